"""The only training loop, and the evaluation that goes with it.

Owns the optimizer, the learning rate's schedule and reproducibility. Knows nothing of recipes, rungs or files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from compress_search.data import Split, ordered_batches
from compress_search.errors import NotFinite, TrialError
from compress_search.method import Batch, Loss
from compress_search.tasks import Task

MAX_GRADIENT_NORM = 1.0


def fit(
    network: nn.Module,
    batches: Iterator[Batch],
    steps: int,
    loss: Loss,
    *,
    learning_rate: float,
    warmup: float,
    weight_decay: float,
    device: torch.device | str,
    seed: int,
    parameters: Iterable[nn.Parameter] | None = None,
    on_step: Callable[[int, int], None] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """Train the network in place with AdamW (Loshchilov and Hutter, 2019) and leave it in evaluation mode.

    The learning rate rises linearly over the part ``warmup`` of the steps, then falls linearly to 0; gradients
    are clipped to norm 1. On the CPU the same seed gives the same weights; the caller's random state stays as
    it was. No step leaves every weight bit for bit as it was.

    Args:
        network: on ``device`` already.
        batches: endless; moved to ``device`` here.
        steps: optimizer steps.
        loss: what to minimise.
        learning_rate: the peak.
        warmup: in [0, 1).
        weight_decay: decoupled, on matrices only: not on biases, norms and other vectors.
        device: where the network is.
        seed: of dropout and whatever else draws from torch's generators.
        parameters: what to optimise; all that require gradients by default. They may lie outside the network.
        on_step: called as ``on_step(step, steps)`` before each step, counted from 0.
        on_progress: called with the number of steps done, after each; what it raises ends the training.

    Raises:
        NotFinite: the loss became infinite or not a number.
        TrialError: there is nothing to train.
    """
    if steps == 0:
        network.eval()
        return
    trained = [p for p in (network.parameters() if parameters is None else parameters) if p.requires_grad]
    if not trained:
        raise TrialError("no parameter requires gradients: there is nothing to train")
    optimizer = AdamW(_groups(trained, weight_decay), lr=learning_rate)
    scheduler = LambdaLR(optimizer, lambda step: schedule(step, steps, warmup))
    device = torch.device(device)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            network.train()
            for step in range(steps):
                if on_step:
                    on_step(step, steps)
                _step(network, to_device(next(batches), device), loss, optimizer, trained, step)
                scheduler.step()
                if on_progress:
                    on_progress(step + 1)
    finally:
        # losses reach parameters that are not optimised here: their gradients are of no more use either
        network.zero_grad(set_to_none=True)
        network.eval()


def _step(
    network: nn.Module, batch: Batch, loss: Loss, optimizer: AdamW, trained: list[nn.Parameter], step: int
) -> None:
    network.zero_grad(set_to_none=True)
    optimizer.zero_grad(set_to_none=True)
    value = loss(network, batch)
    if not math.isfinite(number := value.item()):
        raise NotFinite(f"loss is {number} at step {step}")
    value.backward()
    nn.utils.clip_grad_norm_(trained, MAX_GRADIENT_NORM)
    optimizer.step()


def planned_steps(examples: int, batch_size: int, epochs: float) -> int:
    """Optimizer steps in a number of passes over the examples; at least one."""
    return max(1, round(epochs * -(-examples // batch_size)))


def schedule(step: int, steps: int, warmup: float) -> float:
    """The learning rate of a step (counted from 0) as a part of its peak: linear up, then linear down to 0.

    The first step already learns and the last one still does: 0 lies just before and just after them.
    """
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / (rising + 1)
    return (steps - step) / max(1, steps - rising)


def _groups(parameters: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups: matrices decay, vectors (biases, norms) do not."""
    matrices = [p for p in parameters if p.dim() > 1]
    vectors = [p for p in parameters if p.dim() <= 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def forward(network: nn.Module, batch: Batch) -> Tensor:
    """The network's logits, (B, C) or (B, S, C)."""
    inputs = {name: tensor for name, tensor in batch.items() if name not in ("labels", "index")}
    logits: Tensor = network(**inputs).logits
    return logits


def task_loss(task: Task) -> Loss:
    """The loss that compares a network's logits with a batch's labels."""
    return lambda network, batch: task.loss(forward(network, batch), batch["labels"])


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    """The batch with every tensor on the device."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def evaluate(
    network: nn.Module,
    split: Split,
    task: Task,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
) -> tuple[list[NDArray[Any]], list[NDArray[Any]]]:
    """Logits and labels per example, in the split's order, as :meth:`Task.score` takes them.

    Runs without dropout and without gradients; each module's training mode stays as it was.
    """
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    rows: list[int] = []
    logits: list[NDArray[Any]] = []
    labels: list[NDArray[Any]] = []
    with torch.no_grad():
        for batch in ordered_batches(split, batch_size):
            output = forward(network, to_device(batch, device)).float().cpu().numpy()
            found, truth = task.unpad(output, batch["labels"].numpy())
            rows += batch["index"].tolist()
            logits += found
            labels += truth
    for module, mode in modes:
        module.training = mode
    order = np.argsort(rows)
    return [logits[i] for i in order], [labels[i] for i in order]

"""The only training loop, and the evaluation that goes with it.

Owns the optimizer, the learning rate's schedule and reproducibility. Knows nothing of recipes, rungs or files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from compress_search.crf import crf_of
from compress_search.data import Split, ordered_batches
from compress_search.errors import NotFinite, TrialError
from compress_search.method import Batch, Loss, ParameterGroup
from compress_search.mixed_precision import Precision, computing_in
from compress_search.tasks import Task

MAX_GRADIENT_NORM = 1.0


@dataclass(frozen=True)
class Phase:
    """What a method may ask of one call of ``Context.fit``; the interface says what each means."""

    loss: Loss | None = None
    scored: bool = True
    share: float = 1.0
    parameters: Iterable[nn.Parameter | ParameterGroup] | None = None
    beside: nn.Module | None = None
    batches: Iterator[Batch] | None = None
    learning_rate: float | None = None
    on_step: Callable[[int, int], None] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise TrialError(f"a share of the training budget lies in (0, 1], got {self.share}")

    def steps(self, budget: int, before: float = 0.0) -> int:
        """Optimizer steps that the share of a budget comes to, after another share; at least one.

        Where all phases come to the whole budget, so do their steps, whatever each is rounded to.
        """
        return max(1, round((before + self.share) * budget) - round(before * budget))


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
    precision: Precision = "fp32",
    parameters: Iterable[nn.Parameter | ParameterGroup] | None = None,
    beside: nn.Module | None = None,
    crf_multiplier: float = 1.0,
    on_step: Callable[[int, int], None] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """Train the network in place with AdamW (Loshchilov and Hutter, 2019) and leave it in evaluation mode.

    The learning rate rises linearly over the part ``warmup`` of the steps, then falls linearly to 0; gradients
    are clipped to norm 1. On the CPU the same seed gives the same weights; the caller's random state stays as
    it was. No step has a rate of 0.

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
        precision: of the network's forward passes; weights, gradients and losses are float32.
        parameters: what to optimise, alone or in groups; all that require gradients by default.
        beside: modules that only the loss uses; on ``device`` already, trained like the network.
        crf_multiplier: the learning rate of a CRF of the network, as a multiple of ``learning_rate``.
        on_step: called as ``on_step(step, steps)`` before each step, counted from 0.
        on_progress: called with the number of steps done, after each; what it raises ends the training.

    Raises:
        NotFinite: the loss became infinite or not a number.
        TrialError: there is nothing to train, a parameter is named twice, or the batches come to an end.
    """
    modules = nn.ModuleList([network] if beside is None else [network, beside])
    if steps == 0:
        modules.eval()
        return
    asked = list(modules.parameters() if parameters is None else parameters)
    if crf_multiplier != 1:
        asked = _crf_apart(asked, network, crf_multiplier * learning_rate)
    # one pass over each weight instead of a dozen, which took a fifth of a step on a CPU
    optimizer = AdamW(_optimizer_groups(asked, learning_rate, weight_decay), fused=True)
    scheduler = LambdaLR(optimizer, lambda step: schedule(step, steps, warmup))
    device = torch.device(device)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            modules.train()
            for step in range(steps):
                if on_step:
                    on_step(step, steps)
                # losses reach parameters that are not optimised here: their gradients are of no use
                modules.zero_grad(set_to_none=True)
                optimizer.zero_grad(set_to_none=True)
                with computing_in(precision, network):
                    value = loss(network, to_device(_next(batches, step), device))
                _step(value, optimizer, step)
                scheduler.step()
                if on_progress:
                    on_progress(step + 1)
    finally:
        modules.zero_grad(set_to_none=True)
        modules.eval()


def _next(batches: Iterator[Batch], step: int) -> Batch:
    try:
        return next(batches)
    except StopIteration:
        raise TrialError(f"the batches ended after {step} of the steps: expected endless ones") from None


def _step(value: Tensor, optimizer: AdamW, step: int) -> None:
    if not math.isfinite(number := value.item()):
        raise NotFinite(f"loss is {number} at step {step}")
    value.backward()
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
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


def _crf_apart(
    asked: Sequence[nn.Parameter | ParameterGroup], network: nn.Module, learning_rate: float
) -> list[nn.Parameter | ParameterGroup]:
    """The same parameters, those of the network's CRF that are in no group in one with this learning rate."""
    crf = crf_of(network)
    own = {id(parameter) for parameter in crf.parameters()} if crf else set()
    apart = [item for item in asked if isinstance(item, nn.Parameter) and id(item) in own]
    return [*(item for item in asked if id(item) not in own), ParameterGroup(apart, learning_rate)]


def _optimizer_groups(
    asked: Iterable[nn.Parameter | ParameterGroup], learning_rate: float, weight_decay: float
) -> list[dict[str, Any]]:
    """AdamW's groups, without parameters that require no gradient."""
    items = list(asked)
    loose = ParameterGroup([item for item in items if not isinstance(item, ParameterGroup)])
    groups = [loose, *(item for item in items if isinstance(item, ParameterGroup))]
    made = [part for group in groups for part in _parts(group, learning_rate, weight_decay) if part["params"]]
    trained = [id(parameter) for part in made for parameter in part["params"]]
    if not trained:
        raise TrialError("no parameter requires gradients: there is nothing to train")
    if len(set(trained)) < len(trained):
        raise TrialError("a parameter to train is named twice")
    return made


def _parts(group: ParameterGroup, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
    """One group as AdamW's two: matrices decay, vectors (biases, norms) do not."""
    trained = [parameter for parameter in group.parameters if parameter.requires_grad]
    rate = learning_rate if group.learning_rate is None else group.learning_rate
    decay = weight_decay if group.weight_decay is None else group.weight_decay
    matrices = [parameter for parameter in trained if parameter.dim() > 1]
    vectors = [parameter for parameter in trained if parameter.dim() <= 1]
    return [
        {"params": matrices, "lr": rate, "weight_decay": decay},
        {"params": vectors, "lr": rate, "weight_decay": 0.0},
    ]


def forward(network: nn.Module, batch: Batch) -> Tensor:
    """The network's logits, (B, C) or (B, S, C)."""
    inputs = {name: tensor for name, tensor in batch.items() if name not in ("labels", "index")}
    logits: Tensor = network(**inputs).logits
    return logits


def task_loss(task: Task) -> Loss:
    """The loss that compares a network's logits with a batch's labels: its CRF's, where it has one."""

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        scorer = crf_of(network) or task
        return scorer.loss(forward(network, batch), batch["labels"])

    return loss


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

    Where the network has a CRF, its best paths take the place of the logits. Runs without dropout and without
    gradients; each module's training mode stays as it was.
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
    logits, crf = [logits[i] for i in order], crf_of(network)
    return crf.decode(logits) if crf else logits, [labels[i] for i in order]

"""The loss of a network that learns from the labels and from the teacher's logits at once.

Owns how the two meet on a batch of any task, in one forward pass. The arithmetic is in compress_search.losses;
which methods train under this loss, and when, is theirs to say.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from compress_search import Batch, Context, Loss
from compress_search.losses import SoftLoss, TokenScope, mixed, soft_loss, valid_tokens


def soft_target_loss(
    context: Context,
    task: str,
    *,
    alpha: Callable[[], float] = lambda: 0.5,
    kind: SoftLoss = "kl",
    temperature: float = 2.0,
    scope: TokenScope = "labelled",
) -> Loss:
    """α·soft + (1 − α)·hard, as a loss for ``context.fit``.

    Args:
        context: lends the hard loss and the teacher's logits.
        task: the task's name; regression has the squared difference of outputs for its soft term.
        alpha: the soft term's weight, asked for at every batch.
        kind: the soft term of the other tasks.
        temperature: τ of the soft term; the hard one is always at τ = 1.
        scope: which positions of a token task the soft term counts.

    Source: Hinton et al. 2015, Distilling the Knowledge in a Neural Network, section 2.
    """
    if task == "text-regression":
        kind = "mse_logits"

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        logits, hard = logits_and_task_loss(network, batch, context)
        weight = alpha()
        if weight == 0:
            return hard
        mask = None
        if task == "token-classification":
            mask = valid_tokens(batch["labels"], batch["attention_mask"], scope)
        return mixed(soft_loss(logits, context.teacher_logits(batch), kind, temperature, mask), hard, weight)

    return loss


def logits_and_task_loss(network: nn.Module, batch: Batch, context: Context) -> tuple[Tensor, Tensor]:
    """The network's logits, (B, C) or (B, S, C), and the task's loss on them, from a single forward pass."""
    seen: list[Tensor] = []
    handle = network.register_forward_hook(lambda module, args, output: seen.append(output.logits))
    try:
        hard = context.task_loss(network, batch)
    finally:
        handle.remove()
    return seen[-1], hard

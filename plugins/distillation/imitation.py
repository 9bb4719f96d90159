"""The loss of a network that relearns what it computed before a step changed it, layer by layer and at its output.

Owns how hidden states of the two are compared. What the step was, and how long it is made up for, is the method's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from compress_search import Batch, Context, Loss
from compress_search.encoders import read_features, recording
from compress_search.losses import masked_mean

from .soft_targets import soft_target_loss


def hidden_distance(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], attention_mask: Tensor) -> Tensor:
    """Mean squared difference of hidden states (B, S, H) over tokens that are no padding, widths and states."""
    distances = [masked_mean((ours[name] - theirs[name]) ** 2, attention_mask) for name in theirs]
    return torch.stack(distances).mean()


def imitation_loss(
    context: Context, task: str, original: nn.Module, features: Sequence[str], weight: float = 1.0
) -> Loss:
    """The loss of soft targets plus ``weight`` times :func:`hidden_distance` to the original.

    Args:
        context: lends the task's loss and the teacher's logits.
        task: the task's name.
        original: the network as it was, frozen, in evaluation mode and of the same widths.
        features: which hidden states are compared, as :mod:`compress_search.encoders.features` names them.
        weight: of the distance, beside a term of soft targets and labels in equal parts.
    """
    answer = soft_target_loss(context, task)

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        with recording(network, features) as ours:
            value = answer(network, batch)
        with torch.no_grad():
            theirs = read_features(original, batch, features)
        return value + weight * hidden_distance(ours, theirs, batch["attention_mask"])

    return loss

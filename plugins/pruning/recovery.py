"""Losses under which a network is pruned and recovers.

Owns how a pruned layer's output is compared with that of the layer it was; the soft targets beside it are
soft_targets.py's.

Source: Xia et al. 2022, Structured Pruning Learns Compact and Accurate Models, 3.2 (layerwise distillation).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from compress_search import Batch, Context, Loss
from compress_search.encoders import layers, read_features, recording
from compress_search.losses import masked_mean

from ..distillation.soft_targets import soft_target_loss

TRAINED = ("kd", "finetune", "layer_distill")
RECOVERIES = (*TRAINED, "rescale", "none")
LAYER_WEIGHT = 0.5
"""Of the layers' distance; soft targets and labels have the rest (the paper searches 0.5 to 0.9)."""


def loss_of(recover: str, task: str, context: Context) -> Loss | None:
    """The loss of the label-only or soft-target recovery; None is the task's own."""
    return None if recover in ("finetune", "none", "rescale") else soft_target_loss(context, task)


def layer_distillation(
    context: Context, task: str, dense: nn.Module, kept: Sequence[int], channels: Callable[[], Tensor]
) -> Loss:
    """Soft targets, and the mean squared distance of each layer's output from that of the layer it was.

    Args:
        context: lends the task's loss and the teacher's logits.
        task: the task's name.
        dense: the network before pruning, frozen and in evaluation mode.
        kept: for each layer, which of the dense network's it was.
        channels: the hidden channels that survive so far; only these are compared.
    """
    answer = soft_target_loss(context, task)

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        with recording(network, [f"hidden.{layer + 1}" for layer in range(len(layers(network)))]) as ours:
            value = answer(network, batch)
        with torch.no_grad():
            theirs = read_features(dense, batch, [f"hidden.{layer + 1}" for layer in kept])
        alive, mask, distances = channels(), batch["attention_mask"], []
        for place, layer in enumerate(kept):
            state = ours[f"hidden.{place + 1}"]
            state = state if state.shape[-1] == len(alive) else state[..., alive]
            distances.append(masked_mean((state - theirs[f"hidden.{layer + 1}"][..., alive]) ** 2, mask))
        return (1 - LAYER_WEIGHT) * value + LAYER_WEIGHT * torch.stack(distances).mean()

    return loss

"""Mask tuning: after pruning without training, scale what is left so that each block says what it said before.

Layer by layer, least squares for one scale a head and a neuron that bring the pruned network's sums on the residual
stream back to those of the whole one. Owns the equations and the order; the scales end up in the masks, which fold
into the weights.

Source: Kwon et al. 2022, A Fast Post-Training Pruning Framework for Transformers, 4.3.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress_search import Batch
from compress_search.encoders import layers, parts, set_layers

from .masks import Masks

LARGEST = 10.0
"""A scale beyond this is no correction any more: tuning stops before the block that would get one."""

DAMPING = 1e-3
"""How strongly scales are held at 1, as a part of the mean square of what a unit contributes."""


@dataclass
class Passage:
    """One batch between two layers of a network: hidden states (B, S, H) and the rest of a layer's arguments."""

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Tap(nn.Module):
    """Stands in the place of all layers and keeps what they would be called with."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Passage] = []

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Hidden states, handed on."""
        self.seen.append(Passage(hidden_states, args, kwargs))
        return hidden_states


@torch.no_grad()
def tune(network: nn.Module, masks: Masks, batches: Iterable[Batch], *, pooled: bool) -> None:
    """Turn the masks' ones into scales, in place.

    The attention of the first layer, which only a change of the embeddings could have moved, stays as it is, and
    so do blocks that several layers share.

    Args:
        network: under its masks.
        masks: zeros and ones.
        batches: examples to fit on.
        pooled: whether only the first token's state is used in the end, as for whole texts.
    """
    network.eval()
    batches = list(batches)
    with masks.off():
        whole = _entrances(network, batches)
    pruned = _entrances(network, batches)
    real = [batch["attention_mask"].bool() for batch in batches]
    first = [_first_tokens(mask) for mask in real]
    stack = list(layers(network))
    for index, layer in enumerate(stack):
        with masks.off():
            targets = [_run(layer, passage) for passage in whole]
        for block in range(2):
            row, alone = _row(masks, block, index)
            if not alone or (index, block) == (0, 0) or not masks.units[block][row].any():
                continue
            tokens = first if pooled and (index, block) == (len(stack) - 1, 1) else real
            scales = _scales(layer, block, masks, row, zip(pruned, targets, tokens, strict=True))
            if scales.abs().max() > LARGEST:
                return
            masks.units[block][row] = scales
        _advance(whole, [target.output for target in targets])
        _advance(pruned, [_run(layer, passage).output for passage in pruned])


def _entrances(network: nn.Module, batches: Sequence[Batch]) -> list[Passage]:
    """What the first layer is called with, for each batch."""
    stack, tap = list(layers(network)), _Tap()
    set_layers(network, [tap])
    try:
        for batch in batches:
            network(**{name: tensor for name, tensor in batch.items() if name not in ("labels", "index")})
    finally:
        set_layers(network, stack)
    return tap.seen


def _first_tokens(mask: Tensor) -> Tensor:
    chosen = torch.zeros_like(mask)
    chosen[:, 0] = True
    return chosen


def _advance(passages: Sequence[Passage], states: Sequence[Tensor]) -> None:
    for passage, hidden in zip(passages, states, strict=True):
        passage.hidden = hidden


def _row(masks: Masks, block: int, layer: int) -> tuple[int, bool]:
    """The layer's row of variables, and whether no other layer uses it."""
    rows = (masks.attentions, masks.feed_forwards)[block]
    return rows[layer], rows.count(rows[layer]) == 1


@dataclass(frozen=True)
class Observed:
    """One pass through a layer: its output, and of attention and feed-forward the inputs of the last linear map,
    (B, S, n), and the sums with the residual stream, (B, S, H), before the norm.
    """

    output: Tensor
    inputs: tuple[Tensor, Tensor]
    sums: tuple[Tensor, Tensor]


def _run(layer: nn.Module, passage: Passage) -> Observed:
    view = parts(layer)
    taps = (view.attention_output, view.down, view.attention_norm, view.output_norm)
    seen: dict[int, Tensor] = {}
    with ExitStack() as hooks:
        for number, module in enumerate(taps):
            # the masks' own hooks came first: what passes here is masked already
            handle = module.register_forward_pre_hook(lambda _, args, n=number: seen.__setitem__(n, args[0]))
            hooks.callback(handle.remove)
        output = layer(passage.hidden, *passage.args, **passage.kwargs)
    return Observed(output, (seen[0], seen[1]), (seen[2], seen[3]))


def _scales(
    layer: nn.Module, block: int, masks: Masks, row: int, pairs: Iterable[tuple[Passage, Observed, Tensor]]
) -> Tensor:
    """The block's mask with its ones replaced by the best scales."""
    view = parts(layer)
    linear, width = (view.attention_output, view.head_dim) if block == 0 else (view.down, 1)
    mask, alive = masks.units[block][row].clone(), masks.units.hidden[0] != 0
    kept, weight = mask.nonzero().flatten(), linear.weight[alive].double()
    gram = torch.zeros(len(mask), len(mask), dtype=torch.float64, device=mask.device)
    moment = torch.zeros(len(mask), dtype=torch.float64, device=mask.device)
    for passage, target, tokens in pairs:
        found = _run(layer, passage)
        missing = (target.sums[block] - found.sums[block])[tokens][:, alive]
        each = normal_equations(found.inputs[block][tokens].double(), weight, missing.double(), width)
        gram, moment = gram + each[0], moment + each[1]
    mask[kept] += solve(gram[kept][:, kept], moment[kept]).to(mask)
    return mask


def normal_equations(inputs: Tensor, weight: Tensor, missing: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Gram matrix (u, u) of what the units contribute, and their products (u,) with what is missing.

    Unit j contributes x_j·w_jᵀ, a sum over the ``width`` columns that are its own, so that products of
    contributions are products of (n, n) matrices, and no contribution is ever held.

    Args:
        inputs: x, (tokens, n).
        weight: w, (H, n).
        missing: (tokens, H).
        width: columns of a unit; there are u = n/width units.
    """
    products = (inputs.T @ inputs) * (weight.T @ weight)
    gram = products.unflatten(0, (-1, width)).sum(1).unflatten(1, (-1, width)).sum(2)
    moment = (inputs * (missing @ weight)).sum(0).unflatten(0, (-1, width)).sum(1)
    return gram, moment


def solve(gram: Tensor, moment: Tensor) -> Tensor:
    """The change of the scales, (u,), that least squares find, held near 0 by the damping."""
    damping = DAMPING * gram.diagonal().mean() if len(gram) else 0.0
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    # a unit that contributes nothing keeps its scale
    found: Tensor = torch.linalg.lstsq(gram + (damping + 1e-12) * eye, moment).solution
    return found

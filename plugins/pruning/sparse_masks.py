"""Masks on single weights: patterns, which weights a pattern keeps, and how masks and scores sit on a network.

Owns the selection by score and the parametrization that holds it through all later training. Knows no schedule and
does not say where scores come from.

Sources: Mishra et al. 2021, Accelerating Sparse Deep Neural Networks (N:M); Sanh et al. 2020, Movement Pruning
(straight-through scores); Lagunas et al. 2021, Block Pruning For Faster Transformers (blocks).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compress_search.encoders import layers

BLOCK = 32
LEAST = 0.005
"""Part of each matrix that stays at least: an empty one would cut the network in two."""


@dataclass(frozen=True)
class Pattern:
    """Which weights go together: blocks of ``block`` x ``block``; or ``n`` of every ``m`` inputs stay.

    With ``m`` = 0 any number of blocks may stay; a block of 1 is a single weight.
    """

    name: str
    block: int = 1
    n: int = 0
    m: int = 0

    def fits(self, shape: Sequence[float]) -> bool:
        """Whether a matrix (outputs, inputs) divides into the units of this pattern."""
        outputs, inputs = shape
        across = self.m or self.block
        return across == 1 or (inputs % across == 0 and outputs % self.block == 0)

    @property
    def needs(self) -> str:
        """What a matrix must be like, in words."""
        return f"inputs that {self.m} divides" if self.m else f"sides that {self.block} divides"

    def kept(self, sparsity: float, weights: int) -> int:
        """So many of the weights of a matrix stay: a whole number of units, rounded down, but never none."""
        if self.m:
            return weights // self.m * self.per_group(sparsity)
        units = weights // self.block**2
        return max(self.least(weights), math.floor((1 - sparsity) * units + 1e-6) * self.block**2)

    def least(self, weights: int) -> int:
        """So many of them stay at any sparsity: whole units, :data:`LEAST` of all, rounded up."""
        return math.ceil(LEAST * (weights // self.block**2)) * self.block**2

    def per_group(self, sparsity: float) -> int:
        """So many of every ``m`` weights stay while the network is still on its way to ``n``."""
        return max(self.n, round((1 - sparsity) * self.m))


PATTERNS = {
    pattern.name: pattern
    for pattern in (
        Pattern("unstructured"),
        Pattern("2:4", n=2, m=4),
        Pattern("4:8", n=4, m=8),
        Pattern("block_32x32", block=BLOCK),
    )
}


def keep_top(scores: Tensor, count: int) -> Tensor:
    """A mask of exactly ``count`` highest scores of a tensor of any shape; the first win a tie."""
    flat = scores.flatten()
    if count <= 0 or count >= flat.numel():
        return torch.full_like(scores, count > 0, dtype=torch.bool)
    threshold = flat.kthvalue(flat.numel() - count + 1).values
    mask = flat > threshold
    ties = (flat == threshold).nonzero().flatten()
    mask[ties[: count - int(mask.sum())]] = True
    return mask.view_as(scores)


def keep_per_group(scores: Tensor, n: int, m: int) -> Tensor:
    """A mask of the n highest of every m consecutive scores of a row of (outputs, inputs)."""
    groups = scores.unflatten(1, (-1, m))
    kept = groups.topk(n, dim=-1).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, kept, True).flatten(1)


def unit_scores(scores: Tensor, block: int) -> Tensor:
    """Mean score of each block of (outputs, inputs), (outputs / block, inputs / block)."""
    return scores if block == 1 else scores.unflatten(1, (-1, block)).unflatten(0, (-1, block)).mean((1, 3))


def spread(mask: Tensor, block: int) -> Tensor:
    """The mask of blocks as a mask of weights."""
    return mask if block == 1 else mask.repeat_interleave(block, 0).repeat_interleave(block, 1)


def select(scores: Sequence[Tensor], sparsity: float, pattern: Pattern, *, jointly: bool = False) -> list[Tensor]:
    """Masks that keep the highest scores.

    Args:
        scores: one tensor (outputs, inputs) for each matrix.
        sparsity: the part that goes.
        pattern: what goes together.
        jointly: whether the matrices compete, each keeping :data:`LEAST` at least; else each loses the same part.
    """
    if pattern.m:
        return [keep_per_group(score, pattern.per_group(sparsity), pattern.m) for score in scores]
    units = [unit_scores(score, pattern.block) for score in scores]
    area = pattern.block**2
    if jointly:
        sizes = [score.numel() for score in scores]
        count = max(pattern.kept(sparsity, sum(sizes)), sum(map(pattern.least, sizes)))
        masks = _keep_jointly(units, count // area)
    else:
        masks = [keep_top(unit, pattern.kept(sparsity, unit.numel() * area) // area) for unit in units]
    return [spread(mask, pattern.block) for mask in masks]


def _keep_jointly(units: Sequence[Tensor], count: int) -> list[Tensor]:
    forced = [keep_top(unit, math.ceil(LEAST * unit.numel())) for unit in units]
    ranked = [unit.masked_fill(always, math.inf).flatten() for unit, always in zip(units, forced, strict=True)]
    mask = keep_top(torch.cat(ranked), count)
    parts = mask.split([unit.numel() for unit in units])
    return [part.view_as(unit) for part, unit in zip(parts, units, strict=True)]


class _StraightThrough(torch.autograd.Function):
    """Forward: the masked weight. Backward: scores get g ⊙ W everywhere, as if the mask were the scores itself."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(weight, mask)
        return _masked(weight, mask)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, None]:
        weight, mask = ctx.saved_tensors
        return _masked(gradients[0], mask), gradients[0] * weight, None


def _masked(weight: Tensor, mask: Tensor) -> Tensor:
    # not a product: −1 · 0 is −0.0, whose bits are not those of a zero
    return torch.where(mask, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))


class Mask(nn.Module):
    """Zeroes the weights outside ``mask``; while it has ``scores``, they are trained with the weight."""

    def __init__(self, weight: Tensor, *, scored: bool = False) -> None:
        super().__init__()
        self.mask: Tensor
        self.register_buffer("mask", torch.ones_like(weight, dtype=torch.bool))
        scores = nn.Parameter(torch.zeros_like(weight)) if scored else None
        self.scores: nn.Parameter | None
        self.register_parameter("scores", scores)

    def forward(self, weight: Tensor) -> Tensor:
        """The masked weight."""
        if self.scores is None:
            return _masked(weight, self.mask)
        return cast(Tensor, cast(Any, _StraightThrough).apply(weight, self.scores, self.mask))


@dataclass(frozen=True)
class Matrix:
    """A linear map of the encoder under a mask, and its name in the network."""

    name: str
    linear: nn.Linear
    mask: Mask

    @property
    def weight(self) -> Tensor:
        """The weight beneath the mask, (outputs, inputs)."""
        stack = cast(nn.ModuleDict, self.linear.parametrizations)["weight"]
        return cast(Tensor, stack.original).detach()


def linears(network: nn.Module) -> dict[str, nn.Linear]:
    """The linear maps of the encoder's layers that have weights, each once, by name: what can be sparse."""
    return {
        name: module
        for name, module in layers(network).named_modules()
        if isinstance(module, nn.Linear) and module.weight.numel()
    }


def mask_linears(network: nn.Module, *, scored: bool = False) -> list[Matrix]:
    """Put every linear map of the encoder under a mask of ones, in place."""
    masked = []
    for name, linear in linears(network).items():
        mask = Mask(linear.weight.detach(), scored=scored)
        parametrize.register_parametrization(linear, "weight", mask)
        masked.append(Matrix(name, linear, mask))
    return masked


def density(network: nn.Module) -> float:
    """The part of the weights of the encoder's linear maps that are not zero."""
    weights = [linear.weight.detach() for linear in linears(network).values()]
    return sum(int(weight.count_nonzero()) for weight in weights) / sum(weight.numel() for weight in weights)

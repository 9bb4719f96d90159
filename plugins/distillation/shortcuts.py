"""Layers that give way to one linear map, which the head takes in: nothing is left of them but the head's weights.

Owns the least squares that bring a shorter network's last states to the whole one's, which of a network's layers
stay so that this succeeds best, and how a head takes in a map. Trains nothing, and does not decide how many stay.

Where sums are normalised, as here, no map between two layers folds into what follows, for the sums go on beside it.
After the last layer nothing but the head follows: layers may go anywhere, and the map is at the top.

Sources: Din et al. 2024, Jump to Conclusions: Short-Cutting Transformers With Linear Transformations, 3 (the map);
Shopkhoev et al. 2025, ReplaceMe (a block of layers as one linear map that is merged into the rest).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress_search import Batch
from compress_search.encoders import head, layers, read_features, set_layers

DAMPING = 1e-2
"""How strongly a map is held at 0, as a part of the mean variance of a channel that it is to tell."""
ENOUGH = 16
"""States for each channel of the map: more change it no more."""


@dataclass(frozen=True)
class LinearMap:
    """x ↦ W·x + b, W (H, H) and b (H,) in float64, and the part of the targets' variance that it leaves."""

    weight: Tensor
    bias: Tensor
    unexplained: float


class Moments:
    """Sums over pairs of states, from which least squares follow without any state being kept."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.count = 0
        self.means = torch.zeros(2 * width, dtype=torch.float64, device=device)
        self.products = torch.zeros(2 * width, 2 * width, dtype=torch.float64, device=device)

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """Count in states x and y, (N, H) each."""
        both = torch.cat((inputs, targets), dim=1).double()
        self.count += len(both)
        self.means += both.sum(0)
        self.products += both.T @ both

    def solve(self) -> LinearMap:
        """The map from x to y of least squared error, damped."""
        width = len(self.means) // 2
        mean = self.means / max(self.count, 1)
        spread = self.products - self.count * torch.outer(mean, mean)  # of what is left without the means
        read, crossed, told = spread[:width, :width], spread[:width, width:], spread[width:, width:]
        # held by what is to be told: where lower states hardly change, a map that tells much of them would amplify
        # them a thousandfold, and with them whatever training or rounding does to them
        damping = DAMPING * told.diagonal().mean() + torch.finfo(torch.float64).tiny
        eye = torch.eye(width, dtype=read.dtype, device=read.device)
        weight = torch.linalg.lstsq(read + damping * eye, crossed).solution.T
        rest = told.trace() - 2 * (weight.T * crossed).sum() + (weight @ read * weight).sum()
        whole = told.trace().clamp_min(torch.finfo(torch.float64).tiny)
        return LinearMap(weight, mean[width:] - weight @ mean[:width], float(rest / whole))


def blocks_out(depth: int, count: int) -> list[list[int]]:
    """The ways to leave ``count`` of ``depth`` layers (0-based) by taking out one block of consecutive ones.

    The first ``count`` come first, the last ones last.
    """
    gone = depth - count
    return [[*range(below), *range(below + gone, depth)] for below in range(count, -1, -1)]


@torch.no_grad()
def best_cut(
    network: nn.Module, ways: Sequence[Sequence[int]], batches: Iterable[Batch], *, pooled: bool
) -> tuple[list[int], LinearMap]:
    """Which of these layers are to stay so that a linear map makes up best for the others, and that map.

    Args:
        network: in evaluation mode, with all of its layers, none of them shared; left as it is.
        ways: the layers (0-based) that stay, for each way to choose.
        batches: examples to fit on, of which no more are drawn than are :data:`ENOUGH`.
        pooled: whether only the first token's last state is used, as for whole texts.
    """
    stack = list(layers(network))
    found: list[Moments] = []
    try:
        for batch in batches:
            targets = _last_states(network, batch, pooled=pooled)
            found = found or [Moments(targets.shape[1], targets.device) for _ in ways]
            for way, moments in zip(ways, found, strict=True):
                set_layers(network, [stack[layer] for layer in way])
                moments.add(_last_states(network, batch, pooled=pooled), targets)
            set_layers(network, stack)
            if found[0].count >= ENOUGH * targets.shape[1]:
                break
    finally:
        set_layers(network, stack)
    maps = [moments.solve() for moments in found]
    best = min(range(len(maps)), key=lambda way: maps[way].unexplained)
    return list(ways[best]), maps[best]


@torch.no_grad()
def take_in(network: nn.Module, found: LinearMap) -> None:
    """Have the head read its network's last states through the map, in place: W'x + b' = W(Ax + c) + b."""
    first = next(m for part in head(network) for m in part.modules() if isinstance(m, nn.Linear))
    weight = first.weight.double()
    first.bias.copy_(first.bias.double() + weight @ found.bias)
    first.weight.copy_(weight @ found.weight)


def _last_states(network: nn.Module, batch: Batch, *, pooled: bool) -> Tensor:
    """The states (N, H) that the head reads."""
    name = f"hidden.{len(layers(network))}"
    states = read_features(network, batch, [name])[name]
    return states[:, 0] if pooled else states[batch["attention_mask"].bool()]

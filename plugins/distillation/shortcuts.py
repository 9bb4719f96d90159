"""Layers that give way to one linear map, which the head takes in: nothing is left of them but the head's weights.

Owns the least squares that bring a shorter network's last states to the whole one's, which of a network's layers
stay so that this succeeds best, and how a head takes in a map. Trains nothing, and does not decide how many stay.

Between two layers there is no place for a map: the residual stream would have to go through it as well, and nothing
there can take it in. After the last layer nothing but the head follows.

Sources: Din et al. 2024, Jump to Conclusions: Short-Cutting Transformers With Linear Transformations, 3 (the map);
Shopkhoev et al. 2025, ReplaceMe (a block of layers as one linear map that is merged into the rest).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress_search import Batch
from compress_search.encoders import head_linears, layers, read_features, set_layers
from compress_search.losses import IGNORED

DAMPING = 1e-2
"""How strongly a map is held at 0, as a part of the mean variance of a channel that it is to tell."""
ROUNDING = 1e-12
"""The part of its mean square below which the variance of what is to be told is that of rounding."""


@dataclass(frozen=True)
class LinearMap:
    """x ↦ A·x + c, with A (H, H) and c (H,) in float64.

    ``unexplained`` is the part of the targets' variance that it would leave of other examples: 0 is all told, 1 no
    more than the mean. By generalised cross-validation (Golub, Heath and Wahba 1979), for what is left of the very
    examples that a map was fitted on says little where they are few.
    """

    weight: Tensor
    bias: Tensor
    unexplained: float


class Moments:
    """Sums over pairs of states x and y, from which least squares follow without any state being kept."""

    def __init__(self) -> None:
        self.count = 0
        self.inputs = self.targets = self.squares = torch.zeros(())  # Σx (H,), Σy (H,), Σ‖y‖²
        self.gram = self.crossed = torch.zeros(())  # Σx·xᵀ, Σx·yᵀ (H, H)

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """Count in states x and y, (N, H) each."""
        x, y = inputs.double(), targets.double()
        self.count += len(x)
        self.inputs, self.targets = self.inputs.to(x) + x.sum(0), self.targets.to(y) + y.sum(0)
        self.gram, self.crossed = self.gram.to(x) + x.T @ x, self.crossed.to(x) + x.T @ y
        self.squares = self.squares.to(y) + (y**2).sum()

    def solve(self) -> LinearMap:
        """The map from x to y of least squared error, damped."""
        x, y = self.inputs / self.count, self.targets / self.count
        width = len(x)
        # sums of products of what is left without the means
        gram = self.gram - self.count * torch.outer(x, x)
        crossed = self.crossed - self.count * torch.outer(x, y)
        told = (self.squares - self.count * (y @ y)).clamp_min(ROUNDING * self.squares + torch.finfo(y.dtype).tiny)
        # held by what is to be told: where lower states hardly change, a map that tells much of them would amplify
        # them a thousandfold, and with them whatever training or rounding does to them
        damped = gram + DAMPING * told / width * torch.eye(width, dtype=gram.dtype, device=gram.device)
        weight, smoothing = torch.linalg.solve(damped, torch.cat((crossed, gram), dim=1)).split(width, dim=1)
        left = told - 2 * (weight * crossed).sum() + (weight * (gram @ weight)).sum()
        free = 1 - (1 + float(smoothing.trace())) / self.count  # the part of the examples that is not fitted away
        unexplained = float(left / told) / free**2 if free > 0 else float("inf")
        return LinearMap(weight.T, y - weight.T @ x, unexplained)


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

    The layers below those that a way takes out are run once, for all ways.

    Args:
        network: in evaluation mode, with all of its layers; left with them unless this fails.
        ways: the layers (0-based) that stay, for each way to choose.
        batches: labelled examples to fit on.
        pooled: whether only the first token's last state is used, as for whole texts; else those with a label are.
    """
    stack = list(layers(network))
    names = [f"hidden.{layer}" for layer in range(len(stack) + 1)]
    found = [Moments() for _ in ways]
    for batch in batches:
        states = list(read_features(network, batch, names).values())
        counted = (slice(None), 0) if pooled else batch["labels"] != IGNORED
        for way, moments in zip(ways, found, strict=True):
            set_layers(network, [stack[layer] for layer in way])
            moments.add(_last_states(network, batch, _shared(way), states)[counted], states[-1][counted])
        set_layers(network, stack)
    maps = [moments.solve() for moments in found]
    best = min(range(len(maps)), key=lambda way: maps[way].unexplained)
    return list(ways[best]), maps[best]


@torch.no_grad()
def take_in(network: nn.Module, found: LinearMap) -> None:
    """Have the head read last states through the map, in place: W·(A·x + c) + b = (W·A)·x + (W·c + b)."""
    reads = head_linears(network)[0]
    weight = reads.weight.double()
    reads.bias.copy_(reads.bias.double() + weight @ found.bias)
    reads.weight.copy_(weight @ found.weight)


def _shared(way: Sequence[int]) -> int:
    """How many of the lowest layers stay where they are."""
    return next((place for place, layer in enumerate(way) if place != layer), len(way))


def _last_states(network: nn.Module, batch: Batch, done: int, states: Sequence[Tensor]) -> Tensor:
    """The last states (B, S, H), where those after each of the first ``done`` layers are known."""
    rest = list(layers(network))[done:]
    if not rest:
        return states[done]
    set_layers(network, rest)
    with rest[0].register_forward_pre_hook(lambda layer, args: (states[done], *args[1:])):
        name = f"hidden.{len(rest)}"
        return read_features(network, batch, [name])[name]

"""Masks that are learned while the network trains: movement scores and L0's hard concrete gates.

Owns their parameters, how masks come from them and what they add to the loss. When how much is to go, and the
final choice, are the pruner's.

Sources: Sanh et al. 2020, Movement Pruning: Adaptive Sparsity by Fine-Tuning; Louizos et al. 2018, Learning Sparse
Neural Networks through L0 Regularization; Xia et al. 2022, Structured Pruning Learns Compact and Accurate Models
(groups of gates, Lagrangian).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .masks import Units

RATE = 0.01
"""Peak learning rate of scores, gates and multipliers; where gates have fewer than :data:`STEPS` steps, more."""

STEPS = 3000
BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
BOUND = math.log(1e-2)
"""log α stays within ±BOUND."""

Choose = Callable[[Units], Units]
"""Scores to masks of zeros and ones."""


def straight_through(mask: Tensor, scores: Tensor) -> Tensor:
    """The mask, whose gradient goes to the scores as it is, masked or not (Sanh 2020, 3)."""
    # in this order: what is added is exactly zero
    return mask.detach() + (scores - scores.detach())


class Movement(nn.Module):
    """One score a unit; the best by score are kept in every forward pass, and all scores learn.

    Args:
        units: the masks at the start, for their shapes.
    """

    def __init__(self, units: Units) -> None:
        super().__init__()
        # vectors: matrices would decay
        self._raw = nn.ParameterList(
            [nn.Parameter(torch.zeros(mask.numel(), device=mask.device)) for mask in units]
        )
        self._shapes = [mask.shape for mask in units]

    @property
    def scores(self) -> Units:
        """S, which falls where a unit's growth would raise the loss."""
        return Units(*(raw.view(shape) for raw, shape in zip(self._raw, self._shapes, strict=True)))

    def masks(self, choose: Choose) -> Units:
        """Masks of zeros and ones that hand their gradients to the scores."""
        scores = self.scores
        with torch.no_grad():
            chosen = choose(scores)
        return Units(*(straight_through(mask, score) for mask, score in zip(chosen, scores, strict=True)))


def hard_concrete(log_alpha: Tensor, uniform: Tensor) -> Tensor:
    """z in [0, 1], exactly 0 and exactly 1 with some probability each, from u in (0, 1) (Louizos, eq. 10, 11)."""
    s = torch.sigmoid((uniform.log() - (1 - uniform).log() + log_alpha) / BETA)
    return (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def open_probability(log_alpha: Tensor) -> Tensor:
    """P(z ≠ 0) (Louizos 2018, eq. 12)."""
    return torch.sigmoid(log_alpha - BETA * math.log(-GAMMA / ZETA))


class HardConcrete(nn.Module):
    """Gates on attentions and feed-forwards, on heads, neurons and channels; a head's is the product of its two.

    Args:
        units: the masks at the start, for their shapes.
        learn: for each kind of unit, whether it has gates; the others stay open.
        seed: of the starting values.
    """

    def __init__(self, units: Units, learn: tuple[bool, bool, bool], seed: int) -> None:
        super().__init__()
        self.learn, self.stretch = learn, 1.0
        generator, device = torch.Generator().manual_seed(seed), units.heads.device
        self._shapes = {
            "attention": (len(units.heads), 1),
            "heads": tuple(units.heads.shape),
            "feed_forward": (len(units.neurons), 1),
            "neurons": tuple(units.neurons.shape),
            "hidden": tuple(units.hidden.shape),
        }
        self._start, self._moved = {}, nn.ParameterDict()
        for name, size in self._shapes.items():
            mean = 0.0 if name == "neurons" else 10.0
            start = torch.normal(mean, 1e-2, size, generator=generator).flatten().clamp(BOUND, -BOUND)
            self._start[name] = start.to(device)
            self._moved[name] = nn.Parameter(torch.zeros_like(self._start[name]))  # a vector: matrices would decay

    def _log_alpha(self, name: str) -> Tensor:
        moved: Tensor = self._start[name] + self.stretch * self._moved[name]
        return moved.view(self._shapes[name])

    def _units(self, gate: Callable[[Tensor], Tensor]) -> Units:
        """The function of log α, times that of the block's gate; 1 for kinds that do not learn."""
        found = {name: gate(self._log_alpha(name)) for name in self._shapes}
        both = (found["attention"] * found["heads"], found["feed_forward"] * found["neurons"], found["hidden"])
        kinds = zip(both, self.learn, strict=True)
        return Units(*(value if learns else torch.ones_like(value) for value, learns in kinds))

    @torch.no_grad()
    def hold(self, steps: int) -> None:
        """Bring log α back within its bounds, and set the pace for a training of so many steps."""
        self.stretch = max(1.0, STEPS / steps)
        for name, moved in self._moved.items():
            start = self._start[name]
            moved.clamp_(min=(BOUND - start) / self.stretch, max=(-BOUND - start) / self.stretch)

    def sample(self) -> Units:
        """Random gates, drawn from torch's own generator."""
        return self._units(lambda alpha: hard_concrete(alpha, torch.rand_like(alpha).clamp(1e-6, 1 - 1e-6)))

    def expected(self) -> Units:
        """The probability that each unit is open."""
        return self._units(open_probability)

    @torch.no_grad()
    def settled(self) -> Units:
        """The gates without their noise, σ(0.8·log α/β), in (0, 1)."""
        return self._units(lambda alpha: torch.sigmoid(0.8 * alpha / BETA))


class Lagrangian(nn.Module):
    """λ₁·(ŝ − t) + λ₂·(ŝ − t)² summed over constraints; the multipliers climb while everything else descends."""

    def __init__(self, constraints: int, device: torch.device) -> None:
        super().__init__()
        self.stretch = 1.0
        self._first, self._second = (nn.Parameter(torch.zeros(constraints, device=device)) for _ in range(2))

    def forward(self, expected: Tensor, target: Tensor) -> Tensor:
        """The penalty for expected sparsities (constraints,) that miss their targets (constraints,)."""
        gap = expected - target
        first, second = (self.stretch * climbing(multiplier) for multiplier in (self._first, self._second))
        return (first * gap + second * gap.square()).sum()


def climbing(multiplier: Tensor) -> Tensor:
    """The multiplier, with the sign of its gradient turned."""
    return 2 * multiplier.detach() - multiplier

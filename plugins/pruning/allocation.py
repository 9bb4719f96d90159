"""How many units of each kind go, from which layer and when: counts, budgets and schedules, as pure functions.

Owns the search for the most important units within a budget of multiply-accumulates or milliseconds. Knows nothing
of networks, and of importance only its numbers.

Sources: Kwon et al. 2022, A Fast Post-Training Pruning Framework for Transformers (the search); Zhu and Gupta
2017, To prune, or not to prune (cubic schedule).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

# when


def cubic_sparsity(t: float, start: float, end: float, initial: float = 0.0, final: float = 1.0) -> float:
    """The part removed at time t: fast at first, slower as what is left matters more (Zhu and Gupta 2017, eq. 1).

    s(t) = s_f + (s_i − s_f)·(1 − (t − t₀)/(t₁ − t₀))³ between t₀ = start and t₁ = end, constant outside.
    """
    if t >= end:
        return final
    done = max(0.0, (t - start) / (end - start))
    return final + (initial - final) * (1 - done) ** 3


def iterative_sparsity(t: float, final: float) -> float:
    """The part removed at time t in [0, 1] when every equal span of time takes an equal part of what is left."""
    return final if t >= 1 else 1 - (1 - final) ** max(t, 0.0)


def sparsity(schedule: str, t: float, final: float) -> float:
    """The part removed at time t in [0, 1], from 0 to ``final``."""
    return iterative_sparsity(t, final) if schedule == "iterative" else cubic_sparsity(t, 0, 1, 0, final)


# where from


def spread(keep: int, layers: int, multiple: int = 1) -> list[int]:
    """So many units for each layer, as equal as groups of ``multiple`` allow."""
    base, extra = divmod(keep // multiple, layers)
    return [multiple * (base + (layer < extra)) for layer in range(layers)]


@dataclass(frozen=True)
class Ladder:
    """Ways to keep units of one kind, from the fewest to all, each rung adding the next most important group.

    ``counts`` (rungs, rows) are the units kept of each row, ``importance`` (rungs,) what they matter together.
    """

    counts: Tensor
    importance: Tensor

    @classmethod
    def of(cls, scores: Tensor, multiple: int = 1, least: int = 1, *, even: bool = False) -> Ladder:
        """The ladder of scores (rows, units).

        Args:
            scores: in a row, the groups are the best ``multiple``, the next best, and so on.
            multiple: size of a group.
            least: units that every row keeps at least.
            even: whether every row keeps equally many, each rung adding a group to all.
        """
        groups = _groups(scores, multiple)
        forced = -(-least // multiple)
        rest = groups[:, forced:]
        if even:
            added, gains = torch.ones_like(rest.T, dtype=torch.long), rest.sum(0)
        else:
            flat = rest.flatten()
            order = flat.argsort(descending=True, stable=True)
            added, gains = nn.functional.one_hot(order // max(rest.shape[1], 1), len(rest)), flat[order]
        # one rung more than groups are added: the first one has only those that are forced
        steps = torch.cat([added.new_zeros(1, len(rest)), added]).cumsum(0)
        gained = torch.cat([groups[:, :forced].sum()[None], gains]).cumsum(0)
        return cls(multiple * (forced + steps), gained)


def _groups(scores: Tensor, multiple: int) -> Tensor:
    """What the best ``multiple`` units of each row matter together, then the next best: (rows, U/multiple)."""
    ranked = scores.double().sort(dim=1, descending=True).values
    groups: Tensor = ranked.unflatten(1, (-1, multiple)).sum(-1)
    return groups


def allot(scores: Tensor, keep: int, multiple: int = 1, least: int = 1) -> list[int]:
    """So many units for each row that the groups kept are the most important of all.

    Args:
        scores: (rows, units); see :class:`Ladder`.
        keep: units in total, a multiple of ``multiple``.
        multiple: size of a group.
        least: units that every row keeps at least.
    """
    ladder = Ladder.of(scores, multiple, least)
    rung = (keep - int(ladder.counts[0].sum())) // multiple
    return [int(count) for count in ladder.counts[rung]]


def best_units(scores: Tensor, counts: Sequence[int]) -> Tensor:
    """A mask (rows, units) of ones for the ``counts[r]`` highest scores of each row r; the first wins a tie."""
    rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (rank < torch.tensor(counts, device=scores.device)[:, None]).to(scores)


@dataclass(frozen=True)
class Blocks:
    """All attentions or all feed-forwards: what their units matter, how these go, and what they cost.

    ``scores`` are (rows, units), −inf where a unit is masked already; ``uses`` (rows,) says how many layers use
    each. ``price`` is what a block of so many units costs more than one of none, ``beyond`` (rows,) what is lost
    with a whole block beside its units. Units go in groups of ``multiple``; a block that stays keeps ``least``.
    """

    scores: Tensor
    uses: Tensor
    price: Callable[[int], float]
    beyond: Tensor
    multiple: int = 1
    least: int = 1

    @property
    def alive(self) -> Tensor:
        """Whether each block has units that are not masked, (rows,)."""
        return self.scores.isfinite().any(1)

    def ladder(self, alive: Tensor, *, even: bool) -> Ladder:
        """The ways to keep units of these blocks and none of the others."""
        ladder = Ladder.of(self.scores[alive], self.multiple, self.least, even=even)
        counts = ladder.counts.new_zeros(len(ladder.counts), len(alive))
        counts[:, alive] = ladder.counts
        return Ladder(counts, ladder.importance - self.beyond[self.alive & ~alive].sum())

    @cached_property
    def prices(self) -> Tensor:
        """What a block of each number of groups costs, none first."""
        counts = range(0, self.scores.shape[1] + 1, self.multiple)
        prices = [self.price(count) for count in counts]
        return torch.tensor(prices, dtype=torch.float64, device=self.scores.device)

    def costs(self, counts: Tensor) -> Tensor:
        """What so many units (…, rows) cost in each block, in all its uses."""
        return self.prices[counts // self.multiple] * self.uses

    def worth(self, counts: Tensor) -> Tensor:
        """What each block matters, with the best so many units, for what they cost, (rows,)."""
        ranked = self.scores.double().sort(dim=1, descending=True).values
        best = torch.arange(ranked.shape[1], device=ranked.device) < counts[:, None]
        matters = torch.where(best, ranked, 0.0).sum(1) + self.beyond
        return matters / self.costs(counts).clamp(min=1e-12)


@dataclass(frozen=True)
class Allocation:
    """Units kept of each row of heads and of neurons; an importance of −inf says that they cost too much."""

    counts: tuple[Tensor, Tensor]
    importance: float
    cost: float

    def __gt__(self, other: Allocation) -> bool:
        """Whether more that matters is kept, or as much for less."""
        return (self.importance, -self.cost) > (other.importance, -other.cost)


def within_budget(
    heads: Blocks, neurons: Blocks, cap: float, *, even: bool = False, whole_blocks: bool = False
) -> Allocation | None:
    """Heads and neurons that together matter most among all that cost at most ``cap``; None where all cost more.

    A block costs something before its first unit. Where blocks may go as a whole, the one whose units matter least
    for what they cost goes, as long as what it cost keeps more that matters elsewhere. One of each kind stays.

    Args:
        heads: of all attentions.
        neurons: of all feed-forwards.
        cap: what they may cost beyond empty layers.
        even: whether every row keeps as much as the others.
        whole_blocks: whether rows may lose all their units.
    """
    kinds = heads, neurons
    best = _best_units_of(kinds, (heads.alive, neurons.alive), cap, even)
    while whole_blocks:
        fewer = (_best_units_of(kinds, alive, cap, even) for alive in _one_fewer(kinds, best))
        better = next((found for found in fewer if found > best), None)
        if better is None:
            break
        best = better
    return best if math.isfinite(best.importance) else None


def _one_fewer(kinds: tuple[Blocks, Blocks], found: Allocation) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows that are left when one more goes, the least worth its cost first."""
    alive = [counts > 0 for counts in found.counts]
    worth = [kind.worth(counts) for kind, counts in zip(kinds, found.counts, strict=True)]
    for kind in range(2):
        worth[kind] = worth[kind].masked_fill(~alive[kind] | (alive[kind].sum() < 2), math.inf)
    ranked = torch.cat(worth).sort(stable=True)
    for block in ranked.indices[ranked.values.isfinite()].tolist():
        left = torch.cat(alive)
        left[block] = False
        yield left[: len(alive[0])], left[len(alive[0]) :]


def _best_units_of(
    kinds: tuple[Blocks, Blocks], alive: tuple[Tensor, Tensor], cap: float, even: bool
) -> Allocation:
    """The best allocation to these rows (Kwon 2022, algorithm 1).

    For every number of heads, these are the best ones, with as many of the best neurons as the rest pays for.
    """
    heads, neurons = (kind.ladder(rows, even=even) for kind, rows in zip(kinds, alive, strict=True))
    head_costs, neuron_costs = (
        kind.costs(ladder.counts).sum(1) for kind, ladder in zip(kinds, (heads, neurons), strict=True)
    )
    # the last rung of neurons that each rung of heads leaves room for
    room = torch.searchsorted(neuron_costs, (cap - head_costs) + 1e-9 * abs(cap), right=True) - 1
    best = neurons.importance.cummax(0)  # more neurons never matter less, unless they are masked already
    total = (heads.importance + best.values[room.clamp(min=0)]).masked_fill(room < 0, -math.inf)
    rung = int(total.argmax())
    other = int(best.indices[room[rung].clamp(min=0)])
    cost = float(head_costs[rung] + neuron_costs[other])
    return Allocation((heads.counts[rung], neurons.counts[other]), float(total[rung]), cost)

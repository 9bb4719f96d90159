"""How many units of each kind go, from which layer and when: counts, budgets and schedules, as pure functions.

Owns the rounding that makes recipes of equal shapes equal, and the search for the most important units within a
budget of multiply-accumulates or milliseconds. Knows nothing of networks, and of importance only its numbers.

Sources: Kwon et al. 2022, A Fast Post-Training Pruning Framework for Transformers (the search); Zhu and Gupta
2017, To prune, or not to prune (cubic schedule).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from compress_search import Params, Subject, TrialError

NOMINAL_LENGTH = 64
"""Tokens of the example by which multiply-accumulates are foretold before any data is seen."""

LayerCost = Callable[[int, int], float]
"""(heads, neurons) -> what one layer of that shape costs, attention and feed-forward adding up."""


@dataclass(frozen=True)
class Cut:
    """What is left: so many layers and hidden channels, and so many heads and neurons in total over the layers.

    Neurons are counted in groups of ``multiple``, channels in groups of ``channels``; no layer has fewer than
    ``min_heads`` heads or one group. Under a budget, heads and neurons are a forecast: equal parts of both, so that
    the budget is met.
    """

    layers: int
    heads: int
    neurons: int
    hidden: int
    multiple: int
    channels: int
    min_heads: int

    @classmethod
    def of(cls, subject: Subject, params: Params) -> Cut:
        """The cut these parameters mean for a model with layers of equal shape.

        Ratios are rounded to the nearest whole layer or head; of neurons and channels, the number kept is rounded
        up.

        Raises:
            TrialError: a ratio that would leave nothing.
        """
        layers = subject.layers - _removed(params, "layer_ratio", subject.layers, least=1)
        multiple = math.gcd(int(params["ffn_multiple"]), int(subject.intermediate))
        channels = math.gcd(int(params["ffn_multiple"]), subject.hidden)
        hidden = _kept_in_groups(params, "hidden_ratio", subject.hidden, channels, least=1)
        least = min(int(params["min_heads"]), int(subject.heads))
        if params["budget"] != "ratios":
            cut = cls(layers, 0, 0, hidden, multiple, channels, least)
            return cut._foretold(subject, float(params["target"]))
        # in layers of equal allotment every one rounds alike, so one stands for all
        equal, pool = (layers, 1) if params["scope"] == "per_layer" else (1, layers)
        heads, neurons = pool * int(subject.heads), pool * int(subject.intermediate)
        kept_heads = heads - _removed(params, "head_ratio", heads, least=max(1, pool * least))
        kept_neurons = _kept_in_groups(params, "ffn_ratio", neurons, multiple, least=pool)
        return cls(layers, equal * kept_heads, equal * kept_neurons, hidden, multiple, channels, least)

    def _foretold(self, subject: Subject, target: float) -> Cut:
        cost = macs_per_layer(subject.having(hidden=self.hidden), NOMINAL_LENGTH)
        whole = subject.macs(NOMINAL_LENGTH)
        heads, neurons = int(subject.heads), int(subject.intermediate)
        shape = uniform_shape(cost, target * whole / self.layers, heads, neurons, self)
        return replace(self, heads=self.layers * shape[0], neurons=self.layers * shape[1])


def _ratio(params: Params, name: str) -> float:
    ratio = float(params[name])
    if not 0 <= ratio < 1:
        raise TrialError(f"{name} is {ratio:g}, the part to remove: expected a number from 0 to below 1")
    return ratio


def _removed(params: Params, name: str, units: int, least: int) -> int:
    return min(round(_ratio(params, name) * units), units - least)


def _kept_in_groups(params: Params, name: str, units: int, multiple: int, least: int) -> int:
    """So many of the units, in groups, and at least so many groups."""
    return multiple * max(least, math.ceil((1 - _ratio(params, name)) * (units // multiple) - 1e-6))


def macs_per_layer(subject: Subject, length: int) -> LayerCost:
    """Multiply-accumulates of one layer for one example: S·(4kdH + 2fH) + 2S²kd for k heads and f neurons."""

    def cost(heads: int, neurons: int) -> float:
        width = heads * subject.head_dim
        linear = length * (4 * width * subject.hidden + 2 * neurons * subject.hidden)
        return float(linear + 2 * length**2 * width)

    return cost


def uniform_shape(cost: LayerCost, cap: float, heads: int, neurons: int, cut: Cut) -> tuple[int, int]:
    """Heads and neurons of one layer whose cost is at most ``cap``: about the same part of both; else the least."""
    groups = neurons // cut.multiple
    for kept in range(groups, 0, -1):
        shape = max(cut.min_heads, round(heads * kept / groups)), kept * cut.multiple
        if cost(*shape) <= cap * (1 + 1e-9):
            return shape
    return cut.min_heads, cut.multiple


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


def shrink(mask: Tensor, scores: Tensor, keep: int, multiple: int, least: int, *, even: bool) -> Tensor:
    """The mask (rows, units) with ``keep`` units left in total; what is masked stays masked."""
    scores = scores.masked_fill(mask == 0, -math.inf)
    counts = spread(keep, len(mask), multiple) if even else allot(scores, keep, multiple, least)
    return best_units(scores, counts)


def within_budget(
    heads: Ladder, neurons: Ladder, uses: tuple[Tensor, Tensor], cost: LayerCost, cap: float
) -> tuple[list[int], list[int]] | None:
    """Heads and neurons of each row that together matter most among all that cost at most ``cap``.

    For every number of heads, the best ones, as many of the best neurons as the rest of the budget allows (Kwon
    2022, algorithm 1). None when even the fewest cost too much.

    Args:
        heads: the ways to keep heads.
        neurons: the ways to keep neurons.
        uses: for each row of heads and of neurons, how many layers use it.
        cost: what a layer costs; attention and feed-forward must add up.
        cap: what all layers may cost.
    """
    most, all_neurons = int(heads.counts[-1].max()), int(neurons.counts[-1].max())
    both = cost(most, all_neurons)
    head_costs = _costs(heads, uses[0], lambda count: cost(count, all_neurons))
    neuron_costs = _costs(neurons, uses[1], lambda count: cost(most, count) - both)
    # the last rung of neurons that each rung of heads leaves room for
    room = torch.searchsorted(neuron_costs, (cap - head_costs) + 1e-9 * cap, right=True) - 1
    if (room < 0).all():
        return None
    best = neurons.importance.cummax(0)  # more neurons never matter less, unless they are masked already
    total = (heads.importance + best.values[room.clamp(min=0)]).masked_fill(room < 0, -math.inf)
    rung = int(total.argmax())
    return heads.counts[rung].tolist(), neurons.counts[best.indices[room[rung]]].tolist()


def _costs(ladder: Ladder, uses: Tensor, cost: Callable[[int], float]) -> Tensor:
    """What each rung costs over all layers, (rungs,)."""
    values, where = ladder.counts.unique(return_inverse=True)
    table = torch.tensor([cost(int(value)) for value in values], dtype=torch.float64, device=values.device)
    return (table[where] * uses).sum(1)

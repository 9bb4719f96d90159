"""What pruning leaves of a model's shape, counted before any weight is seen.

Owns the rounding that makes recipes of equal shapes equal, what a shape costs in multiply-accumulates, and the
forecast of what a budget leaves. Knows nothing of networks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from compress_search import Params, Subject, TrialError

NOMINAL_LENGTH = 64
"""Tokens of the example by which multiply-accumulates are foretold before any data is seen."""

LayerCost = Callable[[int, int], float]
"""(heads, neurons) -> what one layer of that shape costs, attention and feed-forward adding up."""

Shape = tuple[int, int]
"""Heads and neurons of one layer."""


@dataclass(frozen=True)
class Cut:
    """What is left: so many layers and hidden channels, and so many heads and neurons in total over the layers.

    Neurons are counted in groups of ``multiple``, channels in groups of ``channels``; no layer has fewer than
    ``min_heads`` heads or one group, unless ``whole_blocks`` may go, of which one of each kind stays. Under a
    budget, heads and neurons are a forecast: equal parts of both, so that the budget is met.
    """

    layers: int
    heads: int
    neurons: int
    hidden: int
    multiple: int
    channels: int
    min_heads: int
    whole_blocks: bool = False

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
        blocks = bool(params.get("whole_blocks", False))
        least = min(max(int(params["min_heads"]), int(blocks)), int(subject.heads))
        if params["budget"] != "ratios":
            cut = cls(layers, 0, 0, hidden, multiple, channels, least, blocks)
            return cut._foretold(subject, float(params["target"]))
        # in layers of equal allotment every one rounds alike, so one stands for all
        equal, pool = (layers, 1) if params["scope"] == "per_layer" else (1, layers)
        heads, neurons = pool * int(subject.heads), pool * int(subject.intermediate)
        kept_heads = heads - _removed(params, "head_ratio", heads, least=max(1, pool * least))
        kept_neurons = _kept_in_groups(params, "ffn_ratio", neurons, multiple, least=pool)
        return cls(layers, equal * kept_heads, equal * kept_neurons, hidden, multiple, channels, least)

    def _foretold(self, subject: Subject, target: float) -> Cut:
        cost = macs_per_layer(subject.having(hidden=self.hidden), NOMINAL_LENGTH)
        cap, size = target * subject.macs(NOMINAL_LENGTH), (int(subject.heads), int(subject.intermediate))
        shapes = forecast(cost, cap, size, self) or [(self.min_heads, self.multiple)] * self.layers
        return replace(self, heads=sum(heads for heads, _ in shapes), neurons=sum(count for _, count in shapes))

    def least(self, cost: LayerCost) -> float:
        """What the smallest network within these bounds costs."""
        block = cost(self.min_heads, self.multiple)
        return block + (self.layers - 1) * (cost(0, 0) if self.whole_blocks else block)


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


def least_part(subject: Subject, params: Params) -> float:
    """What the smallest network has of the subject's multiply-accumulates, whatever the length of the examples."""
    cut = Cut.of(subject, params)
    left = subject.having(hidden=cut.hidden)
    # the ratio is monotone in the length
    lengths = 1, subject.positions
    return max(cut.least(macs_per_layer(left, length)) / subject.macs(length) for length in lengths)


def forecast(cost: LayerCost, cap: float, size: Shape, cut: Cut) -> list[Shape] | None:
    """A shape for each layer, together within ``cap``: about the same part of both kinds of units in all of them.

    Where that leaves too little for all layers, the first ones have the least shape and the others no blocks at
    all, if whole blocks may go. None when nothing is small enough.

    Args:
        cost: what a layer costs.
        cap: what all layers may cost.
        size: of a layer before.
        cut: how many layers there are, and what is the least of each.
    """
    heads, groups = size[0], size[1] // cut.multiple
    for kept in range(groups, 0, -1):
        shape = max(cut.min_heads, round(heads * kept / groups)), kept * cut.multiple
        if cut.layers * cost(*shape) <= cap * (1 + 1e-9):
            return [shape] * cut.layers
    if cut.least(cost) > cap * (1 + 1e-9):
        return None
    least = cut.min_heads, cut.multiple
    room = (cap - cut.layers * cost(0, 0)) / max(cost(*least) - cost(0, 0), 1e-12)
    full = min(cut.layers, max(1, math.floor(room + 1e-9)))
    return [least] * full + [(0, 0)] * (cut.layers - full)

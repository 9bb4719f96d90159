"""Structured pruning: remove whole layers, attention heads and feed-forward neurons, so that what is left is dense.

Every ``*_ratio`` is the part that is *removed*. Owns how many units go, from which layers and when; how much a
unit matters is importance.py's, the surgery that removes it the engine's. Either at once on the trained network
(``one_shot``, no training), or behind masks while the network trains (``cubic``), then recovery training.

Sources: Michel et al. 2019 (heads); Zhu and Gupta 2017, To prune, or not to prune (cubic schedule); Sajjad et
al. 2023, On the Effect of Dropping Layers of Pre-trained Transformer Models (layer strategies).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress_search import Candidate, Context, Dim, Method, Params, Stage, Subject, TrialError
from compress_search.encoders import keep_layers, prune_heads, prune_neurons

from . import importance
from .importance import CRITERIA, NEED_GRADIENTS, Masks, Units
from .soft_targets import soft_target_loss

STRATEGIES = ("top", "bottom", "alternate", "symmetric")
FFN_MULTIPLES = (1, 8, 16, 32, 64)


@dataclass(frozen=True)
class Cut:
    """What is left: so many layers, and so many heads and neurons in total over them.

    Neurons are counted in groups of ``multiple``; no layer has fewer than ``min_heads`` heads or one group.
    """

    layers: int
    heads: int
    neurons: int
    multiple: int
    min_heads: int

    @classmethod
    def of(cls, subject: Subject, params: Params) -> Cut:
        """The cut these parameters mean for a model with layers of equal shape.

        Ratios are rounded to the nearest whole layer or head; of neurons, the number kept is rounded up.

        Raises:
            TrialError: a ratio that would leave nothing.
        """
        layers = subject.layers - _removed(params, "layer_ratio", subject.layers, least=1)
        heads, neurons = int(subject.heads), int(subject.intermediate)
        multiple = math.gcd(int(params["ffn_multiple"]), neurons)
        least = min(int(params["min_heads"]), heads)
        # in layers of equal allotment every one rounds alike, so one stands for all
        equal, pool = (1, layers) if params["scope"] == "global" else (layers, 1)
        kept_heads = pool * heads - _removed(params, "head_ratio", pool * heads, least=pool * least)
        groups = pool * neurons // multiple
        kept_groups = max(pool, math.ceil((1 - _ratio(params, "ffn_ratio")) * groups - 1e-6))
        return cls(layers, equal * kept_heads, equal * kept_groups * multiple, multiple, least)


def _ratio(params: Params, name: str) -> float:
    ratio = float(params[name])
    if not 0 <= ratio < 1:
        raise TrialError(f"{name} is {ratio:g}, the part to remove: expected a number from 0 to below 1")
    return ratio


def _removed(params: Params, name: str, units: int, least: int) -> int:
    return min(round(_ratio(params, name) * units), units - least)


def kept_layers(depth: int, drop: int, strategy: str) -> list[int]:
    """Which layers (0-based) stay when ``drop`` of ``depth`` go.

    ``top`` and ``bottom``: the last or first ones go; ``alternate``: every second one, down from the last but
    one, then the highest of the rest; ``symmetric``: the middle ones.
    """
    if strategy == "bottom":
        return list(range(drop, depth))
    if strategy == "symmetric":
        start = (depth - drop + 1) // 2
        return [layer for layer in range(depth) if not start <= layer < start + drop]
    if strategy == "alternate":
        order = [*range(depth - 2, -1, -2), *range(depth - 1, -1, -2)]
        return sorted(order[drop:])
    return list(range(depth - drop))


def cubic_sparsity(t: float, start: float, end: float, initial: float = 0.0, final: float = 1.0) -> float:
    """The part removed at time t: fast at first, slower as what is left matters more (Zhu and Gupta 2017, eq. 1).

    s(t) = s_f + (s_i − s_f)·(1 − (t − t₀)/(t₁ − t₀))³ between t₀ = start and t₁ = end, constant outside.
    """
    if t >= end:
        return final
    done = max(0.0, (t - start) / (end - start))
    return final + (initial - final) * (1 - done) ** 3


def spread(keep: int, layers: int, multiple: int = 1) -> list[int]:
    """So many units for each layer, as equal as groups of ``multiple`` allow."""
    base, extra = divmod(keep // multiple, layers)
    return [multiple * (base + (layer < extra)) for layer in range(layers)]


def allot(scores: Tensor, keep: int, multiple: int = 1, least: int = 1) -> list[int]:
    """So many units for each layer that the groups kept are the most important of all.

    Args:
        scores: (L, U); in a layer, the U/multiple groups are the best ``multiple``, the next best, and so on.
        keep: units in total, a multiple of ``multiple``.
        multiple: size of a group.
        least: units that every layer keeps at least.
    """
    ranked = scores.sort(dim=1, descending=True).values
    groups = ranked.unflatten(1, (-1, multiple)).sum(-1)  # (L, U/multiple), falling in every row
    forced = -(-least // multiple)
    rest = groups[:, forced:]
    best = rest.flatten().argsort(descending=True, stable=True)[: keep // multiple - forced * len(rest)]
    counts = torch.bincount(best // max(rest.shape[1], 1), minlength=len(rest)) + forced
    return [multiple * int(count) for count in counts]


def best_units(scores: Tensor, counts: list[int]) -> Tensor:
    """A mask (L, U) of ones for the ``counts[l]`` highest scores of each layer l; the first wins a tie."""
    rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (rank < torch.tensor(counts, device=scores.device)[:, None]).to(scores)


def shrink(mask: Tensor, scores: Tensor, keep: int, multiple: int, least: int, *, even: bool) -> Tensor:
    """The mask (L, U) with ``keep`` units left in total; what is masked stays masked."""
    scores = scores.masked_fill(mask == 0, -math.inf)
    counts = spread(keep, len(mask), multiple) if even else allot(scores, keep, multiple, least)
    return best_units(scores, counts)


def remove_masked(network: nn.Module, masks: Masks) -> None:
    """Take the masks off and cut out what they switched off, in place: the outputs stay the same."""
    masks.remove()
    heads, neurons = (
        {layer: row.nonzero().flatten().tolist() for layer, row in enumerate(mask)} for mask in masks.units
    )
    prune_heads(network, heads)
    prune_neurons(network, neurons)


@dataclass
class Pruner:
    """A network on its way to a cut, under masks."""

    network: nn.Module
    cut: Cut
    params: Params
    context: Context

    def __post_init__(self) -> None:
        self.masks = Masks(self.network)

    def prune(self, fraction: float) -> None:
        """Mask the least important units until this fraction of all that is to go has gone.

        In a dry run, where importance means nothing, every layer gives the same.
        """
        cut = self.cut
        if cut.neurons == self.masks.units.neurons.numel() and cut.heads == self.masks.units.heads.numel():
            return
        scores = self._scores()
        even = self.context.dry or self.params["scope"] == "per_layer"
        goals = ((cut.heads, 1, cut.min_heads), (cut.neurons, cut.multiple, cut.multiple))
        shrunk = []
        for mask, score, (final, multiple, least) in zip(self.masks.units, scores, goals, strict=True):
            gone = multiple * math.floor(fraction * (mask.numel() - final) / multiple)
            shrunk.append(shrink(mask, score, mask.numel() - gone, multiple, least, even=even))
        self.masks.units = Units(*shrunk)

    def _scores(self) -> Units:
        criterion = str(self.params["criterion"])
        if criterion == "random":
            return importance.random(self.masks, self.context.seed)
        if criterion == "magnitude" or self.context.dry:
            return importance.magnitude(self.network)
        batches = self.context.calibration(int(self.params["calib_examples"]))
        return importance.from_gradients(self.network, self.masks, batches, self.context.task_loss, criterion)


class StructuredPruning(Method):
    """Smaller dense shapes, the kind of sparsity that speeds up every runtime."""

    stage = Stage.STRUCTURE

    def search_space(self, teacher: Subject) -> Mapping[str, Dim]:
        """Ratios are parts removed; groups of neurons divide the teacher's number of them.

        ``num_prune_steps`` measures importance that often, each time on ``calib_examples``; ``s_warmup`` and
        ``s_cooldown`` are the parts of the training before the first and after the last of these.
        """
        multiples = [m for m in FFN_MULTIPLES if teacher.intermediate % m == 0]
        heads = min(0.75, 1 - 1 / teacher.heads)
        gradual = {"schedule": ("cubic",)}
        return {
            "head_ratio": Dim.real(0.0, heads, min(0.25, heads)),
            "ffn_ratio": Dim.real(0.0, 0.9, 0.5),
            "layer_ratio": Dim.real(0.0, min(0.75, 1 - 1 / teacher.layers), 0.0),
            "schedule": Dim.choice(("cubic", "one_shot"), "cubic"),
            "scope": Dim.choice(("global", "per_layer"), "global", expert=True),
            "criterion": Dim.choice(CRITERIA, "taylor", expert=True),
            "calib_examples": Dim.choice(
                (256, 512, 1024, 2048), 512, when={"criterion": NEED_GRADIENTS}, expert=True
            ),
            "ffn_multiple": Dim.choice(multiples, max(m for m in multiples if m <= 32), expert=True),
            "min_heads": Dim.integer(1, int(teacher.heads), 1, expert=True),
            "layer_strategy": Dim.choice(STRATEGIES, "top", expert=True),
            "num_prune_steps": Dim.integer(1, 20, 8, when=gradual, expert=True),
            "s_warmup": Dim.real(0.0, 0.3, 0.1, when=gradual, expert=True),
            "s_cooldown": Dim.real(0.1, 0.6, 0.4, when=gradual, expert=True),
            "kd": Dim.flag(False, when=gradual, expert=True),
            "learning_rate": Dim.real(1e-6, 1e-2, 5e-5, log=True, when=gradual, expert=True),
        }

    def unsupported(self, subject: Subject) -> str | None:
        """Units are counted in layers of equal shape, each with weights of its own."""
        if "shared" in subject.traits:
            return "its layers share weights, and would have to lose the same units"
        return "its layers differ in shape" if "non-uniform" in subject.traits else None

    def effective(self, subject: Subject, params: Params) -> Params:
        """The exact parts that go, after rounding to whole layers, heads and groups of neurons."""
        cut = Cut.of(subject, params)
        heads, neurons = cut.layers * int(subject.heads), cut.layers * int(subject.intermediate)
        return {
            **params,
            "layer_ratio": (subject.layers - cut.layers) / subject.layers,
            "head_ratio": (heads - cut.heads) / heads,
            "ffn_ratio": (neurons - cut.neurons) / neurons,
            "ffn_multiple": cut.multiple,
            "min_heads": cut.min_heads,
            "layer_strategy": params["layer_strategy"] if cut.layers < subject.layers else "top",
        }

    def after(self, subject: Subject, params: Params) -> Subject:
        """Mean heads and neurons of the layers left; with a global scope, layers can differ."""
        cut = Cut.of(subject, params)
        left = subject.having(
            layers=cut.layers, heads=cut.heads / cut.layers, intermediate=cut.neurons / cut.layers
        )
        if left == subject:
            return subject
        uneven = params["scope"] == "global" and cut.layers > 1 and _cuts_units(params)
        return left.having("lossy", *(["non-uniform"] if uneven else []))

    def trains(self, params: Params) -> bool:
        """Only while it prunes gradually."""
        return params["schedule"] == "cubic" and (_cuts_units(params) or float(params["layer_ratio"]) > 0)

    def apply(self, candidate: Candidate, params: Params, context: Context) -> Candidate:
        """Layers go first and at once; then heads and neurons, as the schedule says."""
        candidate, params = candidate.copy(), self.effective(candidate.subject, params)
        subject, network = candidate.subject, candidate.network.to(context.device)
        cut = Cut.of(subject, params)
        drop = subject.layers - cut.layers
        keep_layers(network, kept_layers(subject.layers, drop, str(params["layer_strategy"])))
        pruner = Pruner(network, cut, params, context)
        cooldown = float(params["s_cooldown"]) if self.trains(params) else 0.0
        if cooldown:
            # a network that has not lost everything yet scores better than it will
            _train(network, subject.task, params, context, share=1 - cooldown, scored=False, pruner=pruner)
        pruner.prune(1.0)
        remove_masked(network, pruner.masks)
        if cooldown:
            _train(network, subject.task, params, context, share=cooldown)
        return candidate.replace(network=network, subject=self.after(subject, params))


def _train(
    network: nn.Module,
    task: str,
    params: Params,
    context: Context,
    *,
    share: float,
    scored: bool = True,
    pruner: Pruner | None = None,
) -> None:
    context.fit(
        network,
        loss=soft_target_loss(context, task) if params["kd"] else None,
        scored=scored,
        share=share,
        learning_rate=float(params["learning_rate"]),
        on_step=None if pruner is None else _pruning_steps(pruner, params),
    )


def _pruning_steps(pruner: Pruner, params: Params) -> Callable[[int, int], None]:
    """Prune ``num_prune_steps`` times at equal distances after the warm-up, the last time when training is over."""
    times, done = int(params["num_prune_steps"]), 0
    start = float(params["s_warmup"]) / (1 - float(params["s_cooldown"]))  # of this phase; both are of the whole

    def on_step(step: int, steps: int) -> None:
        nonlocal done
        due = math.floor(times * (step / steps - start) / (1 - start))
        if due > done:
            done = due
            pruner.prune(cubic_sparsity(due / times, 0, 1))

    return on_step


def _cuts_units(params: Params) -> bool:
    return float(params["head_ratio"]) > 0 or float(params["ffn_ratio"]) > 0

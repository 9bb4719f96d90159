"""Structured pruning: layers, heads, feed-forward neurons and hidden channels go, and what is left is dense.

Every ``*_ratio`` is the part that is *removed*, a ``target`` the part of a cost that is *left*. Owns the method's
parameters, what they come to and the order of its phases: layers go first, then the rest at once or while the
network trains (pruning/pruner.py, pruning/gradual.py), then comes what makes up for it.

Sources: Michel et al. 2019 (heads); Kwon et al. 2022, A Fast Post-Training Pruning Framework for Transformers
(budgets, rescaling); Xia et al. 2022, Structured Pruning Learns Compact and Accurate Models (gates, hidden width).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from torch import nn

from compress_search import Candidate, Context, Dim, Loss, Method, Params, Stage, Subject
from compress_search.encoders import keep_layers, layer_drop

from .pruning.cuts import Cut, least_part
from .pruning.gradual import train_while_pruning
from .pruning.importance import NEED_GRADIENTS
from .pruning.layer_dropping import STRATEGIES, kept_layers, most_changing_layers
from .pruning.pruner import CRITERIA, LEARNED, Pruner
from .pruning.recovery import RECOVERIES, TRAINED, layer_distillation, loss_of

FFN_MULTIPLES = (1, 8, 16, 32, 64)
SCHEDULES = ("cubic", "one_shot", "iterative")
SCOPES = ("global", "per_layer", "global_layer_normalised")
BUDGETS = ("ratios", "macs", "latency")
RATIOS = ("head_ratio", "ffn_ratio")
REFUSED = {
    "recurrent": "it has no transformer layers",
    "non-uniform": "its layers differ in shape",
    "low-rank": "its matrices are products of two",
    "sparse": "the zeros of its matrices must stay",
}
GRADUAL = ("cubic", "iterative")
SMALLEST: dict[str, Any] = {
    "budget": "macs",
    "target": 1.0,
    "whole_blocks": True,
    "min_heads": 1,
    "layer_ratio": 0.0,
    "hidden_ratio": 0.0,
}
"""What leaves a budget the most ways, but for layers and channels, which go by ratios of their own."""
DEFAULT_PACE = {"num_prune_steps": 8, "s_warmup": 0.1, "s_cooldown": 0.4}


class StructuredPruning(Method):
    """Smaller dense shapes, the kind of sparsity that speeds up every runtime."""

    stage = Stage.STRUCTURE

    def search_space(self, teacher: Subject) -> Mapping[str, Dim]:
        """How much goes, and when; groups of neurons divide the teacher's number of them.

        ``budget`` says how much: by ratios, or as the one ``target`` of multiply-accumulates or of the teacher's
        latency that heads and neurons share; with ``whole_blocks``, attentions and feed-forwards can then go
        altogether, and one that stays keeps ``min_heads``. ``recover`` is what makes up for the loss: training
        (``kd`` and ``layer_distill`` from soft targets, ``finetune`` from labels), least squares (``rescale``) or
        nothing.
        Units go gradually only where there is training. ``num_prune_steps`` measures importance that often, each
        time on ``calib_examples``; ``s_warmup`` and ``s_cooldown`` are the parts of the training before the first
        and after the last of these. ``layerdrop_train`` trains with layers skipped at this rate before any goes.
        """
        return {**_amounts(teacher), **_means()}

    def unsupported(self, subject: Subject) -> str | None:
        """Units are counted in layers of equal shape, and are rows and columns of whole dense matrices."""
        return next((reason for trait, reason in REFUSED.items() if trait in subject.traits), None)

    def effective(self, subject: Subject, params: Params) -> Params:
        """The exact parts that go, after rounding to whole layers, heads and groups of neurons.

        What has no influence any more is left out or at its default. Layers that share weights lose the same units
        each, and stay; learned criteria learn in a training, so they have one.
        """
        chosen = dict(params)
        if "shared" in subject.traits:
            chosen |= {"scope": "per_layer", "layer_ratio": 0.0}
        if "whole_blocks" in chosen:  # layers that lose the same lose no block alone
            chosen["whole_blocks"] = chosen["whole_blocks"] and chosen["scope"] != "per_layer"
        if subject.word_rank:
            chosen["hidden_ratio"] = 0.0
        return _without_idle(chosen | _rounded(subject, chosen))

    def changes_nothing(self, subject: Subject, params: Params) -> bool:
        """Where nothing goes."""
        return not _prunes(params)

    def faults(self, subject: Subject, params: Params) -> Mapping[str, str]:
        """A part of the multiply-accumulates that nothing is small enough for; milliseconds a measurement tells."""
        if params["budget"] != "macs" or float(params["target"]) >= least_part(subject, params):
            return {}
        least = _hundredths(least_part(subject, params))
        return {
            "target": f"{params['target']:g} of the multiply-accumulates, and what these layers can be cut to has "
            f"{least:g}: expected at least that"
        }

    def after(self, subject: Subject, params: Params) -> Subject:
        """Mean heads and neurons of the layers left; with a global scope or a budget, layers can differ.

        Under a budget these means are a forecast: what is pruned of which kind depends on the weights.
        """
        cut = Cut.of(subject, params)
        if not _prunes(params):
            return subject
        same_table = subject.embedding_size == subject.hidden
        left = subject.having(
            layers=cut.layers,
            heads=cut.heads / cut.layers,
            intermediate=cut.neurons / cut.layers,
            hidden=cut.hidden,
            embedding_size=cut.hidden if same_table else subject.embedding_size,
        )
        budget = params["budget"] != "ratios"
        if not (budget or (params["scope"] != "per_layer" and cut.layers > 1 and _prunes(params, *RATIOS))):
            return left.having("lossy")
        multiple = cut.multiple if budget or _prunes(params, "ffn_ratio") else int(subject.intermediate)
        return left.having("lossy", "non-uniform", f"neurons:{multiple}")

    def trains(self, params: Params) -> bool:
        """Where training recovers, and where it makes layers ready to go."""
        return _prunes(params) and (params["recover"] in TRAINED or float(params.get("layerdrop_train", 0)) > 0)

    def apply(self, candidate: Candidate, params: Params, context: Context) -> Candidate:
        """Layers go first and at once; then heads, neurons and channels, as the schedule says."""
        original, candidate, params = candidate.network, candidate.copy(), self.effective(candidate.subject, params)
        if not _prunes(params):
            return candidate
        network, shares = candidate.network.to(context.device), Shares.of(params)
        kept = _drop_layers(network, candidate.subject, params, context, shares.layer_drop)
        pruner = Pruner(network, candidate.subject, Cut.of(candidate.subject, params), params, context)
        loss = _loss(original, kept, pruner)
        if shares.pruning and not context.dry:
            train_while_pruning(pruner, loss, shares.pruning)
        else:
            pruner.prune_at_once()
        if params["recover"] == "rescale":
            pruner.rescale()
        pruner.cut_out()
        if shares.recovery:
            context.fit(network, loss=loss, share=shares.recovery, learning_rate=float(params["learning_rate"]))
        return candidate.replace(network=network, subject=self.after(candidate.subject, params))


def _amounts(teacher: Subject) -> dict[str, Dim]:
    """The dimensions that say how much goes."""
    multiples = [m for m in FFN_MULTIPLES if teacher.intermediate % m == 0]
    multiple, heads = max(m for m in multiples if m <= 32), min(0.75, 1 - 1 / teacher.heads)
    least = max(0.05, _hundredths(least_part(teacher, SMALLEST | {"ffn_multiple": multiple})))
    counted, allotted = {"budget": ("ratios",)}, {"budget": BUDGETS[1:]}
    return {
        "budget": Dim.choice(BUDGETS, "ratios", expert=True),
        "target": Dim.real(least, 1.0, max(least, 0.6), when=allotted, expert=True),
        "whole_blocks": Dim.flag(True, when=allotted, expert=True),
        "head_ratio": Dim.real(0.0, heads, min(0.25, heads), when=counted),
        "ffn_ratio": Dim.real(0.0, 0.9, 0.5, when=counted),
        "layer_ratio": Dim.real(0.0, min(0.75, 1 - 1 / teacher.layers), 0.0),
        "hidden_ratio": Dim.real(0.0, 0.5, 0.0, expert=True),
        "ffn_multiple": Dim.choice(multiples, multiple, expert=True),
        "min_heads": Dim.integer(0, int(teacher.heads), 1, expert=True),
    }


def _means() -> dict[str, Dim]:
    """The dimensions that say what goes, when, and what makes up for it."""
    trained = {"recover": TRAINED}
    gradual = {"schedule": GRADUAL, **trained}
    return {
        "recover": Dim.choice(RECOVERIES, "kd", expert=True),
        "schedule": Dim.choice(SCHEDULES, "cubic", when=trained),
        "criterion": Dim.choice(CRITERIA, "fisher", expert=True),
        "scope": Dim.choice(SCOPES, "global", expert=True),
        "calib_examples": Dim.choice((256, 512, 1024, 2048), 512, expert=True),
        "layer_strategy": Dim.choice(STRATEGIES, "top", expert=True),
        "layerdrop_train": Dim.real(0.0, 0.5, 0.0, expert=True),
        "num_prune_steps": Dim.integer(1, 20, int(DEFAULT_PACE["num_prune_steps"]), when=gradual, expert=True),
        "s_warmup": Dim.real(0.0, 0.3, DEFAULT_PACE["s_warmup"], when=gradual, expert=True),
        "s_cooldown": Dim.real(0.1, 0.6, DEFAULT_PACE["s_cooldown"], when=gradual, expert=True),
        "learning_rate": Dim.real(1e-6, 1e-2, 5e-5, log=True, expert=True),
    }


def _prunes(params: Params, *names: str) -> bool:
    """Whether anything goes, or anything of the ratios named."""
    of = names or (*RATIOS, "layer_ratio", "hidden_ratio")
    return (not names and params["budget"] != "ratios") or any(float(params.get(name, 0)) > 0 for name in of)


def _rounded(subject: Subject, params: Params) -> dict[str, Any]:
    """The amounts as they will really be."""
    cut = Cut.of(subject, params)
    rounded = {
        "layer_ratio": (subject.layers - cut.layers) / subject.layers,
        "hidden_ratio": (subject.hidden - cut.hidden) / subject.hidden,
        "ffn_multiple": cut.multiple,
        "min_heads": cut.min_heads,
    }
    if params["budget"] != "ratios":
        return {**rounded, "target": round(float(params["target"]), 2)}
    heads, neurons = cut.layers * int(subject.heads), cut.layers * int(subject.intermediate)
    return {
        **rounded,
        "head_ratio": (heads - cut.heads) / heads,
        "ffn_ratio": (neurons - cut.neurons) / neurons,
    }


def _hundredths(part: float) -> float:
    """Rounded up, as far as a target is told, and no more than all."""
    return min(1.0, math.ceil(100 * part - 1e-9) / 100)


def _without_idle(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters with those left out, or at their default, that change nothing."""
    chosen = dict(params)
    units = chosen["budget"] != "ratios" or _prunes(chosen, *RATIOS, "hidden_ratio")
    if not _prunes(chosen):
        chosen["recover"] = "none"
    if not units:
        chosen |= {"criterion": "magnitude", "scope": "global"}
        chosen |= {"recover": "none"} if chosen["recover"] == "rescale" else {}
    if chosen["criterion"] in LEARNED and chosen["recover"] not in TRAINED:
        chosen["recover"] = "finetune"
    if not _prunes(chosen, "layer_ratio"):
        chosen |= {"layer_strategy": "top", "layerdrop_train": 0.0}
    if chosen["budget"] == "ratios":
        chosen |= {} if _prunes(chosen, "ffn_ratio", "hidden_ratio") else {"ffn_multiple": 1}
        chosen |= {} if _prunes(chosen, "head_ratio") else {"min_heads": 1}
    return _paced(chosen, gradual=units)


def _paced(params: Mapping[str, Any], *, gradual: bool) -> dict[str, Any]:
    """The parameters with those of calibration, schedule and training that are used, and no others."""
    chosen = {"schedule": "cubic", **DEFAULT_PACE, **params}
    if not gradual:
        chosen["schedule"] = "one_shot"
    elif chosen["criterion"] == "l0" or (chosen["criterion"] == "movement" and chosen["schedule"] == "one_shot"):
        chosen["schedule"] = "cubic"
    needs_data = (
        chosen["criterion"] in NEED_GRADIENTS
        or chosen["recover"] == "rescale"
        or chosen["layer_strategy"] == "importance"
        or chosen["budget"] == "macs"
    )
    idle = set() if needs_data else {"calib_examples"}
    if chosen["recover"] not in TRAINED:
        idle |= {"schedule", *DEFAULT_PACE} | (set() if chosen["layerdrop_train"] else {"learning_rate"})
    elif chosen["schedule"] == "one_shot":
        idle |= set(DEFAULT_PACE)
    elif chosen["criterion"] == "l0":
        idle |= {"num_prune_steps", "s_warmup"}
    return {name: value for name, value in chosen.items() if name not in idle}


@dataclass(frozen=True)
class Shares:
    """The parts of the step's training budget: with layers skipped at random, under masks, and after the cut."""

    layer_drop: float
    pruning: float
    recovery: float

    @classmethod
    def of(cls, params: Params) -> Shares:
        """How these parameters divide it; all to the only phase there is, half to each of two kinds."""
        trained, drops = params["recover"] in TRAINED, float(params["layerdrop_train"]) > 0
        first = (0.5 if trained else 1.0) if drops else 0.0
        rest = 1 - first if trained else 0.0
        after = rest * (float(params["s_cooldown"]) if params.get("schedule") in GRADUAL else 1.0)
        return cls(first, rest - after, after)


def _drop_layers(network: nn.Module, subject: Subject, params: Params, context: Context, share: float) -> list[int]:
    """Remove layers, after training with some skipped if there is a share for it; which of them stayed."""
    drop = round(float(params["layer_ratio"]) * subject.layers)
    if share:
        loss, rate = loss_of(str(params["recover"]), subject.task, context), float(params["learning_rate"])
        with layer_drop(network, float(params["layerdrop_train"])):
            context.fit(network, loss=loss, scored=False, share=share, learning_rate=rate)
    if params["layer_strategy"] == "importance" and not context.dry:
        kept = most_changing_layers(network, context.calibration(int(params["calib_examples"])), drop)
    else:
        kept = kept_layers(subject.layers, drop, str(params["layer_strategy"]))
    keep_layers(network, kept)
    return kept


def _loss(original: nn.Module, kept: list[int], pruner: Pruner) -> Loss | None:
    """What the network is trained for while it is pruned and after; None is the task's own loss."""
    if pruner.params["recover"] != "layer_distill":
        return loss_of(str(pruner.params["recover"]), pruner.task, pruner.context)
    dense = deepcopy(original).to(pruner.context.device).eval().requires_grad_(False)
    return layer_distillation(pruner.context, pruner.task, dense, kept, lambda: pruner.channels)

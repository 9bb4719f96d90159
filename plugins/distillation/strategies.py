"""The matches that a few dimensions describe: of which layers and features, by which losses and projections.

Owns the strategies, their dimensions and which of these say nothing. Knows nothing of training.

Sources: Jiao et al. 2020, TinyBERT; Sun et al. 2019, BERT-PKD; Xia et al. 2022, CoFi; Li et al. 2020, BERT-EMD,
without its cost attention: all layers of a model have the same mass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

from compress_search import Dim, Params

from .layer_maps import STRATEGIES, anchors, attention_pairs, layer_pairs
from .matches import GENERAL, Match

FEATURES = ("hidden", "attention", "hidden+attention", "embedding+hidden+attention")
ALIGNED = "learned_align"
EARTH_MOVER = "emd"
"""Every student layer learns from every one of the teacher's, by a plan that each step makes anew."""
PROJECTION_LEARNING_RATE = 1e-3
PROJECTED = {"shared_projection", "projection_learning_rate"}
"""Dimensions that say something only of a projection."""


def strategy_space(when: Mapping[str, Sequence[str]]) -> dict[str, Dim]:
    """The dimensions of a strategy; weights are of the sum over matches of a kind.

    Under ``emd`` that sum is a mean over layers, for the masses of all layers sum to 1.
    """
    usual = (*STRATEGIES, ALIGNED)
    projected = {**when, "projection": ("auto", "linear", "relu", "tanh", "identity")}
    return {
        "strategy": Dim.choice((*usual, EARTH_MOVER), "uniform", when=when, usual=usual),
        "features": Dim.choice(FEATURES, "hidden+attention", when=when),
        "hidden_weight": Dim.real(0.01, 10.0, 1.0, log=True, when=when),
        "attention_weight": Dim.real(0.01, 10.0, 1.0, log=True, when=when),
        "hidden_loss": Dim.choice(("hidden_mse", "cos", "pkd", "mae"), "hidden_mse", when=when, expert=True),
        "attention_loss": Dim.choice(
            ("attention_mse", "attention_ce", "relation_kl_rows"), "attention_mse", when=when, expert=True
        ),
        "projection": Dim.choice(
            ("auto", "none", "linear", "relu", "tanh", "identity"), "auto", when=when, expert=True
        ),
        "shared_projection": Dim.flag(True, when=projected, expert=True),
        "projection_learning_rate": Dim.real(
            1e-5, 1e-1, PROJECTION_LEARNING_RATE, log=True, when=projected, expert=True
        ),
    }


def strategic(params: Params, student: int, teacher: int) -> tuple[Match, ...]:
    """The matches that the dimensions describe, for models of so many layers."""
    pairs = _pairs(str(params["strategy"]), student, teacher)
    wanted = str(params["features"]).split("+")
    made: list[Mapping[str, Any]] = []
    if "embedding" in wanted:
        made.append({**_hidden(params, 0, 0), "feature": "embedding"})
    if "hidden" in wanted:
        made += [_hidden(params, *pair) for pair in _hidden_pairs(params, pairs, student, teacher)]
    if "attention" in wanted:
        loss, weight = params["attention_loss"], float(params["attention_weight"])
        common = {"feature": "attention_scores", "loss": loss, "weight": weight}
        attended = _attention_pairs(str(params["strategy"]), student, teacher)
        made += [{**common, "student_layer": s, "teacher_layer": t} for s, t in attended]
    phase = [GENERAL, 1] if params["phases"] == "two_phase" else "all"
    return tuple(Match.model_validate({**match, "phase": phase}) for match in made)


def _pairs(strategy: str, student: int, teacher: int) -> list[tuple[int, int]]:
    if strategy == EARTH_MOVER:
        return list(product(range(1, student + 1), range(1, teacher + 1)))
    return layer_pairs("uniform" if strategy == ALIGNED else strategy, student, teacher)


def _attention_pairs(strategy: str, student: int, teacher: int) -> list[tuple[int, int]]:
    if strategy == EARTH_MOVER:
        return list(product(range(student), range(teacher)))
    return attention_pairs("uniform" if strategy == ALIGNED else strategy, student, teacher)


def _hidden_pairs(
    params: Params, pairs: Sequence[tuple[int, int]], student: int, teacher: int
) -> Iterator[tuple[int, int]]:
    if params["strategy"] != ALIGNED:
        yield from pairs
        return
    # every student layer with each of a few of the teacher's; at each step those that fit best are picked
    for above in anchors(student, teacher):
        yield from ((below, above) for below in range(1, student + 1))


def _hidden(params: Params, student: int, teacher: int) -> dict[str, Any]:
    layers = {"student_layer": student, "teacher_layer": teacher}
    match = {**layers, "loss": params["hidden_loss"], "weight": float(params["hidden_weight"])}
    if params["projection"] == "none":
        return match
    proj: dict[str, Any] = {"kind": params["projection"], "lr": float(params["projection_learning_rate"])}
    if params["shared_projection"]:
        proj["shared"] = "hidden"
    elif params["strategy"] == EARTH_MOVER:  # one a student layer, whichever of the teacher's it goes to
        proj["shared"] = f"hidden {student}"
    return {**match, "proj": proj}


def settle(params: dict[str, Any], narrow: bool) -> set[str]:
    """Put in what a strategy's dimensions come to; the names of those that then say nothing."""
    wanted = str(params["features"]).split("+")
    idle = set() if "attention" in wanted else {"attention_weight", "attention_loss"}
    decides = {"mirror_theseus": "attention", ALIGNED: "hidden"}.get(str(params["strategy"]))
    if decides and decides not in wanted:
        params["strategy"] = "uniform"  # which it differs from in that feature alone
    if "hidden" not in wanted:
        params["projection"] = "none"
        idle |= {"hidden_weight", "hidden_loss"}
    elif params["projection"] == "auto":
        equal = "identity" if params["strategy"] == ALIGNED else "none"
        params["projection"] = "linear" if narrow else equal
    elif params["projection"] == "identity" and narrow:
        params["projection"] = "linear"
    if params["strategy"] == EARTH_MOVER or (params["strategy"] == ALIGNED and "hidden" in wanted):
        params["layer_dropout"] = 0.0  # which matches count is decided at every step as it is
    return idle | (PROJECTED if params["projection"] == "none" else set())

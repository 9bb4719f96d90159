"""A shallower, perhaps narrower student that learns from features of its teacher's layers, by matches.

Owns the strategies that write matches from a few dimensions, and the phases of training. A study may write the
matches itself, as TextBrewer's and KnowledgeDistillation's configurations do, under ``matches``::

    layer_match:
      layers: 3
      matches: |
        - {teacher_layer: 0, student_layer: 0, feature: embedding, loss: hidden_mse}
        - {teacher_layer: 12, student_layer: 3, feature: hidden, loss: hidden_mse, weight: 2}
        - {teacher_layer: 11, student_layer: 2, feature: attention_scores, loss: attention_mse}

Sources: Yang et al. 2020, TextBrewer; Jiao et al. 2020, TinyBERT; Sun et al. 2019, BERT-PKD; Xia et al. 2022, CoFi;
Li et al. 2020, BERT-EMD, without its cost attention: all layers of a model have the same mass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

from compress_search import Candidate, Context, Dim, Method, Params, Stage, Subject, TrialError

from .distillation.layer_maps import STRATEGIES, anchors, attention_pairs, layer_pairs
from .distillation.matches import MORE_HEADS, Match, Shapes, check_depths, check_matches, parse_matches, unmatched
from .distillation.matching import Matching
from .distillation.objective import (
    UNLABELLED_BATCH,
    Choice,
    Objective,
    Record,
    aligned,
    has_targets,
    idle_targets,
    some,
    target_space,
    text_missing,
    transported,
)
from .distillation.soft_targets import SoftTerm, crf_missing
from .distillation.starts import (
    CHECKPOINT,
    CUT,
    begun,
    begun_faults,
    begun_subject,
    cut_when,
    init_dim,
    settled_cut,
    start_missing,
    start_space,
)
from .distillation.students import NARROW, depth_dim, unfit, width_dim

FEATURES = ("hidden", "attention", "hidden+attention", "embedding+hidden+attention")
ALIGNED = "learned_align"
EARTH_MOVER = "emd"
"""Every student layer learns from every one of the teacher's, by a plan that each step makes anew."""
BY_STRATEGY = "by strategy"
"""What ``matches`` says where it holds none."""
PROJECTION_LEARNING_RATE = 1e-3
PROJECTED = {"shared_projection", "projection_learning_rate"}
"""Dimensions that say something only of a projection."""


def written(matches: str, teacher_layers: int) -> tuple[Match, ...]:
    """The matches of a text for a teacher of so many layers; none where a strategy is to write them.

    Raises:
        ValueError: what is wrong, in one line.
    """
    if matches == BY_STRATEGY:
        return ()
    found = parse_matches(matches)
    check_depths(found, teacher=teacher_layers)
    return found


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
    phase = 1 if params["phases"] == "two_phase" else "all"
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


class LayerMatch(Method):
    """Distillation from layers to layers, as a study or a strategy matches them."""

    stage = Stage.STUDENT

    def search_space(self, teacher: Subject) -> Mapping[str, Dim]:
        """``width`` is the part of the teacher's that is *kept*; weights are of the sum over matches of a kind.

        Under ``emd`` that sum is a mean over layers, for the masses of all layers sum to 1.
        """
        strategy: dict[str, Sequence[str]] = {"matches": (BY_STRATEGY,)}
        usual = (*STRATEGIES, ALIGNED)
        projected = strategy | {"projection": ("auto", "linear", "relu", "tanh", "identity")}
        cut = cut_when(teacher, CUT)
        text = {"unlabelled_text": Dim.flag(False, when={"phases": ("auto", "two_phase")}, expert=True)}
        return {
            **start_space(teacher),
            "layers": depth_dim(teacher, when=cut),
            "width": width_dim(teacher, when=cut),
            "init": init_dim(cut),
            "matches": Dim.text(partial(written, teacher_layers=teacher.layers), BY_STRATEGY),
            "strategy": Dim.choice((*usual, EARTH_MOVER), "uniform", when=strategy, usual=usual),
            "features": Dim.choice(FEATURES, "hidden+attention", when=strategy),
            "hidden_weight": Dim.real(0.01, 10.0, 1.0, log=True, when=strategy),
            "attention_weight": Dim.real(0.01, 10.0, 1.0, log=True, when=strategy),
            "hidden_loss": Dim.choice(
                ("hidden_mse", "cos", "pkd", "mae"), "hidden_mse", when=strategy, expert=True
            ),
            "attention_loss": Dim.choice(
                ("attention_mse", "attention_ce", "relation_kl_rows"), "attention_mse", when=strategy, expert=True
            ),
            "projection": Dim.choice(
                ("auto", "none", "linear", "relu", "tanh", "identity"), "auto", when=strategy, expert=True
            ),
            "shared_projection": Dim.flag(True, when=projected, expert=True),
            "projection_learning_rate": Dim.real(
                1e-5, 1e-1, PROJECTION_LEARNING_RATE, log=True, when=projected, expert=True
            ),
            "layer_dropout": Dim.real(0.0, 0.5, 0.0, expert=True),
            "phases": Dim.choice(("auto", "joint", "two_phase"), "auto", expert=True),
            "matching_fraction": Dim.real(0.1, 0.9, 0.5, when={"phases": ("auto", "two_phase")}, expert=True),
            **(text if "unlabelled" in teacher.traits else {}),
            **target_space(teacher),
            "learning_rate": Dim.real(1e-6, 1e-2, 5e-5, log=True, expert=True),
        }

    def unsupported(self, subject: Subject) -> str | None:
        """A student is made of the teacher's own layers, all alike."""
        return unfit(subject)

    def effective(self, subject: Subject, params: Params) -> Params:
        """A width of whole heads, what "auto" comes to, and without what then says nothing."""
        found = settled_cut(subject, params)
        narrow = begun_subject(subject, found).hidden != subject.hidden
        told = _told_phases(found)
        if found["phases"] == "auto":
            found["phases"] = "two_phase" if narrow or told - {"all"} else "joint"
        idle = _idle_phases(found, told) | idle_targets(subject, found)
        if found.get("matches", BY_STRATEGY) == BY_STRATEGY:
            idle |= {"matches"} | _settle(found, narrow)
        return {name: value for name, value in found.items() if name not in idle}

    def faults(self, subject: Subject, params: Params) -> Mapping[str, str]:
        """A student of its teacher's own shape, or what it cannot be compared with its teacher by."""
        if fault := begun_faults(subject, params):
            return fault
        student, written = self.after(subject, params), "matches" in params
        if not written and "hidden" in str(params["features"]):
            narrow = student.hidden != subject.hidden
            if narrow and params["projection"] == "none":
                return {"projection": NARROW}
        if not written and params.get("start") != CHECKPOINT:
            return {}
        ours, theirs = map(Shapes.described, (student, subject))
        if not written:
            differs = unmatched(strategic(params, ours.layers, theirs.layers), ours, theirs)
            return {"start": f"{CHECKPOINT}, and {differs}: write matches, with {MORE_HEADS}"} if differs else {}
        try:
            check_matches(_matches(params, theirs.layers, ours.layers), ours, theirs)
        except TrialError as error:
            return {"matches": error.message}
        return {}

    def missing(self, teacher: Subject) -> Mapping[str, str]:
        """Text without labels, a CRF to learn from, and a small network to start as."""
        return text_missing(teacher, "unlabelled_text") | crf_missing(teacher) | start_missing(teacher)

    def after(self, subject: Subject, params: Params) -> Subject:
        """Fewer layers and, by ``width``, narrower ones with as many heads; or the checkpoint's own."""
        return begun_subject(subject, params)

    def trains(self, params: Params) -> bool:
        """Always."""
        return True

    def apply(self, candidate: Candidate, params: Params, context: Context) -> Candidate:
        """Cut the student out of the teacher, or take the checkpoint, and train it, in one phase or two."""
        student = begun(candidate, params, context)
        matches = _matches(params, candidate.subject.layers, student.subject.layers)
        matching = Matching.between(matches, student.network, context.teacher, context.seed)
        matching.projections.to(context.device)
        objective = train(student, matching, params, context)
        return student.replace(notes={**student.notes, "layer_match": objective.report()})

    def evaluate(self, candidate: Candidate, context: Context) -> Mapping[str, float]:
        """The unweighted terms of the last steps of training, by kind."""
        terms: Mapping[str, float] = candidate.notes.get("layer_match", {})
        return terms


def _told_phases(params: Params) -> set[int | str]:
    """The phases that written matches name; none where a strategy is to write them."""
    text = str(params.get("matches", BY_STRATEGY))
    try:
        return set() if text == BY_STRATEGY else {match.phase for match in parse_matches(text)}
    except ValueError:
        return set()  # a plan has refused such a text, and ``apply`` would


def _idle_phases(params: Params, told: set[int | str]) -> set[str]:
    """What says nothing of phases where there is but one, or nothing to be learnt in the other."""
    first = params["phases"] == "two_phase" and (not told or bool(told & {1, "all"}))
    last = params["phases"] == "joint" or bool(told & {2, "all"}) or has_targets(params)
    text = set() if first else {"unlabelled_text"}
    return text if first and last else text | {"matching_fraction"}


def _settle(params: dict[str, Any], narrow: bool) -> set[str]:
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


def _matches(params: Params, depth: int, student: int) -> tuple[Match, ...]:
    if "matches" not in params:
        return strategic(params, student, depth)
    try:
        matches = written(str(params["matches"]), depth)
    except ValueError as error:
        raise TrialError(f"matches: {error}") from error
    phased = [number for number, match in enumerate(matches, start=1) if match.phase != "all"]
    if phased and params["phases"] == "joint":
        raise TrialError(
            f"match {phased[0]} is of phase {matches[phased[0] - 1].phase}, and phases is joint: "
            "expected auto or two_phase"
        )
    return matches


def objectives(student: Candidate, matching: Matching, params: Params, context: Context) -> list[Objective]:
    """What is learnt in one phase after the other: matches, then what else there is with the logits and labels.

    Or all at once; and no phase is without a term.
    """
    joint = params["phases"] == "joint"
    last = Objective(
        context,
        matching if joint else matching.only(2),
        SoftTerm.of(student.subject.task, params),
        float(params["logit_weight"]),
        float(params["hard_weight"]),
        choose=_choice(params, context.seed),
    )
    first = [] if joint else [Objective(context, matching.only(1), choose=_choice(params, context.seed))]
    return [phase for phase in (*first, last) if phase.learns]


def train(student: Candidate, matching: Matching, params: Params, context: Context) -> Objective:
    """Each phase on its part of the budget; the last one, with the terms of all."""
    phases = objectives(student, matching, params, context)
    text = context.unlabelled(UNLABELLED_BATCH) if params.get("unlabelled_text") else None
    part = float(params.get("matching_fraction", 1.0))
    recorded = Record()
    for number, phase in enumerate(phases):
        options = {"share": 1 - part, "batches": None} if number else {"share": part, "batches": text}
        phase.recorded = recorded
        phase.fit(student.network, learning_rate=float(params["learning_rate"]), scored=phase.answers, **options)
    return phases[-1]


def _choice(params: Params, seed: int) -> Choice | None:
    if params.get("strategy") == EARTH_MOVER:
        return transported
    if params.get("strategy") == ALIGNED and "hidden" in str(params["features"]):
        return aligned
    rate = float(params["layer_dropout"])
    return some(rate, seed) if rate else None

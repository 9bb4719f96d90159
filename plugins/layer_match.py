"""A shallower, perhaps narrower student that learns from features of its teacher's layers, by matches.

Owns the phases of training: in general, from a masked language model where the study names one, then matches, then
answers and labels. A strategy writes the matches from a few dimensions, or a study itself under ``matches``, as
TextBrewer's and KnowledgeDistillation's configurations do (docs/matches.md)::

    layer_match:
      layers: 3
      matches: |
        - {teacher_layer: 0, student_layer: 0, feature: embedding, loss: hidden_mse}
        - {teacher_layer: 12, student_layer: 3, feature: hidden, loss: hidden_mse, weight: 2}
        - {teacher_layer: last, student_layer: last, feature: attention_scores, loss: attention_mse}

Sources: Yang et al. 2020, TextBrewer; of the phase in general Jiao et al. 2020, TinyBERT, and Sanh et al. 2019,
DistilBERT.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from compress_search import Candidate, Context, Dim, Method, Params, Stage, Subject, TrialError

from .distillation.comparable import MORE_HEADS, Shapes, check_depths, check_matches, unmatched
from .distillation.general import (
    DEPENDENT,
    NONE,
    general_kind,
    general_missing,
    general_objective,
    general_space,
    language_shapes,
    learn_in_general,
)
from .distillation.language_models import in_teachers_place
from .distillation.masked_text import unfit_in_place
from .distillation.matches import GENERAL, Match, parse_matches
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
    begun,
    begun_faults,
    begun_subject,
    cut_when,
    cuts,
    init_dim,
    settled_cut,
    start_missing,
    start_space,
)
from .distillation.strategies import ALIGNED, EARTH_MOVER, settle, strategic, strategy_space
from .distillation.students import NARROW, depth_dim, unfit, width_dim

BY_STRATEGY = "by strategy"
"""What ``matches`` says where it holds none."""
NARROW_HEAD = "the student is not as wide as the language model under whose head it would stand"


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


class LayerMatch(Method):
    """Distillation from layers to layers, as a study or a strategy matches them."""

    stage = Stage.STUDENT

    def search_space(self, teacher: Subject) -> Mapping[str, Dim]:
        """``width`` is the part of the teacher's that is *kept*; fractions are of what the phases before leave."""
        strategy: dict[str, Sequence[str]] = {"matches": (BY_STRATEGY,)}
        cut = cut_when(teacher, *cuts(teacher))
        text = {"unlabelled_text": Dim.flag(False, when={"phases": ("auto", "two_phase")}, expert=True)}
        return {
            **start_space(teacher),
            "layers": depth_dim(teacher, when=cut),
            "width": width_dim(teacher, when=cut),
            "init": init_dim(cut),
            "matches": Dim.text(partial(written, teacher_layers=teacher.layers), BY_STRATEGY),
            **strategy_space(strategy),
            "layer_dropout": Dim.real(0.0, 0.5, 0.0, expert=True),
            **general_space(teacher),
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
        student = begun_subject(subject, found)
        narrow = student.hidden != subject.hidden
        told = _told(found)
        if found["phases"] == "auto":
            found["phases"] = "two_phase" if narrow or any(_of_one(match) for match in told) else "joint"
        if _is_joint(found, told):
            found["phases"] = "joint"
        idle = _settle_general(found, told) | _idle_phases(found, told) | idle_targets(subject, found)
        if found.get("matches", BY_STRATEGY) == BY_STRATEGY:
            idle |= {"matches"} | settle(found, narrow)
        if told or student.layers <= subject.layers:  # of others ``faults`` tells
            matches = told or strategic(found, student.layers, subject.layers)
            if _most_at_once(found, matches) < 2:
                found["layer_dropout"] = 0.0  # the last match of a step is never left out
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
        if fault := _general_faults(subject, student, params):
            return fault
        if not written and params.get("start") != CHECKPOINT:
            return {}
        ours, theirs = map(Shapes.described, (student, subject))
        language = language_shapes(subject, params)
        if not written:
            differs = unmatched(strategic(params, ours.layers, theirs.layers), ours, theirs)
            return {"start": f"{CHECKPOINT}, and {differs}: write matches, with {MORE_HEADS}"} if differs else {}
        try:
            check_matches(_matches(params, theirs.layers, ours.layers), ours, theirs, language)
        except TrialError as error:
            return {"matches": error.message}
        return {}

    def missing(self, teacher: Subject) -> Mapping[str, str]:
        """Text without labels, a language model, a CRF to learn from, and networks to start as."""
        found = text_missing(teacher, "unlabelled_text") | crf_missing(teacher) | start_missing(teacher)
        return found | general_missing(teacher)

    def after(self, subject: Subject, params: Params) -> Subject:
        """Fewer layers and, by ``width``, narrower ones with as many heads; or the checkpoint's own."""
        return begun_subject(subject, params)

    def trains(self, params: Params) -> bool:
        """Always."""
        return True

    def apply(self, candidate: Candidate, params: Params, context: Context) -> Candidate:
        """Cut the student out of the teacher, or take the checkpoint, and train it, phase after phase."""
        student = begun(candidate, params, context)
        matches = _matches(params, candidate.subject.layers, student.subject.layers)
        before = general_kind(params) != NONE
        language = in_teachers_place(context) if before else None
        matching = Matching.between(matches, student.network, context.teacher, context.seed, language)
        matching.projections.to(context.device)
        terms = dict[str, float]()
        if before:
            objective = general_objective(matching, language, params, context, _choice(params, context.seed))
            terms |= learn_in_general(student, objective, language, params, context)
        terms |= _learn_the_task(student, matching, params, context)
        return student.replace(notes={**student.notes, "layer_match": terms})

    def evaluate(self, candidate: Candidate, context: Context) -> Mapping[str, float]:
        """The unweighted terms of the last steps of training, by kind."""
        terms: Mapping[str, float] = candidate.notes.get("layer_match", {})
        return terms


def _told(params: Params) -> tuple[Match, ...]:
    """The matches that a study has written; none where a strategy is to write them."""
    text = str(params.get("matches", BY_STRATEGY))
    try:
        return () if text == BY_STRATEGY else parse_matches(text)
    except ValueError:
        return ()  # a plan has refused such a text, and ``apply`` would


def _of_one(match: Match) -> bool:
    """Whether it is of one of the task's two phases, and not of the other."""
    return len(match.phases & {1, 2}) == 1


def _is_joint(params: Params, told: Sequence[Match]) -> bool:
    """Whether the task's second phase has nothing that the first has not, or neither has a match."""
    if told:
        return not any(match.phases & {1, 2} for match in told)
    return not has_targets(params) and not params.get("unlabelled_text")


def _most_at_once(params: Params, matches: Sequence[Match]) -> int:
    """How many matches a step of some phase has at most."""
    phases: list[set[str | int]] = [{1, 2}] if params["phases"] == "joint" else [{1}, {2}]
    if general_kind(params) != NONE:
        phases.append({GENERAL})
    return max(sum(bool(match.phases & phase) for match in matches) for phase in phases)


def _idle_phases(params: Params, told: Sequence[Match]) -> set[str]:
    """What says nothing of phases where there is but one, or nothing to be learnt in the other."""
    joint = params["phases"] == "joint"
    first = not joint and (not told or any(1 in match.phases for match in told))
    last = has_targets(params) or any((match.phases & {1, 2} if joint else 2 in match.phases) for match in told)
    last = last or (joint and not told)
    text = set() if first else {"unlabelled_text"}
    text |= set() if first or last else {"general_fraction"}
    return text if first and last else text | {"matching_fraction"}


def _settle_general(params: dict[str, Any], told: Sequence[Match]) -> set[str]:
    """Put in that nothing is learnt where no term is of the phase; the names of those that then say nothing."""
    if not told or params.get("mlm_weight") or any(GENERAL in match.phases for match in told):
        return set()
    if "general" in params:
        params["general"] = NONE
    return set(DEPENDENT)


def _general_faults(subject: Subject, student: Subject, params: Params) -> dict[str, str]:
    """A language model that cannot take the teacher's place, or under whose head the student cannot stand."""
    if general_kind(params) == NONE or "masked-lm" not in subject.traits:
        return {}
    answers = [n for n, m in enumerate(_told(params), 1) if m.kind == "logits" and GENERAL in m.phases]
    headed = bool(params.get("mlm_weight") or answers)
    if unfit := unfit_in_place(subject, headed=headed):
        return {"general": f"{params['general']}, and {unfit}"}
    if not headed or (student.hidden, student.embedding_size) == (subject.hidden, subject.embedding_size):
        return {}
    if answers:
        return {"matches": f"match {answers[0]} is of logits, and {NARROW_HEAD}: leave it out"}
    return {"general": f"{params['general']}, and {NARROW_HEAD}: set mlm_weight to 0"}


def _matches(params: Params, depth: int, student: int) -> tuple[Match, ...]:
    if "matches" not in params:
        return strategic(params, student, depth)
    try:
        matches = written(str(params["matches"]), depth)
    except ValueError as error:
        raise TrialError(f"matches: {error}") from error
    for number, match in enumerate(matches, start=1):
        if _of_one(match) and params["phases"] == "joint":
            (phase,) = match.phases & {1, 2}
            raise TrialError(f"match {number} is of phase {phase}, and phases is joint: expected auto or two_phase")
        if match.phases == {GENERAL} and general_kind(params) == NONE:
            raise TrialError(f"match {number} is of phase general, and general is none: expected another")
    return tuple(match.placed(student, depth) for match in matches)


def objectives(student: Candidate, matching: Matching, params: Params, context: Context) -> list[Objective]:
    """What is learnt of the task, phase after phase: matches, then what else there is with the logits and labels.

    Or all at once; and no phase is without a term.
    """
    joint = params["phases"] == "joint"
    last = Objective(
        context,
        matching.only(1, 2) if joint else matching.only(2),
        SoftTerm.of(student.subject.task, params),
        float(params["logit_weight"]),
        float(params["hard_weight"]),
        choose=_choice(params, context.seed),
    )
    first = [] if joint else [Objective(context, matching.only(1), choose=_choice(params, context.seed))]
    return [phase for phase in (*first, last) if phase.learns]


def _learn_the_task(
    student: Candidate, matching: Matching, params: Params, context: Context
) -> Mapping[str, float]:
    """Each phase on its part of what is left of the budget; the terms of all."""
    text = context.unlabelled(UNLABELLED_BATCH) if params.get("unlabelled_text") else None
    left = 1 - float(params.get("general_fraction", 0.0))
    part = left * float(params.get("matching_fraction", 1.0))
    recorded = Record()
    for number, phase in enumerate(objectives(student, matching, params, context)):
        options = {"share": left - part, "batches": None} if number else {"share": part, "batches": text}
        phase.recorded = recorded
        phase.fit(student.network, learning_rate=float(params["learning_rate"]), scored=phase.answers, **options)
    return recorded.means()


def _choice(params: Params, seed: int) -> Choice | None:
    if params.get("strategy") == EARTH_MOVER:
        return transported
    if params.get("strategy") == ALIGNED and "hidden" in str(params["features"]):
        return aligned
    rate = float(params["layer_dropout"])
    return some(rate, seed) if rate else None

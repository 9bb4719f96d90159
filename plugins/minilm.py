"""MiniLM: a student of any depth and width from the attention of a single layer of its teacher.

Matches, and nothing else: the last layer's attention and value relations (version 1), or the relations of queries,
keys and values among themselves, split into heads anew (version 2, so that the models' heads may differ). They are
the teacher's, or those of the masked language model that a study names: then the student learns the language first.
These say nothing to the head, so logits and labels follow. A student of at most half the depth and width learns
from an assistant, as deep as the teacher and as narrow as the student.

Sources: Wang et al. 2020, MiniLM; Wang et al. 2021, MiniLMv2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from torch import nn

from compress_search import Batch, Candidate, Context, Dim, Method, Params, Stage, Subject, TrialError
from compress_search.encoders import layers

from .distillation.augmentation import (
    augmentation_faults,
    augmentation_missing,
    augmentation_space,
    augmented,
    augmenter,
)
from .distillation.comparable import Shapes, unmatched
from .distillation.masked_text import MASKED_LM, unfit_in_place
from .distillation.matches import Match
from .distillation.matching import Matching
from .distillation.objective import (
    UNLABELLED_BATCH,
    Objective,
    has_targets,
    idle_targets,
    reader,
    target_space,
    text_missing,
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
from .distillation.students import cut_student, depth_dim, unfit, width_dim

RELATIONS = tuple("+".join(some) for n in range(1, 5) for some in combinations(("qk", "qq", "kk", "vv"), n))
RELATION_HEADS = (12, 24, 48, 64)
LEAST_HEAD = 8
"""Channels of a relation head by default, as 384 / 48; of fewer there is little to relate."""
_FEATURES = {"qq": "q", "kk": "k", "vv": "v"}


def relation_heads(width: int, narrow: int, heads: int) -> list[int]:
    """The numbers of relation heads that divide both widths, rising; among them that of the models' own heads."""
    return sorted({n for n in (heads, *RELATION_HEADS) if width % n == 0 and narrow % n == 0})


def default_heads(heads: Sequence[int], width: int) -> int:
    """The paper's 48 where it fits; else as many as leave each head :data:`LEAST_HEAD` channels, or the fewest."""
    if 48 in heads:
        return 48
    return max((n for n in heads if width // n >= LEAST_HEAD), default=min(heads))


def minilm_matches(params: Params, student: int, teacher: int) -> tuple[Match, ...]:
    """The matches of the student's last layer with a layer of the teacher's.

    Args:
        params: ``version``, ``attention_weight``, ``value_weight``; in version 2 ``relations``, ``relation_heads``.
        student: its last layer, from 0.
        teacher: the layer to learn from, from 0.
    """
    return tuple(
        Match.model_validate({**_match(relation, params), "student_layer": student, "teacher_layer": teacher})
        for relation in str(params.get("relations", "qk+vv")).split("+")
    )


def _match(relation: str, params: Params) -> dict[str, Any]:
    weight = float(params["value_weight" if relation == "vv" else "attention_weight"])
    if relation == "qk":
        return {"feature": "attention_scores", "loss": "relation_kl_rows", "weight": weight}
    if params["version"] == "v1" and relation == "vv":
        return {"feature": "value_relation", "loss": "value_relation_kl", "weight": weight}
    loss = f"relation_kl:{params['relation_heads']}"
    return {"feature": _FEATURES[relation], "loss": loss, "weight": weight}


def _relate(
    student: nn.Module,
    teacher: nn.Module,
    layer: int,
    params: Params,
    context: Context,
    share: float,
    text: Iterator[Batch] | None,
) -> dict[str, float]:
    """Train a student's relations on those of a layer of a teacher; the terms at the end."""
    matches = minilm_matches(params, len(layers(student)) - 1, layer)
    matching = Matching.between(matches, student, teacher, context.seed)
    source = None if teacher is context.teacher else reader(teacher)
    objective = Objective(context, matching, teacher=source)
    objective.fit(student, learning_rate=float(params["learning_rate"]), share=share, scored=False, batches=text)
    return objective.report()


def _texts(candidate: Candidate, params: Params, context: Context) -> Callable[[], Iterator[Batch] | None]:
    """What makes the texts of a hop, others for each; None of its own stands for the training rows as they are."""
    if params.get("unlabelled_text"):
        return lambda: context.unlabelled(UNLABELLED_BATCH)
    if not params.get("augment"):
        return lambda: None
    change = augmenter(candidate, context, int(params["variants"]))
    return lambda: augmented(change, context, labels=False)


def _relation_teacher(params: Params, context: Context) -> nn.Module:
    """Whose relations are learnt: the teacher's, or with ``general`` the language model's.

    Raises:
        TrialError: there is no language model.
    """
    if not params.get("general"):
        return context.teacher
    model = context.masked_lm()
    if model is None:
        raise TrialError(f"this needs {MASKED_LM}")
    return model


class MiniLM(Method):
    """Deep self-attention distillation into a student of chosen depth and width."""

    stage = Stage.STUDENT

    def search_space(self, teacher: Subject) -> Mapping[str, Dim]:
        """``width`` is the part of the teacher's that is *kept*; ``teacher_layer`` counts from 1."""
        second, cut = {"version": ("v2",)}, cut_when(teacher, *cuts(teacher))
        heads = relation_heads(teacher.hidden, teacher.hidden, round(teacher.heads))
        there = "unlabelled" in teacher.traits
        text = {"unlabelled_text": Dim.flag(False, expert=True)} if there else {}
        words = augmentation_space(teacher, usual=False, when={"unlabelled_text": (False,)} if there else None)
        language = {"general": Dim.flag(False, expert=True)} if "masked-lm" in teacher.traits else {}
        return {
            **start_space(teacher),
            "layers": depth_dim(teacher, when=cut),
            "width": width_dim(teacher, when=cut),
            "init": init_dim(cut),
            "version": Dim.choice(("v1", "v2"), "v2"),
            "relation_heads": Dim.choice(heads, default_heads(heads, teacher.hidden), when=second),
            "relations": Dim.choice(RELATIONS, "qq+kk+vv", when=second, expert=True),
            "teacher_layer": Dim.integer(
                max(1, teacher.layers // 2), max(1, teacher.layers), max(1, teacher.layers), expert=True
            ),
            "attention_weight": Dim.real(0.01, 10.0, 1.0, log=True, expert=True),
            "value_weight": Dim.real(0.01, 10.0, 1.0, log=True, expert=True),
            "assistant": Dim.choice(("auto", "always", "never"), "auto", when=cut, expert=True),
            "relation_fraction": Dim.real(0.1, 0.9, 0.5),
            **text,
            **words,
            **language,
            **target_space(teacher),
            "learning_rate": Dim.real(1e-6, 1e-2, 5e-5, log=True, expert=True),
        }

    def unsupported(self, subject: Subject) -> str | None:
        """A student starts as a part of its teacher, whose layers are all alike."""
        return unfit(subject)

    def effective(self, subject: Subject, params: Params) -> Params:
        """A width of whole heads, relation heads that divide both widths, and whether there is an assistant.

        Where logits and labels have no weight relations are learnt to the end.
        """
        found = settled_cut(subject, params)
        student = begun_subject(subject, found)
        if "relation_heads" in found:
            asked = int(found["relation_heads"])
            fitting = relation_heads(subject.hidden, student.hidden, round(subject.heads)) or [asked]
            found["relation_heads"] = max((n for n in fitting if n <= asked), default=fitting[0])
        if found.get("assistant") == "auto":
            small = student.layers <= subject.layers / 2 and student.hidden <= subject.hidden / 2
            found["assistant"] = "always" if small else "never"
        whole = student.hidden == subject.hidden and params["teacher_layer"] == subject.layers
        if whole and "assistant" in found and not found.get("general"):
            found["assistant"] = "never"  # it would be the teacher
        idle = idle_targets(subject, found) | (set() if has_targets(found) else {"relation_fraction"})
        relations = set(str(found.get("relations", "qk+vv")).split("+"))
        if relations == {"qk"}:  # attention is by the model's own heads
            idle |= {"relation_heads"}
        if "vv" not in relations:
            idle |= {"value_weight"}
        if relations == {"vv"}:
            idle |= {"attention_weight"}
        return {name: value for name, value in found.items() if name not in idle}

    def faults(self, subject: Subject, params: Params) -> Mapping[str, str]:
        """A student of its teacher's own shape, a checkpoint or a language model that is not like the teacher."""
        fault = begun_faults(subject, params) | augmentation_faults(subject, params)
        if unlike := params.get("general") and unfit_in_place(subject):
            fault["general"] = f"true, and {unlike}"
        if fault or params.get("start") != CHECKPOINT:
            return fault
        ours, theirs = map(Shapes.described, (self.after(subject, params), subject))
        differs = unmatched(minilm_matches(params, ours.layers - 1, theirs.layers - 1), ours, theirs)
        instead = "use version: v2" if params["version"] == "v1" else "leave out qk, or choose other relation_heads"
        return {"start": f"{CHECKPOINT}, and {differs}: {instead}"} if differs else {}

    def missing(self, teacher: Subject) -> Mapping[str, str]:
        """Text without labels, a language model, a CRF to learn from, and a small network to start as."""
        language = {} if "masked-lm" in teacher.traits else {"general": MASKED_LM}
        found = language | text_missing(teacher, "unlabelled_text") | augmentation_missing(teacher)
        return found | crf_missing(teacher) | start_missing(teacher)

    def after(self, subject: Subject, params: Params) -> Subject:
        """Fewer layers and, by ``width``, narrower ones with as many heads; or the checkpoint's own."""
        return begun_subject(subject, params)

    def trains(self, params: Params) -> bool:
        """Always."""
        return True

    def apply(self, candidate: Candidate, params: Params, context: Context) -> Candidate:
        """Relations from the teacher, perhaps by way of an assistant; then logits and labels."""
        student = begun(candidate, params, context)
        network, part = student.network, float(params.get("relation_fraction", 1.0))
        hops = [network]
        if params.get("assistant") == "always":
            every = range(candidate.subject.layers)
            hops.insert(0, cut_student(candidate, every, float(params["width"])).network)
        texts, teacher = _texts(candidate, params, context), _relation_teacher(params, context)
        layer, terms = int(params["teacher_layer"]) - 1, dict[str, float]()
        for pupil in hops:
            terms = _relate(pupil, teacher, layer, params, context, part / len(hops), texts())
            teacher, layer = pupil, len(layers(pupil)) - 1
        later = Objective(
            context,
            Matching(()),
            SoftTerm.of(student.subject.task, params),
            float(params["logit_weight"]),
            float(params["hard_weight"]),
        )
        if later.learns:
            later.fit(network, learning_rate=float(params["learning_rate"]), share=1 - part)
        return student.replace(notes={**student.notes, "minilm": terms | later.report()})

    def evaluate(self, candidate: Candidate, context: Context) -> Mapping[str, float]:
        """The unweighted terms of the last steps of training, by kind."""
        terms: Mapping[str, float] = candidate.notes.get("minilm", {})
        return terms

"""TinyBERT: a shallower and narrower student that learns its teacher's layers first, and its answers after that.

Matches, and nothing else, in a first phase: embeddings, hidden states and attention scores, each layer of the
student with one of the teacher's by a map; the head learns nothing there. In the second the teacher's logits alone.
Owns the maps, where a student starts and the phases. Where the study names text without labels, the first phase's
losses on that may come before everything; where it names a masked language model, both phases may train on
examples with other words in them.

Source: Jiao et al. 2020, TinyBERT: Distilling BERT for Natural Language Understanding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import nn

from compress_search import Batch, Candidate, Context, Dim, Method, Params, Stage, Subject

from .distillation.augmentation import (
    augmentation_faults,
    augmentation_missing,
    augmentation_space,
    augmented,
    augmenter,
)
from .distillation.comparable import Shapes, unmatched
from .distillation.language_models import in_teachers_place, language_objective, language_texts, learn_language
from .distillation.layer_maps import layer_pairs, written_layers
from .distillation.masked_text import unfit_in_place
from .distillation.matches import Match
from .distillation.matching import Matching
from .distillation.objective import Objective, text_missing
from .distillation.soft_targets import SoftTerm, crf_missing, crf_space, tempered
from .distillation.starts import (
    CHECKPOINT,
    CUT,
    NO_CHECKPOINT,
    begun_faults,
    begun_subject,
    checkpoint_subject,
    checkpoints,
    cut_when,
    from_checkpoint,
)
from .distillation.students import (
    NARROW,
    cut_student,
    depth_dim,
    same_shape,
    settled_width,
    student_subject,
    unfit,
    width_dim,
)

MAPS = {"uniform": "uniform", "top": "last", "bottom": "first"}
"""The paper's names of maps -> ours."""
STARTS = (CUT, "random")
"""Where students start that are cut to ``layers`` and ``width``."""
PROJECTION_RATE = 1e-3
TARGETS = {"scores": "attention_scores", "probabilities": "attention_probs"}


def pairs(params: Params, teacher: int, student: int | None = None) -> list[tuple[int, int]]:
    """(student's, teacher's) hidden states that go together, 1-based: by ``custom_map`` or the map of that name.

    Args:
        params: with ``layers`` where ``student`` is left out.
        teacher: its layers.
        student: its layers, where they are not for the parameters to say.
    """
    if custom := written_layers(str(params.get("custom_map", "")), 1, teacher):
        return list(enumerate(custom, start=1))
    return layer_pairs(MAPS[str(params["layer_map"])], student or int(params["layers"]), teacher)


def tinybert_matches(params: Params, mapped: Sequence[tuple[int, int]]) -> tuple[Match, ...]:
    """The matches of the paper's equations 7 to 9: attention, hidden states, embeddings.

    Args:
        params: the three weights, ``attention_target`` and ``projection``.
        mapped: see :func:`pairs`.
    """
    hidden = [_hidden(params, "hidden", *pair) for pair in mapped]
    attention = {
        "feature": TARGETS[str(params["attention_target"])],
        "loss": "attention_mse",
        "weight": float(params["attention_weight"]),
    }
    made: list[Mapping[str, Any]] = [_hidden(params, "embedding", 0, 0), *hidden]
    made += [{**attention, "student_layer": ours - 1, "teacher_layer": theirs - 1} for ours, theirs in mapped]
    return tuple(Match.model_validate(match) for match in made)


def _hidden(params: Params, feature: str, ours: int, theirs: int) -> dict[str, Any]:
    match = {
        "feature": feature,
        "student_layer": ours,
        "teacher_layer": theirs,
        "loss": "hidden_mse",
        "weight": float(params[f"{feature}_weight"]),
    }
    if params["projection"] == "none":
        return match
    shared = {"shared": "states"} if params["projection"] == "shared" else {}
    # where the widths agree it starts by changing nothing
    return {**match, "proj": {"kind": "identity", "lr": float(params["projection_learning_rate"]), **shared}}


def start(candidate: Candidate, params: Params, seed: int) -> Candidate:
    """The student before any training: the teacher's layers that it learns from, or random weights."""
    sources = [theirs - 1 for _, theirs in pairs(params, candidate.subject.layers)]
    student = cut_student(candidate, sources, float(params["width"]))
    return student.replace(network=afresh(student.network, seed)) if params["start"] == "random" else student


def afresh(network: nn.Module, seed: int) -> nn.Module:
    """A copy of the network with the random weights that its class and configuration start with."""
    copied = deepcopy(network)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh: nn.Module = type(network)(deepcopy(network.config))  # type: ignore[call-arg]
    copied.load_state_dict(fresh.state_dict(), strict=False)
    return copied


class TinyBert(Method):
    """Distillation of every layer, then of the answers, into a student of chosen depth and width."""

    stage = Stage.STUDENT

    def search_space(self, teacher: Subject) -> Mapping[str, Dim]:
        """``width`` is the part of the teacher's that is *kept*; ``custom_map`` lists its layers, from 1."""
        named, cut = {"custom_map": ("",)}, cut_when(teacher, *STARTS)
        projected = {"projection": ("shared", "per_layer")}
        space = {
            "custom_map": Dim.text(partial(written_layers, lowest=1, highest=teacher.layers), form="1, 3"),
            "layers": depth_dim(teacher, when=named | cut),
            "width": width_dim(teacher, when=cut),
            "layer_map": Dim.choice(tuple(MAPS), "uniform", when=named),
            "start": Dim.choice((*STARTS, *checkpoints(teacher)), CUT, expert=True),
            "embedding_weight": Dim.real(0.01, 10.0, 1.0, log=True, expert=True),
            "hidden_weight": Dim.real(0.01, 10.0, 1.0, log=True, expert=True),
            "attention_weight": Dim.real(0.01, 10.0, 1.0, log=True),
            "attention_target": Dim.choice(tuple(TARGETS), "scores", expert=True),
            "projection": Dim.choice(("shared", "per_layer", "none"), "shared", expert=True),
            "projection_learning_rate": Dim.real(
                1e-5, 1e-1, PROJECTION_RATE, log=True, when=projected, expert=True
            ),
            "intermediate_fraction": Dim.real(0.1, 0.9, 0.7),
            "hard_weight": Dim.real(0.0, 0.5, 0.0, expert=True),
            "learning_rate": Dim.real(1e-6, 1e-2, 5e-5, log=True, expert=True),
        }
        if teacher.task != "text-regression":
            space["temperature"] = Dim.real(1.0, 5.0, 1.0, when=tempered(teacher), expert=True)
            space |= crf_space(teacher)
        if "unlabelled" in teacher.traits:
            space["general_fraction"] = Dim.real(0.0, 0.9, 0.0, expert=True)
        return space | augmentation_space(teacher, usual=True)

    def unsupported(self, subject: Subject) -> str | None:
        """A student is made of the teacher's own layers, all alike."""
        return unfit(subject)

    def effective(self, subject: Subject, params: Params) -> Params:
        """A width of whole heads, and a map by the first name that it has; an empty one says nothing."""
        found = settled_width(subject, params)
        if not found.get("custom_map"):
            found.pop("custom_map", None)
        if "layer_map" in found:
            depth = begun_subject(subject, found).layers
            wanted = pairs(found, subject.layers, depth)
            alike = (name for name in MAPS if pairs({**found, "layer_map": name}, subject.layers, depth) == wanted)
            found["layer_map"] = next(alike)
        return found

    def faults(self, subject: Subject, params: Params) -> Mapping[str, str]:
        """A student of its teacher's own shape or without a projection that it needs; what the study lacks."""
        if fault := _shape_faults(subject, params):
            return fault
        general = float(params.get("general_fraction", 0.0)) and unfit_in_place(subject)
        found = {"general_fraction": f"{params.get('general_fraction')}: {general}"} if general else {}
        return found | augmentation_faults(subject, params)

    def missing(self, teacher: Subject) -> Mapping[str, str]:
        """Text without labels, a tokenizer by which words can be replaced, a CRF, and a checkpoint to start as."""
        start = {} if checkpoints(teacher) else {f"start: {CHECKPOINT}": NO_CHECKPOINT}
        found = augmentation_missing(teacher) | text_missing(teacher, "general_fraction")
        return found | start | crf_missing(teacher)

    def after(self, subject: Subject, params: Params) -> Subject:
        """Fewer layers and, by ``width``, narrower ones with as many heads; or the checkpoint's own."""
        if params["start"] == CHECKPOINT:
            return checkpoint_subject(subject)
        return student_subject(subject, len(pairs(params, subject.layers)), float(params["width"]))

    def trains(self, params: Params) -> bool:
        """Always."""
        return True

    def apply(self, candidate: Candidate, params: Params, context: Context) -> Candidate:
        """Make the student, then train its layers, then its answers."""
        examples = _examples(candidate, params, context)
        if params["start"] == CHECKPOINT:
            student = from_checkpoint(candidate, context)
        else:
            student = start(candidate, params, context.seed)
        matches = tinybert_matches(params, pairs(params, candidate.subject.layers, student.subject.layers))
        language = in_teachers_place(context) if params.get("general_fraction") else None
        matching = Matching.between(matches, student.network, context.teacher, context.seed, language)
        matching.projections.to(context.device)
        terms = _learn_in_general(student.network, matching, language, params, context)
        terms |= train(student, matching, params, context, examples)
        return student.replace(notes={**student.notes, "tinybert": terms})

    def evaluate(self, candidate: Candidate, context: Context) -> Mapping[str, float]:
        """The unweighted terms of the last steps of each phase, by kind."""
        terms: Mapping[str, float] = candidate.notes.get("tinybert", {})
        return terms


def _shape_faults(subject: Subject, params: Params) -> dict[str, str]:
    """A student of its teacher's own shape, or that cannot be compared with its teacher."""
    if params["start"] == CHECKPOINT:
        fault = begun_faults(subject, params).get("start") or _misfit(subject, params)
        return {"start": fault} if fault else {}
    depth, width = len(pairs(params, subject.layers)), float(params["width"])
    if fault := same_shape(subject, depth, width):
        return {"custom_map" if "custom_map" in params else "layers": fault}
    return {"projection": NARROW} if params["projection"] == "none" and width < 1 else {}


def _misfit(subject: Subject, params: Params) -> str | None:
    """Why the checkpoint cannot be compared with the teacher; None where it can."""
    student = checkpoint_subject(subject)
    mapped = pairs(params, subject.layers, student.layers)
    if len(mapped) != student.layers:
        return f"{CHECKPOINT}, of {student.layers} layers, and custom_map lists {len(mapped)}: expected as many"
    if params["projection"] == "none" and student.hidden != subject.hidden:
        return f"{CHECKPOINT}, {student.hidden} wide and the teacher {subject.hidden}: choose a projection"
    fault = unmatched(tinybert_matches(params, mapped), *map(Shapes.described, (student, subject)))
    return fault and f"{CHECKPOINT}, and {fault}: use layer_match, with attention_mse_sum"


def _examples(candidate: Candidate, params: Params, context: Context) -> Callable[[], Iterator[Batch] | None]:
    """What makes a phase's batches, others for each; None of its own stands for the training rows as they are."""
    if not params.get("augment"):
        return lambda: None
    change, hard = augmenter(candidate, context, int(params["variants"])), float(params["hard_weight"])
    return lambda: augmented(change, context, labels=hard > 0)


def train(
    student: Candidate,
    matching: Matching,
    params: Params,
    context: Context,
    examples: Callable[[], Iterator[Batch] | None],
) -> dict[str, float]:
    """The task's phases, each on its part of what is left of the budget; the terms at their ends."""
    network, rate = student.network, float(params["learning_rate"])
    left = 1 - float(params.get("general_fraction", 0.0))
    part = left * float(params["intermediate_fraction"])
    middle, last = Objective(context, matching), prediction(student.subject.task, params, context)
    middle.fit(network, learning_rate=rate, share=part, scored=False, batches=examples())
    last.fit(network, learning_rate=rate, share=left - part, batches=examples())
    return middle.report() | last.report()


def _learn_in_general(
    network: nn.Module, matching: Matching, language: nn.Module | None, params: Params, context: Context
) -> dict[str, float]:
    """The layers' losses on text without labels, from the language model if there is one; the terms at the end."""
    share = float(params.get("general_fraction", 0.0))
    if not share:
        return {}
    objective = language_objective(context, matching, language)
    text, rate = language_texts(context, unlabelled=True), float(params["learning_rate"])
    learn_language(network, objective, language, share=share, learning_rate=rate, batches=text)
    return {f"general_{name}": term for name, term in objective.report().items()}


def prediction(task: str, params: Params, context: Context) -> Objective:
    """The loss of the second phase: the teacher's logits, and by ``hard_weight`` the labels."""
    hard = float(params["hard_weight"])
    return Objective(context, Matching(()), SoftTerm.of(task, params), 1 - hard, hard)

"""DistilBERT: some of the teacher's layers, trained to say what it says and to point where its last layer points.

With a masked language model the student first learns the language: what that predicts, the hidden pieces
themselves, and the direction of its last hidden states, the paper's triple loss. Without one it learns the task so:
the teacher's logits and the direction of its last hidden states. Then follows the task, by the labels and a second
distillation. Owns which layers are copied, what becomes of token types, and the phases.

Source: Sanh et al. 2019, DistilBERT, a distilled version of BERT.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from compress_search import Candidate, Context, Dim, Method, Params, Stage, Subject, TrialError
from compress_search.encoders import embeddings, layers

from .distillation.language_models import (
    language_model,
    language_objective,
    language_texts,
    learn_language,
    started_from,
    with_holes,
)
from .distillation.layer_maps import source_layers, written_layers
from .distillation.masked_text import MASKED_LM, unlike_teacher
from .distillation.matches import Match
from .distillation.matching import Matching
from .distillation.objective import UNLABELLED_BATCH, Objective, text_missing
from .distillation.soft_targets import SoftTerm, crf_missing, crf_space
from .distillation.students import cut_student, student_subject, unfit

INITS = ("spread", "every_other", "first", "last")


def sources(params: Params, teacher: int) -> list[int]:
    """The teacher's layers (0-based) that the student starts with copies of.

    ``spread`` is 0, 2, 4, 7, 9, 11 for six of twelve, as the published models were made; ``every_other`` every
    second from 0, or every n-th.
    """
    if custom := written_layers(str(params.get("custom_layers", "")), 0, teacher - 1):
        return list(custom)
    count = int(params["layers"])
    if params["init_layers"] == "every_other":
        return [index * (teacher // count) for index in range(count)]
    return source_layers(str(params["init_layers"]), count, teacher)


def _first_name(params: Params, teacher: int) -> str:
    """The first of :data:`INITS` by which the student would start as the same layers."""
    wanted = sources(params, teacher)
    return next(name for name in INITS if sources({**params, "init_layers": name}, teacher) == wanted)


def foldable(subject: Subject) -> bool:
    """Whether token types say nothing: there are several, and every example is a single text."""
    return subject.token_types > 1 and "pairs" not in subject.traits


def fold_token_types(network: nn.Module) -> None:
    """Add the first token type to every position and keep a single type, of zeros, in place.

    For texts of that type the network computes what it did before.
    """
    block = cast(Any, embeddings(network))
    table = block.token_type_embeddings
    with torch.no_grad():
        block.position_embeddings.weight += table.weight[0]
    single = nn.Embedding(1, table.embedding_dim, device=table.weight.device, dtype=table.weight.dtype)
    nn.init.zeros_(single.weight)
    block.token_type_embeddings = single
    cast(Any, network.config).type_vocab_size = 1


class DistilBert(Method):
    """A student of fewer layers that first learns in general, then by a second distillation on the task."""

    stage = Stage.STUDENT

    def search_space(self, teacher: Subject) -> Mapping[str, Dim]:
        """``distillation_fraction`` is the first phase's part of the training; ``custom_layers`` count from 0."""
        depths = list(range(1, teacher.layers)) or [1]
        named = {"custom_layers": ("",)}
        space = {
            "custom_layers": Dim.text(partial(written_layers, lowest=0, highest=teacher.layers - 1), form="0, 2"),
            "layers": Dim.choice(depths, max(1, teacher.layers // 2), when=named),
            "init_layers": Dim.choice(INITS, "spread", when=named),
            "drop_token_type": Dim.flag(foldable(teacher), expert=True),
            "ce_weight": Dim.real(0.0, 10.0, 5.0, expert=True),
            "cos_weight": Dim.real(0.0, 10.0, 1.0),
            "freeze_positions": Dim.flag(True, expert=True),
            "distillation_fraction": Dim.real(0.1, 0.9, 0.5),
            "second_distillation": Dim.flag(True),
            "second_alpha": Dim.real(0.0, 1.0, 0.5, when={"second_distillation": (True,)}, expert=True),
            "learning_rate": Dim.real(1e-6, 1e-2, 5e-5, log=True, expert=True),
        }
        if teacher.task != "text-regression" or "masked-lm" in teacher.traits:
            space["temperature"] = Dim.real(1.0, 10.0, 2.0, expert=True)
            space |= crf_space(teacher)
        if "unlabelled" in teacher.traits:
            space["unlabelled_text"] = Dim.flag(True, expert=True)
        return space | (_language_space() if "masked-lm" in teacher.traits else {})

    def unsupported(self, subject: Subject) -> str | None:
        """A student is made of the teacher's own layers, all alike."""
        return unfit(subject)

    def effective(self, subject: Subject, params: Params) -> Params:
        """Token types stay where they say something; an empty list of layers, or a weight of 0, says nothing."""
        second = bool(params["second_distillation"]) and bool(params["second_alpha"])
        found = {**params, "drop_token_type": bool(params["drop_token_type"]) and foldable(subject)}
        if "init_layers" in found:
            found["init_layers"] = _first_name(found, subject.layers)
        idle = set() if found.get("custom_layers") else {"custom_layers"}
        idle |= (set() if second else {"second_alpha"}) | _idle_chains(found, second)
        if not second and not found["ce_weight"]:
            idle |= {"temperature"}
        return {name: value for name, value in found.items() if name not in idle} | {"second_distillation": second}

    def faults(self, subject: Subject, params: Params) -> Mapping[str, str]:
        """A language model of other shapes, from whose layers no student can start; or no weight above 0."""
        unlike = unlike_teacher(subject) if params.get("general") else None
        found = {"general": f"true, and {unlike}; name another, or set it to false"} if unlike else {}
        return found | ({} if _weights(params) else {"ce_weight": NO_WEIGHT})

    def missing(self, teacher: Subject) -> Mapping[str, str]:
        """Text without labels, a masked language model, and a CRF to learn from."""
        language = {} if "masked-lm" in teacher.traits else dict.fromkeys(_language_space(), MASKED_LM)
        return language | text_missing(teacher, "unlabelled_text") | crf_missing(teacher)

    def after(self, subject: Subject, params: Params) -> Subject:
        """Fewer layers, and perhaps a single token type."""
        student = student_subject(subject, len(sources(params, subject.layers)), 1.0)
        return student.having(token_types=1) if params["drop_token_type"] else student

    def trains(self, params: Params) -> bool:
        """Always."""
        return True

    def apply(self, candidate: Candidate, params: Params, context: Context) -> Candidate:
        """Copy layers, then train in general, then on the task."""
        if not _weights(params):
            raise TrialError(NO_WEIGHT)
        model = language_model(candidate, context) if params.get("general") else None
        start = candidate if model is None else started_from(candidate, model)
        student = cut_student(start, sources(params, candidate.subject.layers), 1.0)
        if params["drop_token_type"]:
            fold_token_types(student.network)
        student = student.replace(subject=self.after(candidate.subject, params))
        with_positions = cast(Any, embeddings(student.network)).position_embeddings
        with_positions.requires_grad_(not params["freeze_positions"])
        if model is None:
            terms = _learn_task(student, params, context)
        else:
            terms = _learn_language(student, model, params, context)
        with_positions.requires_grad_(True)
        terms |= _learn_labels(student, params, context)
        return student.replace(notes={**student.notes, "distilbert": terms})

    def evaluate(self, candidate: Candidate, context: Context) -> Mapping[str, float]:
        """The unweighted terms of the last steps of each phase, by kind."""
        terms: Mapping[str, float] = candidate.notes.get("distilbert", {})
        return terms


def _language_space() -> dict[str, Dim]:
    language = {"general": (True,)}
    return {
        "general": Dim.flag(True, expert=True),
        "mlm_weight": Dim.real(0.0, 10.0, 2.0, when=language, expert=True),
        "mlm_probability": Dim.real(0.1, 0.3, 0.15, when=language, expert=True),
        "restrict_ce_to_mask": Dim.flag(False, when=language, expert=True),
    }


def _idle_chains(params: Params, second: bool) -> set[str]:
    """What says nothing under a CRF: text without labels has no chains, and best paths have no temperature."""
    text = params.get("general") or params.get("unlabelled_text")
    if not second and (text or not params["ce_weight"]):
        return {"crf_target"}
    tempered = params.get("crf_target") != "viterbi" or (text and params["ce_weight"])
    return set() if tempered else {"temperature"}


NO_WEIGHT = "every weight of the first phase is 0: expected one above, or nothing is learnt in it"


def _weights(params: Params) -> list[str]:
    """The weights above 0 of the first phase's losses."""
    names = ["ce_weight", "cos_weight", *(["mlm_weight"] if params.get("general") else [])]
    return [name for name in names if params[name]]


# --- the first phase, with a language model -------------------------------------------------------------------

LANGUAGE_TERMS = {"logits": "language_ce", "hard": "language_mlm", "hidden": "language_cos"}
"""What an objective calls the three terms -> what the paper does."""


def triple_loss(student: nn.Module, model: nn.Module, params: Params, context: Context) -> Objective:
    """w_ce·τ²·KL + w_mlm·cross-entropy + w_cos·(1 − cos) of a student and a language model on texts with holes."""
    scope = "labelled" if params["restrict_ce_to_mask"] else "attended"
    kind = {"feature": "logits", "loss": f"kd_kl:{params['temperature']}", "token_scope": scope}
    answers = {**kind, "weight": float(params["ce_weight"])}
    matches = [Match.model_validate(answers)] if answers["weight"] else []
    matches += _direction(params, len(layers(student)), len(layers(model)))
    matching = Matching.between(matches, student, model, context.seed)
    return language_objective(context, matching, model, float(params["mlm_weight"]))


def _direction(params: Params, student: int, teacher: int) -> list[Match]:
    """The match of the last layers of models of so many, if it has a weight."""
    weight = float(params["cos_weight"])
    match = {"student_layer": student, "teacher_layer": teacher, "loss": "cos", "weight": weight}
    return [Match.model_validate(match)] if weight else []


def _learn_language(student: Candidate, model: nn.Module, params: Params, context: Context) -> dict[str, float]:
    objective = triple_loss(student.network, model, params, context)
    texts = language_texts(context, unlabelled=bool(params.get("unlabelled_text")))
    learn_language(
        student.network,
        objective,
        model,
        share=float(params["distillation_fraction"]),
        learning_rate=float(params["learning_rate"]),
        batches=with_holes(texts, student.tokenizer, float(params["mlm_probability"]), context.seed),
    )
    return {LANGUAGE_TERMS[name]: term for name, term in objective.report().items()}


# --- the first phase without one, and the second --------------------------------------------------------------


def task_objective(student: Candidate, params: Params, context: Context) -> Objective:
    """The teacher's logits and the direction of its last hidden states."""
    last = _direction(params, student.subject.layers, len(layers(context.teacher)))
    term = SoftTerm.of(student.subject.task, params)
    if params.get("unlabelled_text"):
        term = term.unlabelled
    matching = Matching.between(last, student.network, context.teacher, context.seed)
    return Objective(context, matching, term, float(params["ce_weight"]))


def _learn_task(student: Candidate, params: Params, context: Context) -> dict[str, float]:
    objective = task_objective(student, params, context)
    share, rate = float(params["distillation_fraction"]), float(params["learning_rate"])
    text = context.unlabelled(UNLABELLED_BATCH) if params.get("unlabelled_text") else None
    objective.fit(student.network, share=share, learning_rate=rate, batches=text, scored=objective.answers)
    return {"first_ce" if name == "soft" else "cos": term for name, term in objective.report().items()}


def labels_objective(task: str, params: Params, context: Context) -> Objective:
    """The labels, and with ``second_distillation`` the teacher's logits beside them."""
    alpha = float(params["second_alpha"]) if params["second_distillation"] else 0.0
    return Objective(context, Matching(()), SoftTerm.of(task, params), alpha, 1 - alpha)


def _learn_labels(student: Candidate, params: Params, context: Context) -> dict[str, float]:
    objective = labels_objective(student.subject.task, params, context)
    share, rate = 1 - float(params["distillation_fraction"]), float(params["learning_rate"])
    objective.fit(student.network, share=share, learning_rate=rate)
    return objective.report()

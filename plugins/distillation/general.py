"""What a student learns in general before it learns a task, as dimensions: text as it is or with holes, from whom.

Owns those dimensions, what they need and the phase's training. Which features are learnt is a method's to say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from compress_search import Candidate, Context, Dim, Params, Subject

from .comparable import Shapes
from .language_models import language_objective, language_texts, learn_language, with_holes
from .masked_text import MASKED_LM
from .matches import GENERAL
from .matching import Matching
from .objective import UNLABELLED, Choice, Objective

NONE, TEXT, MASKED_TEXT = "none", "text", "masked_text"
"""What is learnt in general: nothing, matches on text as it is, or on text with holes and what is in these."""
DEPENDENT = ("general_fraction", "general_unlabelled", "mlm_weight", "mlm_probability")
"""The dimensions that say something only of what is learnt in general."""
NO_PHASE = "text at large: name some under data.unlabeled, or a language model under teacher.masked_lm"


def general_space(teacher: Subject) -> dict[str, Dim]:
    """What is learnt before the task on ``general_fraction`` of the budget, where there is what to learn from."""
    text, language = "unlabelled" in teacher.traits, "masked-lm" in teacher.traits
    if not text and not language:
        return {}
    kinds = (NONE, TEXT, MASKED_TEXT) if language else (NONE, TEXT)
    some: dict[str, tuple[str, ...]] = {"general": kinds[1:]}
    holes = {"general": (MASKED_TEXT,)}
    found = {
        "general": Dim.choice(kinds, NONE, expert=True),
        "general_fraction": Dim.real(0.1, 0.9, 0.5, when=some, expert=True),
    }
    if text and language:
        found["general_unlabelled"] = Dim.flag(True, when=some, expert=True)
    if language:
        found["mlm_weight"] = Dim.real(0.0, 10.0, 1.0, when=holes, expert=True)
        found["mlm_probability"] = Dim.real(0.1, 0.3, 0.15, when=holes, expert=True)
    return found


def general_kind(params: Params) -> str:
    """What is learnt in general, if anything."""
    return str(params.get("general", NONE))


def general_missing(teacher: Subject) -> dict[str, str]:
    """What the kinds of the phase would need."""
    if "masked-lm" in teacher.traits:
        return {} if "unlabelled" in teacher.traits else {"general_unlabelled": UNLABELLED}
    found = dict.fromkeys((f"general: {MASKED_TEXT}", "mlm_weight", "mlm_probability"), MASKED_LM)
    found["general_unlabelled"] = MASKED_LM
    if "unlabelled" not in teacher.traits:
        found |= dict.fromkeys(("general", "general_fraction"), NO_PHASE)
    return found


def language_shapes(subject: Subject, params: Params) -> Shapes | None:
    """Those of the language model where it takes the teacher's place: its own, with all pieces for classes."""
    if general_kind(params) == NONE or "masked-lm" not in subject.traits:
        return None
    return Shapes.described(subject.having(labels=subject.vocabulary))


def general_objective(
    matching: Matching, language: nn.Module | None, params: Params, context: Context, choose: Choice | None = None
) -> Objective:
    """The language model's features and logits, or the teacher's, and by ``mlm_weight`` the hidden tokens."""
    weight = float(params.get("mlm_weight", 0.0))
    return replace(language_objective(context, matching.only(GENERAL), language, weight), choose=choose)


def learn_in_general(
    student: Candidate, objective: Objective, language: nn.Module | None, params: Params, context: Context
) -> Mapping[str, float]:
    """Train a student in place, on the whole budget where nothing else is learnt; the terms at the end."""
    texts = language_texts(context, unlabelled=bool(params.get("general_unlabelled", language is None)))
    if general_kind(params) == MASKED_TEXT:
        texts = with_holes(texts, student.tokenizer, float(params["mlm_probability"]), context.seed)
    learn_language(
        student.network,
        objective,
        language,
        share=float(params.get("general_fraction", 1.0)),
        learning_rate=float(params["learning_rate"]),
        batches=texts,
    )
    return {f"general_{name}": term for name, term in objective.report().items()}

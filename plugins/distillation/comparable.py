"""What two models have to have in common to be compared by matches, and what is said where they have not.

Owns the refusals, each in a line that names the match and what would do instead. Computes no loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from torch import nn

from compress_search import Subject, TrialError
from compress_search.encoders import embeddings, feature_shape, layers

from .matches import GENERAL, LAST, Match

MORE_HEADS = "attention_mse_sum, attention_ce_mean or relation_kl:<heads>"


def check_depths(matches: Sequence[Match], teacher: int | None = None, student: int | None = None) -> None:
    """Refuse matches that point outside models of so many layers.

    Raises:
        ValueError: a layer that does not exist; the text says up to which there are some.
    """
    for number, match in enumerate(matches, start=1):
        for side, depth, names in (("teacher", teacher, match.teacher), ("student", student, match.student)):
            last = -1 if depth is None else depth if match.kind == "hidden" else depth - 1
            for name in names:
                written = name.partition(".")[2]
                layer = 0 if written in ("", LAST) else int(written)
                if depth is not None and layer > last:
                    raise ValueError(
                        f"match {number}: {side}_layer {layer} does not exist: "
                        f"{match.feature} of its {depth} layers counts from 0 to {last}"
                    )


@dataclass(frozen=True)
class Shapes:
    """What matches have to know of a model; ``of`` gives a feature's shape as :func:`feature_shape` does."""

    layers: int
    vocabulary: int
    of: Callable[[str], tuple[int, ...]]

    @classmethod
    def read(cls, network: nn.Module) -> Shapes:
        """Those of a network."""
        words = cast(Any, embeddings(network).word_embeddings).num_embeddings
        return cls(len(layers(network)), words, partial(feature_shape, network))

    @classmethod
    def described(cls, subject: Subject) -> Shapes:
        """Those of a network whose layers are all alike, before there is one."""

        def of(name: str) -> tuple[int, ...]:
            if name == "logits":
                return (subject.labels,)
            if name == "pooled" and not subject.pooler:
                raise TrialError("pooled cannot be read: the network classifies tokens, it has no sentence to pool")
            wide = name == "pooled" or name.startswith("hidden")
            return (subject.hidden,) if wide else (round(subject.heads), subject.head_dim)

        return cls(subject.layers, subject.vocabulary, of)


def check_matches(
    matches: Sequence[Match], student: Shapes, teacher: Shapes, language: Shapes | None = None
) -> None:
    """Refuse matches that two models cannot be compared by.

    Args:
        matches: their numbers are those that are told.
        student: who learns.
        teacher: who is learnt from.
        language: a language model that is learnt from in the teacher's place in the phase ``general``.

    Raises:
        TrialError: other vocabularies, a layer that does not exist, heads or widths that differ where they may not,
            a projection of other widths, or classes where there are none; the text names what would do.
    """
    if student.vocabulary != teacher.vocabulary:
        raise TrialError(
            f"student and teacher read vocabularies of {student.vocabulary} and {teacher.vocabulary} pieces: "
            "expected the same one"
        )
    try:
        check_depths(matches, teacher.layers, student.layers)
    except ValueError as error:
        raise TrialError(str(error)) from None
    for number, match in enumerate(matches, start=1):
        faults = (_mismatch(match, student, model) for model in _teachers(match, teacher, language))
        if fault := next(filter(None, faults), None):
            raise TrialError(f"match {number}: {': '.join(filter(None, fault))}")
        if language and match.kind == "pooled" and GENERAL in match.phases:
            raise TrialError(f"match {number}: a language model has no pooled sentence: name phase 1 or 2")


def _teachers(match: Match, teacher: Shapes, language: Shapes | None) -> list[Shapes]:
    """Whom it is learnt from, in one phase or another."""
    if language is None or GENERAL not in match.phases:
        return [teacher]
    return [language] if match.phases == {GENERAL} else [teacher, language]


def unmatched(matches: Sequence[Match], student: Shapes, teacher: Shapes) -> str | None:
    """What these matches cannot compare of two models, for a method that writes them itself; None where they can.

    Unlike :func:`check_matches` it names no match and no other loss, for the study has written none.
    """
    faults = (_mismatch(match, student, teacher) for match in matches)
    return next((fault[0] for fault in faults if fault), None)


def _mismatch(match: Match, student: Shapes, teacher: Shapes) -> tuple[str, str] | None:
    """What a match cannot compare, and what would do instead, if anything; None where it can."""
    check = _states_differ if match.kind in ("hidden", "pooled") else _attention_differs
    if match.kind == "logits":
        check = _logits_differ
    pairs = zip(match.student, match.teacher, strict=True)
    return next(filter(None, (check(match, student, teacher, *pair) for pair in pairs)), None)


def _logits_differ(
    match: Match, student: Shapes, teacher: Shapes, ours: str, theirs: str
) -> tuple[str, str] | None:
    if match.function.classes and teacher.of(theirs) == (1,):
        return f"{match.loss} compares classes, and the task has none", "use kd_mse"
    return None


def _states_differ(
    match: Match, student: Shapes, teacher: Shapes, ours: str, theirs: str
) -> tuple[str, str] | None:
    mine, other = student.of(ours)[0], teacher.of(theirs)[0]
    if match.proj and match.proj.widths and match.proj.widths != [mine, other]:
        return f"proj maps {match.proj.widths}, and the widths are [{mine}, {other}]", ""
    if mine != other and not match.proj and not match.function.any_width:
        return f"{match.loss} cannot compare widths {mine} and {other}", "add proj: linear, or use nst"
    return None


def _attention_differs(
    match: Match, student: Shapes, teacher: Shapes, ours: str, theirs: str
) -> tuple[str, str] | None:
    (heads, size), (more, bigger) = (
        model.of(name.replace(match.kind, _SOURCE.get(match.kind, match.kind)))
        for model, name in ((student, ours), (teacher, theirs))
    )
    if heads != more and not match.function.any_heads:
        return f"{match.loss} cannot compare {heads} heads with {more}", f"use {MORE_HEADS}"
    if size != bigger and not match.function.any_width:
        return f"{match.loss} cannot compare heads of size {size} and {bigger}", "use relation_kl:<heads>"
    name, _, number = match.loss.partition(":")
    for width in (heads * size, more * bigger) if name == "relation_kl" else ():
        if width % int(float(number)):
            return f"{match.loss} needs a width that {number} divides, got {width}", ""
    return None


_SOURCE = {"scores": "query", "probabilities": "query", "values": "value"}

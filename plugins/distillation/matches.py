"""Distillation written as data: which feature of which layer is compared with which of the teacher's, and how.

A match names two features, a loss of :mod:`compress_search.losses` and a weight; a student may be projected
onto the teacher's width by a map that is trained with it and then thrown away. Owns the form of matches and
what is wrong with them; :mod:`.matching` computes their losses. Which matches a method makes, and when it
trains on them, is its own.

Layers count as everywhere here: ``hidden`` 0 is the embeddings and n the output of the n-th layer; everything of
attention counts layers from 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Annotated, Any, Literal, cast

import yaml
from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails
from torch import nn

from compress_search import Subject, TrialError
from compress_search.encoders import embeddings, feature_shape, layers
from compress_search.losses import FeatureLoss, TokenScope, feature_loss

KINDS = {
    "hidden": "hidden",
    "embedding": "hidden",
    "attention_scores": "scores",
    "attention": "scores",
    "attention_probs": "probabilities",
    "q": "query",
    "k": "key",
    "v": "value",
    "value_relation": "values",
    "pooled": "pooled",
    "logits": "logits",
}
"""What a match calls a feature -> what the encoders call it."""
UNNUMBERED = ("embedding", "pooled", "logits")
"""Features of the whole network, which have no layer to choose."""
LAST = "last"
"""Instead of a layer's number: the last one's, whatever depth a search gives the student."""
GENERAL = "general"
"""The phase that comes before the task's own two, on text at large."""
MORE_HEADS = "attention_mse_sum, attention_ce_mean or relation_kl:<heads>"

_FORM = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Projection(BaseModel):
    """A map of the student's width onto the teacher's; several matches may share one by its name.

    Also written ``linear``, or ``[linear, 384, 768, {lr: 0.001}]`` with the two widths.
    """

    model_config = _FORM
    kind: Literal["linear", "relu", "tanh", "identity"] = "linear"
    widths: list[int] | None = Field(default=None, min_length=2, max_length=2)
    lr: float | None = Field(default=None, gt=0)
    shared: str | None = None


def _projection(value: Any) -> Any:
    if isinstance(value, str):
        return {"kind": value}
    if isinstance(value, list) and len(value) in (3, 4):
        options = value[3] if len(value) == 4 else {}
        return {
            "kind": value[0],
            "widths": value[1:3],
            **(options if isinstance(options, dict) else {"?": options}),
        }
    return value


def _layer(value: Any) -> Any:
    numbers = value if isinstance(value, list) else [value]
    if not all(number == LAST or type(number) is int for number in numbers):
        raise ValueError(f"expected a layer's number, {LAST}, or a list of two of these, got {value!r}")
    return value


Layer = Annotated[int | str | list[int | str], BeforeValidator(_layer)]


def _placed(layer: Layer, last: int) -> Layer:
    if isinstance(layer, list):
        return [last if number == LAST else number for number in layer]
    return last if layer == LAST else layer


def _listed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else (value,)


class Match(BaseModel):
    """One comparison of the student with its teacher.

    ``teacher_layer`` and ``student_layer`` are numbers or :data:`LAST`, two each for losses of pairs of layers.
    ``phase`` is one or a list of those that the method has, ``all`` by default. The weight is multiplied by 1 − u
    under ``linear_decay`` and by u under ``linear_growth``, u being the part of the phase that is done.
    ``token_scope``: of the logits of tokens those with a label count, as hidden ones have, or all but padding.
    """

    model_config = _FORM
    teacher_layer: Layer = Field(default=0, validation_alias=AliasChoices("teacher_layer", "layer_T"))
    student_layer: Layer = Field(default=0, validation_alias=AliasChoices("student_layer", "layer_S"))
    feature: Literal[tuple(KINDS)] = "hidden"  # type: ignore[valid-type]
    loss: str = "hidden_mse"
    weight: float = Field(default=1.0, gt=0)
    proj: Annotated[Projection | None, BeforeValidator(_projection)] = None
    mask: bool = True
    phase: Annotated[tuple[Literal["general", 1, 2, "all"], ...], BeforeValidator(_listed), Field(min_length=1)] = (
        "all",
    )
    schedule: Literal["const", "linear_decay", "linear_growth"] = "const"
    token_scope: TokenScope = "labelled"

    @model_validator(mode="after")
    def _agrees(self) -> Match:
        loss = self.function
        if self.kind not in loss.kinds:
            fitting = [name for name, kind in KINDS.items() if kind in loss.kinds]
            raise ValueError(f"{self.loss} compares {', '.join(fitting)}, not {self.feature}")
        for name, value in (("teacher_layer", self.teacher_layer), ("student_layer", self.student_layer)):
            numbers = value if isinstance(value, list) else [value]
            if len(numbers) != 1 + loss.pair or isinstance(value, list) != loss.pair:
                raise ValueError(f"{self.loss} takes {'two layers' if loss.pair else 'a layer'}, {name} is {value}")
            if below := [number for number in numbers if number != LAST and int(number) < 0]:
                raise ValueError(f"{name}: expected 0 or more, got {below[0]}")
            if self.feature in UNNUMBERED and any(numbers):
                raise ValueError(f"{name}: {self.feature} has no layers, got {value}")
        if self.proj and self.kind not in ("hidden", "pooled"):
            raise ValueError(f"proj: only hidden, embedding and pooled can be projected, not {self.feature}")
        if self.token_scope == "attended" and self.kind != "logits":
            raise ValueError(f"token_scope: only logits have one, of {self.feature} all but padding counts")
        return self

    @property
    def kind(self) -> str:
        """The feature as the encoders call it."""
        return KINDS[self.feature]

    @cached_property
    def function(self) -> FeatureLoss:
        """The loss of its name."""
        return feature_loss(self.loss)

    @property
    def student(self) -> list[str]:
        """The student's features, one or two."""
        return self._names(self.student_layer)

    @property
    def teacher(self) -> list[str]:
        """The teacher's features, one or two."""
        return self._names(self.teacher_layer)

    def placed(self, student: int, teacher: int) -> Match:
        """The match between models of so many layers, with the last ones' numbers in their place."""
        below = 0 if self.kind == "hidden" else 1  # everything of attention counts from 0
        numbers = {
            "student_layer": _placed(self.student_layer, student - below),
            "teacher_layer": _placed(self.teacher_layer, teacher - below),
        }
        return self.model_copy(update=numbers)

    def _names(self, layer: Layer) -> list[str]:
        numbers = layer if isinstance(layer, list) else [layer]
        return [self.kind if self.kind in UNNUMBERED else f"{self.kind}.{number}" for number in numbers]

    @property
    def phases(self) -> frozenset[str | int]:
        """The phases that it is of, each by its own name."""
        return frozenset((GENERAL, 1, 2) if "all" in self.phase else self.phase)

    def scheduled(self, progress: float) -> float:
        """The weight at this part of a phase."""
        return self.weight * {"const": 1.0, "linear_decay": 1 - progress, "linear_growth": progress}[self.schedule]


@cache
def parse_matches(text: str) -> tuple[Match, ...]:
    """Matches from a YAML or JSON list.

    Raises:
        ValueError: the first thing wrong, in one line that names the match and the key.
    """
    try:
        items = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"not a list of matches: {' '.join(str(error).split())}") from None
    if not isinstance(items, list) or not items:
        raise ValueError(f"expected a list of matches, got {str(text)[:40]!r}")
    try:
        found = tuple(TypeAdapter(list[Match]).validate_python(items))
    except ValidationError as error:
        raise ValueError(_complaint(error.errors()[0])) from None
    _check_shared(found)
    return found


def _complaint(error: ErrorDetails) -> str:
    """One of pydantic's errors in a line that names the match and the key."""
    number, *keys = error["loc"]
    place = ".".join(map(str, [f"match {int(number) + 1}", *keys]))
    if error["type"] == "extra_forbidden":
        known = (Projection if "proj" in keys[:-1] else Match).model_fields
        return f"{place}: unknown key, expected one of {', '.join(known)}"
    return f"{place}: {error['msg'].removeprefix('Value error, ')}"


def _check_shared(matches: Sequence[Match]) -> None:
    """Refuse one name for two projections."""
    first: dict[str, tuple[int, Projection]] = {}
    for number, match in enumerate(matches, start=1):
        if match.proj and match.proj.shared:
            before, proj = first.setdefault(match.proj.shared, (number, match.proj))
            if proj != match.proj:
                raise ValueError(f"match {number}.proj: {proj.shared!r} is another one in match {before}")


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

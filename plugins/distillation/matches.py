"""Distillation written as data: which feature of which layer is compared with which of the teacher's, and how.

A match names two features, a loss of :mod:`compress_search.losses` and a weight; a student may be projected
onto the teacher's width by a map that is trained with it and then thrown away. Owns the form of matches;
:mod:`.comparable` has which models they can compare, :mod:`.matching` computes their losses. Which matches a method
makes, and when it trains on them, is its own.

Layers count as everywhere here: ``hidden`` 0 is the embeddings and n the output of the n-th layer; everything of
attention counts layers from 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, cached_property
from typing import Annotated, Any, Literal

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

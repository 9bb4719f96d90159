"""pydantic's validation errors in the words of a study's author; knows nothing of what is validated."""

from __future__ import annotations

import difflib
import json
import types
from collections.abc import Iterable, Mapping
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import ErrorDetails

_EXPECTED = {
    "dict_type": "a mapping",
    "finite_number": "a finite number",
    "float_type": "a number",
    "greater_than": "a number above {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "int_type": "an integer",
    "less_than": "a number below {lt:g}",
    "less_than_equal": "at most {le:g}",
    "string_type": "text",
    "string_too_short": "some text",
    "string_too_long": "at most {max_length} characters",
}


class Fault(ValueError):
    """What a validator finds wrong with something below the value it was given."""

    def __init__(self, key: str | int, message: str) -> None:
        self.key = key
        super().__init__(message)


def complain(model: type[BaseModel], error: ErrorDetails) -> tuple[str, str]:
    """The dotted key and the sentence for one of the model's validation errors."""
    cause = error.get("ctx", {}).get("error")
    loc = [*error["loc"], *([cause.key] if isinstance(cause, Fault) else [])]
    return ".".join(map(str, loc)), _sentence(model, error)


def _sentence(model: type[BaseModel], error: ErrorDetails) -> str:
    kind, ctx, value = error["type"], error.get("ctx", {}), error["input"]
    if kind == "value_error":
        return str(ctx["error"])
    if kind == "extra_forbidden":
        return unknown("key", error["loc"][-1], _section(model, error["loc"][:-1]).model_fields)
    if kind == "missing":
        field = _section(model, error["loc"][:-1]).model_fields[str(error["loc"][-1])]
        return f"missing; expected {field.description}"
    if kind == "model_type":
        return f"expected a mapping with the keys {', '.join(_section(model, error['loc']).model_fields)}"
    if kind == "literal_error":
        options = _literals(_section(model, error["loc"][:-1]).model_fields[str(error["loc"][-1])].annotation)
        return f"expected one of {', '.join(options)}, got {show(value)}"
    expected = _EXPECTED.get(kind)
    return f"expected {expected.format(**ctx)}, got {show(value)}" if expected else error["msg"]


def unknown(what: str, word: Any, options: Iterable[str]) -> str:
    """``unknown key (did you mean "trials"?)``, or what there is when nothing is close."""
    names = list(options)
    close = difflib.get_close_matches(str(word).lower(), names, n=1)
    return f"unknown {what}" + (
        f' (did you mean "{close[0]}"?)' if close else f"; expected one of {', '.join(names)}"
    )


def show(value: Any, width: int = 60) -> str:
    """The value on one line, as YAML would spell it, cut to ``width`` characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= width else text[: width - 1] + "…"


def _literals(annotation: Any) -> list[str]:
    """Every text a (union of) Literal allows."""
    if get_origin(annotation) in (Union, types.UnionType):
        return [text for part in get_args(annotation) for text in _literals(part)]
    return [text for text in get_args(annotation) if isinstance(text, str)]


def _section(model: type[BaseModel], loc: Iterable[str | int]) -> type[BaseModel]:
    """The nested model at a location."""
    names = iter(loc)
    for name in names:
        annotation = model.model_fields[str(name)].annotation
        if get_origin(annotation) is Mapping:  # of sections by names of the author's own
            next(names, None)
        parts = get_args(annotation) or (annotation,)
        model = next(part for part in parts if isinstance(part, type) and issubclass(part, BaseModel))
    return model

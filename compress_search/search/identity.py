"""What a study is, so that a later run under the same name either continues it or is refused.

Budgets, resources and places may change between runs; the space, the objectives, the data, the training and the
protocol of measuring may not, since old and new trials could not be compared.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from compress_search.errors import StudyError

if TYPE_CHECKING:
    from compress_search.plan import Plan

MAY_CHANGE = ("name", "storage", "output", "artifacts", "cluster", "search")
"""Top-level keys of a study that a later run may change; of ``search``, the seed may not."""


def identity(plan: Plan) -> dict[str, Any]:
    """What may not change, as plain JSON. Paths are relative to the output, so that a moved study is the same."""
    definition = plan.study.to_dict()
    fixed = {key: value for key, value in definition.items() if key not in MAY_CHANGE}
    fixed["search"] = {"seed": plan.study.search.seed}
    fixed["objectives"] = dict(plan.study.directions)
    fixed["space"] = plan.outline()
    found: dict[str, Any] = json.loads(json.dumps(_relative(fixed, str(plan.study.output)), default=str))
    return found


def _relative(value: Any, start: str) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _relative(inner, start) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_relative(inner, start) for inner in value]
    if isinstance(value, str | os.PathLike) and os.path.isabs(value):
        return os.path.relpath(value, start)
    return value


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted keys under which two mappings differ, with the old and the new value (None: not there)."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found |= differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found[f"{prefix}{key}"] = (before, after)
    return found


def refuse_change(plan: Plan, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Stop a run whose study is not the stored one.

    Raises:
        StudyError: at the first key that differs; the text names all of them.
    """
    changed = differences(old, new)
    if not changed:
        return
    written = {key: pair for key, pair in changed.items() if not key.startswith("space.")}
    shown = written or changed  # the space follows from what is written, unless a plugin changed
    text = "; ".join(f"{key} was {_show(before)}, is {_show(after)}" for key, (before, after) in shown.items())
    message = f"this study was begun otherwise ({text}): restore it, or give the study another name"
    error: StudyError = plan.study.error(next(iter(shown)), message)
    raise error


def _show(value: Any, longest: int = 60) -> str:
    text = "not there" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= longest else text[: longest - 1] + "…"

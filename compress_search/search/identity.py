"""What a study is, so that a later run under the same name either continues it or is refused.

Three things may not change, or old and new trials could not be compared: what :meth:`Study.identity` says of the
study's words, the space that follows from them and the installed methods, and what the files hold that they name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from compress_search.errors import StudyError
from compress_search.study import MAY_CHANGE

if TYPE_CHECKING:
    from compress_search.plan import Plan

Contents = Mapping[str, str]
"""By dotted key of a study, a hash of what the files hold that it names."""


def identity(plan: Plan, contents: Contents | None = None) -> dict[str, Any]:
    """What may not change, as plain JSON. Paths are relative to the output, so that a moved study is the same."""
    fixed = {**plan.study.identity(), "space": plan.outline(), "contents": dict(contents or {})}
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


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], written: Mapping[str, Any], prefix: str = ""
) -> dict[str, tuple[Any, Any]]:
    """Dotted keys under which two mappings differ, with the old and the new value (None: not there).

    ``written`` is the part of the new one that is not at its default. A key that the old one lacks counts only
    where it is written: the version of then did what is now the default.
    """
    found: dict[str, tuple[Any, Any]] = {}
    for key in sorted({*old, *written}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found |= differences(before, after, written.get(key, {}), f"{prefix}{key}.")
        elif before != after and f"{prefix}{key}" not in MAY_CHANGE:
            found[f"{prefix}{key}"] = (before, after)
    return found


def refuse_change(plan: Plan, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Stop a run whose study is not the stored one.

    Files are compared by what they hold, wherever they now lie; by their paths where a study was stored before
    their contents were.

    Raises:
        StudyError: at the first key that differs; the text names all of them, or the file that was changed.
    """
    words = {**new, "contents": {}}
    begun, now = old.get("contents", {}), new["contents"]
    written = {**plan.study.identity(defaults=False), "space": new["space"]}
    changed = differences({**old, "contents": {}}, words, written)
    changed = {key: pair for key, pair in changed.items() if key not in begun or begun[key] != now.get(key)}
    if changed:
        raise _begun_otherwise(plan, changed)
    for key in now:
        if key in begun and begun[key] != now[key]:
            raise _file_changed(plan, key)


def _begun_otherwise(plan: Plan, changed: Mapping[str, tuple[Any, Any]]) -> StudyError:
    written = {key: pair for key, pair in changed.items() if not key.startswith("space.")}
    shown = written or changed  # the space follows from what is written, unless a plugin changed
    text = "; ".join(f"{key} was {_show(before)}, is {_show(after)}" for key, (before, after) in shown.items())
    message = f"this study was begun otherwise ({text}): restore it, or give the study another name and output"
    return plan.study.error(next(iter(shown)), message)


def _file_changed(plan: Plan, key: str) -> StudyError:
    source: Any = plan.study.to_dict()
    for part in key.split("."):
        source = source[part]
    named = ", ".join(source) if isinstance(source, list) else source
    message = f"{named} was changed after this study was begun: restore it, or name another output and study"
    return plan.study.error(key, message)


def _show(value: Any, longest: int = 60) -> str:
    text = "not there" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= longest else text[: longest - 1] + "…"

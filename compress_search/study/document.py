"""YAML read strictly, with the place of every key; knows nothing of studies.

Plain scalars mean what YAML 1.2 says: ``5e-5`` is a number, ``no`` and ``on`` are text, ``010`` is ten. Duplicate
keys are errors rather than the last one winning, and tags make no objects.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from compress_search.errors import StudyError

MOST_KEYS = 100_000
"""More keys than any study has: aliases of aliases could make a small file arbitrarily large."""


@dataclass(frozen=True)
class Place:
    """Where a key stands: a file and its line, or the override that set it."""

    file: str
    line: int | None = None


@dataclass(frozen=True)
class Document:
    """Plain data and the place of each dotted key; items of a list are numbered from 0 (``plugins.0``)."""

    data: Any
    places: dict[str, Place]

    def place(self, key: str) -> Place:
        """The place of the key or of its nearest ancestor; the bare file where there is neither."""
        while key and key not in self.places:
            key = key.rpartition(".")[0]
        return self.places[key]

    def end(self, key: str) -> int | None:
        """The last line on which something of this section stands."""
        under = f"{key}." if key else ""
        return max((place.line or 0 for name, place in self.places.items() if name.startswith(under)), default=None)

    def error(self, key: str, message: str) -> StudyError:
        """An error that names the key and its place."""
        place = self.place(key)
        return StudyError(message, file=place.file, line=place.line, key=key or None)


class _Loader(yaml.SafeLoader):
    """Composes nodes, with the plain scalars of YAML 1.2's core schema."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 (PyYAML's own class-level registry)


_SCALARS = {
    "bool": ("true|True|TRUE|false|False|FALSE", "tTfF"),
    "null": ("~|null|Null|NULL|", ["~", "n", "N", ""]),
    "int": ("[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
}
for _name, (_pattern, _first) in _SCALARS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"(?:{_pattern})$"), list(_first))


def read(path: Path) -> Document:
    """Read a YAML file.

    Raises:
        StudyError: it cannot be read, is not UTF-8 or not valid YAML, or has a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise StudyError(f"cannot be read: {error.strerror}", file=path) from error
    except UnicodeDecodeError as error:
        raise StudyError(f"not UTF-8 text (byte {error.start})", file=path) from error
    return parse(text, str(path))


def parse(text: str, file: str) -> Document:
    """Parse YAML text; ``file`` is what errors call it.

    Raises:
        StudyError: it is not valid YAML or has a key twice.
    """
    places = {"": Place(file)}
    try:
        node = _Loader(text).get_single_node()
        return Document(None if node is None else _value(node, "", places), places)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else None
        raise StudyError(_explain(error), file=file, line=line) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, int(error.position)) + 1
        raise StudyError(f"not valid YAML: {error.reason}", file=file, line=line) from error
    except RecursionError as error:
        raise StudyError("not valid YAML: nested too deeply", file=file) from error


def override(document: Document, assignment: str) -> Document:
    """The document with one key set by ``a.b.c=VALUE``, VALUE being YAML; sections are made as needed.

    What stands under ``constraints`` is one key, so that a plugin's ``method.metric`` can be named.

    Raises:
        StudyError: it has no ``=``, VALUE is not valid YAML, or the key runs through something without keys.
    """
    dotted, equals, text = assignment.partition("=")
    # a URL may hold a password, and so may what should have been one
    place = Place(f"--set {dotted}=…" if re.search("://|@", text) else f"--set {assignment}")
    if not (equals and all(dotted.split("."))):
        raise StudyError("expected KEY=VALUE, for example search.trials=8", file=place.file)
    try:
        # ">= 0.9" would open a block scalar, which makes no sense on a command line
        value = text if text.startswith(">") else parse(text, place.file).data
    except StudyError as error:
        raise StudyError(error.message, file=place.file, key=error.key) from error
    head, *rest = dotted.split(".")
    path = [head, ".".join(rest)] if head == "constraints" and rest else [head, *rest]
    data = copy.deepcopy(document.data)
    try:
        data = _assign(data, path, value)
    except (TypeError, ValueError, IndexError) as error:
        raise StudyError("nothing can be set there", file=place.file, key=dotted) from error
    kept = {key: old for key, old in document.places.items() if not key.startswith(f"{dotted}.")}
    return Document(data, {**kept, dotted: place})


def _assign(data: Any, path: Sequence[str], value: Any) -> Any:
    if not path:
        return value
    head, *rest = path
    if isinstance(data, list):
        data[int(head)] = _assign(data[int(head)], rest, value)
        return data
    if data is not None and not isinstance(data, dict):
        raise TypeError(f"{data!r} has no keys")
    return {**(data or {}), head: _assign((data or {}).get(head), rest, value)}


def _value(node: yaml.Node, key: str, places: dict[str, Place]) -> Any:
    """Plain data of a node; notes the place of everything in it."""
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node)
    if len(places) > MOST_KEYS:
        raise yaml.MarkedYAMLError(problem=f"more than {MOST_KEYS} keys", problem_mark=node.start_mark)
    under = f"{key}." if key else ""
    file = places[""].file
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            places[f"{under}{number}"] = Place(file, item.start_mark.line + 1)
        return [_value(item, f"{under}{number}", places) for number, item in enumerate(node.value)]
    data: dict[str, Any] = {}
    for name, item in node.value:
        line = name.start_mark.line + 1
        if not isinstance(name, yaml.ScalarNode):
            raise StudyError("expected a plain key", file=file, line=line, key=key or None)
        dotted = f"{under}{name.value}"
        if name.value in data:
            raise StudyError(
                f"duplicate key (first on line {places[dotted].line})", file=file, line=line, key=dotted
            )
        places[dotted] = Place(file, line)
        data[name.value] = _value(item, dotted, places)
    return data


def _scalar(node: yaml.ScalarNode) -> bool | int | float | str | None:
    kind, text = node.tag.rpartition(":")[2], node.value
    try:
        if kind == "bool":
            return {"true": True, "false": False}[text.lower()]
        if kind == "int":
            return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
        if kind == "float":
            return float(text.replace(".inf", "inf").replace(".nan", "nan"))
    except (KeyError, ValueError) as error:
        raise yaml.MarkedYAMLError(problem=f"{text!r} is no {kind}", problem_mark=node.start_mark) from error
    return None if kind == "null" else str(text)


def _explain(error: yaml.MarkedYAMLError) -> str:
    problem = " ".join((error.problem or "syntax error").split())
    if "chomping or indentation" in problem:
        problem = 'a value that begins with ">" needs quotes, for example ">= 0.9"'
    return f"not valid YAML: {problem}"

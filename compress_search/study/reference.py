"""docs/study-reference.md, written from the schema so that it cannot drift.

``python -m compress_search.study.reference`` prints it. Owns how the schema is shown, and knows nothing of how a
study is read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from compress_search.study import Study
from compress_search.study.goals import COSTS, METRICS, direction

Schema = Mapping[str, Any]
"""A JSON schema, or a part of one."""

COST_MEANINGS = {
    "latency_ms": "milliseconds of a batch, over the lengths of the data: the ratio to the teacher, measured side "
    "by side, × its latency",
    "speedup": "the teacher's latency over the candidate's",
    "throughput": "examples a second",
    "size_mb": "MB (10⁶ bytes) of the files the runtime loads",
    "memory_mb": "peak resident MB of a process that runs it above an empty one, the largest of three",
}


@dataclass(frozen=True)
class Row:
    """One key of a section as the reference shows it."""

    key: str
    value: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Section:
    """A mapping within the study file; the file itself has no key. Of an author's own names the key has NAME."""

    key: str
    meaning: str
    rows: tuple[Row, ...]


def sections(
    schema: Schema, definitions: Mapping[str, Schema], key: str = "", shown: set[str] | None = None
) -> Iterator[Section]:
    """The section of a schema and all below it, in the order of the file; of those that are alike the first."""
    required, shown = schema.get("required", ()), set() if shown is None else shown
    rows = [_row(name, part, name in required, shown) for name, part in schema["properties"].items()]
    yield Section(key, schema["description"], tuple(rows))
    for name, part in schema["properties"].items():
        below = _reference(part)
        if below and below not in shown:
            shown.add(below)
            path = f"{key}.{name}{'.NAME' if _named(part) else ''}".lstrip(".")
            yield from sections(definitions[below], definitions, path, shown)


def reference() -> str:
    """The page as Markdown."""
    schema = Study.model_json_schema()
    environment = Environment(
        loader=PackageLoader("compress_search"),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    costs = {name: COST_MEANINGS[name] for name in COSTS}
    return environment.get_template("study-reference.md.j2").render(
        sections=list(sections(schema, schema["$defs"])), metrics=METRICS, costs=costs, direction=direction
    )


def _reference(part: Schema) -> str | None:
    """The name of the section a key holds, if it holds one."""
    held = [_named(option) or option for option in _options(part)]
    return next((option["$ref"].rpartition("/")[2] for option in held if "$ref" in option), None)


def _named(part: Schema) -> Schema | None:
    """What stands under each of an author's own names, where a key holds sections by such."""
    inner: Schema | bool = part.get("additionalProperties", False)
    return inner if isinstance(inner, Mapping) and "$ref" in inner else None


def _row(name: str, part: Schema, required: bool, shown: Collection[str]) -> Row:
    return Row(name, _values(part, shown), _escape(_default(part, required)), _escape(part["description"]))


def _default(part: Schema, required: bool) -> str:
    if "derived" in part:
        return str(part["derived"])
    default = part.get("default")
    if isinstance(default, str | int | float):
        return f"`{default}`"
    return "required" if required else ""


def _values(part: Schema, shown: Collection[str]) -> str:
    """What may be written, in words."""
    if section := _reference(part):
        return f"mapping, see {'above' if section in shown else 'below'}"
    return " or ".join(filter(None, (_value(option) for option in _options(part))))


def _options(part: Schema) -> list[Schema]:
    """The alternatives of a key but for null, which only stands for leaving it out."""
    return [option for option in part.get("anyOf", [part]) if option.get("type") != "null"]


def _value(option: Schema) -> str:
    if "const" in option or "enum" in option:
        return ", ".join(f"`{value}`" for value in option.get("enum", [option.get("const")]))
    kind = str(option["type"])
    names = {"array": "list", "string": "text", "object": "mapping"}
    return f"{names.get(kind, kind)} {', '.join(_bounds(option))}".rstrip()


def _bounds(option: Schema) -> Iterator[str]:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    for name, sign in signs.items():
        if name in option:
            yield f"{sign} {option[name]}"


def _escape(text: str) -> str:
    """Text that stays in its cell, with every <placeholder> visible."""
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    print(reference(), end="")

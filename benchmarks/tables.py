"""Writes what a benchmark measured as a Markdown page, with the machine it was measured on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from compress_search.environment import fingerprint

RESULTS = Path(__file__).parent / "results"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def machine() -> str:
    """This one, in a few words."""
    facts = fingerprint()
    cpu = facts["cpu"]
    return f"{cpu['model']} ({', '.join(cpu['flags'])}), {cpu['cores']} cores, Python {facts['python']}"


def write(name: str, title: str, parts: Iterable[str], measured_on: str | None = None) -> Path:
    """The page ``results/<name>.md``, of measurements on this machine unless others are named."""
    RESULTS.mkdir(exist_ok=True)
    page = RESULTS / f"{name}.md"
    where = f"Machine: {measured_on or machine()}."
    page.write_text("\n\n".join([f"# {title}", where, *parts]) + "\n", encoding="utf-8")
    return page

"""The documents and plans of a study as tables for a terminal.

Owns which columns a person sees and in which order. Computes nothing that a report or a plan does not hold; all
text from studies and methods is shown as it is, never read as markup.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from compress_search import formats, wording
from compress_search.report import Entry, Report

if TYPE_CHECKING:
    from compress_search.method import Method
    from compress_search.registry import Registry
    from compress_search.space import Space

PIPED_WIDTH = 160
"""Characters to a line where no terminal tells."""

STATES = ("complete", "stopped", "failed", "infeasible", "duplicate", "running", "waiting")


def show(*parts: RenderableType) -> None:
    """Print to standard output."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PIPED_WIDTH)
    for part in parts:
        console.print(part)


def grid(title: str, heads: Sequence[str], rows: Iterable[Sequence[Any]], left: Sequence[str] = ()) -> Table:
    """A table; columns are aligned right but for those named in ``left``, whose text may wrap."""
    table = Table(title=title or None, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    for head in heads:
        wraps = head in left
        table.add_column(head, justify="left" if wraps else "right", no_wrap=not wraps, header_style="dim")
    for row in rows:
        table.add_row(
            *(cell if isinstance(cell, Text) else Text("" if cell is None else str(cell)) for cell in row)
        )
    return table


def pairs(items: Mapping[str, Any], title: str = "") -> Table:
    """Names and values in two columns."""
    return grid(title, ["", " "], items.items(), left=("", " "))


def report_tables(found: Report, path: Path) -> list[RenderableType]:
    """Teacher, baselines, front; the recommendation in a sentence with its export command; the failures."""
    parts: list[RenderableType] = [front_table(found), Text()]
    parts.append(Text(wording.recommendation(found), style="bold"))
    if found.recommended is not None:
        place = shlex.quote(str(path))
        parts.append(Text(f"  compress-search export {place} {found.recommended} -o trial-{found.recommended}/"))
    parts.append(Text(counts_line(found), style="dim"))
    failed = wording.failures(found)
    if failed:
        rows = [(len(numbers), reason, ", ".join(map(str, numbers))) for reason, numbers in failed]
        parts += [Text(), grid("Failures", ["trials", "reason", "numbers"], rows, left=("reason", "numbers"))]
    return parts


def front_table(found: Report) -> Table:
    """One row for the teacher, each baseline and each member of the front."""
    metrics = wording.key_metrics(found)
    tested = sorted({name for entry in found.trials for name in entry.test or {} if name in metrics})
    heads = ["trial", "", *(formats.style(name).heading for name in metrics)]
    heads += [f"test {formats.style(name).heading}" for name in tested] + ["recipe", "notes"]
    rows = []
    for entry in wording.headliners(found):
        cells = [cell(entry, name, found.teacher) for name in metrics]
        tests = [formats.number(name, (entry.test or {}).get(name)) for name in tested]
        mark = "→" if entry.number == found.recommended else "●" if entry.on_front else ""
        rows.append((entry.number, mark, *cells, *tests, wording.title(entry), ", ".join(wording.notes(entry))))
    return grid(f"{found.study}: the front against the teacher", heads, rows, left=("", "recipe", "notes"))


def cell(entry: Entry, metric: str, teacher: Mapping[str, float]) -> str:
    """A value with its interval and, beside a teacher's value, the change against it."""
    text = formats.with_interval(metric, entry.metrics.get(metric), entry.intervals.get(metric))
    change = wording.change(entry, metric, teacher)
    return f"{text} ({change})" if change else text


def counts_line(found: Report) -> str:
    """How many trials ended how."""
    counts = wording.counts(found)
    listed = [f"{counts[state]} {state}" for state in STATES if state in counts]
    return f"Trials: {', '.join(listed) or 'none yet'}."


def trials_table(found: Report) -> Table:
    """One line a trial."""
    metrics = list(found.objectives)
    heads = ["trial", "state", *(formats.style(name).heading for name in metrics), "time", "recipe", "error"]
    rows = [
        (
            f"{entry.number}{'*' if entry.on_front else ''}",
            entry.state,
            *(formats.number(name, entry.metrics.get(name)) for name in metrics),
            formats.duration(entry.seconds),
            entry.text,
            entry.error,
        )
        for entry in found.trials
    ]
    return grid(f"{found.study} (* on the front)", heads, rows, left=("state", "recipe", "error"))


def plugins_table(registry: Registry) -> Table:
    """Name, stage, origin and state of every method there is."""
    rows = []
    for name in registry:
        reason = registry.unavailable(name)
        stage = "–" if reason else registry[name].stage.name.lower()
        rows.append(
            (name, stage, registry.source(name).origin, f"unavailable: {reason}" if reason else "available")
        )
    heads = ["method", "stage", "from", "state"]
    return grid("Methods", heads, rows, left=heads)


def space_table(name: str, method: Method, space: Space) -> Table:
    """A method's dimensions."""
    heads = ["dimension", "values", "default", "only if", "searched"]
    rows = []
    for dimension, dim in space.items():
        needs = "; ".join(f"{other} is {' or '.join(map(str, values))}" for other, values in dim.when.items())
        rows.append((dimension, dim.describe(), dim.default, needs, "when named" if dim.expert else "yes"))
    return grid(f"{name} ({method.stage.name.lower()})", heads, rows, left=heads)

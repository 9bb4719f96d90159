"""The documents and plans of a study as tables for a terminal.

Owns which columns a person sees and in which order. Computes nothing that a report or a plan does not hold; all
text from studies and methods is shown as it is, never read as markup.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from compress_search import formats
from compress_search.records import rung_fraction
from compress_search.report import Entry, Report, wording

if TYPE_CHECKING:
    from compress_search.doctor import Findings
    from compress_search.estimate import Estimate
    from compress_search.method import Method
    from compress_search.plan import Plan
    from compress_search.registry import Registry
    from compress_search.space import Space
    from compress_search.storage.stored import TrialRow
    from compress_search.study import SearchConfig
    from compress_search.testing import CheckResult

PIPED_WIDTH = 10_000
"""Characters to a line where there is no terminal: nothing is wrapped or cut."""

STATES = ("complete", "stopped", "failed", "infeasible", "duplicate", "running", "waiting")


def show(*parts: RenderableType) -> None:
    """Print to standard output."""
    console = Console(highlight=False)
    if console.is_terminal:
        console.print(*parts, sep="\n")
    else:
        console.file.write(text(*parts))


def text(*parts: RenderableType) -> str:
    """The same as plain text."""
    console = Console(file=io.StringIO(), highlight=False, width=PIPED_WIDTH)
    with console.capture() as captured:
        for part in parts:
            console.print(part)
    return "\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n"


def grid(title: str, heads: Sequence[str], rows: Iterable[Sequence[Any]], left: Sequence[str] = ()) -> Table:
    """A table; columns are aligned right but for those named in ``left``, which give way on a narrow terminal."""
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


def report_tables(found: Report, study: str) -> list[RenderableType]:
    """Teacher, baselines, front; the recommendation in a sentence with its export command; the failures.

    ``study`` is how a command line names the study, overrides included.
    """
    parts: list[RenderableType] = [*front_tables(found), Text()]
    parts.append(Text(wording.recommendation(found), style="bold"))
    if found.recommended is not None:
        number = found.recommended
        parts.append(Text(f"  compress-search export {study} {number} -o trial-{number}/"))
    parts += [Text(line, style="dim") for line in (wording.run_on(found), counts_line(found)) if line]
    failed = wording.failures(found)
    if failed:
        rows = [(len(numbers), reason, ", ".join(map(str, numbers))) for reason, numbers in failed]
        parts += [Text(), grid("Failures", ["trials", "reason", "numbers"], rows, left=("reason", "numbers"))]
    return parts


def front_tables(found: Report) -> list[RenderableType]:
    """The teacher, each baseline and each member of the front: first their numbers, then their recipes."""
    metrics, shown = wording.key_metrics(found), wording.headliners(found)
    final = sorted({name for entry in shown for name in entry.test or {} if name in metrics})
    heads = [
        "trial",
        "",
        *(_heading(name) for name in metrics),
        *(_heading(name, final=True) for name in final),
    ]
    rows = [
        (
            entry.number,
            "→" if entry.number == found.recommended else "●" if entry.on_front else "",
            *(cell(entry, name, found.teacher) for name in metrics),
            *(formats.number(name, (entry.test or {}).get(name)) for name in final),
        )
        for entry in shown
    ]
    numbers = grid(f"{found.study}: the front against the teacher", heads, rows)
    recipes = [(entry.number, _recipe(entry, found), "; ".join(wording.notes(entry))) for entry in shown]
    return [numbers, Text(), grid("", ["trial", "recipe", "notes"], recipes, left=("recipe", "notes"))]


def _heading(metric: str, final: bool = False) -> str:
    """A metric, its unit below, and whether it was measured at the end: scores on test data, costs once more."""
    how = formats.style(metric)
    when = "" if not final else "\ntest" if how.scale == 100 else "\nagain"
    return f"{how.label}\n{how.unit}{when}"


def _recipe(entry: Entry, found: Report) -> str:
    text = wording.short(entry, found)
    return f"{entry.baseline}: {text}" if entry.baseline and entry.recipe else text


def cell(entry: Entry, metric: str, teacher: Mapping[str, float]) -> str:
    """A value with its interval and, below it, the change against the teacher's."""
    text = formats.with_interval(metric, entry.metrics.get(metric), entry.intervals.get(metric))
    change = wording.change(entry, metric, teacher)
    return f"{text}\n{change}" if change else text


def counts_line(found: Report) -> str:
    """How many trials ended how."""
    counts = wording.counts(found)
    listed = [f"{counts[state]} {state}" for state in STATES if state in counts]
    return f"Trials: {', '.join(listed) or 'none yet'}."


def status_tables(found: Report, seconds: float, budget: SearchConfig) -> list[RenderableType]:
    """Trials by state, the front so far, time spent and an estimate of the time left."""
    counts = wording.counts(found)
    done = sum(counts.get(state, 0) for state in ("complete", "stopped", "failed"))
    left = seconds / done * max(budget.trials - done, 0) if done else None
    if budget.hours is not None:
        left = min(left if left is not None else math.inf, max(3600 * budget.hours - seconds, 0))
    facts = {
        "trials": f"{done} of {budget.trials}",
        "by state": ", ".join(f"{counts[state]} {state}" for state in STATES if state in counts) or "none yet",
        "time spent": formats.duration(seconds),
        "time left": _left(left, finished=done >= budget.trials),
    }
    return [pairs(facts, found.study), Text(), *front_tables(found), Text(), Text(wording.recommendation(found))]


def _left(seconds: float | None, finished: bool) -> str:
    if finished:
        return "none: all trials are done"
    return "not known yet" if seconds is None else f"about {formats.duration(seconds)}"


def trial_tables(row: TrialRow, measurements: Mapping[str, Any]) -> list[RenderableType]:
    """One trial whole: what it was, what it came to, how it was measured, and why it failed."""
    parts: list[RenderableType] = [pairs(_trial_facts(row), f"Trial {row.number}")]
    if row.metrics:
        rows = [
            (formats.style(name).heading, formats.with_interval(name, value, row.intervals.get(name)))
            for name, value in row.metrics.items()
        ]
        parts += [Text(), grid("Metrics", ["metric", "value ± interval"], rows, left=("metric",))]
    if row.rungs:
        names = sorted({name for rung in row.rungs for name in rung.metrics})
        heads = ["rung", "training", *(formats.style(name).heading for name in names), "decision"]
        reached = [
            (
                rung.index,
                f"{100 * float(rung_fraction(rung.index)):.0f} %",
                *(formats.number(name, rung.metrics.get(name)) for name in names),
                _decision(rung.kept),
            )
            for rung in row.rungs
        ]
        parts += [Text(), grid("Rungs", heads, reached)]
    if measurements:
        parts += [Text(), pairs(dict(formats.flatten(measurements)), "Measurements")]
    if row.error:
        parts += [Text(), Text(f"Failure ({row.error.kind}): {row.error.message}", style="bold")]
        parts.append(Text(row.error.traceback))
    return parts


def _trial_facts(row: TrialRow) -> dict[str, Any]:
    steps = row.recipe.steps if row.recipe else ()
    return {
        "state": row.state + (" (provisional: by shapes alone)" if row.provisional else ""),
        "baseline": row.baseline or "–",
        "recipe": "\n".join(map(str, steps)) or "teacher",
        "seed": "–" if row.seed is None else row.seed,
        "attempts": row.attempts,
        "time": ", ".join(f"{phase} {formats.duration(spent)}" for phase, spent in row.seconds.items()) or "–",
        "artefact": row.artifact or "–",
    }


def _decision(kept: bool) -> str:
    return "went on" if kept else "stopped"


def plan_tables(plan: Plan, estimate: Estimate) -> list[RenderableType]:
    """The teacher, the decisions, every dimension as narrowed, and the time it will take."""
    teacher = plan.teacher
    facts = {
        "teacher": f"{teacher.family}, {teacher.layers} layers of width {teacher.hidden}, "
        f"{teacher.parameters:,} parameters, {formats.number('size_mb', teacher.megabytes)} MB",
        "decisions": f"{plan.dimensions} at most",
        "starting recipes": len(plan.starting_points()),
        "time": f"about {formats.duration(60 * estimate.minutes)}, "
        f"{formats.duration(60 * estimate.teacher_minutes)} of it for the teacher",
        "training": f"{estimate.steps_per_trial} steps a trial, {1000 * estimate.step_seconds:.0f} ms each, "
        f"in {_computes_in(plan)}",
    }
    slots = [(slot.name, ", ".join(slot.options), _needs(plan, slot.options)) for slot in plan.slots]
    heads = ("decision", "one of", "needs")
    parts: list[RenderableType] = [pairs(facts, plan.study.name), Text(), grid("Methods", heads, slots, left=heads)]
    for name, space in plan.spaces.items():
        searched = {dimension: dim for dimension, dim in space.items() if not dim.fixed}
        if searched:
            parts += [Text(), space_table(name, plan.methods[name], searched)]
    return parts


def _computes_in(plan: Plan) -> str:
    """The precision of training, and what it costs where it was asked for without there being kernels."""
    precision = plan.study.training.computes_in
    idle = precision != "fp32" and f"kernel:{precision}" not in plan.teacher.traits
    return precision + (", for which no kernel is real here: slower than fp32" if idle else "")


def _needs(plan: Plan, options: Sequence[str]) -> str:
    """Why methods cannot follow on the teacher itself; steps before them may change that."""
    reasons = {name: plan.methods[name].unsupported(plan.teacher) for name in options if name in plan.methods}
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason)


def contract_table(name: str, results: Sequence[CheckResult]) -> Table:
    """One row a check."""
    rows = [
        ("ok" if result.ok else "broken", result.name, formats.duration(result.seconds), result.message)
        for result in results
    ]
    return grid(
        f"{name}: the plugin contract", ["", "check", "time", "finding"], rows, left=("", "check", "finding")
    )


def doctor_tables(found: Findings) -> list[RenderableType]:
    """Versions and hardware, which kernels are worth using here, and what was looked at."""
    kernels = [
        (kernel.name, device, "real" if kernel.real else "not real", _ratio(kernel.ratio), kernel.note)
        for device, kernel in found.kernels
    ]
    checks = [(check.name, check.state, check.finding) for check in found.checks]
    heads = ["kernel", "on", "here", "time", "note"]
    return [
        pairs(found.versions, "Versions"),
        Text(),
        pairs(found.machine, "Machine"),
        Text(),
        grid("Kernels", heads, kernels, left=("kernel", "on", "here", "note")),
        Text(),
        grid("Checks", ["", "state", "finding"], checks, left=("", "state", "finding")),
    ]


def _ratio(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}×"


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
            wording.short(entry, found),
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

"""A report as one self-contained HTML page, and its front as an SVG picture.

Owns what is drawn and how values become coordinates and cells; markup, style and script are in ``templates/``.
Everything is escaped on its way into the page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from compress_search import __version__, formats, pareto, report
from compress_search.report import Entry, Facts, Report, wording

_TEMPLATES = Environment(
    loader=PackageLoader("compress_search"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render_html(found: Report, facts: Facts, study: str) -> str:
    """The page; ``study`` is how its command lines name the study."""
    from plotly.offline import get_plotlyjs

    metrics = report.columns(found)
    return _TEMPLATES.get_template("report.html.j2").render(
        report=found,
        headline=wording.recommendation(found),
        run_on=wording.run_on(found),
        headliners=wording.headliners(found),
        metrics=metrics,
        key_metrics=wording.key_metrics(found),
        counts=wording.counts(found),
        failures=wording.failures(found),
        charts=charts(found),
        environment=list(formats.flatten(found.environment)),
        settings=yaml.safe_dump(facts.settings, sort_keys=False, allow_unicode=True) if facts.settings else "",
        study=study,
        version=__version__,
        formats=formats,
        change=wording.change,
        notes=wording.notes,
        steps=lambda entry: wording.steps(entry, found),
        short=lambda entry: wording.short(entry, found),
        bounds=lambda name: wording.bounds(found, name),
        plotly=Markup(get_plotlyjs()),  # a library's own script, not data
    )


def charts(found: Report) -> list[dict[str, Any]]:
    """Plain data of the page's figures: a front for each pair of objectives, then the hypervolume."""
    figures = [front_chart(found, x, y) for x, y in axes(found)]
    history = report.hypervolume_history(found)
    if len(history) > 1:
        trace = {
            "role": "volume",
            "name": "hypervolume",
            "x": [n for n, _ in history],
            "y": [v for _, v in history],
        }
        figures.append(
            {
                "id": "hypervolume",
                "title": "Hypervolume over trials",
                "x": "trial",
                "y": "hypervolume",
                "log": False,
                "label": f"Hypervolume against the reference point: {history[0][1]:.4g} after the first trial, "
                f"{history[-1][1]:.4g} after the last.",
                "traces": [trace],
            }
        )
    return figures


def axes(found: Report) -> list[tuple[str, str]]:
    """(x, y) of each picture of the front: the first objective against every other one; none when alone."""
    first, *others = found.objectives
    return [(other, first) for other in others]


def front_chart(found: Report, x: str, y: str) -> dict[str, Any]:
    """One picture of the front as plain data: traces of points with the half-widths of their intervals."""
    groups = {role: [e for e in entries if {x, y} <= set(e.metrics)] for role, entries in _roles(found).items()}
    drawn = [entry.metrics[x] for entries in groups.values() for entry in entries]
    return {
        "id": f"front-{x}",
        "title": f"{formats.style(y).label} against {formats.style(x).label}",
        "x": formats.style(x).heading,
        "y": formats.style(y).heading,
        "log": bool(drawn) and min(drawn) > 0 and max(drawn) > 20 * min(drawn),
        "label": f"{len(drawn)} models, {len(found.front)} of them on the front, which the table lists.",
        "traces": [_trace(found, role, entries, x, y) for role, entries in groups.items() if entries],
        "line": _line(found, x, y),
    }


def _line(found: Report, x: str, y: str) -> dict[str, list[float]]:
    """From left to right through the members that no other beats in these two, whatever else counts."""
    points = [(entry.metrics[x], entry.metrics[y]) for entry in found.members if {x, y} <= set(entry.metrics)]
    rows = pareto.front(points, [found.objectives[x], found.objectives[y]])
    ends = sorted(points[row] for row in rows)
    return {
        "x": [left * formats.style(x).scale for left, _ in ends],
        "y": [up * formats.style(y).scale for _, up in ends],
    }


def _roles(found: Report) -> dict[str, list[Entry]]:
    """Complete trials by the part they play in a picture, drawn in this order."""
    done = report.candidates(found.trials, found)
    special = [entry for entry in done if entry.baseline]
    rest = [entry for entry in done if entry not in special]
    return {
        "infeasible": [e for e in rest if report.violations(e.metrics, found)],
        "dominated": [e for e in rest if not e.on_front and not report.violations(e.metrics, found)],
        "front": found.members,
        "baseline": [e for e in special if e.recipe],
        "teacher": [e for e in special if not e.recipe],
        "recommended": [e for e in done if e.number == found.recommended],
    }


_NAMES = {
    "infeasible": "outside the constraints",
    "dominated": "dominated",
    "front": "front",
    "baseline": "baseline",
    "teacher": "teacher",
    "recommended": "recommended",
}


def _trace(found: Report, role: str, entries: Sequence[Entry], x: str, y: str) -> dict[str, Any]:
    return {
        "role": role,
        "name": _NAMES[role],
        "x": [entry.metrics[x] * formats.style(x).scale for entry in entries],
        "y": [entry.metrics[y] * formats.style(y).scale for entry in entries],
        "dx": [_sides(entry, x) for entry in entries],
        "dy": [_sides(entry, y) for entry in entries],
        "text": [_hover(entry, found) for entry in entries],
    }


def _sides(entry: Entry, metric: str) -> tuple[float, float]:
    """How far the interval reaches below and above the value, in the unit shown."""
    value, scale = entry.metrics[metric], formats.style(metric).scale
    low, high = entry.intervals.get(metric, (value, value))
    return max(value - low, 0.0) * scale, max(high - value, 0.0) * scale


def _hover(entry: Entry, found: Report) -> str:
    """A few lines in Plotly's HTML subset; what comes from the study is escaped."""
    lines = [f"<b>trial {entry.number}</b>", *map(escape, wording.steps(entry, found))]
    lines += [
        f"{formats.style(name).label} {formats.number(name, value, unit=True)}"
        for name, value in entry.metrics.items()
        if name in formats.KNOWN
    ]
    return "<br>".join(lines + [escape(note) for note in wording.notes(entry)])


_BARRED = ("front", "baseline", "teacher")
"""Whose intervals are drawn; those of all would hide the points."""

_NO_CHART: Mapping[str, Any] = {
    "traces": [],
    "line": None,
    "x": "",
    "y": "",
    "label": "A front needs two objectives.",
}


def front_picture(found: Report) -> str:
    """The first picture of the front as an SVG that follows the reader's light or dark scheme."""
    chart = next((front_chart(found, x, y) for x, y in axes(found)), _NO_CHART)
    x, y = Scale.over(_reach(chart, "x"), 70, 700), Scale.over(_reach(chart, "y"), 370, 20)
    # six pixels a character and thirty for the mark bring the legend's entries beside one another
    widths = [30 + 6 * len(trace["name"]) for trace in chart["traces"]]
    legend = [80 + sum(widths[:position]) for position in range(len(widths))]
    template = _TEMPLATES.get_template("front.svg.j2")
    return template.render(study=found.study, chart=chart, x=x, y=y, legend=legend, barred=_BARRED)


def _reach(chart: Mapping[str, Any], axis: str) -> list[float]:
    """The values of one axis, and the ends of the intervals that are drawn along it."""
    found = []
    for trace in chart["traces"]:
        found += trace[axis]
        if trace["role"] in _BARRED:
            for value, (below, above) in zip(trace[axis], trace[f"d{axis}"], strict=True):
                found += [value - below, value + above]
    return found


class Scale:
    """A linear axis from values to pixels, with round ticks around the values."""

    def __init__(self, ticks: Sequence[float], start: float, end: float) -> None:
        self.ticks, self.start, self.end = ticks, start, end

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float) -> Scale:
        """An axis that holds all the values, with four to ten ticks at 1, 2 or 5 times a power of ten."""
        low, high = (min(values), max(values)) if values else (0.0, 1.0)
        span = high - low if high - low > 1e-6 * abs(high) else abs(high) or 1.0
        power = 10.0 ** math.floor(math.log10(span / 4))
        step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= 8)
        first, last = math.floor(low / step), math.ceil(high / step)
        return cls([step * tick for tick in range(first, max(last, first + 1) + 1)], start, end)

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        low, high = self.ticks[0], self.ticks[-1]
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)

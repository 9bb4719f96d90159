"""How numbers are written for people: units, digits, intervals, durations.

Owns the one place where a metric's name becomes a heading. Knows nothing of tables, pages or terminals.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

MINUS = "−"
Interval = Sequence[float]
"""(low, high)."""


@dataclass(frozen=True)
class Style:
    """How a metric is shown: ``value * scale`` with ``digits`` decimals, under ``label`` in ``unit``."""

    label: str
    unit: str = ""
    scale: float = 1.0
    digits: int | None = None

    @property
    def heading(self) -> str:
        """Label and unit, for the head of a column."""
        return f"{self.label} ({self.unit})" if self.unit else self.label


KNOWN = {
    "accuracy": Style("accuracy", "%", 100, 1),
    "macro_f1": Style("macro F1", "%", 100, 1),
    "f1": Style("F1", "%", 100, 1),
    "pearson": Style("Pearson r", "×100", 100, 1),
    "spearman": Style("Spearman ρ", "×100", 100, 1),
    "latency_ms": Style("latency", "ms", 1, 2),
    "p50_ms": Style("latency p50", "ms", 1, 2),
    "p95_ms": Style("latency p95", "ms", 1, 2),
    "size_mb": Style("size", "MB", 1, 1),
    "memory_mb": Style("memory", "MB", 1, 1),
    "speedup": Style("speed-up", "×", 1, 2),
    "parameters": Style("parameters", "M", 1e-6, 1),
    "throughput": Style("throughput", "examples/s", 1, 1),
}
"""Styles of the engine's own metrics."""


def style(metric: str) -> Style:
    """The style of a metric; unknown ones (a plugin's own) are shown as they are with four digits."""
    if metric in KNOWN:
        return KNOWN[metric]
    base = metric.removesuffix("_drop")
    if base != metric and base in KNOWN:
        return Style(f"{KNOWN[base].label} lost", "points", 100, 1)
    return Style(metric)


def number(metric: str, value: float | None, *, unit: bool = False) -> str:
    """A value in its metric's unit, for example ``91.2`` or, with ``unit``, ``91.2 %``."""
    if value is None or not math.isfinite(value):
        return "–"
    how = style(metric)
    text = _decimals(value * how.scale, _digits(how, value))
    if not unit or not how.unit:
        return text
    return f"{text}{how.unit}" if how.unit == "×" else f"{text} {how.unit}"


def with_interval(metric: str, value: float | None, interval: Interval | None) -> str:
    """A value with half the width of its interval, for example ``91.2 ± 1.1``."""
    text = number(metric, value)
    if value is None or interval is None or not all(map(math.isfinite, interval)):
        return text
    how = style(metric)
    return f"{text} ± {_decimals((interval[1] - interval[0]) / 2 * how.scale, _digits(how, value))}"


def _digits(how: Style, value: float) -> int | None:
    """Decimals of a value: the style's own, but two significant ones of small quantities (0.042 MB is not 0.0)."""
    if how.digits is None or how.scale != 1 or not value:
        return how.digits
    return max(how.digits, 1 - math.floor(math.log10(abs(value * how.scale))))


def _decimals(shown: float, digits: int | None) -> str:
    return (f"{shown:.4g}" if digits is None else f"{shown:.{digits}f}").replace("-", MINUS)


def points(value: float) -> str:
    """A difference of two scores in points of 0.01 with its sign, for example ``−0.6 points``."""
    text = f"{abs(value) * 100:.1f}"
    sign = "±" if text == "0.0" else MINUS if value < 0 else "+"
    return f"{sign}{text} point{'' if text == '1.0' else 's'}"


def percent(ratio: float) -> str:
    """A relative change with its sign, for example ``−65 %`` for 0.35."""
    change = round(100 * (ratio - 1))
    return f"{MINUS if change < 0 else '+' if change else '±'}{abs(change)} %"


def duration(seconds: float | None) -> str:
    """A duration in at most two units, for example ``2 h 5 min``."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if 0 < seconds < 10:
        return f"{seconds:.1f} s"
    if round(seconds) < 60:
        return f"{round(seconds)} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, rest = divmod(minutes, 60)
    return f"{hours} h {rest} min" if rest else f"{hours} h"


def flatten(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, text) of nested plain data; long series are shown by their number, median and range."""
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _plain(value)


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        numbers = [item for item in value if isinstance(item, int | float)]
        if len(value) > 4 and len(numbers) == len(value):
            return f"{len(value)} values, median {median(value):.4g}, from {min(value):.4g} to {max(value):.4g}"
        return ", ".join(map(_plain, value)) or "–"
    if value is None or value == "":
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)

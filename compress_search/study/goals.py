"""What a study may aim for: metrics, their directions and ranges, objectives and constraints.

Knows nothing of how a metric comes about.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from compress_search.study.complaints import Fault, show, unknown

Direction = Literal["maximize", "minimize"]
TaskName = Literal["text-classification", "text-regression", "token-classification"]

METRICS: dict[TaskName, tuple[str, ...]] = {
    "text-classification": ("accuracy", "macro_f1"),
    "text-regression": ("pearson", "spearman"),
    "token-classification": ("f1", "accuracy"),
}
"""The metrics of each task, the primary one first. Entity F1 needs BIO tags; accuracy is primary without them."""

TIMED = ("latency_ms", "speedup", "throughput")
"""Metrics that depend on running time."""

COSTS: dict[str, Direction] = {
    "latency_ms": "minimize",
    "speedup": "maximize",
    "throughput": "maximize",
    "size_mb": "minimize",
    "memory_mb": "minimize",
}
"""The metrics every task has, with their directions."""
_CORRELATIONS = METRICS["text-regression"]
_DROP = "_drop"
_PLUGIN_METRIC = re.compile(r"\w+\.\w+")
_BOUND = re.compile(r"(<=|>=)\s*(\S+)")


def direction(metric: str) -> Direction:
    """Which way the metric gets better.

    Raises:
        ValueError: it is none of the engine's own.
    """
    if metric in COSTS:
        return COSTS[metric]
    scores = {name for names in METRICS.values() for name in names}
    if metric.removesuffix(_DROP) not in scores:
        raise ValueError(f"{metric!r} is no metric of the engine's own")
    return "minimize" if metric.endswith(_DROP) else "maximize"


def metric_range(metric: str) -> tuple[float, float]:
    """The lowest and highest value the metric can take; a drop is an absolute loss against the teacher."""
    if metric in COSTS or _PLUGIN_METRIC.fullmatch(metric):
        return (-math.inf if "." in metric else 0.0), math.inf
    low, high = (-1.0, 1.0) if metric.removesuffix(_DROP) in _CORRELATIONS else (0.0, 1.0)
    return (0.0, high - low) if metric.endswith(_DROP) else (low, high)


class Objective(str):
    """The name of a metric that knows which way it gets better."""

    direction: Direction

    def __new__(cls, name: str, direction: Direction) -> Objective:
        """Make the text and attach the direction."""
        self = super().__new__(cls, name)
        self.direction = direction
        return self

    def __getnewargs__(self) -> tuple[str, Direction]:  # type: ignore[override]
        return str(self), self.direction


def default_objectives(primary: str) -> tuple[Objective, ...]:
    """What a study that names no objectives trades off: the task's first metric and latency."""
    return tuple(Objective(name, direction(name)) for name in (primary, "latency_ms"))


def plain_objective(name: str) -> str | dict[str, str]:
    """As a study file spells it: a method's metric carries its direction."""
    return {str(name): name.direction} if isinstance(name, Objective) and "." in name else str(name)


def parse_objectives(items: Any, task: TaskName) -> tuple[Objective, ...]:
    """Objectives from a study's list of names and ``{method.key: minimize}``.

    Raises:
        ValueError: it is no list, or holds an unknown metric, one twice, or a direction that is wrong or lacking.
    """
    if items is None:
        return ()
    if not isinstance(items, list | tuple):
        raise ValueError(f"expected a list such as [accuracy, latency_ms], got {show(items)}")
    found: list[Objective] = []
    for number, item in enumerate(items):
        try:
            objective = _objective(item, task)
            if objective in found:
                raise ValueError(f"{objective} is named twice")
        except ValueError as error:
            raise Fault(number, str(error)) from error
        found.append(objective)
    return tuple(found)


def _objective(item: Any, task: TaskName) -> Objective:
    if isinstance(item, Objective):
        return item
    name, way = next(iter(item.items())) if isinstance(item, dict) and len(item) == 1 else (item, None)
    if isinstance(name, str) and _PLUGIN_METRIC.fullmatch(name):
        if way not in ("maximize", "minimize"):
            raise ValueError(f"a method's metric needs its direction: {{{name}: minimize}} or {{{name}: maximize}}")
        return Objective(name, way)
    known = [*METRICS[task], *COSTS]
    if name not in known:
        raise ValueError(unknown(f"objective {show(name)}", name, known))
    if way not in (None, direction(name)):
        raise ValueError(f"{name} is always to {direction(name)}, got {show(way)}")
    return Objective(name, direction(name))


@dataclass(frozen=True)
class Constraint:
    """A bound on a metric; ``also`` is the bound from the other side where there are two."""

    metric: str
    op: Literal["<=", ">="]
    bound: float
    also: Constraint | None = None

    def violation(self, value: float, tolerance: float = 0.0) -> float:
        """How far the value lies beyond the bound, in the metric's unit; not above 0 where it holds.

        ``tolerance`` widens the bound by that fraction of itself. A value that is not a number violates all.
        """
        if math.isnan(value):
            return math.inf
        beyond = value - self.bound if self.op == "<=" else self.bound - value
        own = beyond - tolerance * abs(self.bound)
        return max(own, self.also.violation(value, tolerance)) if self.also else own

    def bounds(self) -> list[str]:
        """As a study file spells it: ``["<= 40"]``."""
        return [f"{self.op} {repr(self.bound).removesuffix('.0')}", *(self.also.bounds() if self.also else [])]

    def __str__(self) -> str:
        return f"{self.metric} {' and '.join(self.bounds())}"


def parse_constraint(metric: str, value: Any, task: TaskName) -> Constraint:
    """A constraint from ``"<= 40"``, or from a list of two bounds.

    Raises:
        ValueError: unknown metric, unreadable bound, one the metric cannot reach, or two that exclude each other.
    """
    known = [*METRICS[task], *COSTS, *(name + _DROP for name in METRICS[task])]
    if metric not in known and not _PLUGIN_METRIC.fullmatch(metric):
        raise ValueError(unknown("metric", metric, known))
    if not isinstance(value, list | tuple):
        return _bound(metric, value)
    parts = [_bound(metric, part) for part in value]
    if len(parts) != 2 or parts[0].op == parts[1].op:
        raise ValueError(f'expected one "<=" and one ">=" bound, got {show(value)}')
    low, high = sorted(parts, key=lambda part: part.op, reverse=True)
    if low.bound > high.bound:
        raise ValueError(f"nothing is both >= {low.bound:g} and <= {high.bound:g}")
    return Constraint(metric, high.op, high.bound, also=low)


def _bound(metric: str, value: Any) -> Constraint:
    match = _BOUND.fullmatch(value.strip()) if isinstance(value, str) else None
    number = _number(match[2]) if match else None
    if match is None or number is None:
        raise ValueError(f'expected a bound such as "<= 40" or ">= 0.9", got {show(value)}')
    low, high = metric_range(metric)
    if not low <= number <= high or (metric in COSTS and number == 0):
        raise ValueError(f"{metric} lies {_between(low, high)}, got {show(value)}")
    return Constraint(metric, "<=" if match[1] == "<=" else ">=", number)


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _between(low: float, high: float) -> str:
    return f"between {low:g} and {high:g}" if math.isfinite(high) else f"above {low:g}"


def parse_constraints(items: Any, task: TaskName) -> dict[str, Constraint]:
    """Constraints by metric, from a study's mapping.

    Raises:
        ValueError: it is no mapping, or one of them is wrong.
    """
    if items is None:
        return {}
    if not isinstance(items, dict):
        raise ValueError(f'expected a mapping such as {{size_mb: "<= 40"}}, got {show(items)}')
    found: dict[str, Constraint] = {}
    for metric, value in items.items():
        try:
            found[metric] = parse_constraint(metric, value, task)
        except ValueError as error:
            raise Fault(metric, str(error)) from error
    return found


def as_written(constraint: Constraint) -> str | Sequence[str]:
    """The inverse of :func:`parse_constraint`."""
    bounds = constraint.bounds()
    return bounds if constraint.also else bounds[0]

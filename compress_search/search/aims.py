"""From metrics by name to what is compared: vectors to minimise, and violations of constraints.

Owns what a metric means to a study's objectives and constraints. Knows nothing of trials or of early stopping.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from optuna.trial import TrialState

from compress_search.records import Failure, Result
from compress_search.study.goals import Constraint

Metrics = Mapping[str, float]

SHAPE_METRICS = ("latency_ms", "speedup", "throughput", "size_mb", "memory_mb")
"""Metrics that training does not change."""

TOLERANCE = 0.1
"""How far beyond a limit, as a fraction of it, shapes that may still change must lie to be hopeless."""


@dataclass(frozen=True)
class Aims:
    """A study's objectives, with their directions, and its constraints by metric."""

    objectives: Mapping[str, str]
    constraints: Mapping[str, Constraint]

    def vector(self, metrics: Metrics) -> tuple[float, ...]:
        """The objectives, to be minimised. One that is only known at the end ties for all."""
        signs = {"maximize": -1.0, "minimize": 1.0}
        return tuple(signs[way] * metrics.get(name, 0.0) for name, way in self.objectives.items())

    def violations(self, metrics: Metrics) -> dict[str, float]:
        """By which fraction of its bound each constraint on a known metric is missed; not above 0 where it is met.

        Fractions, so that megabytes and points of accuracy can be added up.
        """
        return {
            name: constraint.violation(metrics[name]) / (abs(constraint.bound) or 1.0)
            for name, constraint in self.constraints.items()
            if name in metrics
        }

    def total_violation(self, metrics: Metrics) -> float:
        """The sum over the constraints that are missed; 0 where none is."""
        return sum(max(0.0, excess) for excess in self.violations(metrics).values())

    def hopeless(self, metrics: Metrics) -> bool:
        """Whether a limit on what training does not change is missed for good."""
        missed = self.violations(metrics)
        return any(missed.get(name, 0.0) > TOLERANCE for name in SHAPE_METRICS)

    def ending(self, result: Result) -> tuple[TrialState, list[float] | None, dict[str, float]]:
        """What samplers are told of a result: the trial's state, its objectives if it is complete, and constraints.

        One is that the recipe ran at all; satisfied is what does not exceed 0.
        """
        constraints = {**self.violations(result.metrics), "ran": 1.0 if result.state == "failed" else -1.0}
        if result.state != "complete" or not self.objectives.keys() <= result.metrics.keys():
            return TrialState.PRUNED, None, constraints  # what is no recipe of a method lacks its metrics
        return TrialState.COMPLETE, [result.metrics[name] for name in self.objectives], constraints

    def checked(self, result: Result, *, baseline: bool) -> Result:
        """The result, failed if it claims to be complete without a number for every objective and constraint.

        A baseline is compared as far as it can be: it has no numbers of methods that it was not made by.
        """
        if result.state != "complete":
            return result
        wanted = dict.fromkeys([*self.objectives, *self.constraints])
        wanted = {name: None for name in wanted if not (baseline and "." in name and name not in result.metrics)}
        bad = [name for name in wanted if not math.isfinite(result.metrics.get(name, math.nan))]
        if not bad:
            return result
        text = ", ".join(f"{name} is {result.metrics.get(name, 'missing')}" for name in bad)
        return replace(result, state="failed", failure=Failure("nan", text))

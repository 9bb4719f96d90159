"""A worker whose trials do nothing, so that what remains is the engine's own time."""

from __future__ import annotations

import random

from compress_search.records import Assignment, Failure, Report, Result


class NoopWorker:
    """Returns numbers at once; deterministic in the trial's seed."""

    def __init__(self, brief: object) -> None:
        pass

    def run(self, assignment: Assignment, report: Report) -> Result:
        """A complete result with every metric of the default objectives."""
        draw = random.Random(assignment.seed)
        metrics = {"accuracy": draw.random(), "latency_ms": 1 + draw.random()}
        return Result(assignment.number, assignment.attempt, "complete", metrics)

    def close(self) -> None:
        """Nothing to close."""


def no_reason(number: int, attempt: int) -> Failure:
    """Why an attempt died, when nobody knows."""
    return Failure("died", "the worker process died")

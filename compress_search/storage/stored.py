"""What is read back from the database: plain records, and their way out of and into JSON columns.

Knows nothing of connections or transactions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from compress_search.recipe import Recipe
from compress_search.records import Failure, Result, State
from compress_search.storage.tables import AttemptRow, ReportRow, StudyRow


@dataclass(frozen=True)
class StudyInfo:
    """What is stored of a study (:class:`tables.StudyRow`). ``seconds`` sum over sessions."""

    name: str
    definition: Mapping[str, Any]
    identity: Mapping[str, Any]
    space_hash: str
    subject: Mapping[str, Any]
    reference: Mapping[str, Any]
    environment: Mapping[str, Any]
    driver: Mapping[str, Any] | None
    seconds: float
    created: datetime


@dataclass(frozen=True)
class RungRow:
    """A trial's metrics at a rung; those that were not finite are NaN."""

    trial: int
    index: int
    group: str
    metrics: Mapping[str, float]
    kept: bool


@dataclass(frozen=True)
class LastAttempt:
    """The newest attempt at a trial, and the states of the ones before it (see ``AttemptRow``)."""

    number: int
    attempt: int
    state: str
    recipe: Recipe
    key: str
    baseline: str | None
    history: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrialRow:
    """All that is known of a trial, raw measurements aside.

    ``recipe`` is None for a trial that was interrupted before it had one. ``metrics`` holds finite values only.
    """

    number: int
    state: State
    recipe: Recipe | None = None
    baseline: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    rungs: Sequence[RungRow] = ()
    attempts: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    error: Failure | None = None
    artifact: str | None = None
    seed: int | None = None
    provisional: bool = False
    environment: Mapping[str, Any] = field(default_factory=dict)
    started: datetime | None = None
    ended: datetime | None = None


def plain(value: Any) -> Any:
    """Strict JSON of the value: numbers that are not finite become None, NumPy scalars Python's."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def finite(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The values there are: what was not finite when it was written is left out."""
    return {name: float(value) for name, value in metrics.items() if value is not None}


def with_nan(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The values, NaN for what was not finite when it was written."""
    return {name: math.nan if value is None else float(value) for name, value in metrics.items()}


def pairs(intervals: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """The intervals with two finite ends."""
    return {name: (pair[0], pair[1]) for name, pair in intervals.items() if None not in pair}


def study_info(row: StudyRow) -> StudyInfo:
    """A study as it is stored."""
    return StudyInfo(**{name: getattr(row, name) for name in StudyInfo.__dataclass_fields__})


def rung_row(row: ReportRow) -> RungRow:
    """A report as it was made."""
    return RungRow(row.trial, row.rung, row.peer_group, with_nan(row.metrics), row.kept)


def attempt_result(row: AttemptRow) -> Result:
    """What an attempt came to, measurements aside."""
    return Result(
        row.trial,
        row.attempt,
        row.state,  # type: ignore[arg-type]
        metrics=finite(row.metrics),
        intervals=pairs(row.intervals),
        artifact=row.artifact,
        seconds=finite(row.seconds),
        failure=Failure(**row.failure) if row.failure else None,
        environment=row.environment,
        provisional=row.provisional,
    )


def trial_row(number: int, told: str, row: AttemptRow | None, attempts: int, rungs: Sequence[RungRow]) -> TrialRow:
    """A trial from its newest attempt; what Optuna was not told yet has not happened yet."""
    unfinished: dict[str, State] = {"WAITING": "waiting", "RUNNING": "running"}
    if row is None:
        return TrialRow(number, unfinished.get(told, "failed"), rungs=rungs)
    return TrialRow(
        number,
        unfinished.get(told, row.state),  # type: ignore[arg-type]
        Recipe.from_list(row.recipe),
        row.baseline,
        finite(row.metrics),
        pairs(row.intervals),
        rungs,
        attempts,
        finite(row.seconds),
        Failure(**row.failure) if row.failure else None,
        row.artifact,
        row.seed,
        row.provisional,
        row.environment,
        row.started,
        row.ended,
    )

"""What a study found: front, recommendation, failures, as one JSON document.

Owns the document's schema (``docs/report.md``) and what follows from facts and trials. Knows nothing of the rows
they are read from (``reading.py``) or of how the document is drawn (``terminal.py``, ``page.py``).
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from compress_search import pareto
from compress_search.recipe import Recipe, Step
from compress_search.study import goals

Metrics = Mapping[str, float]


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StepEntry(_Document):
    """One step of a recipe."""

    method: str
    params: dict[str, bool | int | float | str]


class Entry(_Document):
    """One trial. Values that are not finite are left out, so that the document is strict JSON."""

    number: int
    state: Literal["complete", "stopped", "failed", "infeasible", "duplicate", "running", "waiting"]
    recipe: list[StepEntry] = Field(default_factory=list)
    metrics: dict[str, float] = Field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = Field(default_factory=dict)
    test: dict[str, float] | None = None
    on_front: bool = False
    seconds: float | None = None
    attempts: int = 1
    error: str | None = None
    baseline: str | None = None
    engine: str | None = None
    marks: list[str] = Field(default_factory=list)
    alike: list[int] = Field(default_factory=list)

    @field_validator("metrics", "test", mode="before")
    @classmethod
    def _finite(cls, value: Metrics | None) -> Metrics | None:
        return value if value is None else {name: x for name, x in value.items() if _is_finite(x)}

    @field_validator("intervals", mode="before")
    @classmethod
    def _finite_pairs(cls, value: Mapping[str, Sequence[float]]) -> Mapping[str, Sequence[float]]:
        return {name: pair for name, pair in value.items() if all(map(_is_finite, pair))}

    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps of the recipe."""
        return tuple(Step.of(step.method, step.params) for step in self.recipe)

    @property
    def text(self) -> str:
        """The recipe on one line."""
        return str(Recipe(self.steps))


class Baseline(_Document):
    """A reference that every study measures: the teacher in fp32, and in int8."""

    name: str
    number: int
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    test: dict[str, float] | None


class Aims(_Document):
    """What the study is after: all that is needed to rank trials."""

    study: str
    task: goals.TaskName
    objectives: dict[str, pareto.Direction]
    constraints: dict[str, str | list[str]] = Field(default_factory=dict)
    reference_point: dict[str, float] = Field(default_factory=dict)


class Facts(Aims):
    """What a report needs to know of the study beside its trials; all of it stored in the database."""

    searched: list[str] = Field(default_factory=list)
    kernels: list[str] = Field(default_factory=list)
    environment: dict[str, Any] = Field(default_factory=dict)
    settings: dict[str, Any] = Field(default_factory=dict)
    seconds: float = 0.0


class Report(Aims):
    """The document ``report --format json`` prints."""

    schema_version: Literal[1] = 1
    searched: list[str]
    kernels: list[str]
    teacher: dict[str, float]
    baselines: list[Baseline]
    hypervolume: float | None
    front: list[int]
    recommended: int | None
    trials: list[Entry]
    environment: dict[str, Any]

    def trial(self, number: int) -> Entry:
        """The trial of this number; KeyError where there is none."""
        return {entry.number: entry for entry in self.trials}[number]

    @property
    def members(self) -> list[Entry]:
        """The front's trials, in the order of ``front``."""
        return [self.trial(number) for number in self.front]

    def to_json(self) -> str:
        """The document as indented JSON without NaN."""
        document = {"schema_version": self.schema_version, **self.model_dump(mode="json")}
        return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)


def build_report(facts: Facts, entries: Iterable[Entry]) -> Report:
    """The document of a study from its stored facts and trials; sensible for a study with no trial at all."""
    trials = sorted(entries, key=lambda entry: entry.number)
    members = front_of(trials, facts)
    alike = _alike(members, facts)
    marked = [
        entry.model_copy(update={"on_front": entry.number in alike, "alike": alike.get(entry.number, [])})
        for entry in trials
    ]
    teacher = teacher_of(marked)
    return Report(
        **facts.model_dump(exclude={"environment", "settings", "seconds"}),
        teacher=teacher.metrics if teacher else {},
        baselines=[_baseline(entry) for entry in marked if entry.baseline and entry.metrics],
        hypervolume=hypervolume_of(members, facts),
        front=[entry.number for entry in members],
        recommended=_recommended(members, facts, teacher_of(trials)),
        trials=marked,
        environment=_plain(facts.environment),
    )


def candidates(trials: Iterable[Entry], aims: Aims) -> list[Entry]:
    """The complete trials that have a value for every objective."""
    return [
        entry
        for entry in trials
        if entry.state == "complete" and all(name in entry.metrics for name in aims.objectives)
    ]


def front_of(trials: Iterable[Entry], aims: Aims) -> list[Entry]:
    """The complete trials within the constraints that none other dominates, best in the first objective first."""
    able = [entry for entry in candidates(trials, aims) if not violations(entry.metrics, aims)]
    first, way = next(iter(aims.objectives.items()))
    sign = -1 if way == "maximize" else 1
    members = [able[row] for row in pareto.front(_points(able, aims), list(aims.objectives.values()))]
    return sorted(members, key=lambda entry: (sign * entry.metrics[first], entry.number))


def hypervolume_of(trials: Sequence[Entry], aims: Aims) -> float | None:
    """Of complete, feasible trials against the study's frozen reference point; None before there is one."""
    if not set(aims.objectives) <= set(aims.reference_point):
        return None
    reference = [aims.reference_point[name] for name in aims.objectives]
    return pareto.hypervolume(_points(trials, aims), reference, list(aims.objectives.values()))


def hypervolume_history(report: Report) -> list[tuple[int, float]]:
    """(number, hypervolume of the trials up to it) for every complete trial, in order."""
    done = candidates(report.trials, report)
    volumes = [hypervolume_of(front_of(done[: end + 1], report), report) for end in range(len(done))]
    return [(entry.number, volume) for entry, volume in zip(done, volumes, strict=True) if volume is not None]


def violations(metrics: Metrics, aims: Aims) -> dict[str, float]:
    """By how much each broken constraint is missed, relative to its bound; a missing metric misses it wholly."""
    missed = {}
    for name, bounds in aims.constraints.items():
        limit = goals.parse_constraint(name, bounds, aims.task)
        excess = limit.violation(metrics.get(name, math.nan))
        if excess > 0:
            missed[name] = excess / max(abs(limit.bound), 1e-12)
    return missed


def _points(trials: Iterable[Entry], aims: Aims) -> list[list[float]]:
    return [[entry.metrics[name] for name in aims.objectives] for entry in trials]


def _alike(members: Sequence[Entry], aims: Aims) -> dict[int, list[int]]:
    """For each member of the front the other members whose intervals overlap its own in every objective."""
    boxes = [
        [entry.intervals.get(name, (entry.metrics[name],) * 2) for name in aims.objectives] for entry in members
    ]
    overlap = pareto.indistinguishable(boxes)
    return {
        entry.number: [
            other.number for other, same in zip(members, overlap[row], strict=True) if same and other is not entry
        ]
        for row, entry in enumerate(members)
    }


def _holds_up(entry: Entry, teacher: Entry, score: str) -> bool:
    """Whether the teacher's score is reached, or as far as can be told: the interval of what is lost holds 0.

    Of results without such an interval, whether the score's own reaches the teacher's.
    """
    value, base = entry.metrics[score], teacher.metrics[score]
    _, high = entry.intervals.get(score, (value, value))
    low, _ = entry.intervals.get(f"{score}_drop", (base - high, base))
    return low <= 0 or value >= base


def _recommended(members: Sequence[Entry], aims: Aims, teacher: Entry | None) -> int | None:
    """The front's member to choose; never the teacher itself, which is no compression.

    A study that bounds no score still expects one: where some members are as good as the teacher, as far as can
    be told, the choice is among those.
    """
    members = [entry for entry in members if entry.recipe]
    bounded = [name in aims.constraints or f"{name}_drop" in aims.constraints for name in aims.objectives]
    scores = [way == "maximize" and name not in goals.COSTS for name, way in aims.objectives.items()]
    if teacher and not any(bound and score for bound, score in zip(bounded, scores, strict=True)):
        names = [n for n, score in zip(aims.objectives, scores, strict=True) if score and n in teacher.metrics]
        if as_good := [entry for entry in members if all(_holds_up(entry, teacher, name) for name in names)]:
            members, bounded = as_good, [b or s for b, s in zip(bounded, scores, strict=True)]
    row = pareto.recommend(_points(members, aims), list(aims.objectives.values()), bounded=bounded)
    return None if row is None else members[row].number


def teacher_of(trials: Iterable[Entry]) -> Entry | None:
    """The complete trial of the empty recipe."""
    return next((entry for entry in trials if entry.state == "complete" and not entry.recipe), None)


def columns(report: Report) -> list[str]:
    """The metrics there are: objectives first, then the constrained, then the rest by name."""
    found = {name for entry in report.trials for name in entry.metrics}
    first = dict.fromkeys([*report.objectives, *report.constraints])
    return [*first, *sorted(found - set(first))]


def to_csv(report: Report) -> str:
    """One line a trial: fixed columns, then each metric with its interval, then the test scores."""
    metrics = columns(report)
    tested = sorted({name for entry in report.trials for name in entry.test or {}})
    head = ["number", "state", "baseline", "on_front", "recommended", "recipe", "seconds", "attempts", "error"]
    head += [column for name in metrics for column in (name, f"{name}_low", f"{name}_high")]
    head += [f"test_{name}" for name in tested]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(head)
    for entry in report.trials:
        recipe = json.dumps([step.model_dump() for step in entry.recipe], ensure_ascii=False)
        recommended = entry.number == report.recommended
        row: list[Any] = [entry.number, entry.state, entry.baseline, entry.on_front, recommended, recipe]
        row += [entry.seconds, entry.attempts, entry.error]
        for name in metrics:
            row += [entry.metrics.get(name), *entry.intervals.get(name, (None, None))]
        row += [(entry.test or {}).get(name) for name in tested]
        writer.writerow(row)
    return stream.getvalue()


def _baseline(entry: Entry) -> Baseline:
    return Baseline(
        name=entry.baseline or "teacher",
        number=entry.number,
        metrics=entry.metrics,
        intervals=entry.intervals,
        test=entry.test,
    )


def _is_finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _plain(value: Any) -> Any:
    """Plain data with every value that is not finite replaced by None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

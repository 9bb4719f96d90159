"""What a study found, from its database rows alone: front, recommendation, failures, as one JSON document.

Owns the document's schema (``docs/report.md``) and what is derived from the rows. Knows nothing of how the
document is drawn (``tables.py``, ``page.py``) or of how the rows came about.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from compress_search import formats, pareto
from compress_search.recipe import Recipe

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
    def text(self) -> str:
        """The recipe on one line."""
        return str(Recipe.from_list([step.model_dump() for step in self.recipe]))


class Baseline(_Document):
    """A reference that every study measures: the teacher in fp32, in int8, a network of the same shape."""

    name: str
    number: int
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    test: dict[str, float] | None


class Report(_Document):
    """The document ``report --format json`` prints."""

    schema_version: Literal[1] = 1
    study: str
    task: str
    objectives: dict[str, pareto.Direction]
    constraints: dict[str, str]
    teacher: dict[str, float]
    baselines: list[Baseline]
    reference_point: dict[str, float]
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
        return json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False, allow_nan=False)


class Facts(_Document):
    """What a report needs to know of the study beside its trials; all of it stored in the database."""

    name: str
    task: str
    objectives: dict[str, pareto.Direction]
    constraints: dict[str, str] = Field(default_factory=dict)
    reference_point: dict[str, float] = Field(default_factory=dict)
    environment: dict[str, Any] = Field(default_factory=dict)
    settings: dict[str, Any] = Field(default_factory=dict)


def build_report(facts: Facts, entries: Iterable[Entry]) -> Report:
    """The document of a study from its stored facts and trials; sensible for a study with no trial at all."""
    trials = sorted(entries, key=lambda entry: entry.number)
    front = front_of(trials, facts.objectives, facts.constraints)
    alike = _alike(trials, front, facts.objectives)
    marked = [
        entry.model_copy(update={"on_front": entry.number in front, "alike": alike.get(entry.number, [])})
        for entry in trials
    ]
    teacher = teacher_of(marked)
    return Report(
        study=facts.name,
        task=facts.task,
        objectives=facts.objectives,
        constraints=facts.constraints,
        teacher=teacher.metrics if teacher else {},
        baselines=[_baseline(entry) for entry in marked if entry.baseline and entry.metrics],
        reference_point=facts.reference_point,
        hypervolume=hypervolume_of(marked, facts),
        front=front,
        recommended=_recommended(marked, front, facts),
        trials=marked,
        environment=_plain(facts.environment),
    )


def front_of(
    trials: Sequence[Entry], objectives: Mapping[str, pareto.Direction], constraints: Mapping[str, str]
) -> list[int]:
    """Numbers of the complete trials within the constraints that none other dominates, best score first."""
    able = [entry for entry in candidates(trials, objectives) if not violations(entry.metrics, constraints)]
    if not able:
        return []
    names, directions = list(objectives), list(objectives.values())
    rows = pareto.front([[entry.metrics[name] for name in names] for entry in able], directions)
    sign = -1 if directions[0] == "maximize" else 1
    best_first = sorted(
        (able[row] for row in rows), key=lambda entry: (sign * entry.metrics[names[0]], entry.number)
    )
    return [entry.number for entry in best_first]


def _alike(
    trials: Sequence[Entry], front: Sequence[int], objectives: Mapping[str, pareto.Direction]
) -> dict[int, list[int]]:
    """For each member of the front the other members whose intervals overlap its own in every objective."""
    members = [entry for entry in trials if entry.number in front]
    boxes = [[entry.intervals.get(name, (entry.metrics[name],) * 2) for name in objectives] for entry in members]
    overlap = pareto.indistinguishable(boxes)
    numbers = [entry.number for entry in members]
    return {
        number: [other for other, same in zip(numbers, overlap[row], strict=True) if same and other != number]
        for row, number in enumerate(numbers)
    }


def _recommended(trials: Sequence[Entry], front: Sequence[int], facts: Facts) -> int | None:
    """The front's member to choose; never the teacher itself, which is no compression."""
    members = [entry for entry in trials if entry.number in front and entry.recipe]
    if not members:
        return None
    row = pareto.recommend(
        [[entry.metrics[name] for name in facts.objectives] for entry in members],
        list(facts.objectives.values()),
        bounded=[name in facts.constraints or f"{name}_drop" in facts.constraints for name in facts.objectives],
    )
    return None if row is None else members[row].number


def candidates(trials: Iterable[Entry], objectives: Mapping[str, pareto.Direction]) -> list[Entry]:
    """The complete trials that have a value for every objective."""
    return [
        entry for entry in trials if entry.state == "complete" and all(name in entry.metrics for name in objectives)
    ]


def violations(metrics: Metrics, constraints: Mapping[str, str]) -> dict[str, float]:
    """By how much each broken constraint is missed, relative to its bound; a missing metric misses it wholly."""
    missed = {}
    for name, text in constraints.items():
        for limit in text.split(" and "):
            operator, bound = limit.split()
            if name not in metrics:
                missed[name] = math.inf
                continue
            excess = metrics[name] - float(bound)
            if (excess if operator.startswith("<") else -excess) > 0:
                missed[name] = abs(excess) / max(abs(float(bound)), 1e-12)
    return missed


def teacher_of(trials: Iterable[Entry]) -> Entry | None:
    """The complete trial of the empty recipe."""
    return next((entry for entry in trials if entry.state == "complete" and not entry.recipe), None)


def hypervolume_of(trials: Sequence[Entry], facts: Facts) -> float | None:
    """Of the feasible complete trials against the study's frozen reference point; None while there is none."""
    names = list(facts.objectives)
    if any(name not in facts.reference_point for name in names):
        return None
    members = front_of(trials, facts.objectives, facts.constraints)
    by_number = {entry.number: entry for entry in trials}
    rows = [[by_number[number].metrics[name] for name in names] for number in members]
    reference = [facts.reference_point[name] for name in names]
    return float(pareto.hypervolume(rows, reference, list(facts.objectives.values()))) if rows else 0.0


def hypervolume_history(report: Report) -> list[tuple[int, float]]:
    """(number, hypervolume of the trials up to it) for every complete trial, in order."""
    facts = Facts(
        name=report.study,
        task=report.task,
        objectives=report.objectives,
        constraints=report.constraints,
        reference_point=report.reference_point,
    )
    done = candidates(report.trials, report.objectives)
    volumes = [hypervolume_of(done[: end + 1], facts) for end in range(len(done))]
    return [(entry.number, volume) for entry, volume in zip(done, volumes, strict=True) if volume is not None]


def failures(report: Report) -> list[tuple[str, list[int]]]:
    """(reason, numbers) of the failed trials, most frequent first; parameters are no part of a reason."""
    groups: dict[str, list[int]] = {}
    for entry in report.trials:
        if entry.state == "failed":
            reason = re.sub(r" \{[^{}]*\}", "", entry.error or "unknown")
            groups.setdefault(reason, []).append(entry.number)
    return sorted(groups.items(), key=lambda item: (-len(item[1]), item[1]))


def counts(report: Report) -> dict[str, int]:
    """How many trials are in each state, baselines aside."""
    found: dict[str, int] = {}
    for entry in report.trials:
        if entry.baseline is None and entry.recipe:
            found[entry.state] = found.get(entry.state, 0) + 1
    return found


def recommendation(report: Report) -> str:
    """The recommendation in one sentence, or why there is none."""
    if report.recommended is not None:
        chosen = report.trial(report.recommended)
        return f"Choose trial {chosen.number}: {', '.join(_gains(chosen, report)) or chosen.text}."
    done = [entry for entry in candidates(report.trials, report.objectives) if entry.recipe]
    if not done:
        return "Nothing has completed yet."
    if not report.constraints or report.front:
        return "Nothing on the front improves on the teacher."
    closest = min(done, key=lambda entry: sum(violations(entry.metrics, report.constraints).values()))
    missed = ", ".join(
        f"{formats.number(name, closest.metrics.get(name), unit=True)} against {report.constraints[name]}"
        for name in violations(closest.metrics, report.constraints)
    )
    return f"Nothing meets the constraints; the closest is trial {closest.number} ({missed})."


def _gains(entry: Entry, report: Report) -> list[str]:
    """What a trial gains and loses against the teacher, in words."""
    words, teacher = [], report.teacher
    speedup = speedup_of(entry, teacher)
    if speedup:
        words.append(f"{speedup:.1f}× faster" if speedup >= 1 else f"{1 / speedup:.1f}× slower")
    score = next((name for name, way in report.objectives.items() if way == "maximize" and name in teacher), None)
    if score in entry.metrics and formats.style(score).scale == 100:
        low_high = entry.intervals.get(score)
        words.append(f"{formats.points(entry.metrics[score] - teacher[score])} {formats.style(score).label}")
        if low_high:
            low, high = (formats.points(bound - teacher[score]).split()[0] for bound in low_high)
            words[-1] += f" (95 % CI {low} … {high})"
    if "size_mb" in entry.metrics and teacher.get("size_mb"):
        words.append(
            f"{formats.number('size_mb', entry.metrics['size_mb'])} MB instead of "
            f"{formats.number('size_mb', teacher['size_mb'])} MB"
        )
    return words


def speedup_of(entry: Entry, teacher: Metrics) -> float | None:
    """How many times faster than the teacher: as measured, or from the two latencies."""
    if "speedup" in entry.metrics:
        return entry.metrics["speedup"]
    mine, base = entry.metrics.get("latency_ms"), teacher.get("latency_ms")
    return base / mine if mine and base else None


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

"""One trial in a worker: shapes first, then training, lowering, scoring and measuring, then ``result.json``.

Owns the order of those, the metrics of a trial and what becomes of an exception. Knows nothing of who proposed
the recipe, of Ray or of the database.
"""

from __future__ import annotations

import faulthandler
import json
import shutil
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from compress_search.candidate import Candidate
from compress_search.environment import fingerprint
from compress_search.errors import BenchDied, CompressSearchError, StudyError, TrialError
from compress_search.measure import Score
from compress_search.measure.costs import costs_of
from compress_search.pipeline import (
    Budget,
    StepContext,
    TrialStopped,
    derive_seed,
    extra_metrics,
    is_disk_full,
    is_out_of_memory,
    run_recipe,
)
from compress_search.records import Assignment, Failure, Report, Result, Rung, State
from compress_search.runtimes import Artifact
from compress_search.runtimes.engines import COMPILE
from compress_search.runtimes.lowering import lower
from compress_search.workbench import Brief, Shape, Workbench, write_atomically

PROVISIONAL_MARGIN = 0.10
"""How far beyond a hard limit a measurement of not yet final shapes must lie to reject a recipe."""

Metrics = dict[str, float]


def trial_folder(output: Path, number: int) -> Path:
    """Where a trial keeps its files."""
    return output / "trials" / f"{number:06d}"


def read_result(output: Path, number: int) -> Result | None:
    """The result a worker left behind, if it got that far."""
    path = trial_folder(output, number) / "result.json"
    return Result.from_dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def read_death(output: Path, number: int, attempt: int) -> Failure:
    """Why an attempt's process ended without a result: its time limit, or something unknown."""
    path = _overrun(output, number, attempt)
    if path.exists() and (text := path.read_text(encoding="utf-8")):
        return Failure("timeout", "the attempt outlasted search.trial_minutes", text)
    return Failure("died", "the worker process died")


def _overrun(output: Path, number: int, attempt: int) -> Path:
    return trial_folder(output, number) / f"overrun-{attempt}.txt"


def shape_metrics(shape: Shape, reference: Mapping[str, float], batch_size: int) -> Metrics:
    """Latency in ms of the study's frozen teacher, speed-up, throughput in examples a second, size and memory."""
    costs, _ = costs_of(shape.latency, _teacher_ms(shape, reference), batch_size)
    metrics = {**costs, "size_mb": shape.size}
    return metrics if shape.memory is None else {**metrics, "memory_mb": shape.memory}


def _teacher_ms(shape: Shape, reference: Mapping[str, float]) -> float:
    """Before the study has frozen it, as in this very measurement."""
    return reference.get("latency_ms", shape.latency.reference_ms)


def score_metrics(scores: Mapping[str, float], reference: Mapping[str, float]) -> Metrics:
    """The scores, and the absolute loss of each against the teacher."""
    drops = {f"{name}_drop": reference.get(name, value) - value for name, value in scores.items()}
    return {**scores, **drops}


def intervals_of(
    score: Score, shape: Shape, reference: Mapping[str, float], batch_size: int
) -> dict[str, tuple[float, float]]:
    """95 % intervals of scores, latency, speed-up and throughput."""
    _, intervals = costs_of(shape.latency, _teacher_ms(shape, reference), batch_size)
    return {**score.intervals, **intervals}


def _as_deployed(candidate: Candidate) -> bool:
    """Whether it is scored in batches as it will be run: lowered arithmetic, and what compiles for each size."""
    return bool(candidate.lowering) or candidate.runtime.get("engine") == COMPILE


@dataclass
class Stopwatch:
    """Seconds by phase."""

    seconds: dict[str, float] = field(default_factory=dict)
    running: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def time(self, phase: str) -> Iterator[None]:
        """Add the time of the block to a phase."""
        self.running[phase] = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.so_far()[phase]
            del self.running[phase]

    def so_far(self) -> dict[str, float]:
        """The seconds up to now, of phases that still run as well."""
        now = time.perf_counter()
        elapsed = {phase: self.seconds.get(phase, 0.0) + now - since for phase, since in self.running.items()}
        return {**self.seconds, **elapsed}


class TrialWorker:
    """Runs the trials of one study in one process."""

    def __init__(self, brief: Brief) -> None:
        self.workbench = Workbench(brief)

    def run(self, assignment: Assignment, report: Report) -> Result:
        """Run one attempt to its end, whatever its methods do, and leave ``result.json`` behind.

        Raises:
            BenchDied: the bench process ended.
            StudyError: there is no space on a disk, for which no recipe is to blame: every trial would fail.
        """
        with disk_faults():
            return self._run(assignment, report)

    def _run(self, assignment: Assignment, report: Report) -> Result:
        output, watch = self.workbench.output, Stopwatch()
        folder = trial_folder(output, assignment.number)
        overrun = _overrun(output, assignment.number, assignment.attempt)
        for stale in (folder / "result.json", overrun):  # of an earlier study in the same place
            stale.unlink(missing_ok=True)
        with watch.time("teacher"):
            self.workbench.prepare()
        with (
            scratch_folder(folder / f"scratch-{assignment.attempt}") as scratch,
            watch.time("total"),
            time_limit(self.workbench.study.search.trial_minutes, overrun),
        ):
            result = Attempt(self.workbench, assignment, report, scratch, watch).run()
        result = replace(result, seconds=watch.seconds, environment=fingerprint())
        write_atomically(folder / "result.json", json.dumps(result.to_dict()))
        return result

    def finalize(self, artifacts: Mapping[int, str]) -> dict[int, dict[str, Any]]:
        """Measure these trials once more, interleaved with the teacher, and score them once on test.

        What cannot be measured any more has an ``error`` in place of its numbers, and costs the others nothing.

        Raises:
            StudyError: there is no space on a disk.
        """
        with disk_faults():
            return self._finalize(artifacts)

    def _finalize(self, artifacts: Mapping[int, str]) -> dict[int, dict[str, Any]]:
        self.workbench.prepare()
        found: dict[int, dict[str, Any]] = {}
        for number, artifact in artifacts.items():
            try:
                found[number] = self._second_look(number, self.workbench.output / artifact)
            except CompressSearchError as error:  # of the bench, which says what is wrong with what it was given
                if is_disk_full(error):
                    raise
                found[number] = {"error": str(error)}
        return found

    def _second_look(self, number: int, artifact: Path) -> dict[str, Any]:
        bench = self.workbench
        seed = derive_seed(bench.study.search.seed, "final", number)
        latency = bench.latency(artifact, repeats=2 * bench.study.measure.repeats, seed=seed)
        found = {"latency": latency.to_dict()}
        if bench.split("test") is not None:
            found["test"] = bench.score(artifact, "test", as_deployed=True).to_dict()
        return found

    def close(self) -> None:
        """End the bench process."""
        self.workbench.close()


@contextmanager
def disk_faults() -> Iterator[None]:
    """A full disk, wherever it was met, as what ends the run instead of a trial."""
    try:
        yield
    except Exception as error:
        if isinstance(error, StudyError) or not is_disk_full(error):
            raise
        text = f"a disk is full ({error}): free some space, and the same command goes on"
        raise StudyError(" ".join(text.split()), key="output") from error


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """A directory for the time of the block."""
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def clear_scratch(output: Path) -> None:
    """Remove what attempts whose processes were killed left behind; only while no attempt runs."""
    for path in (output / "trials").glob("*/scratch-*"):
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def time_limit(minutes: float | None, overrun: Path) -> Iterator[None]:
    """End the whole process when the block takes longer, even if it hangs inside a C library.

    The stacks of all threads are left in the file ``overrun``.
    """
    if minutes is None:
        yield
        return
    try:
        with overrun.open("w", encoding="utf-8") as file:
            faulthandler.dump_traceback_later(minutes * 60, exit=True, file=file)
            try:
                yield
            finally:
                faulthandler.cancel_dump_traceback_later()
    finally:
        overrun.unlink(missing_ok=True)


@dataclass
class Attempt:
    """The course of one attempt at one trial."""

    bench: Workbench
    assignment: Assignment
    report: Report
    scratch: Path
    watch: Stopwatch
    shape: Shape | None = None
    latest: Metrics = field(default_factory=dict)

    def run(self) -> Result:
        """What the attempt came to. Faults of the machine are raised: a dead bench, until it repeats; a full disk.

        A bench that hangs is none: what it was given hangs it, and would again.
        """
        try:
            return self._run()
        except TrialStopped:
            return self._result("stopped", metrics=self.latest)
        except Exception as error:  # a method, a stranger's perhaps, may raise anything; it costs this trial only
            if (isinstance(error, BenchDied) and error.kind != "timeout") or is_disk_full(error):
                raise
            kind = "oom" if is_out_of_memory(error) else getattr(error, "kind", "error")
            message = str(error) if isinstance(error, TrialError) else f"{type(error).__name__}: {error}"
            failure = Failure(kind, message.split("\n")[0], traceback.format_exc())
            return self._result("failed", failure=failure)

    def _run(self) -> Result:
        recipe = self.assignment.recipe
        if recipe.steps and self._shapes_first:
            with self.watch.time("dry"):
                provisional = self._dry_pass()
            if self.assignment.baseline is None and self._rejected(provisional):
                return self._result("infeasible", metrics=self._shape_metrics(), provisional=True)
        with self.watch.time("apply"):
            candidate, budget = self._apply(on_rung=self._on_rung)
            extra = self._evaluate(candidate, budget)
        self.watch.seconds["fit"] = budget.fit_seconds
        self.watch.seconds["apply"] -= budget.fit_seconds
        directory = self.bench.artifact(recipe, self.assignment.seed)
        with self.watch.time("lower"):
            self.bench.lower(candidate, directory)
        with self.watch.time("score"):
            score = self.bench.score(directory, "validation", as_deployed=_as_deployed(candidate))
        with self.watch.time("measure"):
            self.shape = self.bench.shape(candidate, directory, recipe)
        return self._complete(candidate, score, self.shape, extra, directory)

    @property
    def _shapes_first(self) -> bool:
        """Whether shapes can reject a recipe, or are needed to compare it at rungs."""
        study = self.bench.study
        return bool(study.constraints) or study.search.early_stop != "none"

    def _apply(self, **options: Any) -> tuple[Candidate, Budget]:
        bench, assignment = self.bench, self.assignment
        return run_recipe(
            assignment.recipe,
            bench.registry,
            bench.materials,
            seed=assignment.seed,
            scratch=self.scratch,
            **options,
        )

    def _dry_pass(self) -> bool:
        """Measure the shapes without training; whether training may still change them, or the size of the zeros."""
        candidate, _ = self._apply(dry=True)
        directory = self.scratch / "dry"
        lower(candidate, directory, self.bench.materials.task)
        self.shape = self.bench.shape(candidate, directory, self.assignment.recipe)
        shutil.rmtree(directory)
        return not candidate.subject.traits.isdisjoint({"non-uniform", "sparse"})

    def _rejected(self, provisional: bool) -> bool:
        metrics, tolerance = self._shape_metrics(), PROVISIONAL_MARGIN if provisional else 0.0
        limits = self.bench.study.constraints.values()
        return any(
            limit.violation(metrics[limit.metric], tolerance) > 0 for limit in limits if limit.metric in metrics
        )

    def _shape_metrics(self) -> Metrics:
        if self.shape is None:
            return {}
        return shape_metrics(self.shape, self.assignment.reference, self.bench.study.measure.batch_size)

    def _on_rung(self, index: int, scores: Mapping[str, float]) -> bool:
        self.latest = {**self._shape_metrics(), **score_metrics(scores, self.assignment.reference)}
        number, attempt = self.assignment.number, self.assignment.attempt
        return self.report(Rung(number, attempt, index, self.latest, self.watch.so_far()))

    def _evaluate(self, candidate: Candidate, budget: Budget) -> Metrics:
        seed = derive_seed(self.assignment.seed, "evaluate")
        materials = self.bench.materials.read_by(candidate.tokenizer)
        context = StepContext(materials, budget, 0, seed, self.scratch, dry=True)
        return extra_metrics(self.assignment.recipe, self.bench.registry, candidate, context)

    def _complete(
        self, candidate: Candidate, score: Score, shape: Shape, extra: Metrics, directory: Path
    ) -> Result:
        metrics = {**score_metrics(score.metrics, self.assignment.reference), **self._shape_metrics(), **extra}
        parameters = sum(parameter.numel() for parameter in candidate.network.parameters())
        return self._result(
            "complete",
            metrics={**metrics, "parameters": float(parameters)},
            intervals=intervals_of(score, shape, self.assignment.reference, self.bench.study.measure.batch_size),
            measurements={
                "latency": shape.latency.to_dict(),
                "simulated": candidate.simulated,
                "runtime": dict(Artifact.read(directory).runtime),
            },
            artifact=directory.relative_to(self.bench.output).as_posix(),
        )

    def _result(self, state: State, **fields: Any) -> Result:
        """With the study's mark: a later run tells by it whether a file left behind belongs to its trial."""
        measurements = {"study": self.assignment.study, **fields.pop("measurements", {})}
        return Result(self.assignment.number, self.assignment.attempt, state, measurements=measurements, **fields)

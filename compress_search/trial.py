"""One trial in a worker: shapes first, then training, lowering, scoring and measuring, then ``result.json``.

Owns the order of those and what becomes of an exception. Knows nothing of who proposed the recipe, of Ray or
of the database.
"""

from __future__ import annotations

import faulthandler
import json
import os
import shutil
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from compress_search.candidate import Candidate, Subject
from compress_search.data import read, tokenize
from compress_search.encoders import describe, shape_key, subject_of
from compress_search.environment import fingerprint, host_kind
from compress_search.errors import BenchDied, TrialError
from compress_search.logits import teacher_logits
from compress_search.measure import Bench, Latency, Score
from compress_search.pipeline import (
    Budget,
    Materials,
    StepContext,
    TrialStopped,
    derive_seed,
    extra_metrics,
    is_out_of_memory,
    run_recipe,
)
from compress_search.recipe import Recipe, digest
from compress_search.records import Assignment, Failure, Report, Result, Rung
from compress_search.registry import PluginFile, Registry
from compress_search.runtimes import lower, size_mb
from compress_search.study import Study
from compress_search.teacher import load_teacher, prepare_teacher

SCORING_BATCH = 64
"""Batch size of scoring where the result does not depend on an example's companions."""

PROVISIONAL_MARGIN = 0.10
"""How far beyond a hard limit a measurement of not yet final shapes must lie to reject a recipe."""


@dataclass(frozen=True)
class Brief:
    """All that a worker needs to know of a study, as plain data; the database is not among it."""

    study: Mapping[str, Any]
    files: Sequence[tuple[str, str]]
    teacher: Mapping[str, Any]
    cache: str


def trial_folder(output: Path, number: int) -> Path:
    """Where a trial keeps its files."""
    return output / "trials" / f"{number:06d}"


def read_result(output: Path, number: int) -> Result | None:
    """The result a worker left behind, if it got that far."""
    path = trial_folder(output, number) / "result.json"
    return Result.from_dict(json.loads(path.read_text())) if path.exists() else None


def read_death(output: Path, number: int, attempt: int) -> Failure:
    """Why an attempt's process ended without a result: its time limit, or something unknown."""
    path = _overrun(output, number, attempt)
    if path.exists() and (text := path.read_text()):
        return Failure("timeout", "the attempt outlasted search.trial_minutes", text)
    return Failure("died", "the worker process died")


def _overrun(output: Path, number: int, attempt: int) -> Path:
    return trial_folder(output, number) / f"overrun-{attempt}.txt"


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that it is either whole or not there."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@dataclass
class Stopwatch:
    """Seconds by phase."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def time(self, phase: str) -> Iterator[None]:
        """Add the time of the block to a phase."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started


@dataclass(frozen=True)
class Shape:
    """What depends on shapes alone: the latency against the teacher, the size and the memory."""

    key: str
    size: float
    latency: Latency
    memory: float | None = None


class Workbench:
    """A worker's long-lived belongings: the study's materials and its bench process, made when first needed."""

    def __init__(self, brief: Brief) -> None:
        self.study = Study.from_dict(brief.study)
        self.output = Path(self.study.output)
        self.cache = Path(brief.cache)
        self.registry = Registry(tuple(PluginFile(name, text) for name, text in brief.files))
        self.subject = Subject.from_dict(brief.teacher)
        self._bench: Bench | None = None
        torch.set_num_threads(max(1, round(self.study.cluster.cpus_per_trial)))

    @property
    def device(self) -> torch.device:
        """Where trials train: a GPU when the study gives them one."""
        return torch.device("cuda" if self.study.cluster.gpus_per_trial > 0 else "cpu")

    @property
    def bench(self) -> Bench:
        """The bench process of this worker."""
        if self._bench is None:
            self._bench = Bench(threads=self.study.measure.threads, device=self.device.type)
        return self._bench

    @cached_property
    def materials(self) -> Materials:
        """Teacher, splits and cached teacher outputs: prepared by whoever comes first, shared by all."""
        raw, task = read(self.study)
        directory = prepare_teacher(self.study, raw, task, self.cache)
        network, tokenizer = load_teacher(directory, self.device)
        splits = tokenize(raw, tokenizer, self.study, task, self.cache)
        logits = teacher_logits(directory, splits["train"], self.cache, self.device)
        subject = subject_of(network, task.name, self.device.type).having(*self.subject.traits)
        self.splits, self.teacher_directory = splits, directory
        return Materials(
            Candidate(network, tokenizer, subject),
            task,
            splits["train"],
            splits["validation"],
            logits,
            self.device,
            self.study.training,
        )

    @cached_property
    def reference(self) -> Path:
        """The lowered teacher, which every candidate is timed against."""
        directory = self.artifact(Recipe(), 0)
        directory.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{directory}.lock"):
            if not directory.exists():
                lower(self.materials.teacher, directory, self.materials.task)
        return directory

    def artifact(self, recipe: Recipe, seed: int) -> Path:
        """Where the artefact of a recipe belongs: the same for the same content, whoever makes it."""
        _ = self.materials
        plugins = [self.registry.fingerprint(name) for name in recipe.methods]
        study = self.study.to_dict()
        parts = [self.teacher_directory.name, recipe.key, seed if recipe.steps else 0, study["training"], plugins]
        return self.output / "artifacts" / digest(parts)[:20]

    def run(self, assignment: Assignment, report: Report) -> Result:
        """Run one attempt to its end, whatever happens in it, and leave ``result.json`` behind."""
        folder = trial_folder(self.output, assignment.number)
        scratch = folder / f"scratch-{assignment.attempt}"
        scratch.mkdir(parents=True, exist_ok=True)
        watch = Stopwatch()
        with watch.time("teacher"):
            _ = self.materials, self.reference
        with watch.time("total"), self._limit(assignment):
            result = self._guarded(assignment, report, scratch, watch)
        shutil.rmtree(scratch, ignore_errors=True)
        seconds = {**watch.seconds, **result.seconds}
        result = Result(**{**vars(result), "seconds": seconds, "environment": fingerprint()})
        write_atomically(folder / "result.json", json.dumps(result.to_dict()))
        return result

    @contextmanager
    def _limit(self, assignment: Assignment) -> Iterator[None]:
        """End the process when the attempt outlasts its limit, even if it hangs inside a C library."""
        minutes = self.study.search.trial_minutes
        if minutes is None:
            yield
            return
        path = _overrun(self.output, assignment.number, assignment.attempt)
        with path.open("w") as file:
            faulthandler.dump_traceback_later(minutes * 60, exit=True, file=file)
            try:
                yield
            finally:
                faulthandler.cancel_dump_traceback_later()
        path.unlink()

    def _guarded(self, assignment: Assignment, report: Report, scratch: Path, watch: Stopwatch) -> Result:
        number, attempt = assignment.number, assignment.attempt
        stopped: dict[str, float] = {}

        def watched(rung: Rung) -> bool:
            stopped.clear()
            stopped.update(rung.metrics)
            return report(rung)

        try:
            return self._run(assignment, watched, scratch, watch)
        except TrialStopped:
            return Result(number, attempt, "stopped", metrics=stopped)
        except BenchDied:
            raise  # a fault of the machine until it repeats itself
        except Exception as error:  # a method, a stranger's perhaps, may raise anything; it costs this trial only
            kind = "oom" if is_out_of_memory(error) else getattr(error, "kind", "error")
            message = str(error) if isinstance(error, TrialError) else f"{type(error).__name__}: {error}"
            failure = Failure(kind, message.splitlines()[0] if message else kind, traceback.format_exc())
            return Result(number, attempt, "failed", failure=failure)

    def _run(self, assignment: Assignment, report: Report, scratch: Path, watch: Stopwatch) -> Result:
        shape = None
        if self._shapes_first and assignment.recipe.steps:
            with watch.time("dry"):
                shape, provisional = self._dry(assignment, scratch)
            metrics = self._shape_metrics(shape, assignment.reference)
            if self._rejects(metrics, provisional):
                return Result(assignment.number, assignment.attempt, "infeasible", metrics, provisional=True)

        def on_rung(index: int, scores: Mapping[str, float]) -> bool:
            known = self._shape_metrics(shape, assignment.reference) if shape else {}
            metrics = {**known, **self._score_metrics(scores, assignment.reference)}
            return report(Rung(assignment.number, assignment.attempt, index, metrics))

        with watch.time("apply"):
            candidate, budget = self._apply(assignment, scratch, on_rung=on_rung)
            extra = self._extra_metrics(assignment, candidate, scratch, budget)
        watch.seconds["fit"] = budget.fit_seconds
        watch.seconds["apply"] -= budget.fit_seconds
        directory = self.artifact(assignment.recipe, assignment.seed)
        with watch.time("lower"):
            self._lower(candidate, directory)
        with watch.time("score"):
            score = self._score(directory, candidate, "validation")
        with watch.time("measure"):
            shape = self._measured(candidate, directory, assignment.recipe, known=shape)
        return self._result(assignment, score, shape, extra, directory, candidate)

    @property
    def _shapes_first(self) -> bool:
        """Whether shapes can reject a recipe, or are needed to compare it at rungs."""
        return bool(self.study.constraints) or self.study.search.early_stop != "none"

    def _apply(self, assignment: Assignment, scratch: Path, **options: Any) -> tuple[Candidate, Budget]:
        return run_recipe(
            assignment.recipe, self.registry, self.materials, seed=assignment.seed, scratch=scratch, **options
        )

    def _dry(self, assignment: Assignment, scratch: Path) -> tuple[Shape, bool]:
        candidate, _ = self._apply(assignment, scratch, dry=True)
        directory = scratch / "dry"
        lower(candidate, directory, self.materials.task)
        shape = self._measured(candidate, directory, assignment.recipe)
        shutil.rmtree(directory)
        return shape, "non-uniform" in candidate.subject.traits

    def _rejects(self, metrics: Mapping[str, float], provisional: bool) -> bool:
        tolerance = PROVISIONAL_MARGIN if provisional else 0.0
        limits = self.study.constraints.values()
        return any(
            limit.violation(metrics[limit.metric], tolerance) > 0 for limit in limits if limit.metric in metrics
        )

    def _extra_metrics(
        self, assignment: Assignment, candidate: Candidate, scratch: Path, budget: Budget
    ) -> dict[str, float]:
        seed = derive_seed(assignment.seed, "evaluate")
        context = StepContext(self.materials, budget, 0, seed, scratch, dry=True)
        return extra_metrics(assignment.recipe, self.registry, candidate, context)

    def _lower(self, candidate: Candidate, directory: Path) -> None:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{directory}.lock"):
            if directory == self.reference:
                return
            shutil.rmtree(directory, ignore_errors=True)
            lower(candidate, directory, self.materials.task)

    def _score(self, directory: Path, candidate: Candidate, split: str) -> Score:
        # lowered arithmetic can depend on an example's companions (one scale per batch): score it as deployed
        batch_size = self.study.measure.batch_size if candidate.lowering else SCORING_BATCH
        return self.bench.score(directory, self.splits[split].path, self.materials.task, batch_size)

    def _measured(self, candidate: Candidate, directory: Path, recipe: Recipe, known: Shape | None = None) -> Shape:
        """Latency, size and memory; shared by all candidates of equal shapes, precision and runtime."""
        key = self._measurement_key(candidate, recipe)
        if known and known.key == key:
            return known
        shelf = self.output / "shapes" / f"{key}.json"
        if shelf.exists():
            return _shape_from(key, json.loads(shelf.read_text()))
        measure = self.study.measure
        shape = Shape(
            key,
            size_mb(directory),
            self.bench.latency(
                directory,
                self.reference,
                self.splits["validation"].path,
                batch_size=measure.batch_size,
                repeats=measure.repeats,
                seed=self.study.search.seed,
            ),
            self._memory(directory) if "memory_mb" in self._metrics_wanted else None,
        )
        shelf.parent.mkdir(parents=True, exist_ok=True)
        stored = {"size": shape.size, "latency": shape.latency.to_dict(), "memory": shape.memory}
        write_atomically(shelf, json.dumps(stored))
        return shape

    def _memory(self, directory: Path) -> float:
        return self.bench.memory(directory, self.splits["validation"].path, self.study.measure.batch_size)

    @property
    def _metrics_wanted(self) -> set[str]:
        return {*self.study.objectives, *self.study.constraints}

    def _measurement_key(self, candidate: Candidate, recipe: Recipe) -> str:
        late = [step for step in recipe.to_list() if self.registry[step["method"]].stage >= 8]
        shape = shape_key(describe(candidate.network))
        return digest([shape, late, dict(candidate.runtime), self.study.to_dict()["measure"], host_kind()])[:20]

    def _shape_metrics(self, shape: Shape, reference: Mapping[str, float]) -> dict[str, float]:
        base = reference.get("latency_ms", shape.latency.reference_ms)
        latency_ms = shape.latency.ratio * base
        metrics = {
            "latency_ms": latency_ms,
            "speedup": 1 / shape.latency.ratio,
            "throughput": 1000 * self.study.measure.batch_size / latency_ms,
            "size_mb": shape.size,
        }
        return metrics if shape.memory is None else {**metrics, "memory_mb": shape.memory}

    @staticmethod
    def _score_metrics(scores: Mapping[str, float], reference: Mapping[str, float]) -> dict[str, float]:
        drops = {f"{name}_drop": reference.get(name, value) - value for name, value in scores.items()}
        return {**scores, **drops}

    def _result(
        self,
        assignment: Assignment,
        score: Score,
        shape: Shape,
        extra: Mapping[str, float],
        directory: Path,
        candidate: Candidate,
    ) -> Result:
        shapes = self._shape_metrics(shape, assignment.reference)
        base = shapes["latency_ms"] / shape.latency.ratio
        low, high = shape.latency.low, shape.latency.high
        intervals = {
            **score.intervals,
            "latency_ms": (low * base, high * base),
            "speedup": (1 / high, 1 / low),
        }
        return Result(
            assignment.number,
            assignment.attempt,
            "complete",
            {**self._score_metrics(score.metrics, assignment.reference), **shapes, **extra},
            intervals,
            {
                "latency": shape.latency.to_dict(),
                "simulated": candidate.simulated,
                "parameters": sum(p.numel() for p in candidate.network.parameters()),
                "recipe": assignment.recipe.key,
            },
            str(directory.relative_to(self.output)),
        )

    def finalize(self, artifacts: Mapping[int, str]) -> dict[int, dict[str, Any]]:
        """Measure the front once more, interleaved with the teacher, and score it once on test."""
        _ = self.materials, self.reference
        measure, split = self.study.measure, self.splits.get("test")
        found: dict[int, dict[str, Any]] = {}
        for number, artifact in artifacts.items():
            directory = self.output / artifact
            latency = self.bench.latency(
                directory,
                self.reference,
                self.splits["validation"].path,
                batch_size=measure.batch_size,
                repeats=2 * measure.repeats,
                seed=derive_seed(self.study.search.seed, number),
            )
            found[number] = {"latency": latency.to_dict()}
            if split is not None:
                score = self.bench.score(directory, split.path, self.materials.task, measure.batch_size)
                found[number]["test"] = score.to_dict()
        return found

    def close(self) -> None:
        """End the bench process."""
        if self._bench is not None:
            with suppress(OSError):
                self._bench.close()


def _shape_from(key: str, data: Mapping[str, Any]) -> Shape:
    return Shape(key, data["size"], Latency.from_dict(data["latency"]), data["memory"])

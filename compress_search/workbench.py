"""A worker's long-lived belongings: the study's materials, the lowered teacher and the bench process.

Owns what is made once and used by every trial of a worker, where artefacts live and which candidates share a
measurement. Knows nothing of the course of a trial.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from compress_search.candidate import Candidate, Subject
from compress_search.data import Split, tokenize, tokenize_rows, tokenizer_digest
from compress_search.data.rows import read
from compress_search.encoders import describe, shape_key, subject_of
from compress_search.environment import host_kind
from compress_search.measure import SCORING_BATCH, Bench, Latency, Score
from compress_search.measure.layers import LayerTable, kept_layer_table, time_stacks
from compress_search.method import Stage
from compress_search.pipeline import Materials
from compress_search.recipe import Recipe, digest
from compress_search.registry import PluginFile, Registry
from compress_search.runtimes import Artifact, size_mb
from compress_search.runtimes.engines import CPU_SESSION
from compress_search.runtimes.lowering import lower
from compress_search.runtimes.onnx_export import GRAPHS
from compress_search.study import Study
from compress_search.teacher import (
    load_teacher,
    masked_lm,
    prepare_ensemble,
    prepare_teacher,
    student_start,
    untrained,
)
from compress_search.teacher.auxiliary import prepare as prepare_auxiliary
from compress_search.teacher.logits import TeacherLogits
from compress_search.teacher.outputs import TeacherOutputs

HANGING = 900.0
"""Seconds after which a bench that does not answer is taken to hang, were there nothing to compute or compile."""

SECONDS_AN_EXAMPLE, SECONDS_A_COMPILATION = 1.0, 180.0
"""What is granted beyond that: many times what they take."""


def patience(examples: int = 0, compilations: int = 0) -> float:
    """Seconds to wait for an answer of the bench."""
    return HANGING + SECONDS_AN_EXAMPLE * examples + SECONDS_A_COMPILATION * compilations


@dataclass(frozen=True)
class Brief:
    """All that a worker needs to know of a study, as plain data; the database is not among it."""

    study: Mapping[str, Any]
    files: Sequence[tuple[str, str]]
    teacher: Mapping[str, Any]
    cache: str


@dataclass(frozen=True)
class Shape:
    """What depends on shapes alone: the size, the latency against the teacher and, where wanted, the memory."""

    key: str
    size: float
    latency: Latency
    memory: float | None = None


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that it is either whole or not there, also after a crash of the machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


class Workbench:
    """Everything on it is made when it is first needed; file locks keep several workers from making it twice."""

    def __init__(self, brief: Brief) -> None:
        self.study = Study.from_dict(brief.study)
        self.output = self.study.output
        self.cache = Path(brief.cache)
        self.registry = Registry(tuple(PluginFile(name, text) for name, text in brief.files))
        self.subject = Subject.from_dict(brief.teacher)
        self._bench: Bench | None = None
        self._latest_reading: tuple[str, Mapping[str, Split]] = ("", {})
        torch.set_num_threads(self.study.cluster.cpus_per_trial)

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

    def prepare(self) -> None:
        """Make what trials share, so that the first of them is not charged for it."""
        validation = self.materials.validation
        self.bench.reference(
            self.reference, validation.path, self.materials.task, timeout=patience(len(validation))
        )

    @cached_property
    def materials(self) -> Materials:
        """Teacher, splits and cached teacher outputs."""
        raw, task = read(self.study)
        self.raw = {name: rows for name, rows in raw.splits().items() if name in ("validation", "test")}
        self.teacher_directory = prepare_teacher(self.study, raw, task, self.cache)
        network, tokenizer = load_teacher(self.teacher_directory, self.device)
        self.splits = tokenize(raw, tokenizer, self.study, task, self.cache)
        auxiliary = prepare_auxiliary(self.study, tokenizer, self.cache, self.device)
        train = self.splits["train"]
        self.teachers = prepare_ensemble(self.study, self.teacher_directory, raw, task, self.cache)
        logits = TeacherLogits(network, self.teachers, train, self.cache, self.study.teacher.average)
        known = self.subject
        subject = subject_of(network, task.name, self.device.type)
        subject = subject.having(*known.traits, threads=known.threads, cpus=known.cpus, alphabet=known.alphabet)
        teacher = Candidate(network, tokenizer, subject)
        training = self.study.training
        limit, key = training.teacher_cache_gb * 1e9, self.teacher_directory.name
        return Materials(
            teacher=teacher,
            task=task,
            train=train,
            validation=self.splits["validation"],
            logits=logits,
            outputs=TeacherOutputs(network, key, train, self.cache, limit, training.computes_in),
            device=self.device,
            training=training,
            unlabelled=self.splits.get("unlabelled"),
            auxiliary=auxiliary,
            untrained=partial(untrained, self.study, task),
            masked_lm=lambda: self.masked_lm,
            student_start=self.student_start,
            tokenize=self.tokenized,
            layer_latency=self.layer_latency,
        )

    @cached_property
    def masked_lm(self) -> nn.Module | None:
        """The study's masked language model, loaded when a method first asks for it."""
        if self.study.teacher.masked_lm is None:
            return None
        return masked_lm.load(self.study, self.materials.task, self.materials.teacher.tokenizer, self.device)

    def student_start(self) -> nn.Module | None:
        """The small pretrained network that the study names, loaded anew."""
        if self.study.teacher.student_start is None:
            return None
        teacher, task = self.materials.teacher, self.materials.task
        return student_start.load(self.study, task, teacher.tokenizer, crf="crf" in teacher.subject.traits)

    @cached_property
    def lent_digests(self) -> list[str]:
        """What the results of methods that use the models beside the teacher depend on; nothing without any."""
        named = {masked_lm: self.study.teacher.masked_lm, student_start: self.study.teacher.student_start}
        return [model.fingerprint(self.study) for model, there in named.items() if there is not None]

    def layer_latency(self, subject: Subject) -> LayerTable:
        """Milliseconds of one layer by its heads and neurons, on examples of the training data's mean length."""
        length = max(1, round(float(self.materials.train.lengths.mean())))
        way = (self.study.measure.batch_size, length, self.study.measure.threads)
        return kept_layer_table(subject, self.cache, time_stacks(*way), (*way, host_kind(), CPU_SESSION, GRAPHS))

    def tokenized(self, tokenizer: PreTrainedTokenizerBase) -> Mapping[str, Split]:
        """Every split as a candidate's own tokenizer cuts it; the latest reading is kept."""
        key = tokenizer_digest(tokenizer)
        if self._latest_reading[0] != key:
            raw, task = read(self.study)
            self._latest_reading = key, tokenize(raw, tokenizer, self.study, task, self.cache)
        return self._latest_reading[1]

    def split(self, name: str) -> Split | None:
        """A tokenised split; None where the study has no such data."""
        _ = self.materials
        return self.splits.get(name)

    @cached_property
    def reference(self) -> Path:
        """The lowered teacher, which every candidate is timed against."""
        directory = self.artifact(Recipe(), seed=0)
        directory.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{directory}.lock"):
            if not directory.exists():
                lower(self.materials.teacher, directory, self.materials.task)
        return directory

    def artifact(self, recipe: Recipe, seed: int) -> Path:
        """Where the artefact of a recipe belongs: the same for the same content, whoever makes it."""
        _ = self.materials
        parts: list[Any] = [self.teacher_directory.name]
        if recipe.steps:
            plugins = [self.registry.fingerprint(name) for name in recipe.methods]
            parts += [recipe.key, seed, self.study.training.identity(), plugins]
            parts += [self.study.teacher.average, *(path.name for path in self.teachers[1:])]
            parts += self.lent_digests
            parts += [further.digest for further in self.materials.auxiliary]
        else:
            parts += [GRAPHS]  # candidates of a resumed study are timed against a teacher in graphs like theirs
        return self.output / "artifacts" / digest(parts)[:20]

    def lower(self, candidate: Candidate, directory: Path) -> None:
        """Write the candidate's artefact; what an earlier attempt left there is replaced."""
        if directory == self.reference:
            return
        with FileLock(f"{directory}.lock"):
            shutil.rmtree(directory, ignore_errors=True)
            lower(candidate, directory, self.materials.task)

    def as_read(self, directory: Path, name: str) -> Split:
        """A split's rows as an artefact reads them: by its own tokenizer, cut at its own longest input."""
        _ = self.materials
        limit = min(Artifact.read(directory).max_length or self.study.data.max_length, self.study.data.max_length)
        tokenizer = AutoTokenizer.from_pretrained(directory / "weights")
        return tokenize_rows(self.raw[name], tokenizer, limit, self.materials.task, self.cache)

    def score(self, directory: Path, name: str, *, as_deployed: bool) -> Score:
        """Metrics of an artefact on a split; on validation data, how far they lie below the teacher's.

        Arithmetic with one scale for a whole batch depends on an example's companions; ``as_deployed`` scores
        at the study's measured batch size and in the split's order, as it must be for lowered arithmetic.
        """
        batch_size = self.study.measure.batch_size if as_deployed else SCORING_BATCH
        split, task = self.as_read(directory, name), self.materials.task
        return self.bench.score(
            directory,
            split.path,
            task,
            batch_size,
            as_they_come=as_deployed,
            reference=self.reference if name == "validation" and directory != self.reference else None,
            reference_split=self.splits[name].path,
            timeout=patience(2 * len(split)),
        )

    def latency(self, directory: Path, *, repeats: int, seed: int, reference: Path | None = None) -> Latency:
        """Time an artefact on the validation data's own lengths, each text as who is timed reads it.

        Against the teacher, or another artefact of the teacher.
        """
        buckets = Artifact.read(directory).buckets
        return self.bench.latency(
            directory,
            reference or self.reference,
            self.as_read(directory, "validation").path,
            reference_split=self.materials.validation.path,
            batch_size=self.study.measure.batch_size,
            repeats=repeats,
            seed=seed,
            timeout=patience(compilations=len(buckets)),
        )

    def shape(self, candidate: Candidate, directory: Path, recipe: Recipe) -> Shape:
        """Size, latency and memory; the latter two measured once for equal shapes, precision and runtime.

        The size is each artefact's own: zeros change it, but neither shapes nor, once loaded, speed.
        """
        key = self._shape_key(candidate, recipe)
        shelf = self.output / "shapes" / f"{key}.json"
        shelf.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{shelf}.lock"):  # whoever comes second waits for what the first measures
            if shelf.exists():
                stored = json.loads(shelf.read_text(encoding="utf-8"))
                return Shape(key, size_mb(directory), Latency.from_dict(stored["latency"]), stored["memory"])
            shape = self._measure(key, directory, recipe)
            stored = {"latency": shape.latency.to_dict(), "memory": shape.memory}
            write_atomically(shelf, json.dumps(stored))
        return shape

    def _measure(self, key: str, directory: Path, recipe: Recipe) -> Shape:
        latency = self.latency(directory, repeats=self.study.measure.repeats, seed=self.study.search.seed)
        if not recipe.steps:  # the teacher against itself: what is left of its ratio is noise, kept in the interval
            latency = replace(latency, ratio=1.0, low=min(latency.low, 1.0), high=max(latency.high, 1.0))
        return Shape(key, size_mb(directory), latency, self._memory(directory))

    @property
    def _memory_counts(self) -> bool:
        return "memory_mb" in {*self.study.objectives, *self.study.constraints}

    def _memory(self, directory: Path) -> float | None:
        """Peak memory, which takes processes of its own, where the study asks for it."""
        if not self._memory_counts:
            return None
        split = self.as_read(directory, "validation")
        batch_size = self.study.measure.batch_size
        return self.bench.memory(directory, split.path, batch_size, timeout=patience(compilations=1))

    def _shape_key(self, candidate: Candidate, recipe: Recipe) -> str:
        late = [
            [step.method, step.params, self.registry.fingerprint(step.method), candidate.notes.get(step.method)]
            for step in recipe.steps
            if self.registry[step.method].stage >= Stage.PRECISION
        ]
        shape = shape_key(describe(candidate.network))
        what = [self.teacher_directory.name, shape, late, dict(candidate.runtime), self._memory_counts]
        what += [candidate.subject.density] if self._memory_counts else []  # a packed file takes less to load
        # the lengths that are timed are drawn from the validation data, as the candidate's tokenizer cuts it
        reading = tokenizer_digest(candidate.tokenizer)
        drawn = [self.materials.validation.path.name, reading, self.study.search.seed]
        how = [self.device.type, host_kind(), CPU_SESSION, GRAPHS]
        return digest([what, self.study.measure.model_dump(mode="json"), drawn, how])[:20]

    def close(self) -> None:
        """End the bench process."""
        if self._bench is not None:
            with suppress(OSError):
                self._bench.close()

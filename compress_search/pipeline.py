"""From a recipe to a compressed candidate: the steps in order, on a budget, dry or for real.

Owns the training budget's split over the steps, the rungs inside it and the Context each step is lent. Knows
nothing of files, of measuring time or of the search.
"""

from __future__ import annotations

import errno
import os
import random
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from compress_search import training
from compress_search.candidate import Candidate, Subject
from compress_search.data import Split, ordered_batches, training_batches, without_labels
from compress_search.encoders import bake, kept_ids
from compress_search.errors import CompressSearchError, TrialError
from compress_search.method import AuxiliaryTask, Batch, Method, Stage
from compress_search.recipe import Recipe, digest
from compress_search.records import rung_fraction
from compress_search.study import TrainingConfig
from compress_search.tasks import Task
from compress_search.teacher.auxiliary import Auxiliary
from compress_search.teacher.logits import TeacherLogits
from compress_search.teacher.outputs import TeacherOutputs
from compress_search.teacher.reading import cut

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RUNGS = (0, 1)
"""The rungs, by their index, at which a trial is compared with the others if all of its training is scored."""

SCORING_BATCH = 64
"""Batch size of scoring at rungs, where nothing is timed."""

OnRung = Callable[[int, Mapping[str, float]], bool]
"""(rung index, the task's metrics on validation) -> whether to go on."""


class TrialStopped(Exception):
    """Raised inside ``fit`` when the search asks a trial to stop; no error."""


@dataclass(frozen=True)
class Materials:
    """What trials of one study share: loaded once in a worker, never changed by a trial."""

    teacher: Candidate
    task: Task
    train: Split
    validation: Split
    logits: TeacherLogits
    outputs: TeacherOutputs
    device: torch.device
    training: TrainingConfig
    unlabelled: Split | None = None
    auxiliary: Sequence[Auxiliary] = ()
    untrained: Callable[[], nn.Module | None] = lambda: None
    masked_lm: Callable[[], nn.Module | None] = lambda: None
    student_start: Callable[[], nn.Module | None] = lambda: None
    tokenize: Callable[[PreTrainedTokenizerBase], Mapping[str, Split]] | None = None
    """Every split as another tokenizer cuts it."""
    layer_latency: Callable[[Subject], Callable[[int, int], float]] | None = None
    """Milliseconds of a layer as wide as the subject's, by its heads and neurons."""

    @property
    def steps(self) -> int:
        """Optimizer steps a whole trial may spend."""
        per_epoch = -(-len(self.train) // self.training.batch_size)
        return max(1, round(self.training.epochs * per_epoch))

    def read_by(self, tokenizer: PreTrainedTokenizerBase) -> Materials:
        """The same texts in the pieces of a candidate's tokenizer, and teachers that read them.

        What the teachers said of a text stays what it was.

        Raises:
            TrialError: the tokenizer has pieces that the teacher's has not.
        """
        if tokenizer is self.teacher.tokenizer:
            return self
        kept = kept_ids(self.teacher.tokenizer, tokenizer)
        if kept is None or self.tokenize is None:
            raise TrialError(
                "its tokenizer has pieces of its own: expected only such as the teacher's has, in order"
            )
        splits, network = self.tokenize(tokenizer), cut(self.teacher.network, kept)
        untrained, masked_lm, student_start = self.untrained, self.masked_lm, self.student_start
        return replace(
            self,
            teacher=self.teacher.replace(network=network, tokenizer=tokenizer),
            train=splits["train"],
            validation=splits["validation"],
            unlabelled=splits.get("unlabelled"),
            auxiliary=[further.read_by(tokenizer) for further in self.auxiliary],
            logits=self.logits.read_by(splits["train"], kept),
            outputs=self.outputs.read_by(network, splits["train"]),
            untrained=lambda: (start := untrained()) and cut(start, kept),
            masked_lm=lambda: (model := masked_lm()) and cut(model, kept),
            student_start=lambda: (start := student_start()) and cut(start, kept),
        )


@dataclass
class Budget:
    """The training budget of one trial: what is spent, what it took, and the rungs still to come.

    A score counts at a rung if all training was scored so far, or at least a third of what was left of the budget
    when it came to be scored. A rung where it does not count is put off to the next one. Equal indices are equal
    steps in all trials of a study, so that a value is compared only with those after as much training.
    """

    steps: int
    on_rung: OnRung | None
    done: int = 0
    fit_seconds: float = 0.0
    rungs: list[int] = field(default_factory=lambda: list(RUNGS))
    unscored: int = 0
    """The latest step that was not scored."""

    def passes_rung(self, scored: bool) -> int | None:
        """The index of the rung that the latest step completed, if it did and its score counts."""
        if not scored:
            self.unscored = self.done
        counts = not self.unscored or 3 * (self.done - self.unscored) >= self.steps - self.unscored
        passed = None
        # the end of the budget is no rung: nothing is left to be saved
        while self.done < self.steps and self.rungs and self.done >= rung_fraction(self.rungs[0]) * self.steps:
            passed = self.rungs.pop(0)
            if not counts and not self.rungs:
                self.rungs.append(passed + 1)
        return passed if counts else None


@dataclass
class StepContext:
    """The engine's side of :class:`compress_search.method.Context` for one step of one trial."""

    materials: Materials
    budget: Budget
    share_of_budget: int
    seed: int
    scratch: Path
    dry: bool
    share_spent: float = 0.0
    """Of the step's own share, by the phases before."""

    @property
    def device(self) -> torch.device:
        """Where the step's networks live."""
        return self.materials.device

    @property
    def examples(self) -> int:
        """How many training examples there are."""
        return len(self.materials.train)

    @property
    def teacher(self) -> nn.Module:
        """The frozen teacher."""
        return self.materials.teacher.network

    def untrained(self) -> nn.Module | None:
        """A network of the caller's own, the teacher before it was trained on the task."""
        network = self.materials.untrained()
        return network and network.to(self.device)

    def student_start(self) -> nn.Module | None:
        """A network of the caller's own, the small pretrained one that the study names."""
        network = self.materials.student_start()
        return network and network.to(self.device)

    def masked_lm(self) -> nn.Module | None:
        """The study's masked language model."""
        return self.materials.masked_lm()

    def fit(self, network: nn.Module, **options: Any) -> None:
        """Train in place on a share of the step's budget; see the interface for the options."""
        phase = training.Phase(**options)
        settings = self.materials.training
        # a method may train in phases: each sees the examples in an order of its own
        seed = derive_seed(self.seed, self.budget.done)
        started = time.perf_counter()
        training.fit(
            network.to(self.device),
            phase.batches or training_batches(self.materials.train, settings.batch_size, seed),
            0 if self.dry else phase.steps(self.share_of_budget, self.share_spent),
            phase.loss or self.task_loss,
            learning_rate=settings.learning_rate if phase.learning_rate is None else phase.learning_rate,
            warmup=settings.warmup,
            weight_decay=settings.weight_decay,
            device=self.device,
            seed=seed,
            precision=settings.computes_in,
            parameters=phase.parameters,
            beside=phase.beside and phase.beside.to(self.device),
            crf_multiplier=settings.crf_multiplier,
            on_step=phase.on_step,
            on_progress=lambda _: self._advance(network, phase.scored),
        )
        self.share_spent += phase.share
        self.budget.fit_seconds += time.perf_counter() - started

    def _advance(self, network: nn.Module, scored: bool) -> None:
        self.budget.done += 1
        rung, ask = self.budget.passes_rung(scored), self.budget.on_rung
        if rung is not None and ask and not ask(rung, validation_metrics(network, self.materials)):
            raise TrialStopped

    def task_loss(self, network: nn.Module, batch: Batch) -> torch.Tensor:
        """The task's loss on the labels of a batch."""
        return training.task_loss(self.materials.task)(network, batch)

    def teacher_logits(self, batch: Batch) -> torch.Tensor:
        """The teacher's logits, or those of several, (B, C) or (B, S, C)."""
        return self.materials.logits(batch)

    def teacher_outputs(self, batch: Batch, features: Collection[str]) -> dict[str, Tensor]:
        """What the teacher computes on the way, by the features' names; logits are those of all teachers."""
        averaged = {"logits"} & set(features) if self.materials.logits.several else set()
        inner = [name for name in features if name not in averaged]
        found = self.materials.outputs(batch, inner) if inner else {}
        return found | {name: self.materials.logits(batch) for name in averaged}

    def training_batches(self) -> Iterator[Batch]:
        """Endless batches of the training rows on the device, in an order of this phase's own."""
        return self._drawn(self.materials.train, derive_seed(self.seed, self.budget.done))

    def auxiliary(self) -> Sequence[AuxiliaryTask]:
        """The study's further tasks, their rows in an order of this phase's own."""
        return [
            AuxiliaryTask(
                further.task.name,
                further.task.outputs,
                len(further.train),
                self._drawn(further.train, derive_seed(self.seed, self.budget.done, number)),
                further.task.loss,
                further.teacher_logits,
            )
            for number, further in enumerate(self.materials.auxiliary)
        ]

    def _drawn(self, split: Split, seed: int) -> Iterator[Batch]:
        """Endless batches of a split's rows on the device."""
        batches = training_batches(split, self.materials.training.batch_size, seed)
        return (training.to_device(batch, self.device) for batch in batches)

    def unlabelled(self, batch_size: int, *, once: bool = False) -> Iterator[Batch]:
        """Batches of unlabelled text on the device: endless in an order of this phase's own, or every text once."""
        split = self.materials.unlabelled
        if split is None:
            raise TrialError("this needs unlabelled text: name some in the study, under data.unlabeled")
        seed = derive_seed(self.seed, self.budget.done)
        batches = ordered_batches(split, batch_size) if once else training_batches(split, batch_size, seed)
        return (training.to_device(batch, self.device) for batch in without_labels(batches))

    def calibration(self, examples: int, batch_size: int = 32) -> Iterator[Batch]:
        """Batches of training examples on the device, the same ones for the same seed."""
        train = self.materials.train
        rows = random.Random(self.seed).sample(range(len(train)), min(examples, len(train)))
        for start in range(0, len(rows), batch_size):
            yield training.to_device(train.batch(rows[start : start + batch_size]), self.device)

    def layer_latency(self, subject: Subject) -> Callable[[int, int], float]:
        """Milliseconds of one encoder layer by its heads and neurons."""
        if self.materials.layer_latency is None:
            raise TrialError("no layer can be timed here: expected a worker with a cache for what it measures")
        return self.materials.layer_latency(subject)


def validation_metrics(network: nn.Module, materials: Materials) -> dict[str, float]:
    """The task's metrics on validation; the network's training mode is left as it was."""
    logits, labels = training.evaluate(
        network, materials.validation, materials.task, SCORING_BATCH, materials.device
    )
    return materials.task.score(logits, labels)


def run_recipe(
    recipe: Recipe,
    methods: Mapping[str, Method],
    materials: Materials,
    *,
    seed: int,
    scratch: Path,
    on_rung: OnRung | None = None,
    dry: bool = False,
) -> tuple[Candidate, Budget]:
    """Apply the steps in order to a copy of the teacher. Where nobody asks about rungs none is scored.

    A dry run trains zero steps: shapes are right (uniform where they depend on training), weights mean nothing.

    Raises:
        TrialError: a step cannot be applied, or leaves something other than it should.
        TrialStopped: ``on_rung`` asked to stop.
    """
    candidate = materials.teacher.copy()
    candidate.network.requires_grad_(True)  # the teacher's own weights are frozen
    budget = Budget(materials.steps, on_rung)
    portions = _portions(recipe, methods, materials.steps)
    for index, (step, portion) in enumerate(zip(recipe.steps, portions, strict=True)):
        method = methods[step.method]
        if method.stage >= Stage.PRECISION:
            bake(candidate.network)
        context = StepContext(materials, budget, portion, derive_seed(seed, index), scratch, dry)
        _seed_everything(context.seed)
        if reason := method.unsupported(candidate.subject):
            raise TrialError(reason, method=step.method)
        try:
            candidate = method.apply(candidate, step.params, context)
        except TrialError as error:
            if error.method:
                raise
            # which step failed is known here, and not where a helper raised
            raise type(error)(error.message, method=step.method) from error
        finally:
            materials.outputs.release()
        candidate.network.eval()
        materials = materials.read_by(candidate.tokenizer)
    bake(candidate.network)
    return candidate, budget


def extra_metrics(
    recipe: Recipe, methods: Mapping[str, Method], candidate: Candidate, context: StepContext
) -> dict[str, float]:
    """What the methods' ``evaluate`` hooks say of the trained network, as ``<method>.<key>``."""
    metrics: dict[str, float] = {}
    for step in recipe.steps:
        for key, value in methods[step.method].evaluate(candidate, context).items():
            metrics[f"{step.method}.{key}"] = float(value)
    return metrics


def _portions(recipe: Recipe, methods: Mapping[str, Method], steps: int) -> list[int]:
    """Optimizer steps for each step of the recipe: equal parts for those that train, the rest to the last."""
    trains = [methods[step.method].trains(step.params) for step in recipe.steps]
    count = sum(trains)
    portions = [steps // count if train else 0 for train in trains]
    if count:
        last = max(index for index, train in enumerate(trains) if train)
        portions[last] += steps - sum(portions)
    return portions


def derive_seed(*parts: int | str) -> int:
    """A seed below 2³¹ that depends on every part and on nothing else."""
    return int(digest(list(parts))[:8], 16) & 0x7FFFFFFF


def _seed_everything(seed: int) -> None:
    """Methods draw from ``context.seed``; libraries they call may still draw from the global generators."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that host or device memory ran out."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError)
        and not isinstance(error, CompressSearchError)
        and "can't allocate memory" in str(error)
    )


FULL = (errno.ENOSPC, errno.EDQUOT)
"""What the system says of a disk on which nothing more can be written."""


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that a disk is full: libraries keep the text at most."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        if any(os.strerror(number) in str(error) for number in FULL):
            return True
        error = error.__cause__ or error.__context__
    return False

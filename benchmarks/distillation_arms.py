"""Ways of distilling the same student from the same teacher by the same losses, each in a process of its own.

Owns the ways; what is timed, and when, is :mod:`benchmarks.distillation_speed`'s to say.

The loss is everywhere KL at τ = 2 (times τ²) + cross-entropy on the labels + the mean squared difference of matched
hidden states and, where asked, of attention probabilities.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from compress_search_plugins.distillation.layer_maps import source_layers
from compress_search_plugins.distillation.matches import Match
from compress_search_plugins.distillation.matching import Matching
from compress_search_plugins.distillation.objective import Objective
from compress_search_plugins.distillation.soft_targets import SoftTerm
from compress_search_plugins.distillation.students import cut_student
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from compress_search.candidate import Candidate
from compress_search.data import Split, training_batches
from compress_search.driver import prepare
from compress_search.losses import attention_mse, hidden_mse, kl
from compress_search.measure.bench import peak_memory
from compress_search.method import Batch
from compress_search.mixed_precision import Precision
from compress_search.pipeline import Budget, StepContext
from compress_search.study import load_study
from compress_search.training import to_device
from compress_search.workbench import Workbench

BATCH, LENGTH = 32, 64
TEMPERATURE = 2.0
LEARNING_RATE, WARMUP = 5e-5, 0.1
KERNELS = {False: "sdpa", True: "eager"}
"""How transformers is to compute attention, by whether it is to give its maps: only step by step does it do so."""
ENDLESS = 100_000
"""Optimizer steps that are never reached: who measures says when it is enough."""

Feed = Literal["same", "own"]
Batches = Iterable[dict[str, Any]]


@dataclass(frozen=True)
class Setup:
    """What the arms of one comparison have in common; all paths lie in one folder."""

    folder: Path
    teacher: Path
    student: Path
    rows: Path
    """The tokenised training rows."""
    pairs: tuple[tuple[int, int], ...]
    """(student's, teacher's) layers that are matched, from 1."""
    attention: bool
    feed: Feed


class Arm(Protocol):
    """One way of distilling."""

    network: nn.Module

    def own_batches(self) -> Batches:
        """Batches as this way's users feed it, without end or an epoch long."""

    def loss(self, batch: Batch) -> Tensor:
        """What is minimised, on a batch of :func:`same_batches`."""

    def train(self, batches: Iterator[dict[str, Any]]) -> None:
        """Train on batches until they end the process."""


def same_batches(split: Split) -> Iterator[Batch]:
    """Batches as the engine draws them: each of rows of about one length."""
    return training_batches(split, BATCH, seed=0)


# the engine


def open_bench(folder: Path, *, cached: bool = True, precision: Precision = "fp32") -> Workbench:
    """The belongings of a worker; nothing outside of the folder is written."""
    changes = [f"training.precision={precision}", *([] if cached else ["training.teacher_cache_gb=0"])]
    study = load_study(folder / "study.yaml", changes)
    return Workbench(replace(prepare(study).brief, cache=str(folder / "cache")))


def make_student(bench: Workbench) -> Candidate:
    """The teacher's first, middle and last layers, or such, in half its depth."""
    teacher = bench.materials.teacher
    depth = teacher.subject.layers
    student: Candidate = cut_student(teacher, source_layers("spread", depth // 2, depth), 1.0)
    return student


def matches(setup: Setup) -> tuple[Match, ...]:
    """The matches in the engine's words."""
    found: list[dict[str, Any]] = [{"student_layer": s, "teacher_layer": t} for s, t in setup.pairs]
    if setup.attention:
        kind = {"feature": "attention_probs", "loss": "attention_mse"}
        found += [{**kind, "student_layer": s - 1, "teacher_layer": t - 1} for s, t in setup.pairs]
    return tuple(map(Match.model_validate, found))


class Engine:
    """What the plugin ``layer_match`` does in its one phase, by ``context.fit``."""

    def __init__(self, setup: Setup, *, cached: bool, precision: Precision = "fp32") -> None:
        bench = open_bench(setup.folder, cached=cached, precision=precision)
        self.materials = bench.materials
        self.network = make_student(bench).network.requires_grad_(True)
        budget = Budget(ENDLESS, on_rung=None)
        context = StepContext(self.materials, budget, ENDLESS, 0, setup.folder, dry=False)
        matching = Matching.between(matches(setup), self.network, context.teacher, seed=0)
        soft = SoftTerm(self.materials.task.name, temperature=TEMPERATURE)
        self.objective = Objective(context, matching, soft, soft_weight=1.0, hard_weight=1.0)

    def own_batches(self) -> Batches:
        """Of about one length each."""
        return same_batches(self.materials.train)

    def loss(self, batch: Batch) -> Tensor:
        """By the plugins' objective."""
        value: Tensor = self.objective(self.network, batch)
        return value

    def train(self, batches: Iterator[Batch]) -> None:
        """By the engine's loop."""
        self.objective.fit(self.network, learning_rate=LEARNING_RATE, batches=batches)


# what others use


class Others:
    """What the two libraries are given: models as transformers loads them, and the training rows."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.split = setup, Split.open(setup.rows)
        load = partial(
            AutoModelForSequenceClassification.from_pretrained, attn_implementation=KERNELS[setup.attention]
        )
        self.teacher, self.network = load(setup.teacher).eval(), load(setup.student)
        self.asked = {"output_hidden_states": True, "output_attentions": setup.attention}

    def rows(self) -> list[dict[str, Any]]:
        """The training rows, not padded."""
        arrays = (self.split.arrays([row]) for row in range(len(self.split)))
        return [{name: values[0] for name, values in array.items() if name != "index"} for array in arrays]


def given(batch: Batch) -> dict[str, Tensor]:
    """A batch as models of transformers take it."""
    return {name: tensor for name, tensor in batch.items() if name != "index"}


class TextBrewer(Others):
    """TextBrewer's GeneralDistiller, fed as its notebooks do: every text padded to one length, in random order."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        import textbrewer

        logging.getLogger("Distillation").setLevel(logging.ERROR)
        alike = [{"feature": "hidden", "loss": "hidden_mse", "layer_S": s, "layer_T": t} for s, t in setup.pairs]
        if setup.attention:
            kind = {"feature": "attention", "loss": "attention_mse"}
            alike += [{**kind, "layer_S": s - 1, "layer_T": t - 1} for s, t in setup.pairs]
        config = textbrewer.DistillationConfig(
            temperature=TEMPERATURE,
            kd_loss_weight=TEMPERATURE**2,  # it has no such factor
            hard_label_weight=1,
            intermediate_matches=[{**match, "weight": 1} for match in alike],
        )
        self.distiller = textbrewer.GeneralDistiller(
            textbrewer.TrainingConfig(
                output_dir=str(setup.folder / "textbrewer"), ckpt_steps=ENDLESS, device="cpu"
            ),
            config,
            self.teacher,
            self.network,
            self._adaptor,
            self._adaptor,
        )

    def _adaptor(self, batch: Batch, output: Any) -> dict[str, Any]:
        seen = {"logits": output.logits, "losses": output.loss, "inputs_mask": batch["attention_mask"]}
        seen["hidden"] = output.hidden_states
        return seen | ({"attention": output.attentions} if self.setup.attention else {})

    def own_batches(self) -> Batches:
        """All of LENGTH tokens."""
        padded = [{name: self._padded(name, value) for name, value in row.items()} for row in self.rows()]
        return torch.utils.data.DataLoader(padded, batch_size=BATCH, shuffle=True)  # type: ignore[arg-type]

    def _padded(self, name: str, value: Any) -> Tensor:
        tensor = torch.as_tensor(value)
        if not tensor.ndim:  # the label
            return tensor
        return F.pad(tensor, (0, LENGTH - len(tensor)), value=self.split.padding.get(name, 0))

    def loss(self, batch: Batch) -> Tensor:
        """By its own step."""
        value: Tensor = self.distiller.train_on_batch(given(batch), self.asked)[0]
        return value

    def train(self, batches: Iterator[Batch]) -> None:
        """By its loop, handed the optimizer and schedule of its notebooks, and clipping as all have it."""
        from transformers import get_linear_schedule_with_warmup

        optimizer = torch.optim.AdamW(self.network.parameters(), lr=LEARNING_RATE)
        schedule = {"num_warmup_steps": int(WARMUP * ENDLESS), "num_training_steps": ENDLESS}
        with self.distiller:
            self.distiller.train(
                optimizer,
                map(given, batches),
                num_steps=ENDLESS,
                scheduler_class=get_linear_schedule_with_warmup,
                scheduler_args=schedule,
                max_grad_norm=1.0,
                **self.asked,
            )


class HfTrainer(Others):
    """transformers' Trainer with the teacher in ``compute_loss``, fed by its own collator."""

    def __init__(self, setup: Setup, precision: Precision = "fp32") -> None:
        super().__init__(setup)
        self.precision = precision

    def _trainer(self, feed: Batches | None = None) -> Any:
        from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

        arm = self

        class Distilling(Trainer):
            def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
                return arm.compute_loss(model, inputs)

            def get_train_dataloader(self) -> Any:
                return super().get_train_dataloader() if feed is None else feed

        arguments = TrainingArguments(
            output_dir=str(self.setup.folder / "trainer"),
            per_device_train_batch_size=BATCH,
            learning_rate=LEARNING_RATE,
            warmup_steps=int(WARMUP * ENDLESS),
            weight_decay=0.01,
            max_steps=ENDLESS,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=self.precision == "bf16",
        )
        collator = DataCollatorWithPadding(AutoTokenizer.from_pretrained(self.setup.teacher))
        return Distilling(self.network, arguments, data_collator=collator, train_dataset=self.dataset)

    @cached_property
    def dataset(self) -> list[dict[str, Any]]:
        """The training rows as lists."""
        return [{name: value.tolist() for name, value in row.items()} for row in self.rows()]

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """The teacher's pass, the student's, and the functions of :mod:`compress_search.losses`."""
        mine = model(**inputs, **self.asked)
        with torch.no_grad():
            theirs = self.teacher(**inputs, **self.asked)
        mask = inputs["attention_mask"]
        loss = mine.loss + kl(mine.logits, theirs.logits, TEMPERATURE)
        for s, t in self.setup.pairs:
            loss = loss + hidden_mse(mine.hidden_states[s], theirs.hidden_states[t], mask)
            if self.setup.attention:
                loss = loss + attention_mse(mine.attentions[s - 1], theirs.attentions[t - 1], mask)
        return loss  # type: ignore[no-any-return]

    def own_batches(self) -> Batches:
        """Random rows, padded to the longest of a batch."""
        loader: Batches = self._trainer().get_train_dataloader()
        return loader

    def loss(self, batch: Batch) -> Tensor:
        """By ``compute_loss``."""
        return self.compute_loss(self.network, given(batch))

    def train(self, batches: Iterator[Batch]) -> None:
        """By its loop."""
        self._trainer(map(given, batches)).train()


ARMS: dict[str, tuple[Callable[[Setup], Arm], tuple[str, ...]]] = {
    "engine": (lambda setup: Engine(setup, cached=False), ()),
    "engine, cached": (lambda setup: Engine(setup, cached=True), ()),
    "TextBrewer": (TextBrewer, ("textbrewer",)),
    "Trainer": (HfTrainer, ("accelerate",)),
    "engine, bf16": (lambda setup: Engine(setup, cached=False, precision="bf16"), ()),
    "engine, bf16, cached": (lambda setup: Engine(setup, cached=True, precision="bf16"), ()),
    "Trainer, bf16": (lambda setup: HfTrainer(setup, "bf16"), ("accelerate",)),
}
"""Name -> how it is made, and the packages that takes besides our own. TextBrewer's 16 bits are CUDA's alone."""


# a process


def serve(name: str, setup: Setup, line: Connection, steps: int) -> None:
    """Load an arm, say what it weighs, then train ``steps`` steps each time the line says so.

    Sends (bytes of memory when loaded, norm of the gradient on the first of :func:`same_batches`) and, for each
    round, (seconds, bytes at the peak so far).
    """
    disable_progress_bar()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    arm = ARMS[name][0](setup)
    loaded = peak_memory()
    split = Split.open(setup.rows)
    line.send((loaded, gradient_norm(arm, next(same_batches(split)))))
    arm.train(rounds(same_batches(split) if setup.feed == "same" else endless(arm.own_batches()), steps, line))


def gradient_norm(arm: Arm, batch: Batch) -> float:
    """Of the student on a batch, without dropout: the same for arms that do the same."""
    arm.network.eval()
    arm.loss(to_device(batch, "cpu")).backward()
    norm = float(nn.utils.get_total_norm([p.grad for p in arm.network.parameters() if p.grad is not None]))
    arm.network.zero_grad()
    return norm


def endless(batches: Batches) -> Iterator[dict[str, Any]]:
    """Epoch after epoch."""
    while True:
        yield from batches


def rounds(batches: Iterator[dict[str, Any]], steps: int, line: Connection) -> Iterator[dict[str, Any]]:
    """Batches in rounds; between two rounds whoever trains on them waits. Ends the process when told None.

    Seconds are of this process's one thread: what else the machine does takes none of them.
    """
    while line.recv() is not None:
        started = time.process_time()
        yield from islice(batches, steps)
        line.send((time.process_time() - started, peak_memory()))
    raise SystemExit

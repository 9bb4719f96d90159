"""How many optimizer steps a second distillation makes here, in TextBrewer and in transformers' Trainer.

``python -m benchmarks.distillation_speed SHARED [--rows 2048] [--rounds 8] [--steps 4] [--quick]``

The same student of half the depth, teacher and losses, each way in a process of its own with one thread. In each
round every way makes the same number of steps, one after the other, and another one goes first. TextBrewer and
Trainer's accelerate are no dependencies: ``pip install --no-deps textbrewer accelerate``; what is not there is left
out, and the page says so. SHARED is a folder with ``data/sst2/*.jsonl`` and ``models/all-minilm-l6-v2``.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, product
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click
import numpy as np
import optuna
import torch
import yaml
from compress_search_plugins.distillation.layer_maps import layer_pairs
from compress_search_plugins.distillation.matching import Matching
from scipy import stats
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification
from transformers.utils.logging import disable_progress_bar

from benchmarks import tables
from benchmarks.distillation_arms import (
    ARMS,
    BATCH,
    KERNELS,
    LENGTH,
    Feed,
    Setup,
    given,
    make_student,
    matches,
    open_bench,
    same_batches,
    serve,
)
from compress_search.data import Split
from compress_search.method import Batch
from compress_search.runtimes.probe import kernels

OTHER = "TextBrewer"
"""Which way the others are compared with."""
TARGETS = {"engine": 2.0, "engine, cached": 3.0, "engine, bf16": 2.0, "engine, bf16, cached": 3.0}
"""How many times as fast as TextBrewer the project wants to be."""
ALIKE = {"fp32": 1e-3, "bf16": 5e-2}
"""By how much of its norm a gradient may differ from the first way's."""
FEEDS: Mapping[Feed, str] = {
    "same": "The same batches for all, tensor for tensor: those the engine draws",
    "own": f"Each as its users feed it: the engine batches of about one length, Trainer random batches padded to "
    f"their longest text, TextBrewer random batches padded to {LENGTH} tokens",
}
MATCHED = {False: "logits and hidden states", True: "logits, hidden states and attention maps"}
MB = 1e6

TOLD = """3 of 6 layers × 384 on {count} texts of sst2, {batch} a batch, one thread, AdamW, gradients clipped;
{rounds} interleaved rounds of {steps} steps. Medians over rounds with 95 % bootstrap intervals, ratios round
by round: above 1 is faster; seconds are of the process's own thread. `engine` computes the teacher's outputs
at each step, `engine, cached` reads them from disk (`training.teacher_cache_gb`). Peak memory of the process
in MB, and over what it had taken when all was loaded. `bf16`: passes in bfloat16 by autocast, the rest in
float32 (`training.precision`); {other} has 16 bits on CUDA alone. All ways have the same gradient on the same
batch, but for dropout, to 0.1 % of its norm, those in bf16 to 5 %."""

EXPLAINED = """On the same batches all who run the teacher run the same kernels. Its pass is {teacher:.0%} of
the engine's step, the student's two are {student:.0%}: without the teacher a step can be {without:.2f} times
as fast, and no more, however good the loop is. {other} is handed its optimizer, here torch's AdamW as in its
notebooks; engine and Trainer take the fused one, without which a step takes {plain:.2f} times as long: this
is what the engine gains on the same batches. For attention maps transformers leaves the fused attention
kernel, which changes the passes' time by {maps:+.0%} here; the engine keeps it, but multiplies the matched
layers' queries and keys once more. Padding is what decides: the same texts take {padded:.2f} times as long at
{length} tokens as in a batch of about their own length. {other}'s notebook for sst2 pads to 128. The cache
took {seconds:.0f} s and {size:.0f} MB for {count} texts, once for a study, as long as {passes:.0f} of the
teacher's passes over a batch; its pages, mapped from the file, count as memory of who reads them."""


@dataclass(frozen=True)
class Ran:
    """What one way did: seconds of each round, and bytes of memory when loaded and at the peak."""

    seconds: tuple[float, ...]
    loaded: int
    peak: int


@dataclass(frozen=True)
class Cache:
    """What it took to put the teacher's outputs away."""

    seconds: float
    size: int


# what is distilled


def make(shared: Path, folder: Path, rows: int) -> Setup:
    """A study of the first rows, its teacher, hardly trained, and its student, as all ways load them."""
    for name, source, count in (("train", "train", rows), ("validation", "dev", BATCH)):
        with (shared / "data" / "sst2" / f"{source}.jsonl").open(encoding="utf-8") as lines:
            (folder / f"{name}.jsonl").write_text("".join(islice(lines, count)), encoding="utf-8")
    content = {
        "name": "speed",
        "task": "text-classification",
        "teacher": {"model": str(shared / "models/all-minilm-l6-v2"), "fine_tune": {"epochs": 2 * BATCH / rows}},
        "data": {"train": "train.jsonl", "validation": "validation.jsonl", "max_length": LENGTH},
        "methods": ["layer_match"],
        "training": {"batch_size": BATCH},
        "output": "run",
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    bench = open_bench(folder)
    student = make_student(bench)
    network: Any = student.network
    network.save_pretrained(folder / "student")
    pairs = tuple(layer_pairs("uniform", student.subject.layers, bench.materials.teacher.subject.layers))
    paths = bench.teacher_directory, folder / "student", bench.materials.train.path
    return Setup(folder, *paths, pairs, attention=False, feed="same")


def fill(setup: Setup) -> Cache:
    """Put away all that the matches need of the teacher."""
    outputs = open_bench(setup.folder).materials.outputs
    wanted = Matching(matches(setup)).teacher_features
    batch = next(same_batches(outputs.split))
    begun = time.process_time()
    outputs(batch, wanted)
    files = outputs.directory.rglob("*.npy")
    return Cache(time.process_time() - begun, sum(file.stat().st_size for file in files))


# rounds


@contextmanager
def started(name: str, setup: Setup, steps: int) -> Iterator[Connection]:
    """The process of one way, and the line to it."""
    context = multiprocessing.get_context("spawn")
    line, other = context.Pipe()
    process = context.Process(target=serve, args=(name, setup, other, steps), daemon=True)
    process.start()
    other.close()
    try:
        yield line
        line.send(None)
        process.join()
    finally:
        process.kill()


def run(setup: Setup, names: Sequence[str], rounds: int, steps: int) -> dict[str, Ran]:
    """All ways, round by round; one more round before that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    peaks: dict[str, int] = {}
    with ExitStack() as stack:
        lines = {name: stack.enter_context(started(name, setup, steps)) for name in names}
        ready = {name: line.recv() for name, line in lines.items()}
        agree({name: norm for name, (_, norm) in ready.items()})
        for turn in range(rounds + 1):
            first = turn % len(names)
            for name in (*names[first:], *names[:first]):
                lines[name].send(turn)
                spent, peaks[name] = lines[name].recv()
                seconds[name].append(spent)
    return {name: Ran(tuple(seconds[name][1:]), ready[name][0], peaks[name]) for name in names}


def agree(norms: Mapping[str, float]) -> None:
    """Refuse to compare ways that do not do the same: gradients on the same batch, without dropout."""
    known = next(iter(norms.values()))
    for name, norm in norms.items():
        allowed = ALIKE["bf16" if "bf16" in name else "fp32"]
        assert np.isclose(norm, known, rtol=allowed), f"norms of gradients differ: {norms}"


# where the time goes


@dataclass(frozen=True)
class Parts:
    """Seconds of what a step consists of: (on a batch of the median width, on the same texts at LENGTH tokens).

    ``maps``: where the pass gives attention maps; ``plain`` and ``fused`` are of AdamW.
    """

    teacher: tuple[float, float]
    student: tuple[float, float]
    teacher_maps: tuple[float, float]
    student_maps: tuple[float, float]
    plain: float
    fused: float

    def step(self, column: int = 0) -> float:
        """A whole step of the engine."""
        return self.teacher[column] + self.student[column] + self.fused


def clocked(work: Callable[[], object], repeats: int) -> float:
    """Median seconds of this process."""
    times = []
    for _ in range(repeats + 1):
        begun = time.process_time()
        work()
        times.append(time.process_time() - begun)
    return statistics.median(times[1:])


def wider(batch: Batch) -> Batch:
    """A batch with every text padded to LENGTH tokens."""
    short = LENGTH - batch["input_ids"].shape[1]
    return {name: F.pad(tensor, (0, short)) if tensor.ndim == 2 else tensor for name, tensor in batch.items()}


def passes(setup: Setup, repeats: int, *, maps: bool) -> tuple[tuple[float, float], tuple[float, float], nn.Module]:
    """Seconds of the teacher's pass and of the student's two, and the student with its gradients."""
    drawn = sorted(islice(same_batches(Split.open(setup.rows)), 31), key=lambda batch: batch["input_ids"].shape[1])
    narrow = given(drawn[15])
    load = partial(AutoModelForSequenceClassification.from_pretrained, attn_implementation=KERNELS[maps])
    asked = {"output_hidden_states": True, "output_attentions": maps}
    teacher, student = load(setup.teacher).eval(), load(setup.student).train()

    def look(batch: Batch) -> None:
        with torch.no_grad():
            teacher(**batch, **asked)

    def learn(batch: Batch) -> None:
        student.zero_grad()
        student(**batch, **asked).loss.backward()

    def both(work: Callable[[Batch], None]) -> tuple[float, float]:
        return clocked(partial(work, narrow), repeats), clocked(partial(work, wider(narrow)), repeats)

    return both(look), both(learn), student


def parts(setup: Setup, repeats: int) -> Parts:
    """Each part by itself, in this process."""
    torch.set_num_threads(1)
    teacher, student, _ = passes(setup, repeats, maps=False)
    teacher_maps, student_maps, network = passes(setup, repeats, maps=True)
    plain, fused = (
        clocked(torch.optim.AdamW(network.parameters(), fused=fused).step, repeats) for fused in (False, True)
    )
    return Parts(teacher, student, teacher_maps, student_maps, plain, fused)


# the page


def interval(values: Sequence[float]) -> str:
    """Median with its 95 % bootstrap interval."""
    if len(values) < 2 or len(set(values)) == 1:
        return f"{np.median(values):.2f}"
    found = stats.bootstrap((values,), np.median, method="percentile", rng=np.random.default_rng(0))
    low, high = found.confidence_interval
    return f"{np.median(values):.2f} ({low:.2f} … {high:.2f})"


def faster(mine: Ran, than: Ran | None) -> list[float]:
    """How many times as fast, round by round; nothing where there is nothing to compare with."""
    return [theirs / ours for ours, theirs in zip(mine.seconds, than.seconds, strict=True)] if than else []


def rows(found: Mapping[str, Ran], steps: int) -> Iterator[list[object]]:
    """One row a way."""
    for name, ran in found.items():
        ratios = [faster(ran, found.get(other)) for other in (OTHER, "Trainer")]
        compared = [interval(values) if values else "—" for values in ratios]
        peak = f"{ran.peak / MB:.0f} ({(ran.peak - ran.loaded) / MB:+.0f})"
        yield [name, interval([steps / spent for spent in ran.seconds]), *compared, peak]


def verdict(found: Mapping[str, Ran]) -> str:
    """Whether the targets hold."""
    told = []
    for name, target in TARGETS.items():
        if name not in found:
            told.append(f"{name}: not measured here")
        elif ratios := faster(found[name], found.get(OTHER)):
            held = "held" if float(np.median(ratios)) >= target else "missed"
            told.append(f"{name}: {target:g} × {OTHER} {held} ({np.median(ratios):.2f})")
    return f"Targets: {'; '.join(told)}." if told else f"Targets: not looked at, {OTHER} is not there."


def explained(parts: Parts, cache: Cache, count: int) -> str:
    """Where the time goes, and so what can be had at all."""
    teacher, step = parts.teacher[0], parts.step()
    return EXPLAINED.replace("\n", " ").format(
        teacher=teacher / step,
        student=parts.student[0] / step,
        without=step / (step - teacher),
        plain=(step + parts.plain - parts.fused) / step,
        maps=(parts.teacher_maps[0] + parts.student_maps[0]) / (step - parts.fused) - 1,
        padded=parts.step(1) / step,
        seconds=cache.seconds,
        passes=cache.seconds / teacher,
        size=cache.size / MB,
        count=count,
        length=LENGTH,
        other=OTHER,
    )


def milliseconds(parts: Parts) -> Iterator[list[object]]:
    """One row a part."""
    named = {
        "teacher forward": parts.teacher,
        "student forward and backward": parts.student,
        "teacher forward with attention maps": parts.teacher_maps,
        "student forward and backward with attention maps": parts.student_maps,
        "AdamW": (parts.plain, parts.plain),
        "AdamW, fused": (parts.fused, parts.fused),
    }
    for name, (narrow, wide) in named.items():
        yield [name, f"{1000 * narrow:.0f}", f"{1000 * wide:.0f}"]


def page(
    groups: Mapping[tuple[bool, Feed], Mapping[str, Ran]],
    spent: Parts,
    cache: Cache,
    count: int,
    steps: int,
) -> Path:
    """Write the result."""
    rounds = len(next(iter(next(iter(groups.values())).values())).seconds)
    missing = [name for name in ARMS if name not in next(iter(groups.values()))]
    told = TOLD.replace("\n", " ").format(count=count, batch=BATCH, rounds=rounds, steps=steps, other=OTHER)
    absent = f"Left out, as not installed: {', '.join(missing)}." if missing else ""
    content = [told, *filter(None, [absent])]
    header = ["", "steps/s", f"× {OTHER}", "× Trainer", "peak MB"]
    for (attention, feed), found in groups.items():
        title = f"## {MATCHED[attention].capitalize()}, {'identical batches' if feed == 'same' else 'own batches'}"
        content += [title, f"{FEEDS[feed]}.", tables.table(header, rows(found, steps)), verdict(found)]
    content += [
        "## Where the time goes",
        tables.table(["ms of one batch", "of median width", f"at {LENGTH} tokens"], milliseconds(spent)),
        explained(spent, cache, count),
    ]
    return tables.write("distillation_speed", "How fast distillation is", content)


def lacking() -> dict[str, str]:
    """The ways that cannot be measured here, and why."""
    found = {}
    for name, (_, needs) in ARMS.items():
        if missing := [module for module in needs if importlib.util.find_spec(module) is None]:
            found[name] = f"{', '.join(missing)} is not installed"
        elif "bf16" in name and "bf16" not in kernels():
            found[name] = "the processor has no kernels for bfloat16"
    return found


@click.command()
@click.argument("shared", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--rows", default=2048, show_default=True, help="Training texts.")
@click.option("--rounds", default=8, show_default=True, help="Interleaved rounds of one comparison.")
@click.option("--steps", default=4, show_default=True, help="Optimizer steps of a round.")
@click.option("--quick", is_flag=True, help="Two rounds of two steps on 256 texts.")
def main(shared: Path, rows: int, rounds: int, steps: int, quick: bool) -> None:
    """Measure and write benchmarks/results/distillation_speed.md."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    disable_progress_bar()
    if quick:
        rows, rounds, steps = 256, 2, 2
    lacks = lacking()
    for name, what in lacks.items():
        click.echo(f"{name} is left out: {what}")
    names = [name for name in ARMS if name not in lacks]
    with tempfile.TemporaryDirectory() as folder:
        setup = make(shared.resolve(), Path(folder), rows)
        cache = fill(replace(setup, attention=True))
        groups = {}
        for attention, feed in product(MATCHED, FEEDS):
            chosen = replace(setup, attention=attention, feed=feed)
            groups[attention, feed] = run(chosen, names, rounds, steps)
            click.echo(f"{MATCHED[attention]}, {feed} batches: {verdict(groups[attention, feed])}")
        spent = parts(setup, rounds)
    click.echo(page(groups, spent, cache, rows, steps))


if __name__ == "__main__":
    main()

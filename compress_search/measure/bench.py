"""The bench process: loads artefacts from disk, scores them and times them against each other.

Owns what is run, in which order, and the clock. Knows nothing of studies or trials, and makes no statistics of
what it timed. Run as ``python -m compress_search.measure.bench``, it answers one JSON request per line of standard
input on standard output, and ends when its standard input does or its parent is gone.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import importlib
import json
import os
import queue
import resource
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from compress_search.data import Split
from compress_search.errors import CompressSearchError
from compress_search.measure import SCORING_BATCH
from compress_search.measure.lengths import cells, draw, width_distribution
from compress_search.runtimes import Artifact, load_runner
from compress_search.runtimes.deployed import Form, deployed_crf, load_deployed
from compress_search.tasks import Task, bounds, losses

Inputs = Mapping[str, NDArray[Any]]
Runner = Callable[[Inputs], NDArray[Any]]
"""Model inputs of shape (B, S) -> logits (B, C) or (B, S, C), in host memory."""

TRIES = 5
"""How often a pass that the scheduler interrupted is timed anew, before it counts all the same."""

CELL_ROUNDS = 6
"""Rounds that each cell gets at least: fewer make no 95 % interval of a median.

The median lies outside all of n values with a chance of 2 · (1/2)ⁿ, which is below 5 % from six on (Conover,
Practical Nonparametric Statistics, 1999, chapter 3, on quantiles).
"""

LOADED_RUNNERS = 4
"""Runners kept between requests: the reference, its twin for the A/A check, and the latest candidates."""


# what the bench computes


def predict(
    runner: Runner, split: Split, task: Task, batch_size: int, *, as_they_come: bool = False
) -> tuple[list[Any], list[Any]]:
    """Logits and labels of every example in the split's order, as :meth:`Task.score` takes them.

    Examples are batched by length, so that little is padded, or ``as_they_come``.
    """
    order = np.arange(len(split)) if as_they_come else np.argsort(split.lengths, kind="stable")
    found: list[tuple[int, Any, Any]] = []
    for start in range(0, len(order), batch_size):
        batch = split.arrays(order[start : start + batch_size])
        logits, labels = task.unpad(runner(inputs_of(batch)), batch["labels"])
        found += zip(batch["index"].tolist(), logits, labels, strict=True)
    found.sort(key=lambda example: example[0])
    return [logits for _, logits, _ in found], [labels for _, _, labels in found]


def inputs_of(batch: Inputs) -> Inputs:
    """What the model reads of a batch."""
    return {name: array for name, array in batch.items() if name not in ("labels", "index")}


def interleave(
    runners: Sequence[Runner],
    rounds: Iterable[Sequence[Inputs]],
    seed: int,
    clock: Callable[[], int] = time.perf_counter_ns,
    preemptions: Callable[[], int] | None = None,
) -> NDArray[np.float64]:
    """Milliseconds (rounds, runners): in each round every runner takes its batch of the same text, in random order.

    A slow minute of the machine then hits all of them alike, and no runner always goes first. An untimed pass
    goes before each timed one: a model that is deployed finds its weights in the caches, where they fit, and
    not those of the model that was timed before it, and the buffers for this length are allocated.
    """
    preemptions = preemptions or involuntary_switches
    rng = np.random.default_rng(seed)
    taken = []
    with _without_collector():
        for batches in rounds:
            elapsed = np.empty(len(runners))
            for place in rng.permutation(len(runners)):
                elapsed[place] = undisturbed(runners[place], batches[place], clock, preemptions) / 1e6
            taken.append(elapsed)
    return np.array(taken).reshape(-1, len(runners))


def undisturbed(runner: Runner, batch: Inputs, clock: Callable[[], int], preemptions: Callable[[], int]) -> int:
    """Nanoseconds of a pass from which the scheduler did not take the core away, if one of a few tries is such.

    Without this a busy machine flatters small models: a long pass is more often interrupted than a short one.
    """
    elapsed = 0
    for _ in range(TRIES):
        runner(batch)
        before, started = preemptions(), clock()
        runner(batch)
        elapsed = clock() - started
        if preemptions() == before:
            break
    return elapsed


def involuntary_switches() -> int:
    """How often the scheduler has taken a core away from this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


@contextmanager
def _without_collector() -> Iterator[None]:
    """Keeps the garbage collector from running inside a timed pass."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def peak_memory() -> int:
    """Bytes of this process's peak resident set.

    Linux carries ``ru_maxrss`` over from the process that started this one, so it is no use there.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# what the bench is asked


def _written(artifact: str) -> int:
    """When an artefact was last written to, in ns: one that is rewritten is another one."""
    return max((p.stat().st_mtime_ns for p in Path(artifact).rglob("*")), default=0)


class Station:
    """The operations of one bench process, and the runners it keeps loaded between them."""

    def __init__(self, threads: int, device: str) -> None:
        self.threads, self.device = threads, device
        self._runner = lru_cache(LOADED_RUNNERS)(self._load)
        self._reference = lru_cache(1)(self._resampled)

    def _load(self, artifact: str, written: int, copy: int) -> Runner:
        return load_runner(Path(artifact), self.threads, self.device)

    def runner(self, artifact: str, copy: int = 0) -> Runner:
        """The artefact's runner; another ``copy`` is another instance, and a rewritten artefact another one."""
        return self._runner(artifact, _written(artifact), copy)

    def score(
        self,
        artifact: str,
        split: str,
        task: Mapping[str, Any],
        batch_size: int,
        form: Form | None = None,
        as_they_come: bool = False,
        reference: str | None = None,
        reference_split: str | None = None,
    ) -> dict[str, Any]:
        """Metrics and their bootstrap intervals over a whole split, of an artefact or of an exported form.

        With a reference artefact there are intervals of what every metric loses against it too.
        """
        rows, judge = Split.open(Path(split)), Task.from_dict(task)
        runner = load_deployed(Path(artifact), form, judge, self.threads) if form else self.runner(artifact)
        started = time.perf_counter()
        logits, labels = predict(runner, rows, judge, batch_size, as_they_come=as_they_come)
        crf = deployed_crf(Path(artifact)) if form else Artifact.read(Path(artifact)).decoder()
        logits = crf.decode(logits) if crf else logits
        drawn = judge.resampled(logits, labels)
        if reference:
            drawn |= losses(self.resampled(reference, reference_split or split, judge, len(rows)), drawn)
        return {
            "metrics": judge.score(logits, labels),
            "intervals": bounds(drawn),
            "examples": len(rows),
            "batch_size": batch_size,
            "seconds": time.perf_counter() - started,
        }

    def resampled(self, artifact: str, split: str, judge: Task, examples: int) -> Mapping[str, NDArray[Any]]:
        """The resampled metrics of a reference on a split of so many examples; the latest one's are kept."""
        rows = Split.open(Path(split))
        if len(rows) != examples:
            raise ValueError(f"{split} has {len(rows)} examples, not the {examples} of the split it is compared on")
        return self._reference(artifact, _written(artifact), split, judge)

    def _resampled(self, artifact: str, written: int, split: str, judge: Task) -> Mapping[str, NDArray[Any]]:
        logits, labels = predict(self.runner(artifact), Split.open(Path(split)), judge, SCORING_BATCH)
        crf = Artifact.read(Path(artifact)).decoder()
        return judge.resampled(crf.decode(logits) if crf else logits, labels)

    def reference(self, artifact: str, split: str, task: Mapping[str, Any]) -> dict[str, Any]:
        """Get ready to score beside a reference."""
        self.resampled(artifact, split, Task.from_dict(task), len(Split.open(Path(split))))
        return {}

    def latency(
        self,
        artifact: str,
        reference: str,
        split: str,
        reference_split: str,
        batch_size: int,
        repeats: int,
        warmup: int,
        seed: int,
    ) -> dict[str, Any]:
        """Milliseconds of candidate, reference and the reference's twin, round by round, and each round's cell.

        Each reads the same text as its own tokenizer and its own longest input leave it.
        """
        ours, theirs = Split.open(Path(split)), Split.open(Path(reference_split))
        plan = cells(*width_distribution(theirs.lengths, batch_size), self._edges(artifact))
        count = max(repeats, CELL_ROUNDS * len(plan))
        rows = draw(theirs.lengths, plan, batch_size, max(count, warmup), seed)
        rounds = [(inputs_of(ours.arrays(row)), *2 * (inputs_of(theirs.arrays(row)),)) for row in rows]
        runners = [self.runner(artifact), self.runner(reference), self.runner(reference, copy=1)]
        # every width once: a compiled model meets each for the first time now
        interleave(runners, rounds[: max(warmup, len(plan))], seed)
        rounds = rounds[:count]
        candidate, base, twin = interleave(runners, rounds, seed).T.tolist()
        return {
            "cells": [[cell.width, cell.probability] for cell in plan],
            "samples": {
                "candidate_ms": candidate,
                "reference_ms": base,
                "control_ms": twin,
                "cell": [number % len(plan) for number in range(len(rounds))],
                "width": [batch["input_ids"].shape[1] for batch, *_ in rounds],
            },
        }

    def _edges(self, artifact: str) -> Sequence[int]:
        """Lengths beyond which the artefact does other work: its buckets, and its longest input."""
        record = Artifact.read(Path(artifact))
        return [*record.buckets, *([record.max_length] if record.max_length else [])]

    def memory(self, artifact: str, split: str, batch_size: int) -> dict[str, Any]:
        """Peak bytes after loading the artefact and running the longest batch, and the modules that took.

        Asked of a fresh process, as a peak never falls.
        """
        rows = Split.open(Path(split))
        longest = np.argsort(-rows.lengths, kind="stable")[:batch_size]
        batch, runner = inputs_of(rows.arrays(longest)), self.runner(artifact)
        for _ in range(3):
            runner(batch)
        return {"peak": peak_memory(), "modules": sorted(sys.modules)}

    def empty(self, modules: Sequence[str]) -> dict[str, Any]:
        """Peak bytes of a fresh process that has imported these modules and done nothing else."""
        for name in modules:
            with suppress(ImportError):  # a name that some package made up as it ran
                importlib.import_module(name)
        return {"peak": peak_memory()}

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The reply to one request: a result, or what went wrong."""
        arguments = dict(request)
        operations: Mapping[str, Callable[..., Any]] = {
            "score": self.score,
            "reference": self.reference,
            "latency": self.latency,
            "memory": self.memory,
            "empty": self.empty,
        }
        try:
            return {"result": operations[arguments.pop("operation")](**arguments)}
        except Exception as error:  # a broken artefact makes a runtime raise anything; the client says so
            return {"error": in_one_line(error), "kind": kind_of(error), "details": traceback.format_exc()}


def in_one_line(error: Exception) -> str:
    """An exception's text on one line, with its type unless it is one of ours."""
    text = " ".join(str(error).split())
    return text if isinstance(error, CompressSearchError) else f"{type(error).__name__}: {text}"


def kind_of(error: Exception) -> str:
    """A trial's kind of failure: ``oom`` when memory ran out, the error's own if it has one, else ``error``."""
    words = ("can't allocate memory", "failed to allocate memory", "out of memory")
    if isinstance(error, MemoryError) or any(word in str(error).lower() for word in words):
        return "oom"
    return str(getattr(error, "kind", "error"))


# the process


def requests() -> Iterator[dict[str, Any]]:
    """Requests from standard input, until the client is gone."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(lines, os.getppid()), daemon=True).start()
    while True:
        yield json.loads(lines.get())


def _listen(lines: queue.SimpleQueue[str], parent: int) -> None:
    """Pass lines on; end the process at once, even in the middle of a pass, when the client is gone.

    A process that the client forked can keep the pipe open after the client's death, so its number is watched
    too. Linux's PR_SET_PDEATHSIG would not do: it fires when the *thread* that started this process ends.
    """
    pending = b""
    while os.getppid() == parent:
        if not select.select([0], [], [], 2.0)[0]:
            continue
        received = os.read(0, 1 << 16)
        if not received:
            break
        *whole, pending = (pending + received).split(b"\n")
        for line in whole:
            lines.put(line.decode())
    os._exit(0)


def private_stdout() -> TextIO:
    """The pipe to the client; whatever a library prints goes to standard error from now on."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return replies


def load_every_engine(threads: int) -> None:
    """Import what any artefact needs, so that no model is timed in another process than the next.

    ONNX Runtime is a few per cent faster where torch is loaded (decision 0006): a bench that met its first torch
    artefact halfway would from then on favour what it loads against the reference it holds.
    """
    import torch

    import compress_search.encoders  # noqa: F401

    torch.set_num_threads(threads)
    torch.set_num_interop_threads(1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve requests until the client is gone."""
    parser = argparse.ArgumentParser(prog="python -m compress_search.measure.bench")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--lean", action="store_true", help="import an engine when an artefact needs it")
    options = parser.parse_args(arguments)
    replies = private_stdout()
    faulthandler.enable()
    # the terminal's Ctrl-C reaches the whole group: what it means is for the driver to say
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not options.lean:
        load_every_engine(options.threads)
    station = Station(options.threads, options.device)
    for request in requests():
        replies.write(json.dumps(station.answer(request)) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()

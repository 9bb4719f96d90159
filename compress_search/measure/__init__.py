"""Measuring: the client of the bench process, and the statistics made of what it timed.

Owns what a score and a latency are, their intervals, when a measurement counts as noisy, and what the bench process
(:mod:`compress_search.measure.bench`) is asked. Loads no model and imports no torch: what is measured has only ever
seen the disk. How the process lives and dies is :mod:`compress_search.measure.process`'s.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress_search.errors import BenchError
from compress_search.measure.process import Process
from compress_search.tasks import Task

WARMUP = 5
"""Untimed rounds before the first timed one; besides, an untimed pass goes before every timed one."""

CALM_CONTROL = (0.9, 1.1)
"""Where the median ratio of the reference to its own twin lies on a quiet machine."""

CALM_SPREAD = 1.5
"""How far the twin's median ratio may lie above its 10th percentile on a quiet machine."""

MEMORY_RUNS = 3
"""Fresh processes that run an artefact to tell its memory: where the system happens to lay a process's heap decides
what its allocator gives back before the peak (decision 0006)."""

SCORING_BATCH = 64
"""Examples in a batch of a model whose answers do not depend on an example's companions."""

RESAMPLES = 2000

Interval = tuple[float, float]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Score:
    """Metrics of an artefact on a split, with 95 % bootstrap intervals over examples.

    Scored beside a reference, ``intervals`` has a ``<metric>_drop`` for each: how far the metric lies below the
    reference's, both over the same resamples.
    """

    metrics: Mapping[str, float]
    intervals: Mapping[str, Interval]
    examples: int
    batch_size: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data, the inverse of :meth:`from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Score:
        """Rebuild a score from :meth:`to_dict`'s output."""
        intervals = {name: (low, high) for name, (low, high) in data["intervals"].items()}
        return cls(**{**data, "intervals": intervals})


@dataclass(frozen=True)
class Latency:
    """An artefact timed against a reference, round by round on the same texts.

    Times are per batch and expectations over the lengths of the data (:mod:`compress_search.measure.lengths`):
    ``reference_ms`` is the reference's, ``ratio`` the candidate's to it, [``low``, ``high``] the ratio's 95 %
    bootstrap interval, ``throughput`` the candidate's in examples a second. ``p50_ms`` and ``p95_ms`` are
    quantiles of the candidate over those lengths. ``control`` is the A/A check, the ratio of a second instance of
    the reference to the first, and ``spread`` the median of that ratio over its 10th percentile, round by round.
    A ``noisy`` measurement failed either.
    """

    ratio: float
    low: float
    high: float
    p50_ms: float
    p95_ms: float
    reference_ms: float
    throughput: float
    control: float
    spread: float
    noisy: bool
    protocol: Mapping[str, Any] = field(default_factory=dict)
    samples: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, the inverse of :meth:`from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Latency:
        """Rebuild a latency from :meth:`to_dict`'s output."""
        return cls(**data)


def summarize(samples: Mapping[str, Sequence[float]], protocol: Mapping[str, Any]) -> Latency:
    """What a series of rounds says.

    Args:
        samples: ``candidate_ms``, ``reference_ms``, ``control_ms`` and ``cell``, one value per round each.
        protocol: how they were taken; read here are ``batch_size``, ``seed`` and ``cells``, a width and its
            probability each.
    """
    candidate, reference, twin = (
        np.asarray(samples[name], dtype=np.float64) for name in ("candidate_ms", "reference_ms", "control_ms")
    )
    cell, shares = np.asarray(samples["cell"]), [float(share) for _, share in protocol["cells"]]
    groups = [np.flatnonzero(cell == number) for number in range(len(shares))]
    ratios, controls = candidate / reference, twin / reference
    ratio, reference_ms = expectations(ratios, reference, groups, shares)
    low, high = ratio_interval(ratios, reference, groups, shares, seed=protocol["seed"])
    control, _ = expectations(controls, reference, groups, shares)
    spread = float(np.median(controls) / np.quantile(controls, 0.1))
    weights = np.array(shares)[cell] / np.bincount(cell)[cell]
    return Latency(
        ratio=ratio,
        low=low,
        high=high,
        p50_ms=quantile(candidate, weights, 0.5),
        p95_ms=quantile(candidate, weights, 0.95),
        reference_ms=reference_ms,
        throughput=1000 * protocol["batch_size"] / (ratio * reference_ms),
        control=control,
        spread=spread,
        noisy=not CALM_CONTROL[0] <= control <= CALM_CONTROL[1] or spread > CALM_SPREAD,
        protocol=dict(protocol),
        samples={name: list(values) for name, values in samples.items()},
    )


def expectations(
    ratios: Floats, reference: Floats, groups: Sequence[Ints], shares: Sequence[float]
) -> tuple[float, float]:
    """Σ P·lat(candidate) / Σ P·lat(reference) over cells, and the latter sum in ms.

    A cell's latency of the reference is the median over the cell's rounds; the candidate's is that times the
    median ratio of the two within a round, which a slow minute that hits both leaves as it is.

    Args:
        ratios, reference: (rounds,).
        groups: the rounds of each cell.
        shares: each cell's probability P.
    """
    base = np.array([share * np.median(reference[rows]) for rows, share in zip(groups, shares, strict=True)])
    ours = np.array([np.median(ratios[rows]) for rows in groups])
    return float(base @ ours / base.sum()), float(base.sum())


def ratio_interval(
    ratios: Floats,
    reference: Floats,
    groups: Sequence[Ints],
    shares: Sequence[float],
    *,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Percentile bootstrap interval of the ratio of :func:`expectations`; rounds are drawn anew within their cells.

    Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 8 and 13.
    """
    rng = np.random.default_rng(seed)
    base, ours = np.empty((2, len(groups), RESAMPLES))
    for number, (rows, share) in enumerate(zip(groups, shares, strict=True)):
        drawn = rows[rng.integers(len(rows), size=(RESAMPLES, len(rows)))]
        base[number], ours[number] = share * np.median(reference[drawn], axis=1), np.median(ratios[drawn], axis=1)
    tails = ((1 - level) / 2, (1 + level) / 2)
    low, high = np.quantile((base * ours).sum(axis=0) / base.sum(axis=0), tails)
    return float(low), float(high)


def quantile(values: Floats, weights: Floats, level: float) -> float:
    """The smallest value at or below which lies at least ``level`` of the weight."""
    order = np.argsort(values)
    below = np.cumsum(weights[order]) / weights.sum()
    return float(values[order[below >= level - 1e-12][0]])


class Bench:
    """The client of one long-lived bench process, started when first needed and again after it died.

    The process dies with this one, whatever ends it. Calls are answered one at a time and may come from several
    threads. Every call raises BenchError when the artefact cannot be loaded or run, and BenchDied when the
    process ends before it answers: it crashed, was killed, or took longer than ``timeout`` seconds.
    """

    module = "compress_search.measure.bench"

    def __init__(self, threads: int = 1, device: str = "cpu") -> None:
        self.threads, self.device = threads, device
        self._process: Process | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def score(
        self,
        artifact: Path,
        split: Path,
        task: Task,
        batch_size: int,
        *,
        form: str | None = None,
        as_they_come: bool = False,
        reference: Path | None = None,
        reference_split: Path | None = None,
        timeout: float | None = None,
    ) -> Score:
        """Metrics over the whole split; with a ``form`` (see runtimes.deployed) those of an exported model.

        Beside a ``reference``, whose tokenizer may cut the same rows into another split, losses have intervals too.

        Arithmetic with one scale per batch (dynamic int8) depends on an example's companions: score such an
        artefact at the batch size it will be deployed with, and the examples ``as_they_come`` instead of by length.
        """
        request = {"artifact": str(artifact), "split": str(split), "batch_size": batch_size, "form": form}
        request["as_they_come"] = as_they_come
        if reference:
            request |= {"reference": str(reference), "reference_split": str(reference_split or split)}
        return Score.from_dict(self._ask("score", {**request, "task": task.to_dict()}, timeout))

    def reference(self, artifact: Path, split: Path, task: Task, *, timeout: float | None = None) -> None:
        """Let a reference answer a split before the first score beside it, which otherwise would take that long."""
        request = {"artifact": str(artifact), "split": str(split), "task": task.to_dict()}
        self._ask("reference", request, timeout)

    def latency(
        self,
        artifact: Path,
        reference: Path,
        split: Path,
        *,
        reference_split: Path | None = None,
        batch_size: int = 1,
        repeats: int = 50,
        seed: int = 0,
        retries: int = 1,
        timeout: float | None = None,
    ) -> Latency:
        """Time against the reference in ``repeats`` rounds over lengths that stand for those of the split; in more
        where some length would have too few for an interval.

        In each round candidate, reference and a second instance of the reference run the same text in random
        order, once to fill the caches and once against the clock. A noisy measurement is repeated up to
        ``retries`` times; the calmest counts. A candidate that has a longest input or a tokenizer of its own reads
        the same rows from a ``split`` of its own; whose lengths count are the reference's.
        """
        protocol = {"batch_size": batch_size, "repeats": repeats, "warmup": WARMUP, "seed": seed}
        places = {"split": str(split), "reference_split": str(reference_split or split)}
        request = {"artifact": str(artifact), "reference": str(reference), **places, **protocol}
        described = {**protocol, "threads": self.threads, "device": self.device}
        taken: list[Latency] = []
        while len(taken) <= retries and (not taken or taken[-1].noisy):
            found = self._ask("latency", request, timeout)
            made = {"repeats": len(found["samples"]["cell"]), "cells": found["cells"]}
            taken.append(summarize(found["samples"], {**described, **made}))
        return min(taken, key=lambda latency: (latency.noisy, latency.spread))

    def memory(self, artifact: Path, split: Path, batch_size: int = 1, *, timeout: float | None = None) -> float:
        """MB of 10⁶ bytes by which loading the artefact and running the longest batch raise the peak resident set.

        Fresh processes tell, as a peak never falls: the largest of :data:`MEMORY_RUNS` with the artefact, and an
        empty one that imports the same modules, so that no model is charged for the library that runs it.
        """
        request = {"artifact": str(artifact), "split": str(split), "batch_size": batch_size}
        loaded = [self._ask_fresh("memory", request, timeout) for _ in range(MEMORY_RUNS)]
        empty = self._ask_fresh("empty", {"modules": loaded[0]["modules"]}, timeout)
        return max(0.0, float(max(run["peak"] for run in loaded) - empty["peak"]) / 1e6)

    def close(self) -> None:
        """End the process; the next call starts another."""
        with self._lock:
            self._end()

    def _ask(self, operation: str, request: Mapping[str, Any], timeout: float | None) -> Any:
        with self._lock:
            if self._process is None or not self._process.alive:
                self._end()
                self._process = self._start()
            return _result(self._process.ask({"operation": operation, **request}, timeout))

    def _ask_fresh(self, operation: str, request: Mapping[str, Any], timeout: float | None) -> Any:
        process = self._start("--lean")
        try:
            return _result(process.ask({"operation": operation, **request}, timeout))
        finally:
            process.end()

    def _end(self) -> None:
        if self._process is not None:
            self._process.end()
            self._process = None

    def _start(self, *others: str) -> Process:
        # -P: a module in the current directory must not shadow an installed one
        options = ["--threads", str(self.threads), "--device", self.device, *others]
        return Process([sys.executable, "-P", "-m", self.module, *options], self.threads)


def _result(reply: Mapping[str, Any]) -> Any:
    if "error" in reply:
        raise BenchError(reply["error"], details=reply["details"], kind=reply["kind"])
    return reply["result"]

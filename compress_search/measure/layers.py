"""How long one encoder layer takes, by its heads and its neurons: measured at a few shapes, linear between them.

Owns the table, how it is measured and where it is kept: once for a machine, a layer's widths and a way of running.
Attention and feed-forward come one after the other, so a layer's time is the sum of a function of its heads and one
of its neurons, and each is measured with the other block left whole. A block takes time before its first unit
computes anything, so the fewest units are measured beside none.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress_search.cache import content_addressed
from compress_search.candidate import Subject
from compress_search.measure.bench import interleave
from compress_search.runtimes.layer_stacks import example, layer_stack, runner

ROUNDS, WARMUP = 30, 5
PARTS, FEWEST = 4, 32
"""Heads and neurons are measured at none, all, the parts between at equal distances, and one of ``FEWEST``."""

Point = tuple[int, float]
"""Units of a block, and milliseconds of a layer with so many of them and the other block whole."""

Stack = tuple[int, int, int]
"""Layers, heads and neurons of each."""

Times = NDArray[np.float64]

Clock = Callable[[Subject, Sequence[Stack]], Sequence[float]]
"""Milliseconds of a network of each of these stacks."""


@dataclass(frozen=True)
class LayerTable:
    """Milliseconds of a layer; points in the order of their units, the last of each kind being the whole layer."""

    heads: tuple[Point, ...]
    neurons: tuple[Point, ...]

    def __call__(self, heads: int, neurons: int) -> float:
        """Milliseconds of one layer with so many heads and neurons, which never falls as either rises."""
        return _between(self.heads, heads) + _between(self.neurons, neurons) - self.heads[-1][1]


def _between(points: Sequence[Point], units: int) -> float:
    places, times = zip(*points, strict=True)
    return float(np.interp(units, places, times))


def layer_table(subject: Subject, clock: Clock) -> LayerTable:
    """The table of layers as wide as the subject's.

    A stack's time holds that of embeddings and head, too, so the whole layer is the difference of two stacks, and
    all others are compared with it. The table is exact, for these times, at the whole layer and at the empty one.
    """
    heads, neurons = _grid(int(subject.heads)), _grid(int(subject.intermediate))
    stacks = [(2, heads[-1], neurons[-1]), (1, 0, 0)]
    stacks += [(1, count, neurons[-1]) for count in heads] + [(1, heads[-1], count) for count in neurons]
    double, empty, *single = clock(subject, stacks)
    by_heads, by_neurons = np.array(single[: len(heads)]), np.array(single[len(heads) :])
    once = (by_heads[-1] + by_neurons[-1]) / 2
    whole = max(0.0, double - once)
    least = min(max(0.0, empty - once + whole), whole)
    saved = _saved(by_heads), _saved(by_neurons)
    # the two blocks together save what lies between the whole layer and the empty one
    pace = (whole - least) / max(float(saved[0][0] + saved[1][0]), 1e-12)
    return LayerTable(_points(heads, whole - pace * saved[0]), _points(neurons, whole - pace * saved[1]))


def _grid(units: int) -> list[int]:
    parts = {round(part * units / PARTS) for part in range(PARTS + 1)}
    return sorted(parts | {max(1, units // FEWEST)})


def _saved(times: Times) -> Times:
    """What each time lies below the last one; noise must not make a smaller block save less."""
    return np.maximum.accumulate(np.maximum(times[-1] - times, 0.0)[::-1])[::-1]


def _points(grid: Sequence[int], times: Times) -> tuple[Point, ...]:
    return tuple((units, float(time)) for units, time in zip(grid, times, strict=True))


def time_stacks(batch_size: int, length: int, threads: int) -> Clock:
    """A clock that runs each stack in turn on a batch of so many examples of one length; medians over rounds."""

    def clock(subject: Subject, stacks: Sequence[Stack]) -> list[float]:
        with tempfile.TemporaryDirectory(prefix="compress-search-") as folder:
            runners = [
                runner(layer_stack(subject, *stack), Path(folder) / f"{number}.onnx", threads, subject.device)
                for number, stack in enumerate(stacks)
            ]
            rounds = [[example(batch_size, length)] * len(runners)]
            interleave(runners, rounds * WARMUP, seed=0)
            taken = interleave(runners, rounds * ROUNDS, seed=0)
        return [float(value) for value in np.median(taken, axis=0)]

    return clock


def kept_layer_table(subject: Subject, cache: Path, clock: Clock, way: Sequence[Any]) -> LayerTable:
    """The table from the cache, measured by whoever comes first.

    Args:
        subject: whose widths count.
        cache: where tables are kept.
        clock: measures.
        way: what else decides on the times, as plain data: the machine, threads, batch and length.
    """
    shape = [subject.family, int(subject.heads), subject.head_dim, int(subject.intermediate), subject.hidden]
    facts = json.dumps([*shape, subject.positions, subject.device, list(way), PARTS, FEWEST, ROUNDS])
    key = hashlib.sha256(facts.encode()).hexdigest()[:20]

    def build(folder: Path) -> None:
        (folder / "table.json").write_text(json.dumps(asdict(layer_table(subject, clock))), encoding="utf-8")

    stored = json.loads((content_addressed(cache, f"layers-{key}", build) / "table.json").read_text("utf-8"))
    return LayerTable(*(tuple((int(u), float(t)) for u, t in stored[name]) for name in ("heads", "neurons")))

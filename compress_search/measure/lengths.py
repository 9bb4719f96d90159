"""Which lengths are timed and what each of them counts: the data's own lengths under one way of deployment.

The way: inputs are batched as they come, ``batch_size`` at a time, and each batch is padded to its longest, or to
the next bucket where the model has buckets. The latency of that is an expectation over the lengths of the data,

    Σ P(width) · latency(bucket(width)),

and it is estimated from a few representative widths. Pure functions; they know no models and no clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

CELLS = 5
"""Parts of about equal probability into which the lengths are divided, before buckets divide them further."""

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Cell:
    """A range of widths that one of them, ``width``, stands for; ``probability`` is that of the whole range."""

    width: int
    probability: float


def width_distribution(lengths: NDArray[Any], batch_size: int) -> tuple[Ints, Floats]:
    """The widths of batches of ``batch_size`` random examples, padded to their longest, and their probabilities.

    P(width ≤ w) = F(w) ** batch_size for examples whose lengths are distributed as F.

    Args:
        lengths: (N,) tokens of each example, N ≥ 1.
        batch_size: examples in a batch.
    """
    widths, counts = np.unique(np.asarray(lengths, dtype=np.int64), return_counts=True)
    below = np.cumsum(counts) / counts.sum()
    return widths, np.diff(below**batch_size, prepend=0.0)


def cells(widths: Ints, probabilities: Floats, edges: Sequence[int] = (), count: int = CELLS) -> list[Cell]:
    """Neighbouring widths gathered into cells of about equal probability, none of which straddles an edge.

    A cell's representative is the one of its widths nearest to their mean, so that a latency linear in the width
    keeps its expectation. An edge is the last width that a bucket holds: within a cell a model with buckets does
    the same work for every width.

    Args:
        widths: (n,) ascending.
        probabilities: (n,) of those widths, with sum 1.
        edges: a model's buckets.
        count: cells to divide into, where no edge divides them further.
    """
    middle = np.cumsum(probabilities) - probabilities / 2
    part = np.minimum((count * middle).astype(np.int64), count - 1)
    bucket = np.searchsorted(np.unique(np.asarray(edges, dtype=np.int64)), widths, side="left")
    starts = np.flatnonzero(np.diff(part, prepend=-1) | np.diff(bucket, prepend=-1))
    ends = [*starts[1:], len(widths)]
    found = [_cell(widths[a:b], probabilities[a:b]) for a, b in zip(starts, ends, strict=True)]
    return [cell for cell in found if cell.probability > 0]


def _cell(widths: Ints, probabilities: Floats) -> Cell:
    total = float(probabilities.sum())
    mean = float(widths @ probabilities) / total if total else float(widths.mean())
    return Cell(int(widths[np.abs(widths - mean).argmin()]), total)


def draw(lengths: NDArray[Any], plan: Sequence[Cell], batch_size: int, rounds: int, seed: int) -> list[Ints]:
    """Rows (batch_size,) for each round, the cells taking turns: random examples, the longest of a cell's width."""
    rng = np.random.default_rng(seed)
    lengths = np.asarray(lengths)
    pools = [(np.flatnonzero(lengths == cell.width), np.flatnonzero(lengths <= cell.width)) for cell in plan]
    found = []
    for number in range(rounds):
        longest, others = pools[number % len(pools)]
        found.append(np.append(rng.choice(longest), rng.choice(others, batch_size - 1)))
    return found

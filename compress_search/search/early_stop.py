"""Multi-objective asynchronous successive halving: whether a trial may go on, from its peers at the same rung.

Pure functions on vectors of which every column is minimised, and :class:`Rungs`, the table of what has been
seen. Knows nothing of metrics' names, of trials' recipes or of storage.

The stopping variant of ASHA with the multi-objective ranking of Schmucker et al. (2021, "Multi-objective
Asynchronous Successive Halving", arXiv:2106.12639) and Salinas et al. (2021, "A multi-objective perspective on
jointly tuning hardware and hyperparameters", arXiv:2106.05680): non-dominated sorting, and inside a front an
epsilon-net. The front itself is protected, since an epsilon-net alone stops non-dominated trials as soon as the
front holds more than a fraction 1/eta of a rung.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

ETA = 3


def dominance(vectors: Array, violations: Array | None = None) -> NDArray[np.bool_]:
    """(n, n) matrix whose entry (i, j) says that row i dominates row j.

    A smaller total violation dominates a greater one; rows that violate nothing (0) are compared as vectors: no
    column worse and one better (constrained dominance, Deb et al. 2002, section VI).
    """
    no_worse = np.all(vectors[:, None] <= vectors[None], axis=-1)
    better: NDArray[np.bool_] = no_worse & np.any(vectors[:, None] < vectors[None], axis=-1)
    if violations is None:
        return better
    feasible = violations <= 0
    both = feasible[:, None] & feasible[None]
    found: NDArray[np.bool_] = (both & better) | (violations[:, None] < violations[None])
    return found


def fronts(vectors: Array, violations: Array | None = None) -> NDArray[np.int_]:
    """(n,) index of each row's front by non-dominated sorting, 0 the best."""
    dominates = dominance(vectors, violations)
    above = dominates.sum(0)
    index = np.full(len(vectors), -1)
    level = 0
    while (index < 0).any():
        front = np.flatnonzero((above == 0) & (index < 0))
        index[front] = level
        above -= dominates[front].sum(0)
        level += 1
    return index


def farthest_first(points: Array, count: int) -> list[int]:
    """The first ``count`` rows of an epsilon-net: each objective's best point, then always the farthest one left.

    Ties go to the lexicographically smaller point, then to the earlier row; distances are Euclidean. O(n·count).
    """
    n, k = points.shape
    order: list[int] = []
    nearest = np.full(n, np.inf)

    def take(row: int) -> None:
        order.append(row)
        np.minimum(nearest, np.linalg.norm(points - points[row], axis=1), out=nearest)
        nearest[row] = -np.inf

    for column in range(k):
        others = [points[:, j] for j in range(k) if j != column]
        # lexsort's last key is the primary one; it is stable, so that equal points keep their order of arrival
        best = int(np.lexsort([*others[::-1], points[:, column]])[0])
        if best not in order and len(order) < count:
            take(best)
    while len(order) < min(count, n):
        take(int(np.argmax(nearest)))
    return order


def order(vectors: Array, count: int, violations: Array | None = None) -> list[int]:
    """The ``count`` best rows, best first: fronts ascending, inside a front by :func:`farthest_first`.

    Columns are scaled to [0, 1] over all rows, so that units do not matter.
    """
    low, high = vectors.min(0), vectors.max(0)
    scaled = (vectors - low) / np.where(high > low, high - low, 1.0)
    index = fronts(vectors, violations)
    best: list[int] = []
    level = 0
    while len(best) < min(count, len(vectors)):
        rows = np.flatnonzero(index == level)
        best += [int(rows[i]) for i in farthest_first(scaled[rows], count - len(best))]
        level += 1
    return best


def keep(
    recorded: Sequence[Sequence[float]] | Array,
    new: Sequence[float] | Array,
    eta: int = ETA,
    protect_front: bool = True,
    *,
    violations: Sequence[float] | Array | None = None,
) -> bool:
    """Whether a trial with the vector ``new`` may go on.

    Args:
        recorded: vectors already seen at this rung, in any order, without the new one.
        new: the vector to decide on, shape (k,).
        eta: one trial in ``eta`` goes on.
        protect_front: let a trial that no other dominates go on whatever the epsilon-net says.
        violations: total violation of the constraints (0: none) of the recorded ones, then of the new one.

    Returns:
        True with fewer than ``eta`` results, for a protected member of the first front, and for the best
        ``floor(n / eta)`` of all n; never for a vector that is not finite.
    """
    vectors = np.array([*recorded, new], dtype=float)
    if not np.isfinite(vectors[-1]).all():
        return False
    n = len(vectors)
    if n < eta:
        return True
    vectors = _without_holes(vectors)
    excess = None if violations is None else np.maximum(np.asarray(violations, dtype=float), 0.0)
    if protect_front and not dominance(vectors, excess)[:, -1].any():
        return True
    return n - 1 in order(vectors, n // eta, excess)


def _without_holes(vectors: Array) -> Array:
    """The vectors with every entry that is not finite made worse, by 1, than the worst of its column."""
    finite = np.isfinite(vectors)
    worst = np.where(finite, vectors, -np.inf).max(0)
    return np.where(finite, vectors, worst + 1)


@dataclass(frozen=True)
class Entry:
    """What a trial showed at a rung and what was decided."""

    vector: tuple[float, ...]
    violation: float
    kept: bool


@dataclass
class Rungs:
    """What has been seen, by (group, rung): trials are compared with those of their own group only.

    Like is compared with like: inside one rung, which is the same part of the training in all trials, and inside
    one group, since kinds of students gain accuracy at different speeds.
    """

    eta: int = ETA
    protect_front: bool = True
    table: dict[tuple[Hashable, int], dict[int, Entry]] = field(default_factory=dict)

    def judge(
        self, group: Hashable, index: int, trial: int, vector: Sequence[float], violation: float = 0.0
    ) -> Entry:
        """What is decided on a trial's vector at a rung; nothing is recorded. A decision once recorded stands."""
        seen = self.table.get((group, index), {})
        if trial in seen:
            return seen[trial]
        excess = [*(entry.violation for entry in seen.values()), violation]
        recorded = [entry.vector for entry in seen.values()]
        kept = keep(recorded, vector, self.eta, self.protect_front, violations=excess)
        return Entry(tuple(vector), violation, kept)

    def record(self, group: Hashable, index: int, trial: int, entry: Entry) -> None:
        """Remember a decision; the first one of a trial at a rung stands."""
        self.table.setdefault((group, index), {}).setdefault(trial, entry)

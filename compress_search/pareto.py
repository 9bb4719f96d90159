"""Pareto arithmetic: dominance, the front, exact hypervolume, what noise leaves undecided, what to recommend.

Pure functions on arrays. Rows are points (candidates), columns are objectives, and a direction per column says
whether larger or smaller is better. Knows nothing of trials, metrics' names or where the numbers come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Direction = Literal["maximize", "minimize"]
Floats = NDArray[np.float64]


def losses(points: ArrayLike, directions: Sequence[Direction]) -> Floats:
    """The points (n, m) with every objective turned so that smaller is better.

    Raises:
        ValueError: an unknown direction, a number of columns other than m, or a value that is not a number.
    """
    if unknown := [d for d in directions if d not in ("maximize", "minimize")]:
        raise ValueError(f"a direction is 'maximize' or 'minimize', got {unknown[0]!r}")
    array = np.asarray(points, dtype=np.float64)
    array = array.reshape(0, len(directions)) if array.size == 0 else array
    if array.ndim != 2 or array.shape[1] != len(directions):
        raise ValueError(f"expected points of {len(directions)} objectives, got an array of shape {array.shape}")
    if np.isnan(array).any():
        raise ValueError(f"point {int(np.isnan(array).any(axis=1).argmax())} has an objective that is not a number")
    return array * np.where(np.asarray(directions) == "maximize", -1.0, 1.0)


def dominates(a: Sequence[float], b: Sequence[float], directions: Sequence[Direction]) -> bool:
    """Whether ``a`` is at least as good as ``b`` everywhere and better somewhere."""
    first, second = losses([a, b], directions)
    return bool((first <= second).all() and (first < second).any())


def front(points: ArrayLike, directions: Sequence[Direction]) -> list[int]:
    """Rows of the non-dominated points, ascending. Equal points stand or fall together."""
    return [int(row) for row in np.flatnonzero(_on_front(losses(points, directions)))]


def _on_front(array: Floats) -> NDArray[np.bool_]:
    """Mask (n,) of the rows that no row dominates; smaller is better."""
    at_most = (array[:, None] <= array[None]).all(axis=2)
    below = (array[:, None] < array[None]).any(axis=2)
    return np.asarray(~(at_most & below).any(axis=0))


def hypervolume(points: ArrayLike, reference: Sequence[float], directions: Sequence[Direction]) -> float:
    """Exact volume of the region that the points dominate, bounded by the reference point.

    Points that are not better than the reference in every objective add nothing. Any number of objectives, by
    slicing one at a time (While et al. 2006, "A Faster Algorithm for Calculating Hypervolume"): O(n log n)
    for two, O(n²) for three, with a factor n for each further one.

    Raises:
        ValueError: as :func:`losses`, and for a reference point that is not finite.
    """
    array = losses(points, directions)
    corner = losses([reference], directions)[0]
    if not np.isfinite(corner).all():
        raise ValueError(f"the reference point must be finite, got {list(reference)}")
    return _volume(array[(array < corner).all(axis=1)], corner)


def _volume(array: Floats, corner: Floats) -> float:
    """Volume between (n, m) points and the corner, all of them below it in every objective."""
    if not len(array):
        return 0.0
    if array.shape[1] == 1:
        return float(corner[0] - array.min())
    if array.shape[1] == 2:
        return _area(array, corner)
    array = array[_on_front(array)]
    array = array[np.argsort(array[:, -1])]
    # between two levels of the last objective, the section is what the points of the lower levels dominate
    heights = np.diff(np.append(array[:, -1], corner[-1]))
    return float(sum(h * _volume(array[: i + 1, :-1], corner[:-1]) for i, h in enumerate(heights) if h > 0))


def _area(array: Floats, corner: Floats) -> float:
    """The two-objective case: a staircase of steps (width to the next point) × (height of the best so far)."""
    array = array[np.argsort(array[:, 0])]
    widths = np.diff(np.append(array[:, 0], corner[0]))
    heights = corner[1] - np.minimum.accumulate(array[:, 1])
    return float(widths @ heights)


def indistinguishable(intervals: ArrayLike) -> NDArray[np.bool_]:
    """Mask (n, n): whether two candidates' intervals (n, m, 2) overlap in every objective.

    A value that is known exactly has an interval of width zero, so that a difference in it tells two
    candidates apart. The relation is symmetric but not transitive.

    Raises:
        ValueError: intervals of another shape, or with the lower end above the upper.
    """
    array = np.asarray(intervals, dtype=np.float64)
    if array.size == 0:
        return np.zeros((0, 0), dtype=bool)
    if array.ndim != 3 or array.shape[2] != 2:
        raise ValueError(f"expected intervals of shape (candidates, objectives, 2), got {array.shape}")
    low, high = array[..., 0], array[..., 1]
    if not (low <= high).all():
        raise ValueError(
            f"an interval's lower end must not exceed its upper, got {array[~(low <= high)][0].tolist()}"
        )
    return np.asarray(((low[:, None] <= high[None]) & (low[None] <= high[:, None])).all(axis=2))


def recommend(
    points: ArrayLike,
    directions: Sequence[Direction],
    *,
    feasible: Sequence[bool] | None = None,
    bounded: Sequence[bool] | None = None,
) -> int | None:
    """The row to recommend, or None when no point is feasible.

    Constraints say what is good enough, so only the objectives that no constraint bounds are left to be
    improved (all bounded: the last, by convention the cost). Among the feasible points that no feasible point
    dominates, the recommendation is the one closest to the ideal point in these objectives, each scaled to
    [0, 1] over the front (compromise programming, Yu 1973): the best when one is left, the knee when several.

    Args:
        points: (n, m) values.
        directions: one per objective.
        feasible: whether each point meets every constraint; all of them by default.
        bounded: whether a constraint bounds each objective; none by default.
    """
    array = losses(points, directions)
    rows = np.flatnonzero(np.ones(len(array), dtype=bool) if feasible is None else np.asarray(feasible, dtype=bool))
    rows = rows[_on_front(array[rows])]
    if not len(rows):
        return None
    free = [column for column in range(array.shape[1]) if not (bounded and bounded[column])]
    return int(rows[_knee(array[rows][:, free or [-1]])])


def _knee(array: Floats) -> Any:
    """Row closest to the ideal point after scaling each objective to [0, 1]; the first of equals."""
    ideal, span = array.min(axis=0), np.ptp(array, axis=0)
    scaled = (array - ideal) / np.where(span > 0, span, 1.0)
    return np.argmin(np.linalg.norm(scaled, axis=1))

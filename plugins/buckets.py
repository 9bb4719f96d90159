"""Which widths to pad inputs to: the few that cost least over the lengths of the data.

Pure functions of a histogram of lengths; they know no models.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray


def optimal_buckets(lengths: NDArray[np.int64], count: int, cost: Callable[[int], float]) -> tuple[int, ...]:
    """The at most ``count`` widths, ascending, with the least Σ cost(bucket(length)) over the lengths.

    Every length is padded to the smallest width that holds it, so that the last width is the longest length. An
    optimal set exists among the lengths themselves. Dynamic programming over the n distinct ones: the best cost of
    the first j with k buckets is min over i < j of best(i, k - 1) + examples(i, j] · cost(length j), in
    O(count · n²) time.

    Args:
        lengths: (N,) tokens of each example, N ≥ 1.
        count: widths at most, ≥ 1.
        cost: of running an input of so many tokens; increasing.
    """
    widths, examples = np.unique(lengths, return_counts=True)
    size = len(widths)
    before = np.concatenate([[0], np.cumsum(examples)])
    price = np.array([cost(int(width)) for width in widths], dtype=float)
    # group[i, j]: what the lengths i … j cost in one bucket as wide as the last of them
    group = (before[None, 1:] - before[:-1, None]) * price[None, :]
    group[np.tril_indices(size, -1)] = np.inf
    best, starts = group[0], [np.zeros(size, dtype=np.int64)]
    for _ in range(min(count, size) - 1):
        total = np.concatenate([[0.0], best[:-1]])[:, None] + group
        starts.append(total.argmin(axis=0))
        best = total.min(axis=0)
    return tuple(int(widths[last]) for last in _lasts(starts, size - 1))


def _lasts(starts: list[NDArray[np.int64]], last: int) -> list[int]:
    """The last length of each bucket, ascending, read back from where the best buckets start."""
    found = []
    for start in reversed(starts):
        found.append(last)
        last = int(start[last]) - 1
        if last < 0:
            break
    return found[::-1]


def quantile_length(lengths: NDArray[np.int64], part: float) -> int:
    """The least number of tokens that holds so large a part of the examples uncut."""
    return int(np.quantile(lengths, part, method="inverted_cdf"))

"""The lengths that are timed stand for those of the data: probabilities, cells and what is drawn from them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress_search.measure import summarize
from compress_search.measure.bench import interleave
from compress_search.measure.lengths import CELLS, cells, draw, width_distribution
from compress_search.runtimes.engines import Bucketed, padded_width

lengths_of_data = st.lists(st.integers(1, 60), min_size=1, max_size=80).map(np.array)


@given(lengths_of_data, st.integers(1, 8))
def test_widths_are_distributed_as_the_longest_of_a_batch(lengths: Any, batch_size: int) -> None:
    widths, shares = width_distribution(lengths, batch_size)
    assert shares.sum() == pytest.approx(1.0)
    for width in (int(lengths.min()), int(np.median(lengths)), int(lengths.max())):
        assert shares[widths <= width].sum() == pytest.approx(np.mean(lengths <= width) ** batch_size)


def test_the_width_of_a_batch_by_hand() -> None:
    """Of two inputs, each short three times in four, both are short nine times in sixteen."""
    widths, shares = width_distribution(np.array([4, 4, 4, 20]), 2)
    assert widths.tolist() == [4, 20]
    assert shares.tolist() == [9 / 16, 7 / 16]


@given(lengths_of_data, st.integers(1, 4), st.lists(st.integers(1, 60), max_size=4), st.integers(1, CELLS))
def test_cells_hold_everything_and_straddle_no_edge(
    lengths: Any, batch_size: int, edges: list[int], count: int
) -> None:
    widths, shares = width_distribution(lengths, batch_size)
    found = cells(widths, shares, edges, count)
    assert sum(cell.probability for cell in found) == pytest.approx(1.0)
    assert [cell.width for cell in found] == sorted({cell.width for cell in found})
    assert {cell.width for cell in found} <= set(widths.tolist())
    assert len(found) <= count + len(set(edges))
    for edge in edges:
        inside = sum(cell.probability for cell in found if cell.width <= edge)
        assert inside == pytest.approx(shares[widths <= edge].sum())


@given(st.lists(st.integers(1, 500), min_size=30, max_size=200).map(np.array))
def test_a_latency_linear_in_the_width_keeps_its_expectation(lengths: Any) -> None:
    widths, shares = width_distribution(lengths, 1)
    found = cells(widths, shares)
    expected = float(widths @ shares)
    nearest = max(np.diff(widths, prepend=widths[0]))  # a representative is a width that occurs
    assert sum(cell.width * cell.probability for cell in found) == pytest.approx(expected, abs=nearest + 1e-9)


@given(lengths_of_data, st.integers(1, 4), st.integers(0, 5))
def test_what_is_drawn_has_the_cells_widths_in_turn(lengths: Any, batch_size: int, seed: int) -> None:
    plan = cells(*width_distribution(lengths, batch_size))
    rows = draw(lengths, plan, batch_size, 20, seed)
    assert [len(row) for row in rows] == [batch_size] * 20
    assert [int(lengths[row].max()) for row in rows] == [plan[number % len(plan)].width for number in range(20)]
    again = draw(lengths, plan, batch_size, 20, seed)
    assert all(np.array_equal(first, second) for first, second in zip(rows, again, strict=True))


@pytest.mark.parametrize("buckets", [(), (6, 20), (20,)])
def test_the_measured_latency_is_the_formula(buckets: tuple[int, ...]) -> None:
    """A fake bench whose models take as many milliseconds as they are fed columns, and a constant."""
    data, now = np.array([3, 3, 3, 6, 6, 11, 20, 20]), [0]

    def model(constant: float) -> Any:
        def run(batch: Any) -> Any:
            now[0] += int(1e6 * (constant + batch["input_ids"].shape[1]))
            return np.zeros((1, 2), np.float32)

        return run

    candidate = Bucketed(model(0.0), buckets, 0) if buckets else model(0.0)
    plan = cells(*width_distribution(data, 1), buckets)
    rounds = [
        ({"input_ids": np.zeros((1, int(data[row].max())))},) * 2 for row in draw(data, plan, 1, 4 * len(plan), 0)
    ]
    runners = [candidate, model(5.0)]
    times = interleave(runners, rounds, 0, clock=lambda: now[0], preemptions=lambda: 0)
    samples = {
        "candidate_ms": times[:, 0],
        "reference_ms": times[:, 1],
        "control_ms": times[:, 1],
        "cell": [number % len(plan) for number in range(len(rounds))],
    }
    protocol = {"batch_size": 1, "seed": 0, "cells": [[cell.width, cell.probability] for cell in plan]}
    found = summarize(samples, protocol)
    assert len(plan) == 4, "each of the four lengths is a cell of its own"
    reference = np.mean([5.0 + length for length in data])
    expected = np.mean([padded_width(length, buckets) for length in data])
    assert found.reference_ms == pytest.approx(reference)
    assert found.ratio * found.reference_ms == pytest.approx(expected)

"""What a latency comes to as metrics of a trial: each with an interval, of the same measurement."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress_search.measure import Latency, Score
from compress_search.measure.costs import costs_of
from compress_search.trial import intervals_of, shape_metrics
from compress_search.workbench import Shape

ratios = st.lists(st.floats(0.01, 10), min_size=3, max_size=3).map(sorted)


def latency(low: float, ratio: float, high: float) -> Latency:
    return Latency(ratio, low, high, 1.0, 1.0, 5.0, 1.0, 1.0, 1.0, noisy=False)


def test_costs_by_hand() -> None:
    """Half the teacher's 8 ms for a batch of 4 is 1000 examples a second; 0.4 and 0.625 of it are 1250 and 800."""
    metrics, intervals = costs_of(latency(0.4, 0.5, 0.625), teacher_ms=8.0, batch_size=4)
    assert metrics == {"latency_ms": 4.0, "speedup": 2.0, "throughput": 1000.0}
    assert intervals["latency_ms"] == pytest.approx((3.2, 5.0))
    assert intervals["speedup"] == pytest.approx((1.6, 2.5))
    assert intervals["throughput"] == pytest.approx((800.0, 1250.0))


@given(ratios, st.floats(0.01, 1000), st.integers(1, 64))
def test_every_cost_lies_in_its_interval(bounds: list[float], teacher_ms: float, batch_size: int) -> None:
    metrics, intervals = costs_of(latency(*bounds), teacher_ms, batch_size)
    assert metrics.keys() == intervals.keys()
    for name, (low, high) in intervals.items():
        assert low <= metrics[name] <= high


def test_a_trials_intervals_are_those_of_its_metrics_on_the_studys_scale() -> None:
    shape, score = (
        Shape("key", 1.0, latency(0.4, 0.5, 0.625)),
        Score({"accuracy": 0.9}, {"accuracy": (0.8, 1.0)}, 9, 1, 1.0),
    )
    for reference, scale in (({"latency_ms": 8.0}, 8.0), ({}, 5.0)):
        assert shape_metrics(shape, reference, 4)["throughput"] == pytest.approx(4000 / (0.5 * scale))
        found = intervals_of(score, shape, reference, 4)
        assert found["throughput"] == pytest.approx((4000 / (0.625 * scale), 4000 / (0.4 * scale)))
        assert set(found) == {"accuracy", "latency_ms", "speedup", "throughput"}

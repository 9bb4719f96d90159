"""What a latency comes to as metrics of a trial, each with its interval. Knows neither trials nor studies.

Every one of them is the ratio to the teacher on another scale, rising with it or falling, so the ends of the
ratio's interval are the ends of theirs.
"""

from __future__ import annotations

from compress_search.measure import Interval, Latency


def costs_of(latency: Latency, teacher_ms: float, batch_size: int) -> tuple[dict[str, float], dict[str, Interval]]:
    """Latency in ms, speed-up and throughput in examples a second, and their 95 % intervals.

    Args:
        latency: how long a candidate takes, against the teacher.
        teacher_ms: the study's frozen latency of the teacher for a batch.
        batch_size: examples in a batch.
    """
    low, high = (_costs(ratio, teacher_ms, batch_size) for ratio in (latency.low, latency.high))
    intervals = {name: (min(low[name], high[name]), max(low[name], high[name])) for name in low}
    return _costs(latency.ratio, teacher_ms, batch_size), intervals


def _costs(ratio: float, teacher_ms: float, batch_size: int) -> dict[str, float]:
    latency_ms = ratio * teacher_ms
    return {"latency_ms": latency_ms, "speedup": 1 / ratio, "throughput": 1000 * batch_size / latency_ms}

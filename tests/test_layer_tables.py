"""The table of a layer's latency: what is measured, what lies between, and that it is measured once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress_search import Subject
from compress_search.encoders import layers, parts
from compress_search.measure.layers import LayerTable, Stack, kept_layer_table, layer_table, time_stacks
from compress_search.runtimes.layer_stacks import example, layer_stack, runner

TINY = Subject("bert", "text-classification", 4, 4, 8, 32, 64, 100, 40, 2, 2)
FAMILIES = ("bert", "roberta", "electra", "distilbert")


def model(heads: int, neurons: int) -> float:
    return 0.5 + 0.2 * heads + 0.01 * neurons


def clock(subject: Subject, stacks: Sequence[Stack]) -> list[float]:
    """A machine on which embeddings and head take three milliseconds."""
    return [3.0 + depth * model(heads, neurons) for depth, heads, neurons in stacks]


def noisy(subject: Subject, stacks: Sequence[Stack]) -> list[float]:
    rng = np.random.default_rng(0)
    return [time * rng.uniform(0.5, 1.5) for time in clock(subject, stacks)]


@pytest.mark.parametrize(("heads", "neurons"), [(4, 64), (0, 64), (4, 0), (1, 16), (3, 40), (2, 7)])
def test_what_is_around_the_layer_does_not_count(heads: int, neurons: int) -> None:
    assert layer_table(TINY, clock)(heads, neurons) == pytest.approx(model(heads, neurons))


@given(st.integers(0, 4), st.integers(0, 64), st.integers(0, 4), st.integers(0, 64))
def test_a_larger_layer_is_never_faster_however_noisy_the_machine(k: int, f: int, more: int, wider: int) -> None:
    table = layer_table(TINY, noisy)
    assert table(min(4, k + more), min(64, f + wider)) >= table(k, f) - 1e-9


def test_what_a_block_takes_before_its_first_unit_is_seen() -> None:
    def starting(subject: Subject, stacks: Sequence[Stack]) -> list[float]:
        return [3 + d * (0.1 + (k > 0) + 0.2 * k + 0.3 * (f > 0) + 0.01 * f) for d, k, f in stacks]

    table = layer_table(TINY, starting)
    assert table(1, 64) - table(0, 64) == pytest.approx(1.2)
    assert table(4, 2) - table(4, 0) == pytest.approx(0.32)
    assert table(0, 0) == pytest.approx(0.1)


@given(st.integers(0, 99))
def test_an_empty_layer_takes_some_time_and_no_more_than_a_whole_one(seed: int) -> None:
    def jittery(subject: Subject, stacks: Sequence[Stack]) -> list[float]:
        rng = np.random.default_rng(seed)
        return [time * rng.uniform(0.8, 1.2) for time in clock(subject, stacks)]

    table = layer_table(TINY, jittery)
    assert -1e-9 <= table(0, 0) <= table(4, 64) + 1e-9


def test_a_table_is_measured_once_for_a_machine_and_a_shape(tmp_path: Path) -> None:
    asked: list[Subject] = []

    def counting(subject: Subject, stacks: Sequence[Stack]) -> list[float]:
        asked.append(subject)
        return clock(subject, stacks)

    first = kept_layer_table(TINY, tmp_path, counting, ["here", 1])
    assert kept_layer_table(TINY.having("timed", layers=2), tmp_path, counting, ["here", 1]) == first
    assert first == layer_table(TINY, clock)
    assert len(asked) == 1
    kept_layer_table(TINY.having(hidden=24), tmp_path, counting, ["here", 1])
    kept_layer_table(TINY, tmp_path, counting, ["elsewhere", 1])
    assert len(asked) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stack_has_the_widths_of_the_subject_and_runs(family: str, tmp_path: Path) -> None:
    subject = TINY.having(family=family, hidden=24)
    state = torch.get_rng_state()
    network = layer_stack(subject, 2, 3, 16)
    assert torch.equal(torch.get_rng_state(), state)
    found = [parts(layer) for layer in layers(network)]
    assert [(view.heads, view.head_dim, view.neurons, len(view.output_norm.weight)) for view in found] == [
        (3, 8, 16, 24)
    ] * 2
    assert np.isfinite(runner(network, tmp_path / "stack.onnx", 1, "cpu")(example(2, 5))).all()


def test_a_stack_without_heads_runs_too(tmp_path: Path) -> None:
    run = runner(layer_stack(TINY, 1, 0, 16), tmp_path / "stack.onnx", 1, "cpu")
    assert run(example(1, 5)).shape == (1, 2)


def test_a_real_clock_gives_a_time_for_each_stack() -> None:
    times = time_stacks(batch_size=1, length=4, threads=1)(TINY, [(1, 4, 64), (1, 2, 0)])
    assert len(times) == 2
    assert all(time > 0 for time in times)


def test_between_points_the_table_is_linear() -> None:
    table = LayerTable(heads=((0, 1.0), (2, 3.0)), neurons=((0, 2.0), (10, 3.0)))
    assert [table(2, 10), table(1, 10), table(2, 5), table(0, 0)] == [3.0, 2.0, 2.5, 0.0]

"""What candidates of equal shapes share, and what makes a stored measurement another one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from compress_search import workbench
from compress_search.candidate import Candidate
from compress_search.encoders import keep_pieces, subject_of
from compress_search.measure import Latency
from compress_search.recipe import Recipe, Step
from compress_search.registry import Registry
from compress_search.study import load_study
from compress_search.workbench import Workbench
from tests.tiny import tiny_network, tiny_tokenizer

LATENCY = Latency(0.5, 0.4, 0.6, 1.0, 1.5, 2.0, 1000.0, 1.0, 1.1, noisy=False)
INT8 = Recipe((Step.of("quantization", {"weight_bits": 8}),))


@dataclass
class Place:
    """Stands for a split: all that is asked of it is where it lies."""

    path: Path


@dataclass
class Shelved:
    """Stands for a worker's materials."""

    validation: Place


@pytest.fixture
def bench(tiny_study: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, list[int]]]:
    """A workbench whose measurements take a while and are counted."""
    monkeypatch.setattr(workbench, "size_mb", lambda directory: 1.5)

    def make(validation: str = "validation", **sections: Any) -> tuple[Any, list[int]]:
        made: Any = Workbench.__new__(Workbench)
        made.study, made.registry = load_study(tiny_study(**sections)), Registry()
        made.output, made.teacher_directory = made.study.output, Path("teacher")
        made.materials = Shelved(Place(Path(validation)))
        taken: list[int] = []

        def latency(*args: Any, **options: Any) -> Latency:
            taken.append(1)
            time.sleep(0.3)
            return LATENCY

        made.latency, made._memory = latency, lambda directory: 7.0 if made._memory_counts else None
        return made, taken

    return make


def candidate() -> Candidate:
    network: Any = tiny_network()
    return Candidate(network, tiny_tokenizer(), subject_of(network, "text-classification"))


def test_workers_that_meet_the_same_shape_at_once_share_one_measurement(bench: Any) -> None:
    made, taken = bench()
    found: list[Any] = []
    threads = [
        threading.Thread(target=lambda: found.append(made.shape(candidate(), Path("artifact"), Recipe())))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1
    assert found[0] == found[1]


def test_a_measurement_of_former_data_or_without_memory_is_not_taken_for_a_new_one(bench: Any) -> None:
    for changes in ({}, {"validation": "other"}, {"objectives": ["accuracy", "memory_mb"]}):
        made, taken = bench(**changes)
        shape = made.shape(candidate(), Path("artifact"), Recipe())
        assert len(taken) == 1, changes
        assert shape.memory == (7.0 if "objectives" in changes else None)


@pytest.mark.parametrize(("low", "high"), [(0.9, 0.95), (1.02, 1.1), (0.97, 1.01)])
def test_the_teachers_interval_holds_its_own_value(bench: Any, low: float, high: float) -> None:
    made, _ = bench()
    made.latency = lambda *args, **options: replace(LATENCY, ratio=0.5 * (low + high), low=low, high=high)
    found = made.shape(candidate(), Path("artifact"), Recipe()).latency
    assert (found.ratio, found.low, found.high) == (1.0, min(low, 1.0), max(high, 1.0))


def test_zeros_change_the_size_but_not_the_time(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workbench, "size_mb", lambda directory: {"dense": 1.5, "sparse": 0.5}[directory.name])
    dense = candidate()
    sparse = dense.replace(subject=dense.subject.having("sparse", density=0.2))
    for objectives, measured in ((["accuracy", "size_mb"], 1), (["accuracy", "size_mb", "memory_mb"], 2)):
        made, taken = bench(objectives=objectives)
        first = made.shape(dense, Path("dense"), Recipe())
        second = made.shape(sparse, Path("sparse"), Recipe())
        assert (first.size, second.size) == (1.5, 0.5)
        assert first.latency == second.latency
        assert len(taken) == measured, "what a packed file takes to load is measured where memory counts"


def test_a_changed_precision_method_is_measured_again(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made, taken = bench()
    made.shape(candidate(), Path("artifact"), INT8)
    made.shape(candidate(), Path("artifact"), INT8)
    assert len(taken) == 1
    monkeypatch.setattr(made.registry, "fingerprint", lambda name: "changed")
    made.shape(candidate(), Path("artifact"), INT8)
    assert len(taken) == 2


def test_what_a_precision_method_chose_by_the_weights_is_measured_apart(bench: Any) -> None:
    made, taken = bench()
    for chosen in (["layer.0.query"], ["layer.1.down"], ["layer.0.query"]):
        made.shape(candidate().replace(notes={"quantization": {"high_precision": chosen}}), Path("artifact"), INT8)
    assert len(taken) == 2


@pytest.mark.parametrize(("setting", "other"), [("CPU_SESSION", {"another": "entry"}), ("GRAPHS", 0)])
def test_what_runs_otherwise_is_measured_again(
    bench: Any, monkeypatch: pytest.MonkeyPatch, setting: str, other: Any
) -> None:
    made, taken = bench()
    made.shape(candidate(), Path("artifact"), Recipe())
    monkeypatch.setattr(workbench, setting, other)
    made.shape(candidate(), Path("artifact"), Recipe())
    made.shape(candidate(), Path("artifact"), Recipe())
    assert len(taken) == 2


def test_a_candidate_whose_tokenizer_cuts_otherwise_is_measured_again(bench: Any) -> None:
    made, taken = bench()
    pruned = candidate()
    kept = range(len(pruned.tokenizer) - 1)
    made.shape(candidate(), Path("artifact"), Recipe())
    made.shape(pruned.replace(tokenizer=keep_pieces(pruned.tokenizer, kept)), Path("artifact"), Recipe())
    assert len(taken) == 2

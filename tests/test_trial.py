"""What a trial leaves on the disk, and what it must not take for its own."""

from __future__ import annotations

import errno
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from compress_search.errors import BenchDied, StudyError
from compress_search.recipe import Recipe
from compress_search.records import Assignment, Failure
from compress_search.trial import (
    Attempt,
    Stopwatch,
    TrialWorker,
    clear_scratch,
    read_death,
    read_result,
    time_limit,
    trial_folder,
)


def worker_that_dies_while_it_prepares(output: Path) -> TrialWorker:
    def die() -> None:
        raise KeyboardInterrupt

    worker = TrialWorker.__new__(TrialWorker)
    bench: Any = SimpleNamespace(output=output, prepare=die)
    worker.workbench = bench
    return worker


def test_a_full_disk_is_no_fault_of_the_trial_wherever_it_is_met(tmp_path: Path) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "teacher.safetensors")

    worker = TrialWorker.__new__(TrialWorker)
    bench: Any = SimpleNamespace(output=tmp_path, prepare=full)
    worker.workbench = bench
    with pytest.raises(
        StudyError, match=r"output: a disk is full .*teacher.safetensors.*the same command goes on$"
    ):
        worker.run(Assignment(0, 0, Recipe(), seed=1), lambda rung: True)
    with pytest.raises(StudyError, match="a disk is full"):
        worker.finalize({0: "artifacts/teacher"})


def test_what_an_earlier_study_left_in_the_place_goes_before_anything_can_die(tmp_path: Path) -> None:
    folder = trial_folder(tmp_path, 0)
    folder.mkdir(parents=True)
    (folder / "result.json").write_text('{"number": 0, "attempt": 0, "state": "complete"}')
    (folder / "overrun-0.txt").write_text("Timeout (0:01:00)!")
    assert read_result(tmp_path, 0) is not None
    assert read_death(tmp_path, 0, 0).kind == "timeout"
    with pytest.raises(KeyboardInterrupt):
        worker_that_dies_while_it_prepares(tmp_path).run(Assignment(0, 0, Recipe(), seed=1), lambda rung: True)
    assert read_result(tmp_path, 0) is None
    assert read_death(tmp_path, 0, 0) == Failure("died", "the worker process died")


def test_scratch_of_killed_attempts_is_cleared_and_results_stay(tmp_path: Path) -> None:
    folder = trial_folder(tmp_path, 3)
    (folder / "scratch-1" / "dry").mkdir(parents=True)
    (folder / "scratch-1" / "dry" / "model.onnx").touch()
    (folder / "result.json").write_text("{}")
    clear_scratch(tmp_path)
    assert [path.name for path in folder.iterdir()] == ["result.json"]


@pytest.mark.parametrize(("kind", "costs_the_trial"), [("timeout", True), ("died", False)])
def test_a_bench_that_hangs_costs_its_trial_and_one_that_dies_is_the_machines_fault(
    kind: str, costs_the_trial: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(attempt: Attempt) -> None:
        raise BenchDied("latency of model took longer than 900 s", kind=kind)

    monkeypatch.setattr(Attempt, "_run", fail)
    bench: Any = SimpleNamespace()
    attempt = Attempt(bench, Assignment(3, 0, Recipe(), seed=1), lambda rung: True, tmp_path, Stopwatch())
    if not costs_the_trial:
        with pytest.raises(BenchDied):
            attempt.run()
        return
    result = attempt.run()
    assert result.state == "failed"
    assert result.failure is not None
    assert (result.failure.kind, "took longer than 900 s" in result.failure.message) == ("timeout", True)


@pytest.mark.parametrize("end", [None, SystemExit, BenchDied])  # by SystemExit Tune stops a trial
def test_a_time_limit_that_was_kept_leaves_nothing(tmp_path: Path, end: type[BaseException] | None) -> None:
    expected: AbstractContextManager[Any] = pytest.raises(end) if end else nullcontext()
    with expected, time_limit(1.0, tmp_path / "overrun-0.txt"):
        assert (tmp_path / "overrun-0.txt").exists()
        if end:
            raise end("over")
    assert not list(tmp_path.iterdir())

"""Both executors keep the same promises: nothing lost, the dead replaced, the stopped stopped, no process left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from compress_search.errors import CompressSearchError, StudyError, StudyLocked
from compress_search.executor import Executor, LocalExecutor
from compress_search.records import Assignment, Result, Rung
from compress_search.study import load_study
from tests.workers import ScriptedSearch, ScriptedWorker, no_reason

ROOT = Path(__file__).resolve().parents[1]
Make = Callable[..., Executor]


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    import ray

    import compress_search.ray_executor  # noqa: F401  (sets what Ray reads from the environment)

    environment = {"env_vars": {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    yield
    ray.shutdown()


@pytest.fixture(params=["local", pytest.param("ray", marks=pytest.mark.slow)])
def make(request: Any, tmp_path: Path, tiny_study: Callable[..., Path]) -> Iterator[Make]:
    made: list[Executor] = []

    def local(concurrency: int) -> Executor:
        return LocalExecutor(ScriptedWorker, str(tmp_path), no_reason, concurrency)

    def on_ray(concurrency: int) -> Executor:
        request.getfixturevalue("ray_session")
        from compress_search.ray_executor import RayExecutor

        study = load_study(tiny_study(search={"concurrency": concurrency}))
        return RayExecutor(ScriptedWorker, str(tmp_path), no_reason, study)

    def executor(concurrency: int = 1) -> Executor:
        made.append({"local": local, "ray": on_ray}[request.param](concurrency))
        return made[-1]

    yield executor
    for one in made:
        one.close()


def test_every_trial_is_run_once_and_finished(make: Make, tmp_path: Path) -> None:
    search = ScriptedSearch(["fine"] * 5)
    make(concurrency=2).run(search)  # type: ignore[arg-type]
    assert {n: r.metrics["accuracy"] for n, r in search.results.items()} == {n: 0.5 + n for n in range(5)}
    assert sorted(path.name for path in tmp_path.glob("?-?")) == [f"{n}-1" for n in range(5)]


def test_workers_are_reused(make: Make, tmp_path: Path) -> None:
    make().run(ScriptedSearch(["fine"] * 4))  # type: ignore[arg-type]
    assert len({path.read_text() for path in tmp_path.glob("?-?")}) == 1


def test_a_stopped_trial_goes_no_further(make: Make, tmp_path: Path) -> None:
    search = ScriptedSearch(["reports", "fine"], stop_at=1)
    make().run(search)  # type: ignore[arg-type]
    assert [rung.index for rung in search.rungs] == [0, 1]
    assert (tmp_path / "0-went-on-0").exists()
    assert not (tmp_path / "0-went-on-1").exists()
    assert search.results[0].seconds == {"total": 2.5}, "a stopped trial took time as well"
    assert search.results[1].state == "complete"


def test_a_dead_worker_is_replaced_and_its_trial_repeated(make: Make) -> None:
    search = ScriptedSearch(["dies_once", "fine", "dies"])
    make().run(search)  # type: ignore[arg-type]
    assert [(number, attempt) for number, attempt, _ in search.deaths] == [(0, 1), (2, 1), (2, 2)]
    assert {n: r.state for n, r in search.results.items()} == {0: "complete", 1: "complete", 2: "failed"}


class SlowToAnswer(ScriptedSearch):
    """Decides on a rung only once the worker that reported it is dead."""

    def report(self, rung: Rung) -> bool:
        time.sleep(1.0)
        return super().report(rung)


def test_a_worker_that_dies_while_it_waits_for_an_answer_costs_its_attempt_only(make: Make) -> None:
    search = SlowToAnswer(["reports_and_dies", "fine"])
    make().run(search)  # type: ignore[arg-type]
    assert [(number, attempt) for number, attempt, _ in search.deaths] == [(0, 1), (0, 2)]
    assert {n: r.state for n, r in search.results.items()} == {0: "failed", 1: "complete"}


def test_a_worker_that_died_while_it_was_idle_costs_an_attempt_only(tmp_path: Path) -> None:
    executor, search = LocalExecutor(ScriptedWorker, str(tmp_path), no_reason), ScriptedSearch(["fine"])
    try:
        executor.call("double", 1)
        executor.idle[0].process.kill()
        executor.idle[0].process.join()
        executor.run(search)  # type: ignore[arg-type]
    finally:
        executor.close()
    assert search.results[0].attempt == 2
    assert search.results[0].state == "complete"


def test_an_interrupted_job_leaves_no_worker_behind(tmp_path: Path) -> None:
    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    executor = LocalExecutor(ScriptedWorker, str(tmp_path), no_reason)
    executor.call("double", 1)
    worker = psutil.Process(executor.idle[0].process.pid)
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        with pytest.raises(KeyboardInterrupt):
            executor.call("wait")
        executor.close()
        assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
    finally:
        signal.signal(signal.SIGALRM, before)
        if worker.is_running():
            worker.kill()


def test_a_fault_of_the_engine_is_told_with_its_traceback(make: Make) -> None:
    search = ScriptedSearch(["breaks", "fine"], attempts=1)
    make().run(search)  # type: ignore[arg-type]
    assert "a fault of the engine" in search.results[0].failure.message  # type: ignore[union-attr]
    assert "in breaks" in search.results[0].failure.traceback  # type: ignore[union-attr]
    assert search.results[1].state == "complete"


def test_a_study_that_cannot_run_in_a_worker_ends_the_run(make: Make) -> None:
    with pytest.raises(CompressSearchError, match=r"study.yaml:3: data.text: no such column") as caught:
        make().run(ScriptedSearch(["refuses", "fine"]))  # type: ignore[arg-type]
    assert caught.value.exit_code == 2


def test_a_key_that_a_worker_blames_is_told_as_such(make: Make) -> None:
    with pytest.raises(StudyError, match=r"^teacher.model: the weights are damaged$") as caught:
        make().run(ScriptedSearch(["blames"]))  # type: ignore[arg-type]
    assert caught.value.key == "teacher.model", "so that the driver can say where it stands"


class TakenOver(ScriptedSearch):
    """Finds that another driver has its study, at one kind of event."""

    at = "finish"

    def finish(self, result: Result) -> None:
        self._fail("finish")
        super().finish(result)

    def report(self, rung: Rung) -> bool:
        self._fail("report")
        return super().report(rung)

    def next(self) -> Assignment | None:
        if self.open:  # not at once, but while a trial runs
            self._fail("next")
        return super().next()

    def _fail(self, event: str) -> None:
        if event == self.at:
            raise StudyLocked("study 's' was taken over by process 7")


@pytest.mark.parametrize("event", ["finish", "report", "next"])
def test_an_error_of_the_search_ends_the_run_as_what_it_is(make: Make, event: str) -> None:
    search = TakenOver(["reports", "fine", "fine"])
    search.at = event
    with pytest.raises(StudyLocked, match=r"^study 's' was taken over by process 7$"):
        make(concurrency=2).run(search)  # type: ignore[arg-type]


def test_jobs_that_are_no_trials(make: Make) -> None:
    assert make().call("double", 21) == 42


def test_a_job_that_fails_says_why(make: Make) -> None:
    with pytest.raises(CompressSearchError, match=r"^study.yaml:3: data.text: no such column$"):
        make().call("refuse")


def test_a_job_whose_process_dies_is_told_in_one_line(make: Make) -> None:
    with pytest.raises(CompressSearchError, match=r"^the worker process died during die$"):
        make().call("die")


DRIVER = """
import sys
from compress_search.executor import LocalExecutor
from tests.workers import ScriptedSearch, ScriptedWorker, no_reason
if __name__ == "__main__":
    LocalExecutor(ScriptedWorker, sys.argv[1], no_reason).run(ScriptedSearch(["hangs"]))
"""


def test_a_killed_driver_leaves_no_worker_behind(tmp_path: Path) -> None:
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    driver = subprocess.Popen([sys.executable, str(script), str(tmp_path)], env=environment)
    marker = tmp_path / "0-1"
    _wait_until(lambda: marker.exists() and marker.read_text() != "")
    worker = psutil.Process(int(marker.read_text()))
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    gone, _ = psutil.wait_procs([worker], timeout=30)
    assert gone or worker.status() == psutil.STATUS_ZOMBIE


def _wait_until(holds: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_kernels_are_those_of_the_place_that_trials_run_in(monkeypatch: pytest.MonkeyPatch) -> None:
    from compress_search.ray_executor import probe_cluster
    from compress_search.runtimes import probe

    monkeypatch.setattr(probe, "kernels", lambda device: {device, str(os.getpid())})
    study: Any = SimpleNamespace(cluster=SimpleNamespace(cpus_per_trial=1, gpus_per_trial=0))
    found = probe_cluster(study, "cpu")
    assert "cpu" in found
    assert str(os.getpid()) not in found


def test_only_a_cluster_is_asked_what_is_real_there(tiny_study: Callable[..., Path]) -> None:
    from compress_search import driver

    here, there = (load_study(tiny_study(cluster={"address": address})) for address in ("local", "auto"))
    assert driver.probe_of(here, "ray") is driver.probe_of(there, "local") is driver.kernels
    assert driver.probe_of(there, "ray") is not driver.kernels

"""Whole studies through the command line, on both executors: what goes wrong costs its trial and nothing else."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner

from compress_search import driver
from compress_search.cli import main
from compress_search.storage import Store
from compress_search.study import load_study
from tests.workers import HereExecutor

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[1]
COMMAND = [sys.executable, "-m", "compress_search"]
TRAINING = {"epochs": 2, "batch_size": 16, "learning_rate": 1e-3}
Study = Callable[..., Path]


@pytest.fixture(params=["local", "ray"])
def executor(request: Any) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def environment(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("COMPRESS_SEARCH_CACHE", str(cache))


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials of the local executor run in this process."""
    monkeypatch.setattr(driver, "LocalExecutor", HereExecutor)


@pytest.fixture
def command() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a command in a process of its own, for those that come to harm or go on beside the test."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: object) -> subprocess.Popen[str]:
        started.append(
            subprocess.Popen(
                [*COMMAND, *map(str, arguments)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def said(*arguments: object, code: int = 0) -> str:
    """What a command says, run in this process: another would first load the libraries."""
    result = CliRunner().invoke(main, [*map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


def report(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(said("report", path, "--format", "json"))
    return found


def wait_until(holds: Callable[[], bool], seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def left_running(study: Path) -> list[psutil.Process]:
    """Processes of ours that know the study's folder by argument or by what they hold open."""
    found = []
    for process in psutil.process_iter():
        try:
            files = [file.path for file in process.open_files()]
            mine = any(str(study.parent) in text for text in [*process.cmdline(), *files])
        except psutil.Error:
            continue
        if mine and process.pid != os.getpid():
            found.append(process)
    return found


def troubled(tiny_study: Study, tmp_path: Path, kinds: list[str], **search: Any) -> Path:
    path = tiny_study(
        methods={"trouble": {"use": True, "kind": kinds}},
        plugins=["trouble.py"],
        search={"trials": len(kinds), "sampler": "random", **search},
        training=TRAINING,
    )
    shutil.copy(ROOT / "tests" / "trouble.py", tmp_path)
    return path


def test_a_method_in_trouble_costs_its_trial_only(tiny_study: Study, tmp_path: Path, executor: str) -> None:
    kinds = ["fine", "raises", "refuses", "nan", "oom", "dies-then-hangs"]
    path = troubled(tiny_study, tmp_path, kinds, trial_minutes=0.2, retries=1)
    said("run", path, "--executor", executor)
    trials = [trial for trial in report(path)["trials"] if trial.get("baseline") is None]
    ended = {trial["recipe"][0]["params"]["kind"]: trial for trial in trials if trial["state"] != "duplicate"}
    assert {kind: trial["state"] for kind, trial in ended.items()} == {
        kind: "complete" if kind == "fine" else "failed" for kind in kinds
    }
    assert {kind: trial["attempts"] for kind, trial in ended.items()} == {
        kind: 2 if kind == "dies-then-hangs" else 1 for kind in kinds
    }
    for kind, text in {
        "raises": "a bug of the method",
        "refuses": "do not go together",
        "oom": "MemoryError",
        "dies-then-hangs": "outlasted",
    }.items():
        assert text in ended[kind]["error"], kind
    study = load_study(path)
    death = Store(study.storage).result(study.name, ended["dies-then-hangs"]["number"], 0).failure
    assert death is not None
    died = "the worker process died (exit code 9)" if executor == "local" else "the worker process died"
    assert died in death.message
    shown = said("show", path, ended["raises"]["number"])
    assert "misbehave" in shown
    assert "ZeroDivisionError" in shown
    wait_until(lambda: not left_running(path), 30)


@pytest.mark.usefixtures("here")
def test_a_methods_own_metric_is_an_aim(tiny_study: Study, tmp_path: Path) -> None:
    path = troubled(tiny_study, tmp_path, ["fine", "metric"])
    own = 'objectives=["accuracy", {"trouble.value": "maximize"}]', "constraints.trouble.value=>= 0.5"
    said("run", path, "--executor", "local", *(word for aim in own for word in ("--set", aim)))
    found = report(path)
    made = [trial for trial in found["trials"] if trial["state"] == "complete" and trial.get("baseline") is None]
    assert made
    assert {trial["metrics"]["trouble.value"] for trial in made} == {1.0}
    assert set(found["front"]) <= {trial["number"] for trial in made}, "a baseline has no number of the method's"
    assert found["front"]
    said("report", path, "--format", "html", "-o", tmp_path / "page.html")
    assert "trouble.value" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_full_disk_ends_the_run_and_is_held_against_no_recipe(
    tiny_study: Study, tmp_path: Path, executor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The executor matters where the run ends; what goes on is the search, wherever the rest is run."""
    path = troubled(tiny_study, tmp_path, ["fine", "disk"])
    full = "output: a disk is full (cannot write the file): free some space, and the same command goes on"
    assert full in said("run", path, "--executor", executor, code=2)
    wait_until(lambda: not left_running(path), 60)
    monkeypatch.setenv("TROUBLE_FREED", "yes")
    monkeypatch.setattr(driver, "LocalExecutor", HereExecutor)
    said("run", path, "--executor", "local")
    trials = [trial for trial in report(path)["trials"] if trial["state"] != "duplicate"]
    assert {trial["state"] for trial in trials} == {"complete"}
    kinds = [trial["recipe"][0]["params"]["kind"] for trial in trials if trial.get("baseline") is None]
    assert sorted(kinds) == ["disk", "fine"]


@pytest.mark.parametrize(
    ("executor", "numbers"),
    [
        ("local", [signal.SIGINT, signal.SIGKILL]),
        ("ray", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL]),  # Ray has a handler of its own for SIGTERM
    ],
    ids=["local", "ray"],
)
def test_a_study_resumes_where_it_was_however_often_it_is_interrupted(
    tiny_study: Study,
    tmp_path: Path,
    command: Any,
    executor: str,
    numbers: list[signal.Signals],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The executor matters where runs end; the last one, which nothing ends, is run here."""
    kinds = ["fine", "raises", "nan", "metric"]
    path = troubled(tiny_study, tmp_path, kinds)
    slow = ("--set", "methods.trouble.seconds=2")

    def results() -> int:
        return len(list((tmp_path / "run" / "trials").glob("*/result.json")))

    def arrived(count: int) -> bool:
        return results() >= count

    for number in numbers:
        enough = max(2, results() + 1)  # both baselines, which are quick; then a trial more than before
        run = command("run", path, "--executor", executor, *slow)
        wait_until(partial(arrived, enough))
        time.sleep(random.uniform(0, 2))  # in which one more trial can end, so that some are left each time
        run.send_signal(number)
        output = run.communicate(timeout=60)[0]
        assert run.returncode == (-number if number is signal.SIGKILL else 130), output
        assert number is signal.SIGKILL or "resumes" in output
        assert "the search ended" not in output
        wait_until(lambda: not left_running(path), 60)

    monkeypatch.setattr(driver, "LocalExecutor", HereExecutor)
    said("run", path, "--executor", "local", *slow)
    found = report(path)
    trials = [trial for trial in found["trials"] if trial.get("baseline") is None]
    done = [trial for trial in trials if trial["state"] != "duplicate"]
    assert [trial["number"] for trial in found["trials"]] == list(range(len(found["trials"])))
    assert sorted(trial["recipe"][0]["params"]["kind"] for trial in done) == sorted(kinds)
    assert {trial["state"] for trial in done} == {"complete", "failed"}
    wait_until(lambda: not left_running(path), 60)


def test_a_second_driver_is_refused(tiny_study: Study, tmp_path: Path, command: Any) -> None:
    path = troubled(tiny_study, tmp_path, ["fine"])
    first = command("run", path, "--executor", "local", "--set", "methods.trouble.seconds=60")
    assert first.stdout
    assert any("trial 0 started" in line for line in first.stdout)
    output = said("run", path, "--executor", "local", "--set", "methods.trouble.seconds=60", code=3)
    assert f"process {first.pid}" in output


@pytest.mark.usefixtures("here")
def test_constraints_that_nothing_meets_name_the_closest_recipes(tiny_study: Study) -> None:
    path = tiny_study(
        methods=["structured_pruning", "sharing"],
        constraints={"size_mb": "<= 0.001"},
        search={"trials": 1},
        training=TRAINING,
    )
    output = said("run", path, "--executor", "local", code=4)
    [error] = [line for line in output.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: Nothing meets the constraints; the closest: trial ")
    assert "structured_pruning" in error
    assert "against ≤ 0.0010 MB" in error


@pytest.mark.usefixtures("here")
def test_a_finished_study_prints_its_front_again_at_once(tiny_study: Study, tmp_path: Path) -> None:
    path = troubled(tiny_study, tmp_path, ["fine"])
    said("run", path, "--executor", "local")
    for trial in report(path)["trials"]:
        lost = trial["intervals"].get("accuracy_drop")
        assert (lost is None) == (not trial["recipe"]), "the teacher loses nothing against itself"
        assert lost is None or lost[0] <= trial["metrics"]["accuracy_drop"] <= lost[1]
    started = time.monotonic()
    output = said("run", path, "--executor", "local")
    assert "front" in output.lower()
    assert "started" not in output
    assert time.monotonic() - started < 60

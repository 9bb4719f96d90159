"""The board that a run's events add up to, and what is shown of it."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest

from compress_search import progress
from compress_search.progress import Board, RungReported, SearchEnded, StudyStarted, TrialFinished, TrialStarted

DIRECTIONS = {"accuracy": "maximize", "latency_ms": "minimize"}


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def finished(number: int, accuracy: float = 0.9, latency_ms: float = 5.0, **changes: object) -> TrialFinished:
    values = {"state": "complete", "metrics": {"accuracy": accuracy, "latency_ms": latency_ms}, "seconds": 60.0}
    return TrialFinished(number, f"recipe {number}", **{**values, **changes})  # type: ignore[arg-type]


def board_of(
    *events: progress.Event, trials: int = 10, hours: float | None = None, clock: Clock | None = None
) -> Board:
    board = Board(clock or Clock())
    board.on(StudyStarted("mine", DIRECTIONS, trials, hours))
    for event in events:
        board.on(event)
    return board


def test_a_trial_runs_from_its_start_to_its_end() -> None:
    board = board_of(TrialStarted(3, "a"), RungReported(3, 0, {}))
    assert (list(board.running), list(board.rungs), board.done) == ([3], [3], 0)
    board.on(finished(3))
    assert (list(board.running), list(board.rungs), board.done) == ([], [], 1)


def test_what_is_no_trial_of_the_budget_is_not_counted() -> None:
    board = board_of(finished(0, counted=False), finished(1), finished(2, state="failed", metrics={}))
    assert board.done == 2


def test_former_runs_have_taken_of_the_hours() -> None:
    clock = Clock()
    board = Board(clock)
    board.on(StudyStarted("mine", DIRECTIONS, 1000, hours=8.0, seconds=7 * 3600.0))
    clock.now += 600
    assert board.seconds_left == pytest.approx(3000)


def test_former_runs_count_but_say_nothing_of_the_pace() -> None:
    clock = Clock()
    board = Board(clock)
    board.on(StudyStarted("mine", DIRECTIONS, 10, earlier=[finished(0), finished(1)]))
    assert board.done == 2
    assert board.seconds_left is None
    clock.now += 50
    board.on(finished(2))
    assert board.seconds_left == pytest.approx(50 * 7)


def test_what_the_teacher_took_says_nothing_of_the_pace() -> None:
    clock = Clock()
    board = board_of(clock=clock)
    clock.now += 500  # it was trained
    board.on(TrialStarted(0, "teacher", baseline="teacher"))
    clock.now += 500  # and measured
    board.on(finished(0, counted=False))
    board.on(TrialStarted(1, "a"))
    clock.now += 50
    board.on(finished(1))
    assert board.seconds_left == pytest.approx(50 * 9)


def test_the_time_limit_cuts_the_estimate() -> None:
    clock = Clock()
    board = board_of(hours=0.5, clock=clock)
    assert board.seconds_left == 1800
    clock.now += 1000
    board.on(finished(0))
    assert board.seconds_left == 800
    clock.now += 5000
    assert board.seconds_left == 0


def test_the_front_holds_feasible_complete_trials_best_first() -> None:
    board = board_of(
        finished(0, 0.80, 2),
        finished(1, 0.90, 9),
        finished(2, 0.79, 3),
        finished(3, 0.99, 1, feasible=False),
        finished(4, 0.99, 1, state="stopped"),
        finished(5, metrics={}),
    )
    assert [event.number for event in board.front()] == [1, 0]


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (TrialStarted(4, "prune(ratio=0.5)"), "trial 4 started: prune(ratio=0.5)"),
        (TrialStarted(1, "teacher", attempt=1, baseline="teacher"), "trial 1 started, attempt 2: teacher"),
        (RungReported(4, 1, {"accuracy": 0.875}), "trial 4 rung 1: accuracy 87.5 %"),
        (RungReported(4, 1, {"accuracy": 0.5}, going_on=False), "trial 4 rung 1: accuracy 50.0 %, stopped"),
        (finished(4), "trial 4 complete after 1 min: accuracy 90.0 %, latency 5.00 ms"),
        (
            finished(4, state="failed", metrics={}, reason="out of memory"),
            "trial 4 failed after 1 min: out of memory",
        ),
        (finished(4, state="infeasible", metrics={}), "trial 4 infeasible after 1 min"),
        (SearchEnded("all 10 trials are done"), "the search ended: all 10 trials are done"),
        (
            StudyStarted("mine", DIRECTIONS, 10, earlier=[finished(0)]),
            "study mine: 10 trials, 1 of them done before",
        ),
    ],
)
def test_every_event_is_one_plain_line(event: progress.Event, line: str) -> None:
    assert progress.sentence(event, DIRECTIONS) == line


def test_without_a_terminal_every_event_is_a_line() -> None:
    stream = io.StringIO()
    with progress.display(stream) as on_event:
        for event in (
            StudyStarted("mine", DIRECTIONS, 10),
            TrialStarted(0, "a"),
            finished(0),
            SearchEnded("the budget of 1 hours is spent"),
        ):
            on_event(event)
    lines = stream.getvalue().splitlines()
    assert lines[:2] == ["study mine: 10 trials", "trial 0 started: a"]
    assert lines[2].startswith("trial 0 complete after 1 min: accuracy 90.0 %, latency 5.00 ms [1/10 trials")
    assert lines[3:] == ["the search ended: the budget of 1 hours is spent"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_finished_trials_stay_above_the_live_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with progress.display(stream) as on_event:
        on_event(StudyStarted("mine", DIRECTIONS, 10))
        on_event(TrialStarted(0, "a[red]"))
        on_event(finished(0))
        on_event(SearchEnded("all 10 trials are done"))
    assert "trial 0 complete after 1 min" in stream.getvalue()
    assert "the search ended: all 10 trials are done" in stream.getvalue()


def test_the_live_picture_shows_what_runs_and_the_front() -> None:
    from rich.console import Console

    board = board_of(finished(0), TrialStarted(1, "a[red]"), RungReported(1, 0, {}), TrialStarted(2, "b"))
    console = Console(file=io.StringIO(), width=100)
    console.print(progress.screen(board))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "1/10 trials · 2 running · front 1" in text
    assert "trial 1: a[red]  (rung 0)" in text
    assert "recipe 0" in text


def test_events_can_be_defined_without_rich_or_numpy() -> None:
    code = "import sys, compress_search.progress; print({'rich', 'numpy', 'torch', 'optuna'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"

"""What a search does when workers, drivers and databases fail: no trial lost, none twice."""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from optuna.trial import TrialState
from sqlalchemy.exc import OperationalError

from compress_search.errors import StorageError, StudyLocked
from compress_search.recipe import Recipe, Step
from compress_search.records import Assignment, Failure, Result, Rung
from compress_search.search import MAX_LOST, Counts
from compress_search.storage import Store
from tests.databases import database
from tests.fake_plan import (
    DEATH,
    after_teacher,
    failed,
    fake_search,
    given,
    measured,
    metrics_of,
    nothing,
    run,
    start,
    states,
    url_of,
)

pytestmark = pytest.mark.usefixtures("migrations_read_once")

# ---- failures ---------------------------------------------------------------------------------------------------


def test_a_process_that_dies_is_tried_again_and_then_failed(tmp_path: Path) -> None:
    search = after_teacher(fake_search(tmp_path, search={"retries": 2}))
    first = given(search.next())
    for retry in (1, 2):
        assert search.died(first.number, retry - 1, DEATH)
        assert search.store.trial("fake", first.number).state == "waiting"
        assert not search.done
        again = given(search.next())
        assert again == replace(first, attempt=retry)
    assert not search.died(first.number, 2, DEATH)
    row = search.store.trial("fake", first.number)
    assert (row.state, row.attempts, row.error) == ("failed", 3, DEATH)
    assert search._optuna.trials()[first.number].state is TrialState.PRUNED
    assert given(search.next()).number != first.number


def test_an_attempt_that_outlasts_its_time_is_tried_once_more(tmp_path: Path) -> None:
    search = after_teacher(fake_search(tmp_path, search={"retries": 5}))
    trial, timeout = given(search.next()), Failure("timeout", "60 minutes")
    assert search.died(trial.number, 0, timeout)
    assert given(search.next()).number == trial.number
    assert not search.died(trial.number, 1, timeout)


def test_without_retries_the_first_death_is_the_last(tmp_path: Path) -> None:
    search = after_teacher(fake_search(tmp_path, search={"retries": 0}))
    assert not search.died(given(search.next()).number, 0, DEATH)


def test_the_death_of_an_attempt_that_is_over_changes_nothing(tmp_path: Path) -> None:
    search = after_teacher(fake_search(tmp_path))
    trial = given(search.next())
    search.died(trial.number, 0, DEATH)
    again = given(search.next())
    assert not search.died(trial.number, 0, DEATH)
    search.finish(measured(again))
    assert not search.died(again.number, again.attempt, DEATH)
    assert not search.died(99, 0, DEATH)
    assert search.store.trial("fake", trial.number).state == "complete"


def test_a_baseline_is_retried_like_any_trial(tmp_path: Path) -> None:
    search = fake_search(tmp_path)
    teacher = given(search.next())
    assert search.died(0, 0, DEATH)
    assert given(search.next()) == replace(teacher, attempt=1)


def test_an_interrupt_takes_everything_back_and_holds_nothing_against_it(tmp_path: Path) -> None:
    search = after_teacher(fake_search(tmp_path, search={"retries": 0}))
    first, second = start(search, 2)
    for _ in range(MAX_LOST + 1):  # interrupts are no deaths, however many
        search.release()
        assert states(search)[-2:] == ["waiting", "waiting"]
        search = fake_search(tmp_path, search={"retries": 0})
        assert search.reconcile(nothing) == Counts()
        assert [a.number for a in start(search, 2)] == [first.number, second.number]
    search.finish(measured(first))
    assert states(search)[first.number] == "complete"


def test_a_driver_that_was_replaced_takes_nothing_back(tmp_path: Path) -> None:
    search = after_teacher(fake_search(tmp_path))
    with search.store.lock("fake"):
        (running,) = start(search, 1)
        assert search.store._lock is not None
        search.store._lock.release()  # as if the database had been away
        with Store(url_of(tmp_path)).lock("fake"):
            for write in (search.release, lambda: search.died(running.number, running.attempt, DEATH)):
                with pytest.raises(StudyLocked, match="was taken over by"):
                    write()
            assert states(search)[-1] == "running"


# ---- a driver that dies -----------------------------------------------------------------------------------------


def test_trials_of_a_dead_driver_are_handed_out_again_unchanged(tmp_path: Path) -> None:
    before = start(after_teacher(fake_search(tmp_path)), 2)
    search = fake_search(tmp_path, search={"sampler": "tpe"})  # another sampler does not change them
    assert search.reconcile(nothing) == Counts(requeued=2)
    assert start(search, 2) == [replace(a, attempt=1) for a in before]


def test_results_left_behind_are_told(tmp_path: Path) -> None:
    first, second = start(after_teacher(fake_search(tmp_path)), 2)
    search = fake_search(tmp_path)
    left = {first.number: measured(first, accuracy=0.75)}
    assert search.reconcile(left.get) == Counts(told=1, requeued=1)
    assert search.store.trial("fake", first.number).metrics["accuracy"] == 0.75
    assert given(search.next()).number == second.number
    assert search.reconcile(left.get) == Counts(requeued=1)


def test_a_result_left_behind_by_an_interrupted_trial_is_told(tmp_path: Path) -> None:
    search = after_teacher(fake_search(tmp_path))
    trial = given(search.next())
    search.release()
    search = fake_search(tmp_path)
    assert search.reconcile({trial.number: measured(trial)}.get) == Counts(told=1)
    assert search.store.trial("fake", trial.number).state == "complete"


def test_a_result_of_a_study_begun_before_in_the_same_place_is_not_taken_for_ours(tmp_path: Path) -> None:
    former = given(fake_search(tmp_path).next())
    for path in tmp_path.glob("study.db*"):
        path.unlink()
    ours = given(fake_search(tmp_path).next())  # the same recipe under the same number
    assert replace(ours, study=former.study) == former
    left = replace(measured(former), measurements={"study": former.study})
    assert fake_search(tmp_path).reconcile({0: left}.get) == Counts(requeued=1)
    left = replace(measured(ours), measurements={"study": ours.study})
    assert fake_search(tmp_path).reconcile({0: left}.get) == Counts(told=1)


def test_a_result_of_an_attempt_that_never_was_is_not_taken_for_ours(tmp_path: Path) -> None:
    trial = given(after_teacher(fake_search(tmp_path)).next())
    search = fake_search(tmp_path)
    stray = replace(measured(trial), measurements={"study": "another"})
    future = replace(measured(trial), attempt=5)
    assert search.reconcile({trial.number: stray}.get) == Counts(requeued=1)
    assert search.reconcile({trial.number: future}.get) == Counts()


def test_a_trial_that_keeps_killing_drivers_is_given_up(tmp_path: Path) -> None:
    trial = given(after_teacher(fake_search(tmp_path)).next())
    for _ in range(MAX_LOST - 1):
        search = fake_search(tmp_path)
        assert search.reconcile(nothing) == Counts(requeued=1)
        assert given(search.next()).number == trial.number
    search = fake_search(tmp_path)
    assert search.reconcile(nothing) == Counts(given_up=1)
    row = search.store.trial("fake", trial.number)
    assert (row.state, row.attempts) == ("failed", MAX_LOST)
    assert row.error == Failure("died", f"the driver died {MAX_LOST} times while this trial ran")
    assert given(search.next()).number != trial.number


def test_a_teacher_that_failed_is_tried_again_before_anything_else(tmp_path: Path) -> None:
    search = fake_search(tmp_path)
    search.finish(failed(given(search.next())))
    for _ in range(2):  # a driver that dies at once changes nothing
        search = fake_search(tmp_path)
        search.reconcile(nothing)
    assert not search.done
    teacher = given(search.next())
    assert (teacher.number, teacher.baseline) == (1, "teacher")
    search.finish(measured(teacher))
    search = fake_search(tmp_path)
    search.reconcile(nothing)
    first = given(search.next())
    assert (first.number, first.baseline, first.reference) == (2, None, metrics_of(teacher))


class DriverKilled(Exception):
    """Stands for a SIGKILL at this point."""


@contextmanager
def killed_at(monkeypatch: pytest.MonkeyPatch, target: Any, name: str) -> Iterator[None]:
    """The driver dies where it would have called this inside the block."""

    def kill(*args: Any, **kwargs: Any) -> None:
        raise DriverKilled

    with monkeypatch.context() as patch:
        patch.setattr(target, name, kill)
        with pytest.raises(DriverKilled):
            yield


@pytest.mark.parametrize("result", [measured, failed, lambda a: Result(a.number, a.attempt, "stopped")])
def test_a_crash_between_the_rows_and_tell_is_told_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, result: Callable[[Assignment], Result]
) -> None:
    search = after_teacher(fake_search(tmp_path))
    trial = given(search.next())
    with killed_at(monkeypatch, optuna.Study, "tell"):
        search.finish(result(trial))
    assert states(search)[trial.number] == "running"
    search = fake_search(tmp_path)
    assert search.reconcile(nothing) == Counts(told=1)  # even where no file is left behind
    assert states(search)[trial.number] == result(trial).state
    assert given(search.next()).number == trial.number + 1


def test_a_crash_between_the_teachers_rows_and_tell_still_freezes_the_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = fake_search(tmp_path)
    teacher = given(search.next())
    with killed_at(monkeypatch, search._teller, "tell"):
        search.finish(measured(teacher))
    search = fake_search(tmp_path)
    search.reconcile(nothing)
    assert given(search.next()).reference == metrics_of(teacher)


@pytest.mark.parametrize("point", ["propose", "begin_attempt"])
def test_a_crash_between_ask_and_the_first_row_loses_no_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    search = after_teacher(fake_search(tmp_path))
    target = type(search.plan) if point == "propose" else search.store
    with killed_at(monkeypatch, target, point):
        search.next()
    search = fake_search(tmp_path)
    assert search.reconcile(nothing) == Counts(requeued=1)
    trial = given(search.next())
    assert (trial.number, trial.attempt) == (1, 0)
    search.finish(measured(trial))
    run(search)
    assert set(states(search)) <= {"complete", "duplicate"}


def test_a_crash_while_a_baseline_is_handed_out_leaves_it_trial_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = fake_search(tmp_path)
    with killed_at(monkeypatch, search.store, "begin_attempt"):
        search.next()
    search = fake_search(tmp_path)
    search.reconcile(nothing)
    teacher = given(search.next())
    assert (teacher.number, teacher.baseline) == (0, "teacher")


def test_a_crash_before_a_duplicate_is_told_is_made_up_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = after_teacher(fake_search(tmp_path, methods=("quantize",)))
    for _ in range(2):
        search.finish(measured(given(search.next())))
    with killed_at(monkeypatch, search._optuna, "tell"):
        search.next()
    search = fake_search(tmp_path, methods=("quantize",))
    assert search.reconcile(nothing) == Counts(told=1)
    assert states(search)[-1] == "duplicate"


def test_a_crash_before_samplers_learn_of_a_baseline_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    int8 = Recipe((Step.of("quantize", {"bits": 8}),))
    options = {"search": {"sampler": "auto"}, "options": {"baselines": [("int8", int8)]}}
    search = after_teacher(after_teacher(fake_search(tmp_path, **options)))
    with killed_at(monkeypatch, search._optuna, "tell"):
        search.next()
    search = fake_search(tmp_path, **options)
    assert search.reconcile(nothing) == Counts(told=1)
    trial = search._optuna.trials()[2]
    assert (trial.state, trial.user_attrs["duplicate_of"]) == (TrialState.COMPLETE, 1)


def test_an_ask_whose_answer_was_lost_is_handed_out_by_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = after_teacher(fake_search(tmp_path))
    search._optuna._study.ask()  # reached the database; the connection broke before its answer came
    trial = given(search.next())
    assert trial.number == 1
    search.finish(measured(trial))
    assert states(search) == ["complete", "complete"]


def test_a_locked_database_is_waited_for_while_searching(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    search = after_teacher(fake_search(tmp_path, store={"patience": 60, "sleep": pauses.append}))
    real, failures = optuna.Study.ask, iter([1, 2])

    def ask(study: optuna.Study, *args: Any) -> optuna.Trial:
        if next(failures, None):
            raise OperationalError("", {}, sqlite3.OperationalError("database is locked"))
        return real(study, *args)

    monkeypatch.setattr(optuna.Study, "ask", ask)
    assert given(search.next()).number == 1
    assert pauses == [0.1, 0.2]


def test_a_full_disk_ends_the_run_and_loses_nothing_that_was_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = after_teacher(fake_search(tmp_path, store={"patience": 60}))
    trial = given(search.next())

    def full(*args: Any, **kwargs: Any) -> None:
        raise OperationalError("", {}, sqlite3.OperationalError("database or disk is full"))

    with monkeypatch.context() as patch:
        patch.setattr(optuna.Study, "tell", full)
        with pytest.raises(StorageError, match="disk is full"):
            search.finish(measured(trial))
    search = fake_search(tmp_path)
    search.reconcile(nothing)
    assert states(search) == ["complete", "complete"]


def test_a_study_whose_optuna_part_was_deleted_is_refused(tmp_path: Path) -> None:
    search = after_teacher(fake_search(tmp_path))
    optuna.delete_study(study_name="fake", storage=search.store._optuna_storage())
    with pytest.raises(StorageError, match="Optuna's study 'fake' was deleted, its results were not"):
        fake_search(tmp_path)


# ---- any order of events ----------------------------------------------------------------------------------------

TRIALS = 5
OUTCOMES: dict[str, Callable[[Assignment], Result]] = {
    "complete": measured,
    "failed": failed,
    "stopped": lambda a: Result(a.number, a.attempt, "stopped", metrics={"accuracy": 0.5}),
    "infeasible": lambda a: Result(a.number, a.attempt, "infeasible", metrics={"size_mb": 90.0}),
}


ENDS: set[str] = set()
"""What trials came to in the lives drawn last, before the rest of each was run."""


class Life(RuleBasedStateMachine):
    """A study whose workers and drivers die at any moment, and what must hold all the same."""

    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory()
        self.out: list[Assignment] = []
        self.past: list[Assignment] = []
        self.files: dict[int, Result] = {}
        self.recipes: dict[int, str] = {}
        self.told: dict[int, tuple[str, Any]] = {}
        self.openings = 0  # in a row
        self.open()

    def open(self) -> None:
        self.search = fake_search(Path(self._folder.name), search={"trials": TRIALS, "retries": 1})
        self.search.reconcile(self.files.get)
        self.past, self.out = self.past + self.out, []
        self.openings += 1

    @rule(workers=st.integers(1, 3))
    def hand_out(self, workers: int) -> None:
        self.openings = 0
        for assignment in filter(None, (self.search.next() for _ in range(workers))):
            assert self.recipes.setdefault(assignment.number, assignment.recipe.key) == assignment.recipe.key
            assert assignment.number not in {other.number for other in self.out}
            assert assignment.number not in self.told
            self.out.append(assignment)

    @precondition(lambda self: self.out)
    @rule(data=st.data(), outcome=st.sampled_from(sorted(OUTCOMES)), heard=st.booleans())
    def come_back(self, data: st.DataObject, outcome: str, heard: bool) -> None:
        """A worker ends and leaves its file; the driver may die before it hears of that."""
        assignment = self.out.pop(data.draw(st.integers(0, len(self.out) - 1)))
        self.past.append(assignment)
        self.files[assignment.number] = OUTCOMES[outcome](assignment)
        if heard:
            self.search.finish(self.files[assignment.number])
        else:
            self.open()
        assert self.row(assignment.number) == outcome

    @precondition(lambda self: self.past)
    @rule(data=st.data(), outcome=st.sampled_from(sorted(OUTCOMES)))
    def come_back_late(self, data: st.DataObject, outcome: str) -> None:
        self.openings = 0
        self.search.finish(OUTCOMES[outcome](data.draw(st.sampled_from(self.past))))
        self.out = [a for a in self.out if self.row(a.number) == "running"]

    @precondition(lambda self: self.out)
    @rule(data=st.data(), index=st.integers(0, 1), accuracy=st.floats(0, 1))
    def report(self, data: st.DataObject, index: int, accuracy: float) -> None:
        assignment = data.draw(st.sampled_from(self.out))
        rung = Rung(assignment.number, assignment.attempt, index, {"accuracy": accuracy, "latency_ms": 1.0})
        assert self.search.report(rung) == self.search.report(rung)

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def worker_dies(self, data: st.DataObject) -> None:
        assignment = self.out.pop(data.draw(st.integers(0, len(self.out) - 1)))
        self.past.append(assignment)
        again = self.search.died(assignment.number, assignment.attempt, DEATH)
        assert self.row(assignment.number) == ("waiting" if again else "failed")

    @precondition(lambda self: self.openings < 2)  # more of them in a row have nothing new to meet
    @rule(interrupted=st.booleans())
    def driver_ends(self, interrupted: bool) -> None:
        """It is killed, or what it has handed out is taken back first."""
        if interrupted:
            self.search.release()
            assert "running" not in states(self.search)
        self.open()

    @precondition(lambda self: self.out)
    @rule(data=st.data(), outcome=st.sampled_from(sorted(OUTCOMES)))
    def driver_dies_before_it_tells(self, data: st.DataObject, outcome: str) -> None:
        assignment = self.out.pop(data.draw(st.integers(0, len(self.out) - 1)))
        self.past.append(assignment)
        with pytest.MonkeyPatch.context() as patch, killed_at(patch, optuna.Study, "tell"):
            self.search.finish(OUTCOMES[outcome](assignment))
        self.open()
        assert self.row(assignment.number) == outcome

    def row(self, number: int) -> str:
        return str(self.search.store.trial("fake", number).state)

    @invariant()
    def no_trial_is_lost_or_twice_or_told_again(self) -> None:
        rows = self.search.store.trials("fake")
        assert [row.number for row in rows] == list(range(len(rows)))
        for row in rows:
            if row.recipe and row.number in self.recipes:
                assert row.recipe.key == self.recipes[row.number]
            if row.state not in ("running", "waiting"):
                end = (row.state, dict(row.metrics))
                assert self.told.setdefault(row.number, end) == end
        tried = [row.recipe.key for row in rows if row.recipe and not row.baseline and row.state != "duplicate"]
        assert len(tried) == len(set(tried))
        # a failed teacher is put in again before it has an attempt that says what it is
        asked = [row for row in rows if row.attempts]
        counted = [row for row in asked if not row.baseline and row.state not in ("duplicate", "infeasible")]
        assert len(counted) <= TRIALS
        assert {row.number for row in rows if row.state == "running"} == {a.number for a in self.out}

    def teardown(self) -> None:
        """However it went, the study comes to its end and everything handed out has come to one."""
        ENDS.update(state for state, _ in self.told.values())
        self.open()
        run(self.search)
        assert self.search.done
        assert not {"running", "waiting"} & set(states(self.search))
        assert set(self.recipes) <= set(range(len(states(self.search))))
        self._folder.cleanup()


def live(examples: int, steps: int) -> set[str]:
    """Draw lives of a study, whose invariants and teardown assert; the ends that trials came to in them."""
    ENDS.clear()
    quiet = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    run_state_machine_as_test(Life, settings=quiet)  # type: ignore[no-untyped-call]
    return set(ENDS)


def test_no_order_of_events_loses_or_doubles_a_trial() -> None:
    assert "complete" in live(examples=2, steps=12), "otherwise nothing happened"


@pytest.mark.slow
def test_no_order_of_many_events_loses_or_doubles_a_trial() -> None:
    assert {"complete", "failed", "infeasible", "stopped"} <= live(examples=6, steps=20)


# ---- PostgreSQL -------------------------------------------------------------------------------------------------


@pytest.fixture
def postgres_url(tmp_path: Path) -> Iterator[str]:
    with database("postgresql", tmp_path) as url:
        yield url


def test_a_search_on_postgresql_survives_its_driver(tmp_path: Path, postgres_url: str) -> None:
    search = after_teacher(fake_search(tmp_path, postgres_url, search={"trials": 5}))
    first, second, third = start(search, 3)
    search.finish(measured(first))
    search.report(Rung(second.number, 0, 0, metrics_of(second)))
    search = fake_search(tmp_path, postgres_url, search={"trials": 5})
    assert search.reconcile({third.number: measured(third)}.get) == Counts(told=1, requeued=1)
    assert given(search.next()) == replace(second, attempt=1)
    search.finish(failed(second))
    run(search)
    found = states(search)
    assert (found.count("complete"), found.count("failed")) == (5, 1)
    assert len(search._rungs.table) == 1

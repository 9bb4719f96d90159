from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from compress_search.errors import StudyError
from compress_search.recipe import Recipe, Step
from compress_search.records import Assignment, Failure, Result, Rung
from compress_search.search import REASKS, Search
from compress_search.search.early_stop import Rungs
from compress_search.search.identity import differences
from compress_search.search.ledger import HOPELESS, REJECTED_PER_TRIAL, Ledger
from compress_search.search.samplers import RANDOM_TRIALS
from compress_search.storage import LastAttempt
from tests.fake_plan import (
    DEATH,
    FAILURE,
    after_teacher,
    failed,
    fake_search,
    fake_store,
    given,
    measured,
    metrics_of,
    nothing,
    run,
    start,
    states,
)

pytestmark = pytest.mark.usefixtures("migrations_read_once")

INT8 = Recipe((Step.of("quantize", {"bits": 8}),))


# ---- proposals --------------------------------------------------------------------------------------------------


def test_a_search_runs_its_budget_and_knows_why_it_ends(tmp_path: Path) -> None:
    search = fake_search(tmp_path, search={"trials": 6})
    assert not search.done
    handed = run(search)
    assert search.done
    assert search.next() is None
    assert search.reason == "all 6 trials are done"
    rows = search.store.trials("fake")
    assert [row.number for row in rows] == list(range(len(rows)))
    assert sum(row.state == "complete" for row in rows) == 7  # the teacher and six trials
    keys = [assignment.recipe.key for assignment in handed]
    assert len(set(keys[1:])) == 6


def test_trial_0_is_the_teacher_and_everything_waits_for_the_baselines(tmp_path: Path) -> None:
    search = fake_search(tmp_path, options={"baselines": [("int8", INT8)]})
    teacher = given(search.next())
    assert (teacher.number, teacher.baseline, teacher.recipe, teacher.reference) == (0, "teacher", Recipe(), {})
    assert search.next() is None  # the other baselines are compared with it too
    assert not search.done
    search.finish(measured(teacher))
    int8 = given(search.next())
    assert (int8.number, int8.baseline, int8.recipe) == (1, "int8", INT8)
    assert int8.reference == metrics_of(teacher)
    assert search.next() is None
    search.finish(failed(int8))  # a baseline that fails does not end the search
    first = given(search.next())
    assert (first.number, first.baseline) == (2, None)
    assert first.reference == metrics_of(teacher)


def test_a_teacher_among_the_baselines_is_not_run_twice(tmp_path: Path) -> None:
    search = fake_search(tmp_path, options={"baselines": [("fp32", Recipe()), ("int8", INT8)]})
    assert [name for name, _ in search.baselines] == ["fp32", "int8"]


def test_baselines_stay_out_of_samplers_sight_and_out_of_the_budget(tmp_path: Path) -> None:
    search = fake_search(tmp_path, search={"trials": 2}, options={"baselines": [("int8", INT8)]})
    run(search)
    told = [trial.state for trial in search._optuna.trials()]
    assert told[:2] == [TrialState.FAIL, TrialState.FAIL]
    rows = search.store.trials("fake")
    assert [row.state for row in rows[:2]] == ["complete", "complete"]
    assert sum(row.state == "complete" for row in rows) == 4
    # and so the space that a Gaussian process is fitted on is not empty
    study = search._optuna._study
    assert optuna.search_space.intersection_search_space(study.get_trials(deepcopy=False))


def test_a_search_hands_out_the_same_trials_whether_or_not_it_is_interrupted(tmp_path: Path) -> None:
    def handed(folder: Path, interrupt: bool) -> list[tuple[str, int]]:
        folder.mkdir()
        found = []
        search = fake_search(folder, search={"sampler": "tpe", "trials": 5})
        while not search.done:
            assignment = given(search.next())
            if interrupt and assignment.attempt == 0 and assignment.number % 2:
                if assignment.number % 3:
                    search.release()
                search = fake_search(folder, search={"sampler": "tpe", "trials": 5})
                search.reconcile(nothing)
                continue
            found.append((assignment.recipe.key, assignment.seed))
            search.finish(measured(assignment))
        return found

    assert handed(tmp_path / "cut", interrupt=True) == handed(tmp_path / "whole", interrupt=False)


def test_auto_tries_the_starting_points_then_random_recipes(tmp_path: Path) -> None:
    search = fake_search(tmp_path, search={"sampler": "auto", "trials": 6})
    handed = run(search)[1:]
    points = search.plan.starting_points()
    starting = [trial for trial in search._optuna.trials() if "start" in trial.user_attrs]
    assert [trial.user_attrs["start"] for trial in starting] == list(range(len(points)))
    assert [trial.params for trial in starting] == points
    assert len(handed) == 6
    assert len(points) < 6 <= len(points) + RANDOM_TRIALS


def test_other_samplers_have_no_starting_points(tmp_path: Path) -> None:
    search = fake_search(tmp_path, search={"sampler": "random", "trials": 3})
    run(search)
    assert not any("start" in trial.user_attrs for trial in search._optuna.trials())


def test_the_gaussian_process_proposes_from_what_was_told(tmp_path: Path) -> None:
    search = fake_search(tmp_path, search={"sampler": "gp", "trials": 7}, constraints={"size_mb": "<= 50"})
    assert len(run(search)) == 8


def test_a_recipe_is_never_tried_twice(tmp_path: Path) -> None:
    search = after_teacher(fake_search(tmp_path, methods=("quantize",), search={"trials": 50}))
    first, second = (given(search.next()) for _ in range(2))  # both at once: nothing has come back
    assert {str(a.recipe) for a in (first, second)} == {"quantize(bits=4)", "quantize(bits=8)"}
    search.finish(failed(first))
    search.finish(Result(second.number, 0, "infeasible", metrics={"size_mb": 99.0}))
    assert search.next() is None


def test_constraints_that_every_recipe_breaks_are_taken_for_impossible(tmp_path: Path) -> None:
    search = after_teacher(fake_search(tmp_path, search={"trials": 1000}))
    while assignment := search.next():
        search.finish(Result(assignment.number, assignment.attempt, "infeasible", metrics={"size_mb": 99.0}))
    assert search.done
    assert states(search).count("infeasible") == HOPELESS


def test_a_finite_space_is_exhausted_before_the_budget(tmp_path: Path) -> None:
    search = fake_search(tmp_path, methods=("quantize",), search={"trials": 50})
    handed = run(search)
    assert [str(a.recipe) for a in handed].count("teacher") == 1  # to do nothing is no trial
    assert {str(a.recipe) for a in handed} == {"teacher", "quantize(bits=4)", "quantize(bits=8)"}
    assert search.done
    assert search.reason == "every recipe of the space has been tried"
    assert states(search).count("complete") == 3
    rows = len(states(search))
    assert rows <= 3 + 3 * REASKS
    # a later session finds that out again without new rows
    again = fake_search(tmp_path, methods=("quantize",), search={"trials": 50})
    again.reconcile(nothing)
    assert run(again) == []
    assert again.done
    assert len(states(again)) == rows


def test_a_duplicate_is_told_as_such_and_names_its_twin(tmp_path: Path) -> None:
    search = fake_search(tmp_path, methods=("quantize",), search={"trials": 50})
    run(search)
    twins = {row.number: row for row in search.store.trials("fake")}
    trials = search._optuna.trials()
    duplicates = [row for row in twins.values() if row.state == "duplicate"]
    assert duplicates
    for row in duplicates:
        told = trials[row.number]
        assert told.state is TrialState.PRUNED
        assert twins[told.user_attrs["duplicate_of"]].recipe == row.recipe


class StuckSampler(optuna.samplers.RandomSampler):
    """Proposes what it proposed first, for ever."""

    def __init__(self, seed: int, size: int) -> None:
        super().__init__(seed=0)


def test_a_sampler_that_repeats_itself_is_helped_by_neighbours_of_its_proposal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress_search.search.make_sampler", lambda kind, seed, size: StuckSampler(seed, size))
    search = after_teacher(fake_search(tmp_path, search={"trials": 8, "sampler": "tpe"}))
    run(search)
    trials = search._optuna.trials()
    proposed = next(trial.params for trial in trials if trial.params)
    drawn = [trial.params for trial in trials if trial.user_attrs.get("drawn")]
    assert len(drawn) == 7, "the stuck sampler came up with one recipe"
    kept = [sum(near.get(name) == value for name, value in proposed.items()) / len(proposed) for near in drawn]
    assert sum(kept) / len(kept) > 0.5, "drawn anywhere they would agree in few parameters"


def test_the_recipe_of_a_baseline_costs_no_trial_and_samplers_learn_its_values(tmp_path: Path) -> None:
    search = fake_search(tmp_path, search={"sampler": "auto", "trials": 3}, options={"baselines": [("int8", INT8)]})
    assert search.plan.at_defaults({"quantize"})[0] == INT8, "the first starting point"
    handed = run(search)
    assert [a.recipe for a in handed].count(INT8) == 1
    assert len(handed) == 2 + 3
    told = search._optuna.trials()[2]
    assert told.user_attrs["state"] == states(search)[2] == "duplicate"
    assert told.user_attrs["duplicate_of"] == 1
    assert (told.state, told.params["precision"]) == (TrialState.COMPLETE, "quantize")
    assert told.values == [metrics_of(handed[1])[name] for name in ("accuracy", "latency_ms")]
    assert told.constraints == {"ran": -1.0}


def test_a_baseline_that_failed_is_told_as_a_failure_and_once_only(tmp_path: Path) -> None:
    options = {"baselines": [("int8", INT8)]}
    search = after_teacher(fake_search(tmp_path, methods=("quantize",), options=options, search={"trials": 50}))
    search.finish(failed(given(search.next())))
    assert [str(a.recipe) for a in run(search)] == ["quantize(bits=4)"]
    twins = [trial for trial in search._optuna.trials() if trial.user_attrs.get("duplicate_of") == 1]
    assert {trial.state for trial in twins} == {TrialState.PRUNED}
    assert [trial.constraints for trial in twins] == [{"ran": 1.0}, *[{}] * (len(twins) - 1)]


def test_starting_points_that_are_no_trials_do_not_bring_the_next_sampler_forward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def note(kind: str, seed: int, size: int) -> optuna.samplers.BaseSampler:
        sizes.append(size)
        return optuna.samplers.RandomSampler(seed)

    monkeypatch.setattr("compress_search.search.make_sampler", note)
    run(fake_search(tmp_path, search={"sampler": "auto", "trials": 6}, options={"baselines": [("int8", INT8)]}))
    assert min(sizes) == 0
    assert max(sizes) > 0


# ---- telling ----------------------------------------------------------------------------------------------------


def test_objectives_and_constraints_are_told_to_optuna(tmp_path: Path) -> None:
    search = after_teacher(fake_search(tmp_path, constraints={"size_mb": "<= 40", "latency_ms": "<= 50"}))
    assignment = given(search.next())
    search.finish(measured(assignment, accuracy=0.75, latency_ms=25.0, size_mb=60.0))
    trial = search._optuna.trials()[assignment.number]
    assert trial.values == [0.75, 25.0]
    assert trial.constraints == {"size_mb": pytest.approx(0.5), "latency_ms": pytest.approx(-0.5), "ran": -1.0}
    assert trial.user_attrs["state"] == "complete"
    assert trial.user_attrs["size_mb"] == 60.0
    directions = [direction.name.lower() for direction in search._optuna._study.directions]
    assert directions == list(search.plan.study.directions.values())


@pytest.mark.parametrize(
    ("result", "state", "ran"),
    [
        (lambda a: failed(a), "failed", 1.0),
        (lambda a: Result(a.number, a.attempt, "stopped", metrics={"accuracy": 0.5}), "stopped", -1.0),
        (lambda a: Result(a.number, a.attempt, "infeasible", metrics={"size_mb": 80.0}), "infeasible", -1.0),
    ],
)
def test_all_other_ends_are_pruned_and_the_attempt_says_which(
    tmp_path: Path, result: Callable[[Assignment], Result], state: str, ran: float
) -> None:
    search = after_teacher(fake_search(tmp_path, constraints={"size_mb": "<= 40"}))
    assignment = given(search.next())
    search.finish(result(assignment))
    trial = search._optuna.trials()[assignment.number]
    assert trial.state is TrialState.PRUNED
    assert trial.constraints["ran"] == ran
    assert ("size_mb" in trial.constraints) == (state == "infeasible")
    row = search.store.trial("fake", assignment.number)
    assert row.state == state
    assert row.error == (FAILURE if state == "failed" else None)
    if state == "failed":
        assert trial.user_attrs["error"] == "ValueError: no such layer"


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"accuracy": math.nan}, "accuracy is nan"),
        ({"latency_ms": math.inf}, "latency_ms is inf"),
        ({"size_mb": math.nan, "accuracy": -math.inf}, "accuracy is -inf, size_mb is nan"),
    ],
)
def test_a_result_without_a_number_for_everything_asked_for_is_a_failure(
    tmp_path: Path, metrics: dict[str, float], message: str
) -> None:
    search = after_teacher(fake_search(tmp_path, constraints={"size_mb": "<= 40"}))
    assignment = given(search.next())
    search.finish(measured(assignment, **metrics))
    row = search.store.trial("fake", assignment.number)
    assert (row.state, row.error) == ("failed", Failure("nan", message))


def test_a_missing_objective_is_a_failure_too(tmp_path: Path) -> None:
    search = after_teacher(fake_search(tmp_path))
    assignment = given(search.next())
    search.finish(Result(assignment.number, 0, "complete", metrics={"accuracy": 0.5}))
    assert given_error(search, assignment) == Failure("nan", "latency_ms is missing")


def given_error(search: Search, assignment: Assignment) -> Failure | None:
    return search.store.trial("fake", assignment.number).error


def test_the_first_result_of_a_trial_stands(tmp_path: Path) -> None:
    search = after_teacher(fake_search(tmp_path))
    assignment = given(search.next())
    search.finish(measured(assignment, accuracy=0.75))
    search.finish(measured(assignment, accuracy=0.25))
    search.finish(failed(assignment))
    row = search.store.trial("fake", assignment.number)
    assert (row.state, row.metrics["accuracy"]) == ("complete", 0.75)


def test_a_late_result_of_an_older_attempt_is_accepted_once(tmp_path: Path) -> None:
    search = after_teacher(fake_search(tmp_path))
    old = given(search.next())
    assert search.died(old.number, old.attempt, DEATH)
    new = given(search.next())
    assert (new.number, new.attempt, new.recipe) == (old.number, 1, old.recipe)
    search.finish(measured(old, accuracy=0.75))
    assert not search.report(Rung(new.number, 1, 0, metrics_of(new)))  # nothing is left to do for the new one
    search.finish(measured(new, accuracy=0.25))
    row = search.store.trial("fake", old.number)
    assert (row.state, row.metrics["accuracy"], row.attempts) == ("complete", 0.75, 2)


def test_a_result_nobody_was_asked_for_is_refused(tmp_path: Path) -> None:
    search = after_teacher(fake_search(tmp_path))
    assignment = given(search.next())
    for stray in (replace(measured(assignment), number=99), replace(measured(assignment), attempt=1)):
        with pytest.raises(ValueError, match="was never handed out"):
            search.finish(stray)


def test_the_teachers_metrics_are_frozen_in_the_study(tmp_path: Path) -> None:
    search = fake_search(tmp_path, options={"baselines": [("again", Recipe())]})
    teacher = given(search.next())
    search.finish(measured(teacher, latency_ms=12.5))
    assert given(search.next()).reference["latency_ms"] == 12.5
    resumed = fake_search(tmp_path, options={"baselines": [("again", Recipe())]})
    assert resumed.reference["latency_ms"] == 12.5
    assert resumed.store.study("fake").reference == {"metrics": resumed.reference}


def test_a_known_reference_is_used_as_it_is(tmp_path: Path) -> None:
    search = fake_search(tmp_path, options={"reference": {"latency_ms": 3.0}})
    assert given(search.next()).reference == {"latency_ms": 3.0}


# ---- budget -----------------------------------------------------------------------------------------------------


def test_failed_and_stopped_trials_count_and_rejected_ones_do_not(tmp_path: Path) -> None:
    search = after_teacher(fake_search(tmp_path, search={"trials": 3}))
    search.finish(failed(given(search.next())))
    for _ in range(2):
        rejected = given(search.next())
        search.finish(Result(rejected.number, 0, "infeasible"))
    stopped = given(search.next())
    search.finish(Result(stopped.number, 0, "stopped"))
    assert not search.done
    last = given(search.next())
    assert search.next() is None  # the one that runs is the third
    search.finish(measured(last))
    assert search.done


def attempt(number: int, state: str, **changes: Any) -> LastAttempt:
    return replace(LastAttempt(number, 0, state, Recipe(), str(number), None), **changes)


def test_recipes_rejected_by_their_shapes_are_limited() -> None:
    rejected = {number: attempt(number, "infeasible") for number in range(2 * REJECTED_PER_TRIAL)}
    assert Ledger(rejected).spent(2) == "20 recipes were rejected by their shapes"
    del rejected[0]
    assert Ledger(rejected).spent(2) is None


def test_hours_are_summed_over_sessions(tmp_path: Path) -> None:
    now = [0.0]
    options = {"clock": lambda: now[0]}
    search = after_teacher(fake_search(tmp_path, search={"hours": 1.0}, options=options))
    first = given(search.next())
    now[0] = 3000.0
    search.finish(measured(first))
    assert not search.done
    now[0] = 9000.0  # between sessions
    search = fake_search(tmp_path, search={"hours": 1.0}, options=options)
    running = given(search.next())
    now[0] = 9601.0
    assert search.next() is None
    assert not search.done  # what runs may come to its end
    search.finish(measured(running))
    assert search.done
    assert search.reason == "the budget of 1 hours is spent"
    assert search.store.study("fake").seconds == pytest.approx(3601.0)


def test_more_trials_may_be_asked_for_later(tmp_path: Path) -> None:
    run(fake_search(tmp_path, search={"trials": 2}))
    more = fake_search(tmp_path, search={"trials": 4, "sampler": "tpe", "concurrency": 3})
    more.reconcile(nothing)
    assert len(run(more)) == 2


def test_asking_again_while_all_is_out_costs_no_query(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = fake_search(tmp_path)
    teacher = given(search.next())
    assert search.next() is None

    def fail(*args: Any) -> None:
        raise AssertionError

    with monkeypatch.context() as patch:
        patch.setattr(search.store, "_run", fail)
        assert search.next() is None
        assert not search.done
    search.finish(measured(teacher))
    assert search.next() is not None


# ---- early stopping ---------------------------------------------------------------------------------------------


def test_a_trial_behind_its_peers_is_stopped_and_the_decision_is_kept(tmp_path: Path) -> None:
    search = after_teacher(fake_search(tmp_path, methods=("prune", "quantize"), search={"trials": 20}))
    trials = start(search, 4)
    good = [Rung(a.number, 0, 0, {"accuracy": 0.9, "latency_ms": 5.0}) for a in trials[:3]]
    assert [search.report(rung) for rung in good] == [True, True, True]
    behind = Rung(trials[3].number, 0, 0, {"accuracy": 0.5, "latency_ms": 9.0})
    assert not search.report(behind)
    assert not search.report(replace(behind, metrics={"accuracy": 1.0, "latency_ms": 1.0}))  # a replay
    resumed = fake_search(tmp_path, methods=("prune", "quantize"), search={"trials": 20})
    assert resumed._rungs == search._rungs
    assert [rung.kept for rung in resumed.store.rungs("fake")] == [True, True, True, False]


def test_students_of_different_kinds_are_not_compared(tmp_path: Path) -> None:
    search = after_teacher(fake_search(tmp_path, search={"trials": 30}))
    trials = start(search, 16)
    with_student = [a for a in trials if "student" in a.recipe.methods]
    without = [a for a in trials if "student" not in a.recipe.methods]
    for trial in with_student[:3]:
        assert search.report(Rung(trial.number, 0, 0, {"accuracy": 0.9, "latency_ms": 5.0}))
    worse = {"accuracy": 0.1, "latency_ms": 50.0}
    assert search.report(Rung(without[0].number, 0, 0, worse))
    assert not search.report(Rung(with_student[3].number, 0, 0, worse))
    assert {rung.group for rung in search.store.rungs("fake")} == {"student", ""}


def test_values_after_other_parts_of_the_training_stop_nobody(tmp_path: Path) -> None:
    search = after_teacher(fake_search(tmp_path, methods=("prune",), search={"trials": 20}))
    trials = start(search, 5)
    for trial in trials[:3]:
        assert search.report(Rung(trial.number, 0, 3, {"accuracy": 0.9, "latency_ms": 5.0}))
    worse = {"accuracy": 0.1, "latency_ms": 50.0}
    resumed = fake_search(tmp_path, methods=("prune",), search={"trials": 20})
    assert resumed.report(Rung(trials[3].number, 0, 1, worse))
    assert not resumed.report(Rung(trials[4].number, 0, 3, worse))


def test_a_retried_trial_gets_the_decisions_it_had(tmp_path: Path) -> None:
    search = after_teacher(fake_search(tmp_path, methods=("prune",), search={"trials": 20}))
    trials = start(search, 4)
    poor = Rung(trials[0].number, 0, 0, {"accuracy": 0.1, "latency_ms": 90.0})
    assert search.report(poor)  # the first of its rung
    for other in trials[1:]:
        search.report(Rung(other.number, 0, 0, {"accuracy": 0.9, "latency_ms": 5.0}))
    search.died(trials[0].number, 0, DEATH)
    again = given(search.next())
    assert search.report(replace(poor, attempt=again.attempt))
    assert not search.report(poor)  # the dead attempt is not heard


def test_a_limit_on_the_shape_missed_for_good_stops_at_once(tmp_path: Path) -> None:
    search = after_teacher(fake_search(tmp_path, constraints={"size_mb": "<= 40", "accuracy": ">= 0.8"}))
    near, far, weak = start(search, 3)
    metrics = {"accuracy": 0.9, "latency_ms": 1.0, "size_mb": 43.9}
    assert search.report(Rung(near.number, 0, 0, metrics))  # within what provisional shapes may be off
    assert not search.report(Rung(far.number, 0, 0, metrics | {"size_mb": 44.1}))
    assert search.report(
        Rung(weak.number, 0, 0, metrics | {"accuracy": 0.1, "size_mb": 30.0})
    )  # it may still learn


def test_numbers_that_are_not_finite_stop_a_trial(tmp_path: Path) -> None:
    search = after_teacher(fake_search(tmp_path))
    trial = given(search.next())
    assert not search.report(Rung(trial.number, 0, 0, {"accuracy": math.nan, "latency_ms": 1.0}))
    vector = fake_search(tmp_path)._rungs.table["student" if "student" in trial.recipe.methods else "", 0]
    assert math.isnan(vector[trial.number].vector[0])


def test_early_stopping_can_be_off(tmp_path: Path) -> None:
    search = after_teacher(fake_search(tmp_path, search={"early_stop": "none", "trials": 20}))
    for number, trial in enumerate(start(search, 5)):
        assert search.report(Rung(trial.number, 0, 0, {"accuracy": 0.9 - number / 10, "latency_ms": number}))
    assert len(search.store.rungs("fake")) == 5


def test_baselines_are_never_stopped(tmp_path: Path) -> None:
    search = fake_search(tmp_path)
    teacher = given(search.next())
    assert search.report(Rung(teacher.number, 0, 0, {"accuracy": math.nan}))
    assert search._rungs == Rungs()


# ---- a study that changed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"training": {"epochs": 5.0}}, "training.epochs was 3.0, is 5.0"),
        ({"constraints": {"size_mb": "<= 40"}}, 'constraints.size_mb was not there, is "<= 40"'),
        ({"search": {"seed": 1}}, "search.seed was 0, is 1"),
        ({"methods": ("prune",)}, "space.dims.quantize.bits"),
    ],
)
def test_a_study_that_is_another_one_is_refused(tmp_path: Path, changes: dict[str, Any], key: str) -> None:
    fake_search(tmp_path)
    with pytest.raises(StudyError) as caught:
        fake_search(tmp_path, **changes)
    assert key in str(caught.value)
    assert str(caught.value).startswith("study.yaml:1: ")
    assert fake_store(tmp_path).study("fake").definition["training"] == {"epochs": 3.0}


def test_what_a_later_version_knows_besides_counts_where_it_is_not_the_default(tmp_path: Path) -> None:
    fake_search(tmp_path)
    stored = fake_store(tmp_path).study("fake").identity
    later = {**stored, "training": {**stored["training"], "precision": "fp32"}}
    assert differences(stored, later, written={}) == {}
    written = {"training": {"precision": "bf16"}}
    later["training"]["precision"] = "bf16"
    assert differences(stored, later, written) == {"training.precision": (None, "bf16")}


def test_files_are_compared_by_what_they_hold(tmp_path: Path) -> None:
    def opened(contents: dict[str, str] | None, folder: str = "data") -> Search:
        data = {"train": str(tmp_path / folder / "train.jsonl")}
        return fake_search(tmp_path, data=data, options={"contents": contents})

    opened(None)  # as before contents were stored
    opened({"data.train": "a"})
    opened({"data.train": "a"}, "elsewhere")
    with pytest.raises(StudyError) as caught:
        opened({"data.train": "b"}, "elsewhere")
    file = tmp_path / "elsewhere" / "train.jsonl"
    assert str(caught.value) == (
        f"study.yaml:1: data.train: {file} was changed after this study was begun: "
        "restore it, or name another output and study"
    )
    with pytest.raises(StudyError, match=r"begun otherwise \(data.train was"):
        opened({"data.train": "b"})


def test_other_objectives_are_always_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = fake_search(tmp_path)
    study = search.plan.study
    study.directions["size_mb"] = "minimize"  # type: ignore[index]
    with pytest.raises(StudyError, match=r'objectives\.size_mb was not there, is "minimize"'):
        Search.open(search.plan, search.store)


def test_a_study_may_be_moved_with_its_data(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    after_teacher(fake_search(old))
    old.rename(new)
    assert fake_search(new).reference

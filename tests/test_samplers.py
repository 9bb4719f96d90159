from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import optuna
import pytest
from optuna.samplers import NSGAIISampler, RandomSampler, TPESampler

from compress_search.search.samplers import GP_TRIALS, RANDOM_TRIALS, GaussianProcess, derive_seed, make_sampler


def sample(sampler: Callable[[int], optuna.samplers.BaseSampler], trials: int = 12) -> list[dict[str, Any]]:
    """Parameters proposed on a conditional space when every ask has a new sampler."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(directions=["minimize", "minimize"])
    for number in range(trials):
        study.sampler = sampler(number)
        trial = study.ask()
        x = trial.suggest_float("x", 0, 1)
        y = trial.suggest_int("y", 1, 5) if trial.suggest_categorical("use", [False, True]) else 0
        for name in ("size_mb", "ran"):
            trial.set_constraint(name, x - 0.9)
        study.tell(trial, [x, 1 - x + y])
    return [trial.params for trial in study.trials]


def test_a_seed_depends_on_everything_it_is_derived_from() -> None:
    seeds = {derive_seed(0, "a", 1), derive_seed(1, "a", 1), derive_seed(0, "b", 1), derive_seed(0, "a", 2)}
    assert len(seeds) == 4
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert derive_seed(0, "a", 1) == derive_seed(0, "a", 1)


@pytest.mark.parametrize(
    ("setting", "sampled", "kind"),
    [
        ("auto", 0, RandomSampler),
        ("auto", RANDOM_TRIALS - 1, RandomSampler),
        ("auto", RANDOM_TRIALS, GaussianProcess),
        ("auto", GP_TRIALS, GaussianProcess),
        ("auto", GP_TRIALS + 1, TPESampler),
        ("random", 100, RandomSampler),
        ("tpe", 0, TPESampler),
        ("gp", 0, GaussianProcess),
        ("nsga2", 0, NSGAIISampler),
    ],
)
def test_the_setting_and_the_trials_so_far_choose_the_sampler(setting: str, sampled: int, kind: type) -> None:
    assert type(make_sampler(setting, 0, sampled)) is kind


@pytest.mark.parametrize("setting", ["random", "tpe", "gp", "nsga2"])
def test_samplers_that_are_rebuilt_for_every_ask_repeat_themselves_exactly(setting: str) -> None:
    def build(number: int) -> optuna.samplers.BaseSampler:
        return make_sampler(setting, derive_seed(0, number), number)

    first = sample(build, trials=7)
    assert first == sample(build, trials=7)
    assert len({str(params) for params in first}) == len(first)  # and do not repeat a proposal


@pytest.mark.parametrize("error", [ValueError("no fit"), RuntimeError("not positive definite")])
def test_a_model_that_cannot_be_fitted_leaves_the_proposal_to_tpe(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any) -> dict[str, Any]:
        raise error

    monkeypatch.setattr(optuna.samplers.GPSampler, "sample_relative", fail)
    with caplog.at_level(logging.WARNING):
        params = sample(lambda number: make_sampler("gp", number, number), trials=3)
    assert all({"x", "use"} <= set(found) for found in params)
    assert str(error) in caplog.text


def test_the_gaussian_process_models_what_every_trial_has_and_no_more() -> None:
    asked: list[set[str]] = []

    class Spy(GaussianProcess):
        def sample_relative(self, study: Any, trial: Any, search_space: dict[str, Any]) -> dict[str, Any]:
            asked.append(set(search_space))
            return super().sample_relative(study, trial, search_space)

    sample(lambda number: Spy(number, TPESampler(seed=number)), trials=8)
    assert asked[-1] == {"x", "use"}

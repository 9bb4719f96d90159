"""At which rungs trials report: methods that train in phases, what a score there is compared with, and stopping."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from math import ceil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress_search.driver import prepare
from compress_search.method import Method
from compress_search.pipeline import Budget, TrialStopped, run_recipe
from compress_search.recipe import Recipe, Step
from compress_search.records import rung_fraction
from compress_search.search.early_stop import Rungs
from compress_search.space import defaults
from compress_search.study import load_study
from compress_search.workbench import Workbench
from tests import tiny

Phases = list[tuple[bool, int]]
"""Whether each phase of a trial is scored, and its optimizer steps."""


def reports(phases: Phases) -> dict[int, int]:
    """Rung -> the step after which it is reported, by a trial of these phases."""
    budget = Budget(sum(steps for _, steps in phases), on_rung=lambda rung, metrics: True)
    found = {}
    for scored in (scored for scored, steps in phases for _ in range(steps)):
        budget.done += 1
        if (rung := budget.passes_rung(scored)) is not None:
            found[rung] = budget.done
    return found


def test_rungs_are_a_ninth_and_then_thirds_of_what_is_left() -> None:
    assert [str(rung_fraction(index)) for index in range(5)] == ["1/9", "1/3", "5/9", "19/27", "65/81"]


@pytest.mark.parametrize(
    ("phases", "expected"),
    [
        ([(True, 81)], {0: 9, 1: 27}),
        ([(False, 81)], {}),
        ([(False, 54), (True, 27)], {4: 65}),  # theseus at its default
        ([(False, 27), (True, 54)], {2: 45}),  # a third of what is left, to the step
        ([(False, 28), (True, 53)], {3: 57}),
        ([(False, 26), (True, 55)], {2: 45}),  # one step of scored training says nothing at 1/3 yet
        ([(False, 4), (True, 77)], {2: 45}),
        ([(True, 9), (False, 20), (True, 52)], {0: 9, 3: 57}),
        ([(True, 40), (False, 20), (True, 21)], {0: 9, 1: 27}),
        ([(False, 27), (True, 13), (False, 20), (True, 21)], {5: 71}),
        ([(True, 2)], {1: 1}),  # both rungs at once are one
        ([(True, 1)], {}),  # the end is no rung
        ([(False, 1), (True, 1)], {}),
    ],
)
def test_what_an_unscored_phase_passes_by_is_put_off(phases: Phases, expected: Mapping[int, int]) -> None:
    assert reports(phases) == expected


trials = st.lists(st.tuples(st.booleans(), st.integers(1, 60)), min_size=1, max_size=6)


@given(trials)
def test_a_rung_is_the_same_step_of_training_in_all_trials(phases: Phases) -> None:
    steps = sum(length for _, length in phases)
    for rung, done in reports(phases).items():
        assert done == ceil(rung_fraction(rung) * steps) < steps


@given(trials)
def test_only_scores_that_say_something_are_reported(phases: Phases) -> None:
    steps = sum(length for _, length in phases)
    ends = accumulate(length for _, length in phases)
    unscored = [
        range(end - length + 1, end + 1) for end, (scored, length) in zip(ends, phases, strict=True) if not scored
    ]
    found = reports(phases)
    assert len(found) <= 2
    for done in found.values():
        assert not any(done in phase for phase in unscored)
        last = max((phase[-1] for phase in unscored if phase[-1] < done), default=None)
        assert last is None or done - last >= (steps - last) / 3


@given(trials, st.integers(5, 200))
def test_whoever_is_scored_at_the_end_reports(phases: Phases, last: int) -> None:
    assert reports([*phases, (True, last)])


@given(
    st.lists(st.tuples(trials, st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=8),
    st.integers(0, 9),
)
def test_a_trial_is_judged_by_values_after_the_same_fraction_only(
    others: list[tuple[Phases, int, int]], value: int
) -> None:
    """Whatever others showed earlier or later in their training changes no decision."""
    everything, rungs = Rungs(), {rung for phases, _, _ in others for rung in reports(phases)}
    for rung in rungs:
        same = Rungs()
        for trial, (phases, left, right) in enumerate(others):
            for other in reports(phases):
                for table in [everything] + [same] * (other == rung):
                    table.record("", other, trial, table.judge("", other, trial, [left, right]))
        assert everything.judge("", rung, -1, [value, value]) == same.judge("", rung, -1, [value, value])


# ---- built-in methods -------------------------------------------------------------------------------------------


class Ground:
    """A tiny study of all methods whose trials train for 18 steps, and what a worker would have made of it."""

    def __init__(self, folder: Path) -> None:
        path = tiny.tiny_study(
            folder,
            methods="all",
            objectives=["accuracy", "latency_ms", "size_mb"],
            training={"epochs": 3, "batch_size": 16},
            teacher={"fine_tune": {"epochs": 1, "learning_rate": 1e-3}},  # so that its start is known
        )
        tiny.tiny_teacher(folder / "teacher", layers=4)
        self.folder = folder
        self.prepared = prepare(load_study(path))
        self.bench = Workbench(self.prepared.brief)

    @property
    def methods(self) -> Mapping[str, Method]:
        return self.bench.registry

    def recipe(self, *steps: str, **changes: Any) -> Recipe:
        """These methods at their defaults; ``changes`` are of the first one."""
        found, subject = [], self.prepared.plan.teacher
        for name in steps:
            method = self.methods[name]
            params = {**defaults(method.search_space(subject)), **changes}
            found.append(Step.of(name, method.effective(subject, params)))
            changes = {}
        return Recipe(tuple(found))

    def run(self, recipe: Recipe, on_rung: Any) -> Budget:
        _, budget = run_recipe(
            recipe, self.methods, self.bench.materials, seed=1, scratch=self.folder, on_rung=on_rung
        )
        return budget


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield Ground(tmp_path_factory.mktemp("rungs"))


EARLY, RATE = [0, 1], {"learning_rate": 5e-5}
REPORTED: list[tuple[str, dict[str, Any], list[int]]] = [
    ("plain_student", {}, EARLY),
    ("shortcut", {}, EARLY),
    ("born_again", {}, EARLY),
    ("bilstm", {}, EARLY),
    ("distilbert", {}, EARLY),
    ("theseus", {}, [4]),
    ("tinybert", {}, [4]),
    ("minilm", {}, [3]),
    ("minilm", {"assistant": "always"}, [3]),
    ("layer_match", {}, EARLY),
    ("layer_match", {"width": 0.5}, [3]),
    ("sharing", {}, EARLY),
    ("sharing", {"convert_init": "average", "tie_warmup": 0.5, "tie_penalty": 1.0}, [3]),
    ("embedding_factorization", {"embedding_size": 16}, EARLY),
    ("low_rank", {"recover": "kd", **RATE}, EARLY),
    ("low_rank distill", {}, EARLY),
    ("structured_pruning", {}, [4]),
    ("structured_pruning", {"schedule": "one_shot"}, EARLY),
    ("unstructured_pruning", {}, [5]),
    ("quantization", {"qat": True, **RATE}, EARLY),
    ("quantization", {"qat": True, "qat_features": "two_stage", **RATE}, [3]),
    ("theseus distill", {}, [2]),
    ("tinybert distill", {}, [2]),
    ("minilm distill", {}, [2]),
    ("theseus distill structured_pruning", {}, [2]),
    ("vocabulary_pruning", {}, []),
]
"""Methods of a recipe, what the first one's parameters are beside the defaults, and the rungs."""


@pytest.mark.parametrize(("steps", "changes", "expected"), REPORTED)
def test_rungs_of_the_built_in_methods(
    ground: Ground, steps: str, changes: dict[str, Any], expected: list[int]
) -> None:
    seen: list[int] = []
    budget = ground.run(ground.recipe(*steps.split(), **changes), lambda rung, _: seen.append(rung) is None)
    assert seen == expected
    assert bool(seen) == bool(budget.done), "whatever trains reports"


def test_every_built_in_method_that_trains_is_among_them(ground: Ground) -> None:
    train = {name for name, method in ground.methods.items() if type(method).trains is not Method.trains}
    assert train <= {name for steps, _, rungs in REPORTED if rungs for name in steps.split()}


def test_a_trial_of_two_phases_is_stopped_by_its_peers(ground: Ground) -> None:
    recipe, table = ground.recipe("theseus"), Rungs()

    def judged(rung: int, metrics: Mapping[str, float]) -> bool:
        return table.judge("theseus", rung, 9, [1 - metrics["accuracy"], 9.0]).kept

    for trial in range(3):  # far better ones, but after another part of their training
        table.record("theseus", 3, trial, table.judge("theseus", 3, trial, [0.0, trial]))
    assert ground.run(recipe, judged).done == 18
    for trial in range(3):
        table.record("theseus", 4, trial, table.judge("theseus", 4, trial, [0.0, trial]))
    with pytest.raises(TrialStopped):
        ground.run(recipe, judged)

"""The space of recipes: what a study's words make of the methods, and that every proposal is legal."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_search.candidate import Candidate, Subject
from compress_search.errors import PluginError, StudyError, TrialError
from compress_search.method import Context, Method, Stage
from compress_search.plan import Plan, make_plan
from compress_search.recipe import Recipe, settle
from compress_search.registry import Registry
from compress_search.space import Dim, Params
from compress_search.study import load_study

TEACHER = Subject("bert", "text-classification", 4, 4, 8, 32, 64, 100, 64, 2, 2)


class Fake(Method):
    """Does nothing; its space, stage and conditions are what a test needs."""

    def apply(self, candidate: Candidate, params: Params, context: Context) -> Candidate:
        return candidate


class Student(Fake):
    stage = Stage.STUDENT

    def search_space(self, teacher: Subject) -> Mapping[str, Dim]:
        return {"keep": Dim.integer(1, teacher.layers, 2), "learning_rate": Dim.real(1e-6, 1e-2, 5e-5, expert=True)}

    def after(self, subject: Subject, params: Params) -> Subject:
        return subject.having("lossy", layers=params["keep"])


class Other(Student):
    pass


class Prune(Fake):
    stage = Stage.STRUCTURE

    def search_space(self, teacher: Subject) -> Mapping[str, Dim]:
        return {
            "ratio": Dim.real(0.0, 0.75, 0.5),
            "how": Dim.choice(["plain", "steps"], "plain"),
            "steps": Dim.integer(1, 8, 4, when={"how": ["steps"]}),
            "secret": Dim.integer(1, 9, 3, expert=True),
        }

    def effective(self, subject: Subject, params: Params) -> Params:
        return {**params, "ratio": round(float(params["ratio"]) * 4) / 4}

    def after(self, subject: Subject, params: Params) -> Subject:
        return subject.having("lossy", heads=subject.heads * (1 - float(params["ratio"])))


class Recover(Fake):
    stage = Stage.RECOVERY

    def search_space(self, teacher: Subject) -> Mapping[str, Dim]:
        return {"alpha": Dim.real(0, 1, 0.5)}

    def unsupported(self, subject: Subject) -> str | None:
        return None if "lossy" in subject.traits else "nothing to recover"


class Bits(Fake):
    stage = Stage.PRECISION

    def search_space(self, teacher: Subject) -> Mapping[str, Dim]:
        return {"bits": Dim.choice([8, 4], 8)}


class Picky(Fake):
    stage = Stage.SPARSITY

    def search_space(self, teacher: Subject) -> Mapping[str, Dim]:
        return {}

    def unsupported(self, subject: Subject) -> str | None:
        return None if subject.layers > 100 else "fits only very deep networks"


METHODS = {"student": Student(), "other": Other(), "prune": Prune(), "recover": Recover(), "bits": Bits()}


class Methods(dict[str, Method]):
    def unavailable(self, name: str) -> str | None:
        return None


@pytest.fixture
def plan(tiny_study: Callable[..., Path]) -> Callable[..., Plan]:
    def make(methods: Any = "all", **sections: Any) -> Plan:
        registry = Methods(METHODS if methods == "all" else {**METHODS, "picky": Picky()})
        return make_plan(load_study(tiny_study(methods=methods, **sections)), registry, TEACHER)  # type: ignore[arg-type]

    return make


def test_a_proposal_is_settled_and_in_stage_order(plan: Callable[..., Plan]) -> None:
    params = {"student": "student", "student.keep": 2, "prune.use": True, "prune.ratio": 0.3, "prune.how": "plain"}
    recipe = plan().propose(
        optuna.trial.FixedTrial({**params, "recovery": "none", "precision": "bits", "bits.bits": 4})
    )
    assert recipe.methods == ("student", "prune", "bits")
    assert recipe.steps[1].params == {"ratio": 0.25, "how": "plain", "secret": 3}
    assert recipe.steps[0].params["learning_rate"] == 5e-5


def test_a_slot_whose_methods_cannot_follow_is_not_asked(plan: Callable[..., Plan]) -> None:
    trial = optuna.trial.FixedTrial({"student": "none", "prune.use": False, "precision": "none"})
    assert plan().propose(trial) == Recipe()
    assert "recovery" not in trial.params


def test_only_one_step_of_an_exclusive_stage(plan: Callable[..., Plan]) -> None:
    slots = {slot.name: slot.options for slot in plan().slots}
    assert slots["student"] == ("none", "other", "student")
    assert slots["prune.use"] == ("none", "prune")


def test_forced_methods_are_not_asked_and_always_there(plan: Callable[..., Plan]) -> None:
    made = plan({"student": {"use": True, "keep": 2}, "bits": {"use": True, "bits": 8}})
    assert made.dimensions == 0
    assert made.propose(optuna.trial.FixedTrial({})).methods == ("student", "bits")


def test_use_false_leaves_a_method_out(plan: Callable[..., Plan]) -> None:
    assert [slot.name for slot in plan({"student": {}, "prune": {"use": False}}).slots] == ["student"]


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"prun": {}}, 'methods.prun: unknown method prun (did you mean "prune"?)'),
        (["student", "prun"], 'methods.1: unknown method prun (did you mean "prune"?)'),
        (["bits", "picky"], "methods.1: cannot be used in this study: fits only very deep networks"),
        ({"prune": {"ration": 0.5}}, 'methods.prune.ration: unknown dimension (did you mean "ratio"?)'),
        (
            {"prune": {"ratio": {"low": 0.5, "high": 0.9}}},
            "methods.prune.ratio: 0.9 is outside the space: expected a number from 0 to 0.75",
        ),
        ({"bits": {"bits": [8, 3]}}, "methods.bits.bits: 3 is outside the space: expected one of 8, 4"),
        ({"picky": {}}, "methods.picky: cannot be used in this study: fits only very deep networks"),
        ({"recover": {}}, "methods.recover: cannot be used in this study: nothing to recover"),
        (
            {"student": {"use": True}, "other": {"use": True}},
            "methods.student.use: only one student method can be forced, and 'other' is already",
        ),
    ],
)
def test_what_a_study_asks_in_vain_is_named_with_its_place(
    plan: Callable[..., Plan], methods: Any, message: str
) -> None:
    with pytest.raises(StudyError) as caught:
        plan(methods)
    assert str(caught.value).endswith(message)
    assert caught.value.line is not None


def test_the_studys_learning_rate_holds_unless_a_method_has_its_own(plan: Callable[..., Plan]) -> None:
    own = {"low": 1e-4, "high": 1e-3}
    made = plan({"student": {}, "other": {"learning_rate": own}}, training={"learning_rate": 3e-4})
    assert made.spaces["student"]["learning_rate"].default == 3e-4
    assert not made.spaces["other"]["learning_rate"].fixed


def test_starting_points_are_distinct_legal_recipes_led_by_precision_alone(plan: Callable[..., Plan]) -> None:
    made = plan()
    recipes = [made.propose(optuna.trial.FixedTrial(point)) for point in made.starting_points()]
    assert recipes[0].methods == ("bits",)
    assert ("student", "recover", "bits") in [recipe.methods for recipe in recipes]
    assert len({recipe.key for recipe in recipes}) == len(recipes)


def test_equal_studies_have_equal_spaces_and_narrowing_changes_the_hash(plan: Callable[..., Plan]) -> None:
    assert plan().space_hash == plan().space_hash
    assert plan({"bits": {}}).space_hash != plan({"bits": {"bits": 8}}).space_hash


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_every_proposal_is_legal_and_already_settled(seed: int, plan_for_all: Plan) -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    recipe = plan_for_all.propose(study.ask())
    assert settle(recipe, plan_for_all.methods, TEACHER)[0] == recipe


@pytest.fixture(scope="module")
def plan_for_all(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    from tests.tiny import tiny_study

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = tiny_study(tmp_path_factory.mktemp("study"), methods="all")
    return make_plan(load_study(path), Methods(METHODS), TEACHER)  # type: ignore[arg-type]


class Matched(Student):
    """Cannot keep so few layers that the wanted one is not among them."""

    def search_space(self, teacher: Subject) -> Mapping[str, Dim]:
        return {**super().search_space(teacher), "wanted": Dim.integer(1, teacher.layers, 1)}

    def faults(self, subject: Subject, params: Params) -> Mapping[str, str]:
        keep, wanted = params["keep"], params["wanted"]
        return {"wanted": f"{wanted} of {keep}"} if wanted > keep else {}  # type: ignore[operator]

    def missing(self, teacher: Subject) -> Mapping[str, str]:
        return {"hints": "hints: name some"}


@pytest.fixture
def matched(tiny_study: Callable[..., Path]) -> Callable[..., Plan]:
    def make(**narrowing: Any) -> Plan:
        study = load_study(tiny_study(methods={"matched": narrowing, "recover": {}}))
        return make_plan(study, Methods({"matched": Matched(), "recover": Recover()}), TEACHER)  # type: ignore[arg-type]

    return make


@pytest.mark.parametrize("narrowing", [{"wanted": 4, "keep": 2}, {"wanted": [3, 4], "keep": {"low": 1, "high": 2}}])
def test_values_that_cannot_go_together_are_refused(matched: Callable[..., Plan], narrowing: Any) -> None:
    with pytest.raises(
        StudyError, match=rf"study\.yaml:\d+: methods\.matched\.wanted: {3 if 'low' in str(narrowing) else 4} of 2"
    ):
        matched(**narrowing)


def test_values_that_cannot_go_together_are_left_out_of_recipes(matched: Callable[..., Plan]) -> None:
    made = matched(wanted=3, keep={"low": 1, "high": 4}, use=True)
    kept = {
        keep: made.propose(optuna.trial.FixedTrial({"matched.keep": keep, "recovery": "none"}))
        for keep in (1, 2, 3)
    }
    assert kept[1] == kept[2] == Recipe()
    assert kept[3].methods == ("matched",)


def test_defaults_without_a_fault_are_found(matched: Callable[..., Plan]) -> None:
    made = matched(wanted=3)
    assert made.spaces["matched"]["keep"].default == 3
    assert made.at_defaults({"matched"})[0].steps[0].params["keep"] == 3
    assert matched(wanted=2).spaces["matched"]["keep"].default == 2


class Idle(Matched):
    """Needs no layer to be kept where it is told not to match."""

    def search_space(self, teacher: Subject) -> Mapping[str, Dim]:
        return {**super().search_space(teacher), "match": Dim.flag(True)}

    def effective(self, subject: Subject, params: Params) -> Params:
        return params if params["match"] else {name: value for name, value in params.items() if name != "wanted"}

    def faults(self, subject: Subject, params: Params) -> Mapping[str, str]:
        return super().faults(subject, params) if params["match"] else {}


def test_a_fixed_value_is_refused_where_only_idle_it_would_be_no_fault(tiny_study: Callable[..., Path]) -> None:
    def made(**narrowing: Any) -> Plan:
        study = load_study(tiny_study(methods={"matched": {"keep": 2, **narrowing}, "recover": {}}))
        return make_plan(study, Methods({"matched": Idle(), "recover": Recover()}), TEACHER)  # type: ignore[arg-type]

    with pytest.raises(StudyError, match=r"methods\.matched\.wanted: 4 of 2"):
        made(wanted=4)
    assert made(wanted=[3, 4]).spaces["matched"]["match"].default is False
    made(wanted=2)


def test_what_recovers_can_be_in_every_recipe_that_has_something_to_recover(
    tiny_study: Callable[..., Path],
) -> None:
    study = load_study(tiny_study(methods={"theseus": {"use": True}, "distill": {"use": True}}))
    recipe, _ = make_plan(study, Registry(), TEACHER).at_defaults([])
    assert recipe.methods == ("theseus", "distill")
    alone = load_study(tiny_study(methods={"distill": {"use": True}}))
    with pytest.raises(StudyError, match=r"methods\.distill: .*nothing to recover"):
        make_plan(alone, Registry(), TEACHER)


def test_a_fault_is_named_where_a_recipe_is_settled() -> None:
    recipe = Recipe.from_list([{"method": "matched", "params": {"keep": 1, "wanted": 2}}])
    with pytest.raises(TrialError, match="wanted: 2 of 1"):
        settle(recipe, {"matched": Matched()}, TEACHER)


@pytest.mark.parametrize("steps", [3, [2, 3], {"low": 2, "high": 5}])
def test_values_that_nothing_can_make_count_are_refused_with_what_they_need(
    plan: Callable[..., Plan], steps: Any
) -> None:
    for others in ({"how": "plain"}, {"how": ["plain"], "use": True}):
        with pytest.raises(StudyError, match=r"methods\.prune\.steps: has no effect: it needs how: steps$"):
            plan({"prune": {"steps": steps, **others}})
    plan({"prune": {"steps": steps}})
    plan({"prune": {"steps": steps, "how": "steps"}})


def test_a_dimension_that_is_missing_says_what_it_needs(matched: Callable[..., Plan]) -> None:
    with pytest.raises(StudyError, match=r"methods\.matched\.hints: true needs hints: name some"):
        matched(hints=True)


class Raising(Prune):
    def effective(self, subject: Subject, params: Params) -> Params:
        raise KeyError("ratio")


def test_a_hook_that_raises_names_its_method(tiny_study: Callable[..., Path]) -> None:
    study = load_study(tiny_study(methods={"prune": {"use": True}}))
    with pytest.raises(PluginError, match="method 'prune': effective must not raise, and raised KeyError: 'ratio'"):
        make_plan(study, Methods({"prune": Raising()}), TEACHER).starting_points()  # type: ignore[arg-type]


class Misspelt(Prune):
    def search_space(self, teacher: Subject) -> Mapping[str, Dim]:
        return {"ratio": Dim.real(0.0, 0.9, 0.5, when={"hwo": ("plain",)})}


class Backwards(Prune):
    def search_space(self, teacher: Subject) -> Mapping[str, Dim]:
        return {"ratio": Dim.real(0.9, 0.0, 0.5)}


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (Misspelt, "method 'prune': search_space: dimension 'ratio' depends on 'hwo', which does not exist"),
        (Backwards, "method 'prune': search_space must not raise, and raised ValueError: "),
    ],
)
def test_a_space_that_is_none_names_its_method(
    method: type[Prune], words: str, tiny_study: Callable[..., Path]
) -> None:
    study = load_study(tiny_study(methods={"prune": {"use": True}}))
    with pytest.raises(PluginError, match=re.escape(words)):
        make_plan(study, Methods({"prune": method()}), TEACHER)  # type: ignore[arg-type]

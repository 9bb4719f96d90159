"""Recipes: their order, their exclusive stages, and identities that depend on what is done alone."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress_search.candidate import Candidate, Subject
from compress_search.errors import TrialError
from compress_search.method import Context, Method, Stage
from compress_search.recipe import Recipe, Step, digest, in_stage_order, settle
from compress_search.space import Dim, Params

TEACHER = Subject("bert", "text-classification", 12, 12, 64, 768, 3072, 30522, 512, 2, 2)


class Fake(Method):
    def search_space(self, teacher: Subject) -> Mapping[str, Dim]:
        return {}

    def apply(self, candidate: Candidate, params: Params, context: Context) -> Candidate:
        raise AssertionError("recipes are settled without applying anything")


class Halver(Fake):
    """Half the layers, rounded: an effective parameter that depends on the subject."""

    stage = Stage.STRUCTURE

    def effective(self, subject: Subject, params: Params) -> Params:
        return {"layers": max(1, round(float(params["ratio"]) * subject.layers))} if "ratio" in params else params

    def after(self, subject: Subject, params: Params) -> Subject:
        return subject.having("lossy", layers=int(params["layers"]))


class Student(Fake):
    stage = Stage.STUDENT

    def after(self, subject: Subject, params: Params) -> Subject:
        return subject.having("lossy", layers=subject.layers // 2)


class OtherStudent(Student):
    pass


class Recovery(Fake):
    stage = Stage.RECOVERY

    def unsupported(self, subject: Subject) -> str | None:
        return None if "lossy" in subject.traits else "there is nothing to recover"


class Precision(Fake):
    stage = Stage.PRECISION


METHODS: dict[str, Method] = {
    "halver": Halver(),
    "another_halver": Halver(),
    "student": Student(),
    "other_student": OtherStudent(),
    "recovery": Recovery(),
    "precision": Precision(),
}

values = (
    st.booleans() | st.integers(-100, 100) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5)
)
params = st.dictionaries(st.text(min_size=1, max_size=5), values, max_size=4)
steps = st.builds(Step.of, st.sampled_from(sorted(METHODS)), params)
recipes = st.lists(steps, max_size=4).map(lambda found: Recipe(tuple(found)))


@given(recipes)
def test_recipes_survive_json(recipe: Recipe) -> None:
    again = Recipe.from_list(json.loads(json.dumps(recipe.to_list())))
    assert again == recipe
    assert again.key == recipe.key


@given(params, st.randoms())
def test_the_order_in_which_parameters_were_written_does_not_matter(
    found: dict[str, Any], rng: random.Random
) -> None:
    items = list(found.items())
    rng.shuffle(items)
    assert Step.of("m", dict(items)) == Step.of("m", found)
    assert Recipe((Step.of("m", dict(items)),)).key == Recipe((Step.of("m", found),)).key


@given(recipes, recipes)
def test_keys_are_equal_exactly_for_equal_recipes(first: Recipe, second: Recipe) -> None:
    same = json.dumps(first.to_list(), sort_keys=True) == json.dumps(second.to_list(), sort_keys=True)
    assert (first.key == second.key) == same


@given(recipes, steps)
def test_a_prefix_keeps_its_identity_when_steps_are_added(recipe: Recipe, step: Step) -> None:
    longer = Recipe((*recipe.steps, step))
    assert longer.prefix_hash(len(recipe.steps)) == recipe.key
    assert longer.key != recipe.key


def test_types_are_part_of_the_identity() -> None:
    keys = {Recipe((Step.of("m", {"x": value}),)).key for value in (1, 1.0, True, "1")}
    assert len(keys) == 4


def test_the_digest_is_canonical_and_refuses_what_json_has_no_word_for() -> None:
    assert digest({"b": 1, "a": [2]}) == digest({"a": [2], "b": 1})
    assert len(digest({})) == 64
    with pytest.raises(ValueError, match="not JSON compliant"):
        digest(float("nan"))


@given(st.permutations(["halver", "another_halver", "student", "recovery", "precision"]))
def test_steps_apply_by_stage_then_by_name(names: list[str]) -> None:
    recipe = Recipe(tuple(Step.of(name, {}) for name in names))
    found = [step.method for step in in_stage_order(recipe, METHODS)]
    assert found == ["student", "another_halver", "halver", "recovery", "precision"]


def test_a_recipe_is_settled_on_what_each_step_really_does() -> None:
    recipe = Recipe((Step.of("halver", {"ratio": 0.5}), Step.of("student", {}), Step.of("recovery", {})))
    settled, left = settle(recipe, METHODS, TEACHER)
    assert settled.methods == ("student", "halver", "recovery")
    assert settled.steps[1].params == {"layers": 3}
    assert left.layers == 3
    assert settle(settled, METHODS, TEACHER) == (settled, left)


def test_different_words_for_the_same_recipe_share_an_identity() -> None:
    keys = {settle(Recipe((Step.of("halver", {"ratio": r}),)), METHODS, TEACHER)[0].key for r in (0.49, 0.5, 0.51)}
    assert len(keys) == 1


def test_the_empty_recipe_is_the_teacher() -> None:
    assert settle(Recipe(), METHODS, TEACHER) == (Recipe(), TEACHER)
    assert str(Recipe()) == "teacher"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("student", "other_student"), "holds one student step of this kind, and has 'student' already"),
        (("halver", "halver"), "has 'halver' already"),
        (("recovery",), "there is nothing to recover"),
    ],
)
def test_what_cannot_be_is_refused_with_its_method(names: tuple[str, ...], message: str) -> None:
    recipe = Recipe(tuple(Step.of(name, {"layers": 2}) for name in names))
    with pytest.raises(TrialError, match=message) as refused:
        settle(recipe, METHODS, TEACHER)
    assert refused.value.method == names[-1]
    assert str(refused.value).startswith(f"{names[-1]}: ")


def test_a_step_reads_well() -> None:
    assert str(Step.of("prune", {"ratio": 0.123456, "mode": "taylor"})) == "prune(mode=taylor, ratio=0.123)"
    assert str(Recipe((Step.of("a", {}), Step.of("b", {"n": 2})))) == "a() + b(n=2)"

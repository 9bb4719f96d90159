"""Dimensions: what they hold, how a study narrows them, and that what is suggested lies inside."""

from __future__ import annotations

import math
from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress_search.space import Dim, active, defaults, fix_experts, in_order, narrow, suggest, unmet

optuna.logging.set_verbosity(optuna.logging.ERROR)

SMALL = st.integers(-50, 50)


@st.composite
def integers(draw: st.DrawFn) -> Dim:
    low = draw(SMALL)
    step = draw(st.integers(1, 4))
    count = draw(st.integers(0, 10))
    return Dim.integer(low, low + step * count, low + step * draw(st.integers(0, count)), step=step)


@st.composite
def reals(draw: st.DrawFn) -> Dim:
    low = draw(st.floats(1e-3, 10))
    high = low + draw(st.floats(0, 100))
    return Dim.real(low, high, draw(st.floats(low, high)), log=draw(st.booleans()))


@st.composite
def choices(draw: st.DrawFn) -> Dim:
    options = draw(st.lists(st.sampled_from(["a", "b", "c", 1, 2, 0.5]), min_size=1, unique=True))
    return Dim.choice(options, draw(st.sampled_from(options)))


def ranged() -> st.SearchStrategy[Dim]:
    return integers() | reals()


def ask(space: dict[str, Dim], seed: int = 0) -> tuple[optuna.Trial, dict[str, Any]]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed))
    trial = study.ask()
    return trial, suggest(trial, "m", space)


def reachable(dim: Dim, value: Any) -> bool:
    """Whether the distribution itself, steps included, can give the value."""
    return dim.distribution._contains(dim.distribution.to_internal_repr(value))


@given(ranged() | choices(), st.integers(0, 2**16))
def test_what_is_suggested_lies_inside(dim: Dim, seed: int) -> None:
    _, params = ask({"x": dim}, seed)
    assert dim.contains(params["x"])


@given(ranged() | choices())
def test_a_scalar_fixes_a_dimension_and_takes_it_from_the_sampler(dim: Dim) -> None:
    fixed = narrow(dim, dim.default)
    assert fixed.fixed
    trial, params = ask({"x": fixed})
    assert params == {"x": dim.default}
    assert type(params["x"]) is type(dim.default)
    assert not trial.params


@given(ranged(), st.data())
def test_a_list_gives_the_choices_without_repetition(dim: Dim, data: st.DataObject) -> None:
    low, high = dim.distribution.low, dim.distribution.high  # type: ignore[attr-defined]
    number = st.integers(low, high) if isinstance(low, int) else st.floats(low, high)
    values = data.draw(st.lists(number, min_size=1, max_size=5))
    narrowed = narrow(dim, [*values, values[0]])
    assert narrowed.distribution.choices == tuple(dict.fromkeys(values))  # type: ignore[attr-defined]
    assert narrowed.default in values


@given(ranged(), st.data())
def test_a_range_stays_inside_and_keeps_a_reachable_default(dim: Dim, data: st.DataObject) -> None:
    low, high = dim.distribution.low, dim.distribution.high  # type: ignore[attr-defined]
    number = st.integers(low, high) if isinstance(low, int) else st.floats(low, high)
    first, last = sorted((data.draw(number), data.draw(number)))
    narrowed = narrow(dim, {"low": first, "high": last})
    assert reachable(narrowed, narrowed.default)
    assert first <= narrowed.default <= last
    _, params = ask({"x": narrowed})
    assert first <= params["x"] <= last
    assert dim.contains(params["x"])


def test_the_default_of_a_range_with_steps_is_one_of_its_values() -> None:
    narrowed = narrow(Dim.integer(0, 8, 4, step=2), {"low": 1, "high": 5})
    assert narrowed.default == 3
    assert reachable(narrowed, narrowed.default)


def test_narrowing_ends_an_experts_privilege() -> None:
    dim = Dim.real(0.0, 1.0, 0.5, expert=True)
    assert not narrow(dim, 0.5).expert
    assert not narrow(dim, {"low": 0.1, "high": 0.2}).expert


@pytest.mark.parametrize(
    ("dim", "to", "message"),
    [
        (Dim.integer(1, 8, 4), 9, "9 is outside the space: expected an integer from 1 to 8"),
        (Dim.integer(1, 8, 4), 2.5, "2.5 is outside the space"),
        (Dim.integer(1, 8, 4), True, "True is outside the space"),
        (Dim.integer(1, 8, 4), [], "got an empty list"),
        (Dim.integer(1, 8, 4), {"low": 6, "high": 2}, "the range is empty: low 6 is above high 2"),
        (Dim.integer(1, 8, 4), {"low": 2}, "a range is written {low: …, high: …}"),
        (Dim.integer(1, 8, 4), {"low": 2, "high": 3, "log": True}, "a range is written {low: …, high: …}"),
        (Dim.real(0.1, 1.0, 0.5, log=True), 0.05, "expected a number from 0.1 to 1 (log)"),
        (Dim.real(0.1, 1.0, 0.5), math.nan, "nan is outside the space"),
        (Dim.real(0.1, 1.0, 0.5), "0.5", "'0.5' is outside the space"),
        (Dim.choice(("kl", "mse"), "kl"), "l1", "expected one of kl, mse"),
        (Dim.choice(("kl", "mse"), "kl"), {"low": 0, "high": 1}, "a range does not fit here"),
        (Dim.flag(False), 0, "0 is outside the space: expected one of False, True"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_was_expected(dim: Dim, to: Any, message: str) -> None:
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - the text is compared below
        narrow(dim, to)
    assert message in str(refused.value)


def test_numbers_take_the_dimensions_own_type() -> None:
    assert type(narrow(Dim.real(0.0, 2.0, 1.0), 1).default) is float
    assert type(narrow(Dim.integer(0, 4, 1), 2.0).default) is int


def test_conditions_come_before_what_depends_on_them() -> None:
    space = {
        "temperature": Dim.real(1.0, 10.0, 2.0, when={"loss": ("kl",)}),
        "loss": Dim.choice(("kl", "mse"), "kl", when={"soft": (True,)}),
        "soft": Dim.flag(True),
        "alpha": Dim.real(0.0, 1.0, 0.5),
    }
    names = [name for name, _ in in_order(space)]
    assert names.index("soft") < names.index("loss") < names.index("temperature")
    assert sorted(names) == sorted(space)


def test_conditions_on_nothing_or_in_a_circle_are_refused() -> None:
    flag = {"when": {"b": (True,)}}
    with pytest.raises(ValueError, match="'a' depends on 'b', which does not exist"):
        in_order({"a": Dim.flag(True, **flag)})
    circle = {"a": Dim.flag(True, **flag), "b": Dim.flag(True, when={"a": (True,)})}
    with pytest.raises(ValueError, match=r"cycle among \['a', 'b'\]"):
        in_order(circle)


@given(st.integers(0, 2**16))
def test_only_active_dimensions_are_suggested_under_the_methods_name(seed: int) -> None:
    space = {
        "size": Dim.integer(2, 4, 2, when={"mode": ("grouped",)}),
        "mode": Dim.choice(("all", "grouped"), "all"),
        "seed": Dim.choice(("only",), "only"),
    }
    trial, params = ask(space, seed)
    assert ("size" in params) == (params["mode"] == "grouped")
    assert params["seed"] == "only"
    assert set(trial.params) == {f"m.{name}" for name in params if name != "seed"}


def test_a_condition_fails_while_what_it_names_is_inactive() -> None:
    dim = Dim.flag(True, when={"loss": ("kl",)})
    assert active(dim, {"loss": "kl"})
    assert not active(dim, {"loss": "mse"})
    assert not active(dim, {})


def test_experts_stay_at_their_default_unless_named() -> None:
    space = {"a": Dim.real(0.0, 1.0, 0.25, expert=True), "b": Dim.real(0.0, 1.0, 0.5)}
    fixed = fix_experts(space)
    assert fixed["a"].fixed
    assert not fixed["b"].fixed
    assert ask(fixed)[1]["a"] == 0.25
    assert defaults(space) == {"a": 0.25, "b": 0.5}


def test_only_the_usual_options_are_searched_unless_others_are_named() -> None:
    space = {"bits": Dim.choice((32, 8, 4), 8, usual=(8, 4))}
    assert fix_experts(space)["bits"].distribution.choices == (8, 4)  # type: ignore[attr-defined]
    named = {"bits": narrow(space["bits"], [32, 4])}
    assert fix_experts(named)["bits"].distribution.choices == (32, 4)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="3 is outside the space: expected one of 32, 8, 4"):
        narrow(space["bits"], 3)


def test_the_condition_that_nothing_fulfils_is_named_and_of_several_the_first_one() -> None:
    space = {
        "mode": Dim.choice(("plain", "slow", "deep"), "plain"),
        "train": Dim.flag(False, when={"mode": ("slow", "deep")}),
        "rate": Dim.real(0.0, 1.0, 0.5, when={"train": (True,)}),
    }
    assert [unmet(space, name) for name in space] == [None, None, None]
    untrained = {**space, "train": narrow(space["train"], False)}
    assert [unmet(untrained, name) for name in space] == [None, None, "train: true"]
    plain = {**space, "mode": narrow(space["mode"], "plain")}
    assert [unmet(plain, name) for name in space] == [None, "mode: slow or deep", "mode: slow or deep"]


def test_defaults_leave_out_what_is_inactive() -> None:
    space = {"on": Dim.flag(False), "ratio": Dim.real(0.0, 1.0, 0.5, when={"on": (True,)})}
    assert defaults(space) == {"on": False}


def test_truth_is_no_number_and_a_number_no_truth() -> None:
    assert not Dim.flag(False).contains(0)
    assert not Dim.integer(0, 1, 0).contains(False)
    assert not Dim.choice((1, 2), 1).contains(1.0)
    assert Dim.real(0.0, 2.0, 1.0).contains(1)

"""A study's words that make no difference are refused with what they would need; what might make one is not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from compress_search.candidate import Candidate, Subject
from compress_search.errors import StudyError
from compress_search.method import Context, Method, Stage
from compress_search.narrowing import idle
from compress_search.plan import Plan, make_plan
from compress_search.space import Dim, Params, narrow
from compress_search.study import load_study

TEACHER = Subject("bert", "text-classification", 4, 4, 8, 32, 64, 100, 64, 2, 2)


class Student(Method):
    stage = Stage.STUDENT

    def search_space(self, teacher: Subject) -> Mapping[str, Dim]:
        return {}

    def apply(self, candidate: Candidate, params: Params, context: Context) -> Candidate:
        return candidate

    def after(self, subject: Subject, params: Params) -> Subject:
        return subject.having("small")


class Bits(Student):
    """Groups count with few bits, a rate when trained, notes on small models, and text only where there is some."""

    stage = Stage.PRECISION

    def search_space(self, teacher: Subject) -> Mapping[str, Dim]:
        return {
            "bits": Dim.choice((8, 4), 8),
            "group": Dim.choice((16, 32), 32),
            "trained": Dim.flag(False, expert=True),
            "rate": Dim.real(0.0, 1.0, 0.5, expert=True),
            "kept": Dim.integer(0, 500, 0, expert=True),
            "examples": Dim.integer(1, 9, 4, expert=True),
            "notes": Dim.choice(("few", "many"), "few", expert=True),
            "text": Dim.real(0.0, 0.9, 0.0, expert=True),
            "ratio": Dim.real(0.1, 0.9, 0.5),
        }

    def effective(self, subject: Subject, params: Params) -> Params:
        unused = set() if params["bits"] == 4 else {"group"}
        unused |= set() if params["trained"] else {"rate"}
        unused |= set() if params["kept"] else {"examples"}
        unused |= set() if "small" in subject.traits else {"notes"}
        used = {name: value for name, value in params.items() if name not in unused}
        return used | {"text": 0.0, "ratio": round(float(params["ratio"]) * 4) / 4}


@pytest.fixture
def plan(tiny_study: Callable[..., Path]) -> Callable[..., Plan]:
    def make(*others: str, **words: Any) -> Plan:
        study = load_study(tiny_study(methods={"bits": words} | {name: {} for name in others}))
        return make_plan(study, Methods({"bits": Bits(), "student": Student()}), TEACHER)  # type: ignore[arg-type]

    return make


class Methods(dict[str, Method]):
    def unavailable(self, name: str) -> str | None:
        return None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"group": 16, "bits": 8}, "group: has no effect: it needs bits: 4"),
        ({"group": [16, 32], "bits": [8]}, "group: has no effect: it needs bits: 4"),
        ({"rate": 0.7}, "rate: has no effect: it needs trained: true"),
        ({"rate": {"low": 0.1, "high": 0.2}, "trained": False}, "rate: has no effect: it needs trained: true"),
        ({"examples": 5}, "examples: has no effect: it needs kept: 500"),
        ({"notes": "many"}, "notes: has no effect on such a model"),
        ({"text": 0.5}, "text: has no effect on such a model"),
    ],
)
def test_words_in_vain_are_refused_with_what_they_need(
    plan: Callable[..., Plan], words: dict[str, Any], message: str
) -> None:
    with pytest.raises(StudyError) as caught:
        plan(**words)
    assert str(caught.value).endswith(f"methods.bits.{message}")
    assert caught.value.line is not None
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "words",
    [
        {"group": 16},  # the bits are searched
        {"group": 16, "bits": [8, 4]},
        {"rate": 0.7, "trained": [True, False]},
        {"rate": 0.7, "trained": True},
        {"examples": 5, "kept": {"low": 0, "high": 300}},
        {"text": 0.0},  # it is so
        {"ratio": 0.3},  # rounded
        {"ratio": 0.5, "use": True},
        {},
    ],
)
def test_words_that_count_in_some_proposal_are_not(plan: Callable[..., Plan], words: dict[str, Any]) -> None:
    space = plan(**words).spaces["bits"]
    assert all(space[name].contains(value) for name, value in words.items() if name != "use" and space[name].fixed)
    assert words.keys() - {"use"} <= space.keys()


def test_words_that_count_on_what_an_earlier_step_leaves_are_not(plan: Callable[..., Plan]) -> None:
    assert plan("student", notes="many").spaces["bits"]["notes"].default == "many"


def test_nothing_is_asked_of_studies_of_all_methods(tiny_study: Callable[..., Path]) -> None:
    study = load_study(tiny_study(methods="all"))
    assert make_plan(study, Methods({"bits": Bits()}), TEACHER).spaces  # type: ignore[arg-type]


def test_every_word_in_vain_is_found() -> None:
    words = {"text": 0.5, "notes": "many", "group": 16}
    whole = Bits().search_space(TEACHER)
    space = {**whole, **{name: narrow(whole[name], value) for name, value in words.items()}}
    assert list(idle(words, "bits", Bits(), TEACHER, space, [TEACHER])) == ["text", "notes"]
    assert list(idle(words, "bits", Bits(), TEACHER, space, [TEACHER, TEACHER.having("small")])) == ["text"]

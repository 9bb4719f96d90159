"""How long a study is said to take: what its texts, its teacher and its budget make of a machine's speed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compress_search import Subject
from compress_search.data.rows import Rows
from compress_search.estimate import PIECES_PER_WORD, Estimate, estimate, mean_length
from compress_search.study import Study, load_study

BERT = Subject("bert", "text-classification", 12, 12, 64, 768, 3072, 30522, 512, 2, 2)
RATE = 1e11


@pytest.fixture
def study_of(tiny_study: Callable[..., Path]) -> Callable[..., Study]:
    """``study_of(section__key=value)``."""

    def make(**changes: Any) -> Study:
        written = [f"{key.replace('__', '.')}={value}" for key, value in changes.items()]
        return load_study(tiny_study(methods=["theseus"]), written)

    return make


def rows(texts: list[Any], pairs: list[str] | None = None) -> Rows:
    return Rows(texts, pairs, [0] * len(texts))


@pytest.mark.parametrize(
    ("texts", "pairs", "tokens"),
    [
        (["one two three", "four"], None, 2 + 2 * PIECES_PER_WORD),
        ([["one", "two"], ["three"]], None, 2 + 1.5 * PIECES_PER_WORD),
        (["one two"], ["and three"], 2 + 4 * PIECES_PER_WORD),
        (["手机应用", "游戏"], None, 2 + 3),
        ([["手", "机"]], None, 2 + 2),
        (["用 App 看电影"], None, 2 + 4 + PIECES_PER_WORD),
        (["word " * 1000, "一" * 1000, "word"], None, (40 + 40 + 2 + PIECES_PER_WORD) / 3),
    ],
    ids=["words", "lists of words", "pairs", "ideographs", "lists of them", "both", "cut at the longest input"],
)
def test_a_text_is_as_long_as_its_words_and_ideographs(
    texts: list[Any], pairs: list[str] | None, tokens: float, study_of: Any
) -> None:
    assert mean_length(study_of(data__max_length=40), rows(texts, pairs)) == pytest.approx(tokens)


def test_of_many_texts_some_are_looked_at_from_all_over(study_of: Any) -> None:
    texts = ["word"] * 6000 + ["word " * 10] * 6000
    assert mean_length(study_of(), rows(texts)) == pytest.approx(2 + 5.5 * PIECES_PER_WORD)


def test_a_step_is_three_passes_at_half_of_the_machines_rate(study_of: Any) -> None:
    found = of(study_of(training__batch_size=8))
    assert found.step_seconds == pytest.approx(3 * 8 * BERT.macs(20) / (0.5 * RATE))
    assert of(study_of(training__batch_size=16)).step_seconds == pytest.approx(2 * found.step_seconds)


def of(study: Study, **changes: Any) -> Estimate:
    return estimate(study, BERT, 100, 20.0, RATE, **changes)


def test_steps_are_those_of_the_budget(study_of: Any) -> None:
    assert of(study_of(training__epochs=3, training__batch_size=16)).steps_per_trial == 3 * 7
    assert of(study_of(training__epochs=0.001)).steps_per_trial == 1


def test_trials_share_the_machine_and_the_hours_end_them(study_of: Any) -> None:
    alone, shared = (of(study_of(search__trials=40, search__concurrency=count)) for count in (1, 4))
    assert alone.search_minutes == pytest.approx(4 * shared.search_minutes)
    assert of(study_of(search__trials=40, search__hours=0.01)).search_minutes == pytest.approx(0.6)
    assert alone.minutes == pytest.approx(alone.search_minutes + alone.teacher_minutes)


def test_a_teacher_that_came_trained_takes_nothing(study_of: Any) -> None:
    assert of(study_of()).teacher_minutes == 0
    tuned = of(study_of(teacher__fine_tune__epochs=2, teacher__fine_tune__batch_size=10))
    assert tuned.teacher_minutes * 60 == pytest.approx(2 * 10 * tuned.step_seconds)

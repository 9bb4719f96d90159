"""The examples that need no search run, and show what they say."""

from __future__ import annotations

import runpy
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def test_the_teachers_word_on_many_digits_is_worth_more_than_few_labels():
    compare = runpy.run_path(str(EXAMPLES / "distil_digits.py"))["compare"]
    result = compare(seed=0)
    assert result["teacher"] > 0.95
    assert result["the teacher's word"] > result["a hundred labels"] + 0.05

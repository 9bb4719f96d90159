"""What crosses process boundaries comes out of JSON as it went in."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from compress_search.recipe import Recipe, Step
from compress_search.records import FINISHED, Assignment, Failure, Result

numbers = st.floats(allow_nan=False, allow_infinity=False)
names = st.text(min_size=1, max_size=8)
metrics = st.dictionaries(names, numbers, max_size=3)
recipes = st.lists(st.builds(Step.of, names, metrics), max_size=2).map(lambda steps: Recipe(tuple(steps)))
assignments = st.builds(
    Assignment,
    number=st.integers(0, 999),
    attempt=st.integers(1, 9),
    recipe=recipes,
    seed=st.integers(0, 2**31 - 1),
    baseline=st.none() | names,
    reference=metrics,
)
results = st.builds(
    Result,
    number=st.integers(0, 999),
    attempt=st.integers(1, 9),
    state=st.sampled_from(FINISHED),
    metrics=metrics,
    intervals=st.dictionaries(names, st.tuples(numbers, numbers), max_size=3),
    measurements=st.dictionaries(names, st.lists(numbers, max_size=3), max_size=2),
    artifact=st.none() | names,
    seconds=metrics,
    failure=st.none() | st.builds(Failure, kind=st.sampled_from(["error", "oom", "nan"]), message=names),
    environment=st.dictionaries(names, names, max_size=2),
    provisional=st.booleans(),
)


def through_json(data: Any) -> Any:
    return json.loads(json.dumps(data))


@given(assignments)
def test_assignments_come_back_as_they_were(assignment: Assignment) -> None:
    assert Assignment.from_dict(through_json(assignment.to_dict())) == assignment


@given(results)
def test_results_come_back_as_they_were(result: Result) -> None:
    assert Result.from_dict(through_json(result.to_dict())) == result

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.study._multi_objective import _fast_non_domination_rank

from compress_search.search.early_stop import Rungs, farthest_first, fronts, keep, order


def integer_cases(count: int = 300) -> list[np.ndarray]:
    """Small integers make ties; 2 or 3 objectives."""
    draw = random.Random(0)
    return [
        np.array([[draw.randint(0, 6) for _ in range(k)] for _ in range(draw.randint(1, 14))], float)
        for k in draw.choices((2, 3), k=count)
    ]


def dominates(a: np.ndarray, b: np.ndarray) -> bool:
    return bool((a <= b).all() and (a < b).any())


def ranks(vectors: np.ndarray, violations: np.ndarray | None = None) -> np.ndarray:
    place = np.empty(len(vectors), int)
    place[order(vectors, len(vectors), violations)] = range(len(vectors))
    return place


def longest_chain(vectors: np.ndarray, row: int) -> int:
    """How many rows can be lined up above this one, each dominating the next."""
    above = [other for other in range(len(vectors)) if dominates(vectors[other], vectors[row])]
    return 1 + max((longest_chain(vectors, other) for other in above), default=-1)


def naive_farthest_first(points: np.ndarray) -> list[int]:
    """The definition, without the incremental distances."""
    n, k = points.shape
    found: list[int] = []
    for column in range(k):
        others = [j for j in range(k) if j != column]
        best = min(range(n), key=lambda i: (points[i, column], *points[i, others], i))
        if best not in found:
            found.append(best)
    while len(found) < n:
        rest = [i for i in range(n) if i not in found]
        found.append(max(rest, key=lambda i: (min(np.linalg.norm(points[i] - points[j]) for j in found), -i)))
    return found


def test_a_front_index_is_the_length_of_the_longest_chain_of_dominance() -> None:
    for vectors in integer_cases():
        assert fronts(vectors).tolist() == [longest_chain(vectors, row) for row in range(len(vectors))]


def test_front_indices_are_those_of_optuna() -> None:
    vectors = np.random.default_rng(0).random((500, 3))
    assert fronts(vectors).tolist() == _fast_non_domination_rank(vectors).tolist()


def test_front_indices_under_constraints_are_those_of_optuna() -> None:
    draw = np.random.default_rng(1)
    for vectors in integer_cases():
        violations = np.maximum(0.0, draw.integers(-3, 3, len(vectors))).astype(float)
        if not (violations <= 0).any():  # Optuna's own does not take a set without a feasible row
            continue
        assert (
            fronts(vectors, violations).tolist() == _fast_non_domination_rank(vectors, penalty=violations).tolist()
        )


def test_the_order_is_a_permutation_in_which_the_dominating_come_first() -> None:
    for vectors in integer_cases():
        place = ranks(vectors)
        assert sorted(place) == list(range(len(vectors)))
        for a, b in itertools.permutations(range(len(vectors)), 2):
            assert not dominates(vectors[a], vectors[b]) or place[a] < place[b]


def test_the_epsilon_net_is_what_its_definition_says() -> None:
    for vectors in integer_cases():
        expected = naive_farthest_first(vectors)
        assert farthest_first(vectors, len(vectors)) == expected
        assert farthest_first(vectors, 3) == expected[:3]


def test_a_capped_order_is_the_beginning_of_the_whole_one() -> None:
    for vectors in integer_cases(100):
        assert order(vectors, 4) == order(vectors, len(vectors))[:4]


def test_units_do_not_matter() -> None:
    for vectors in integer_cases():
        scale, shift = np.array([1000.0, 0.5, 8.0]), np.array([-3.0, 40.0, 0.25])
        k = vectors.shape[1]
        assert order(vectors * scale[:k] + shift[:k], 99) == order(vectors, 99)


def test_the_published_implementation_ranks_this_case_wrongly() -> None:
    # the newest row dominates all others: an argsort mistaken for a rank would give it place 1, not 0
    assert ranks(np.array([[1.0, 1.0], [2.0, 2.0], [0.0, 0.0]])).tolist() == [1, 2, 0]


def test_with_one_objective_it_is_plain_top_k() -> None:
    draw = random.Random(2)
    for _ in range(500):
        values = draw.sample(range(100), draw.randint(1, 20))
        recorded, new = [[float(v)] for v in values[:-1]], [float(values[-1])]
        k = len(values) // 3
        expected = k == 0 or sorted(values).index(values[-1]) < k
        assert keep(recorded, new, protect_front=False) == expected
        assert keep(recorded, new) == (expected or values[-1] == min(values))


def test_nobody_is_stopped_before_there_are_eta_results() -> None:
    assert keep([], [9.0, 9.0])
    assert keep([[0.0, 0.0]], [9.0, 9.0])
    assert not keep([[0.0, 0.0], [1.0, 1.0]], [9.0, 9.0])
    assert keep([[0.0, 0.0], [1.0, 1.0]], [9.0, 9.0], eta=4)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_stopped_and_counts_as_worst(value: float) -> None:
    assert not keep([], [value, 0.0])
    # two recorded ones that are not finite leave the only number on the front
    assert keep([[value, 0.0], [0.0, value]], [5.0, 5.0])
    assert ranks(np.array([[1.0, 1.0], [2.0, 2.0]])).tolist() == [0, 1]


def test_the_front_is_protected_unless_asked_otherwise() -> None:
    line = [[float(i), 10.0 - i] for i in range(10)]
    middle = [4.5, 5.5 - 1e-9]
    assert keep(line, middle)
    decisions = [keep(line[:i] + line[i + 1 :], line[i], protect_front=False) for i in range(10)]
    # an epsilon-net alone keeps the ends of the front and stops most of what no other dominates
    assert decisions[0]
    assert decisions[9]
    assert sum(decisions) <= 3
    assert all(keep(line[:i] + line[i + 1 :], line[i]) for i in range(10))


def test_dominated_trials_within_the_best_third_go_on() -> None:
    recorded = [[0.0, 0.0], *([9.0, 9.0 + i] for i in range(8))]
    assert not keep(recorded[:2], [1.0, 1.0])  # floor(3 / 3) = 1 place, taken
    assert keep(recorded[:5], [1.0, 1.0])  # two places of six


def test_the_feasible_come_before_the_infeasible_and_those_by_their_total_violation() -> None:
    vectors = np.array([[0.0, 0.0], [5.0, 5.0], [1.0, 1.0], [6.0, 6.0]])
    assert order(vectors, 4, np.array([0.2, 0.0, 0.1, 0.0])) == [1, 3, 2, 0]


def test_a_violating_trial_is_not_protected_by_its_vector() -> None:
    recorded = [[5.0, 5.0], [6.0, 6.0], [7.0, 7.0]]
    assert keep(recorded, [0.0, 0.0], violations=[0, 0, 0, 0])
    assert not keep(recorded, [0.0, 0.0], violations=[0, 0, 0, 0.5])
    # where nothing is feasible, the least violation leads
    assert keep(recorded, [9.0, 9.0], violations=[0.3, 0.2, 0.1, 0.05])


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=20), st.randoms())
def test_replaying_a_rung_decides_the_same(values: list[tuple[int, int]], draw: random.Random) -> None:
    live = Rungs()
    for trial, vector in enumerate(values):
        live.record("", 0, trial, live.judge("", 0, trial, vector))
    rebuilt = Rungs()
    for trial, entry in live.table["", 0].items():
        rebuilt.record("", 0, trial, entry)
    assert rebuilt.table == live.table
    for trial in draw.sample(range(len(values)), len(values)):  # a retried trial reports its rungs again
        assert rebuilt.judge("", 0, trial, values[trial]) == live.table["", 0][trial]


def test_trials_are_compared_inside_one_rung_and_one_group_only() -> None:
    rungs = Rungs()
    for trial in range(3):
        rungs.record("theseus", 0, trial, rungs.judge("theseus", 0, trial, [0.0, float(trial)]))
    assert not rungs.judge("theseus", 0, 9, [1.0, 9.0]).kept
    assert rungs.judge("theseus", 1, 9, [1.0, 9.0]).kept
    assert rungs.judge("tinybert", 0, 9, [1.0, 9.0]).kept


def test_judging_records_nothing() -> None:
    rungs = Rungs()
    assert rungs.judge("", 0, 0, [1.0]) == rungs.judge("", 0, 0, [1.0])
    assert rungs.table == {}


def test_a_thousand_entries_are_decided() -> None:
    recorded = np.random.default_rng(0).random((1000, 3))
    assert not keep(recorded, [1.0, 1.0, 1.0])
    assert keep(recorded, [0.0, 0.0, 0.0])

"""Pareto arithmetic against brute force, against Optuna's hypervolume and against its own laws."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from optuna._hypervolume import compute_hypervolume

from compress_search import pareto

MIN, MAX = "minimize", "maximize"


def clouds(dimensions: int, size: int = 12):
    """Points on a coarse grid, so that ties and duplicates are common."""
    shapes = st.tuples(st.integers(1, size), st.just(dimensions))
    return hnp.arrays(np.float64, shapes, elements=st.integers(0, 9).map(float))


any_clouds = st.integers(1, 5).flatmap(clouds)


def counted_cells(points: np.ndarray, reference: np.ndarray) -> float:
    """The volume of integer points counted in unit cells: exact by construction."""
    cells = itertools.product(*(range(int(r)) for r in reference))
    return float(sum(any((p <= cell).all() for p in points) for cell in map(np.array, cells)))


# dominance and the front


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((0.9, 10.0), (0.8, 12.0), True),
        ((0.9, 12.0), (0.8, 10.0), False),
        ((0.9, 10.0), (0.9, 10.0), False),
        ((0.9, 10.0), (0.9, 11.0), True),
    ],
)
def test_dominance_with_mixed_directions(a, b, expected):
    assert pareto.dominates(a, b, [MAX, MIN]) is expected


def test_front_with_mixed_directions():
    points = [(0.90, 10.0), (0.80, 5.0), (0.79, 6.0), (0.95, 30.0), (0.80, 5.0)]
    assert pareto.front(points, [MAX, MIN]) == [0, 1, 3, 4]


@given(any_clouds)
def test_front_equals_its_definition(points):
    directions = [MIN, MAX, MIN, MAX, MIN][: points.shape[1]]
    by_hand = [i for i, p in enumerate(points) if not any(pareto.dominates(q, p, directions) for q in points)]
    assert pareto.front(points, directions) == by_hand


@given(any_clouds, st.randoms(use_true_random=False))
def test_front_does_not_depend_on_the_order(points, random):
    order = list(range(len(points)))
    random.shuffle(order)
    directions = [MIN] * points.shape[1]
    assert sorted(order[i] for i in pareto.front(points[order], directions)) == pareto.front(points, directions)


def test_nothing_has_an_empty_front():
    assert pareto.front([], [MIN, MIN]) == []
    assert pareto.hypervolume([], [1, 1], [MIN, MIN]) == 0.0


@pytest.mark.parametrize(
    ("points", "directions", "message"),
    [
        ([(1.0, float("nan"))], [MIN, MIN], "point 0"),
        ([(1.0, 2.0)], [MIN, "up"], "'up'"),
        ([(1.0, 2.0, 3.0)], [MIN, MIN], "2 objectives"),
    ],
)
def test_bad_points_are_refused_by_name(points, directions, message):
    with pytest.raises(ValueError, match=message):
        pareto.front(points, directions)


# hypervolume


@given(any_clouds)
def test_hypervolume_agrees_with_optuna(points):
    dimensions = points.shape[1]
    reference = np.full(dimensions, 8.0)
    inside = points[(points < reference).all(axis=1)]
    expected = compute_hypervolume(inside, reference) if len(inside) else 0.0
    assert pareto.hypervolume(points, reference, [MIN] * dimensions) == pytest.approx(expected, rel=1e-12)


@given(st.integers(2, 4).flatmap(lambda m: clouds(m, size=6)))
def test_hypervolume_agrees_with_counted_cells(points):
    reference = np.full(points.shape[1], 6.0)
    expected = counted_cells(points, reference)
    assert pareto.hypervolume(points, reference, [MIN] * points.shape[1]) == expected


@pytest.mark.parametrize("dimensions", [2, 3, 4, 5])
def test_hypervolume_agrees_with_optuna_on_fronts_of_real_numbers(dimensions):
    rng = np.random.default_rng(dimensions)
    points = np.abs(rng.normal(size=(25, dimensions)))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    reference = np.full(dimensions, 1.1)
    expected = compute_hypervolume(points, reference)
    assert pareto.hypervolume(points, reference, [MIN] * dimensions) == pytest.approx(expected, rel=1e-12)


@given(clouds(3), hnp.arrays(np.float64, 3, elements=st.integers(0, 9).map(float)))
def test_another_point_never_shrinks_the_hypervolume_and_a_dominated_one_leaves_it(points, point):
    reference, directions = np.full(3, 10.0), [MIN] * 3
    before = pareto.hypervolume(points, reference, directions)
    after = pareto.hypervolume([*points, point], reference, directions)
    if any((p <= point).all() for p in points):
        assert after == pytest.approx(before)
    else:
        assert after > before


@given(clouds(4), st.randoms(use_true_random=False))
def test_hypervolume_does_not_depend_on_the_order_of_points_or_objectives(points, random):
    rows, columns = list(range(len(points))), list(range(4))
    random.shuffle(rows)
    random.shuffle(columns)
    reference = np.array([9.0, 8.0, 7.0, 10.0])
    expected = pareto.hypervolume(points, reference, [MIN] * 4)
    shuffled = pareto.hypervolume(points[np.ix_(rows, columns)], reference[columns], [MIN] * 4)
    assert shuffled == pytest.approx(expected)


@given(clouds(2))
def test_maximising_is_minimising_the_negative(points):
    flipped = points * [1, -1]
    there = pareto.hypervolume(flipped, [9, -9], [MIN, MAX])
    assert there == pareto.hypervolume(points, [9, 9], [MIN, MIN])
    assert pareto.front(flipped, [MIN, MAX]) == pareto.front(points, [MIN, MIN])


def test_points_beyond_the_reference_add_nothing():
    directions, reference = [MAX, MIN], (0.5, 100.0)
    inside = pareto.hypervolume([(0.9, 20.0)], reference, directions)
    assert inside == pytest.approx(0.4 * 80)
    beyond = [(0.9, 20.0), (0.99, 101.0), (0.4, 1.0), (0.5, 1.0)]
    assert pareto.hypervolume(beyond, reference, directions) == pytest.approx(inside)


def test_an_infinite_reference_is_refused():
    with pytest.raises(ValueError, match="finite"):
        pareto.hypervolume([(1.0, 1.0)], [1.0, float("inf")], [MIN, MIN])


# what cannot be told apart


def test_overlap_is_needed_in_every_objective():
    accurate_and_slow = [(0.88, 0.92), (10.0, 11.0)]
    as_good_but_smaller_time = [(0.87, 0.91), (4.0, 5.0)]
    cannot_be_told_from_the_first = [(0.89, 0.93), (10.5, 12.0)]
    mask = pareto.indistinguishable([accurate_and_slow, as_good_but_smaller_time, cannot_be_told_from_the_first])
    assert mask.tolist() == [[True, False, True], [False, True, False], [True, False, True]]


def test_exact_values_that_differ_tell_candidates_apart():
    same_noise = (0.8, 0.9)
    assert not pareto.indistinguishable([[same_noise, (5.0, 5.0)], [same_noise, (5.1, 5.1)]])[0, 1]
    assert pareto.indistinguishable([[same_noise, (5.0, 5.0)], [same_noise, (5.0, 5.0)]])[0, 1]


def test_not_being_told_apart_is_no_equivalence():
    chain = pareto.indistinguishable([[(0.0, 2.0)], [(1.0, 4.0)], [(3.0, 5.0)]])
    assert chain.tolist() == [[True, True, False], [True, True, True], [False, True, True]]
    assert pareto.indistinguishable([]).shape == (0, 0)


@given(st.lists(st.tuples(*[st.tuples(st.integers(0, 9), st.integers(0, 3))] * 2), min_size=1, max_size=8))
def test_candidates_are_alike_exactly_if_some_value_could_be_the_truth_of_both(corners):
    intervals = np.array([[(low, low + width) for low, width in box] for box in corners], dtype=float)
    mask = pareto.indistinguishable(intervals)
    for i, j in itertools.product(range(len(corners)), repeat=2):
        low, high = np.maximum(*intervals[[i, j], :, 0]), np.minimum(*intervals[[i, j], :, 1])
        assert mask[i, j] == (low <= high).all()


def test_an_inverted_interval_is_refused():
    with pytest.raises(ValueError, match=r"\[2.0, 1.0\]"):
        pareto.indistinguishable([[(2.0, 1.0)]])


# the recommendation

MODELS = [(0.92, 40.0), (0.91, 20.0), (0.88, 12.0), (0.60, 10.0), (0.90, 35.0)]
DIRECTIONS = [MAX, MIN]


def test_with_an_accuracy_bound_the_fastest_feasible_is_recommended():
    feasible = [accuracy >= 0.85 for accuracy, _ in MODELS]
    assert pareto.recommend(MODELS, DIRECTIONS, feasible=feasible, bounded=[True, False]) == 2


def test_with_a_latency_bound_the_most_accurate_feasible_is_recommended():
    feasible = [latency <= 30 for _, latency in MODELS]
    assert pareto.recommend(MODELS, DIRECTIONS, feasible=feasible, bounded=[False, True]) == 1


def test_with_both_bounded_the_last_objective_decides():
    feasible = [accuracy >= 0.85 and latency <= 30 for accuracy, latency in MODELS]
    assert pareto.recommend(MODELS, DIRECTIONS, feasible=feasible, bounded=[True, True]) == 2


def test_without_bounds_the_knee_is_recommended_not_an_extreme():
    assert pareto.recommend(MODELS, DIRECTIONS) == 2


def test_a_bound_on_something_else_still_gives_the_knee():
    assert pareto.recommend(MODELS, DIRECTIONS, feasible=[True, True, False, True, True]) == 1


def test_nothing_feasible_recommends_nothing():
    assert pareto.recommend(MODELS, DIRECTIONS, feasible=[False] * 5) is None
    assert pareto.recommend([], DIRECTIONS) is None


@given(clouds(2), st.data())
def test_a_recommendation_is_feasible_and_never_dominated_by_a_feasible_point(points, data):
    feasible = data.draw(st.lists(st.booleans(), min_size=len(points), max_size=len(points)))
    chosen = pareto.recommend(points, DIRECTIONS, feasible=feasible)
    assert (chosen is None) == (not any(feasible))
    if chosen is not None:
        rivals = [p for p, ok in zip(points, feasible, strict=True) if ok]
        assert feasible[chosen]
        assert not any(pareto.dominates(p, points[chosen], DIRECTIONS) for p in rivals)

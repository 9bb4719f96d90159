"""How many units go, from where and when: counts, budgets and schedules."""

from __future__ import annotations

import math
from itertools import pairwise, product

import pytest
import torch
from compress_search_plugins.pruning import allocation
from compress_search_plugins.pruning.allocation import Cut, Ladder
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compress_search import TrialError
from tests.pruning import BASE, parameters

# Totals


@given(st.data())
def test_global_allotment_is_exact_and_keeps_the_most_important(data: st.DataObject) -> None:
    rows, multiple, groups = (data.draw(st.integers(1, n)) for n in (4, 3, 5))
    least = data.draw(st.integers(0, groups)) * multiple
    keep = data.draw(st.integers(rows * least // multiple, rows * groups)) * multiple
    scores = drawn(rows, groups * multiple, data.draw(st.integers(0, 99)))
    counts = allocation.allot(scores, keep, multiple, least)
    mask = allocation.best_units(scores, counts)
    assert mask.sum() == keep == sum(counts)
    assert all(count >= least and count % multiple == 0 for count in counts)
    if multiple == 1:  # a unit that went is less important than any that stayed without being forced to
        forced = allocation.best_units(scores, [least] * rows)
        free, gone = scores[(mask == 1) & (forced == 0)], scores[mask == 0]
        assert not len(free) or not len(gone) or gone.max() <= free.min()


def drawn(rows: int, units: int, seed: int) -> Tensor:
    return torch.rand(rows, units, generator=torch.Generator().manual_seed(seed))


def test_masked_units_stay_masked_whatever_their_score() -> None:
    mask, scores = torch.tensor([[1.0, 0, 1, 1]]), torch.tensor([[0.3, 9.0, 0.1, 0.2]])
    assert allocation.shrink(mask, scores, 2, 1, 1, even=False).tolist() == [[1, 0, 0, 1]]


def test_an_even_spread() -> None:
    assert allocation.spread(8, 4) == [2, 2, 2, 2]
    assert allocation.spread(40, 3, 8) == [16, 16, 8]


def test_permuting_units_permutes_the_mask() -> None:
    scores, order = drawn(1, 8, 0), torch.randperm(8, generator=torch.Generator().manual_seed(1))
    kept = allocation.best_units(scores, [3])
    assert torch.equal(allocation.best_units(scores[:, order], [3]), kept[:, order])


# Budgets


def cost(heads: int, neurons: int) -> float:
    return 3.0 * heads + 1.25 * neurons


@given(st.integers(0, 200), st.floats(0.2, 1.0), st.sampled_from([1, 2, 4]), st.booleans())
def test_no_unit_that_still_fits_the_budget_is_left_out(seed: int, part: float, multiple: int, even: bool) -> None:
    heads, neurons = drawn(3, 4, seed), drawn(3, 8, seed + 1)
    full = 3 * cost(4, 8)
    uses = torch.ones(3), torch.ones(3)
    ladders = Ladder.of(heads, 1, 0, even=even), Ladder.of(neurons, multiple, 0, even=even)
    found = allocation.within_budget(*ladders, uses, cost, part * full)
    assert found is not None
    counts = list(zip(*found, strict=True))
    spent = sum(cost(*count) for count in counts)
    assert spent <= part * full + 1e-6
    rows = 3 if even else 1  # an even ladder adds to all rows at once
    if any(head < 4 for head, _ in counts):
        assert spent + rows * cost(1, 0) > part * full - 1e-6
    if any(neuron < 8 for _, neuron in counts):
        assert spent + rows * cost(0, multiple) > part * full - 1e-6


@given(st.integers(0, 50), st.floats(0.25, 0.9))
def test_the_search_finds_what_trying_every_pair_of_rungs_finds(seed: int, part: float) -> None:
    ladders = Ladder.of(drawn(2, 3, seed), 1, 1), Ladder.of(drawn(2, 4, seed + 1), 2, 2)
    uses, cap = (torch.tensor([1, 2]), torch.tensor([2, 1])), part * 3 * cost(3, 4)

    def price(i: int, j: int) -> float:
        heads, neurons = ladders[0].counts[i] * uses[0], ladders[1].counts[j] * uses[1]
        return cost(int(heads.sum()), int(neurons.sum()))

    pairs = product(range(len(ladders[0].counts)), range(len(ladders[1].counts)))
    best = max(
        (float(ladders[0].importance[i] + ladders[1].importance[j]) for i, j in pairs if price(i, j) <= cap),
        default=None,
    )
    found = allocation.within_budget(*ladders, uses, cost, cap)
    if best is None:
        assert found is None
    else:
        assert found is not None
        kept = [
            float(ladder.importance[ladder.counts.tolist().index(counts)])
            for ladder, counts in zip(ladders, found, strict=True)
        ]
        assert sum(kept) == pytest.approx(best)


def test_units_of_a_shared_row_cost_what_all_its_uses_cost() -> None:
    ladders = Ladder.of(torch.tensor([[3.0, 2.0]]), 1, 0), Ladder.of(torch.tensor([[1.0, 1.0]]), 1, 0)
    once, twice = (
        allocation.within_budget(*ladders, (torch.tensor([n]), torch.tensor([n])), cost, 8.5) for n in (1, 2)
    )
    assert (once, twice) == (([2], [2]), ([1], [1]))


def test_multiply_accumulates_are_those_of_the_subject() -> None:
    for length in (16, 128):
        assert 12 * allocation.macs_per_layer(BASE, length)(12, 3072) == BASE.macs(length)
    per_head = 3 * 20 * 768 * 64 + 2 * 20**2 * 64 + 20 * 64 * 768
    layer = allocation.macs_per_layer(BASE, 20)
    assert layer(5, 100) - layer(4, 100) == per_head
    assert layer(5, 101) - layer(5, 100) == 2 * 20 * 768


@given(st.floats(0.15, 1.0), st.floats(0, 0.75), st.floats(0, 0.5))
def test_a_forecast_under_a_budget_keeps_to_it(target: float, layer_ratio: float, hidden_ratio: float) -> None:
    params = parameters(BASE, budget="macs", target=target, layer_ratio=layer_ratio, hidden_ratio=hidden_ratio)
    cut = Cut.of(BASE, params)
    left = BASE.having(
        layers=cut.layers, heads=cut.heads / cut.layers, intermediate=cut.neurons / cut.layers, hidden=cut.hidden
    )
    assert left.macs(64) <= params["target"] * BASE.macs(64) * (1 + 1e-6)


def test_a_target_below_the_least_shape_becomes_what_that_shape_comes_to() -> None:
    small = BASE.having(heads=2, intermediate=64, layers=1)
    params = parameters(small, budget="macs", target=0.05)
    assert 0.4 < params["target"] < 0.6
    assert parameters(small, budget="macs", target=0.1) == params


# Schedules


def test_cubic_schedule_starts_ends_rises_and_has_done_seven_eighths_by_half() -> None:
    def sparsity(t: float) -> float:
        return allocation.cubic_sparsity(t, 10, 50, 0.1, 0.9)

    assert [sparsity(t) for t in (0, 10)] == pytest.approx([0.1, 0.1])
    assert [sparsity(t) for t in (50, 60)] == [0.9, 0.9]
    assert sparsity(30) == pytest.approx(0.1 + 7 / 8 * 0.8)
    assert all(a <= b for a, b in pairwise([sparsity(t) for t in range(70)]))
    assert allocation.cubic_sparsity(0.5, 0, 1) == pytest.approx(7 / 8)


@given(st.floats(0, 0.95), st.integers(1, 20))
def test_iterative_schedule_takes_equal_parts_of_what_is_left(final: float, steps: int) -> None:
    left = [1 - allocation.sparsity("iterative", step / steps, final) for step in range(steps + 1)]
    assert (left[0], left[-1]) == (1, 1 - final)
    assert [after / before for before, after in pairwise(left)] == pytest.approx([left[1]] * steps)


@pytest.mark.parametrize("schedule", ["cubic", "iterative", "one_shot"])
def test_every_schedule_goes_from_nothing_to_all(schedule: str) -> None:
    assert allocation.sparsity(schedule, 0.0, 0.6) == 0
    assert allocation.sparsity(schedule, 1.0, 0.6) == 0.6


# Rounding


def test_ratios_are_the_part_removed_rounded_to_whole_structures() -> None:
    params = parameters(BASE, head_ratio=0.3, ffn_ratio=0.51, layer_ratio=0.3, hidden_ratio=0.3, scope="per_layer")
    assert params["layer_ratio"] == pytest.approx(4 / 12)
    assert params["head_ratio"] == pytest.approx(4 / 12)
    assert params["ffn_ratio"] == pytest.approx(1 - 1536 / 3072)  # 1505.28 are kept, in groups of 32
    assert params["hidden_ratio"] == pytest.approx(1 - 544 / 768)  # 537.6 are kept, in groups of 32
    assert Cut.of(BASE, params) == Cut(8, 8 * 8, 8 * 1536, 544, 32, 32, 1)


@pytest.mark.parametrize("scope", ["global", "global_layer_normalised"])
def test_a_global_scope_rounds_over_all_layers_at_once(scope: str) -> None:
    params = parameters(BASE, head_ratio=0.3, ffn_ratio=0.505, scope=scope)
    assert Cut.of(BASE, params).heads == 144 - 43
    assert Cut.of(BASE, params).neurons == 32 * math.ceil(0.495 * 3072 * 12 / 32)


@pytest.mark.parametrize("name", ["head_ratio", "ffn_ratio", "layer_ratio", "hidden_ratio"])
@pytest.mark.parametrize("value", [1.0, -0.1, float("nan")])
def test_a_ratio_that_leaves_nothing_is_refused_with_what_is_allowed(name: str, value: float) -> None:
    with pytest.raises(TrialError, match=rf"{name} is {value:g}, .* expected a number from 0 to below 1"):
        parameters(BASE, **{name: value})

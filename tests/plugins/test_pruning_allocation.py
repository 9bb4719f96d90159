"""How many units go, from where and when: counts, budgets and schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch
from compress_search_plugins.pruning import allocation, cuts
from compress_search_plugins.pruning.allocation import Allocation, Blocks, within_budget
from compress_search_plugins.pruning.cuts import Cut
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


def blocks(
    scores: Tensor, price: Callable[[int], float], multiple: int = 1, least: int = 1, uses: Sequence[int] = ()
) -> Blocks:
    rows = len(scores)
    return Blocks(scores, torch.tensor(uses or [1] * rows), price, torch.zeros(rows), multiple, least)


def of_heads(scores: Tensor, least: int = 1, uses: Sequence[int] = (), fixed: float = 0.0) -> Blocks:
    return blocks(scores, lambda count: 3.0 * count + fixed * (count > 0), 1, least, uses)


def of_neurons(
    scores: Tensor, multiple: int = 1, least: int = 1, uses: Sequence[int] = (), fixed: float = 0.0
) -> Blocks:
    return blocks(scores, lambda count: 1.25 * count + fixed * (count > 0), multiple, least, uses)


def counts_of(found: Allocation | None) -> tuple[list[int], list[int]]:
    assert found is not None
    return found.counts[0].tolist(), found.counts[1].tolist()


@given(st.integers(0, 200), st.floats(0.2, 1.0), st.sampled_from([1, 2, 4]), st.booleans())
def test_no_unit_that_still_fits_the_budget_is_left_out(seed: int, part: float, multiple: int, even: bool) -> None:
    full = 3 * cost(4, 8)
    kinds = of_heads(drawn(3, 4, seed), 0), of_neurons(drawn(3, 8, seed + 1), multiple, 0)
    found = within_budget(*kinds, part * full, even=even)
    counts = list(zip(*counts_of(found), strict=True))
    spent = sum(cost(*count) for count in counts)
    assert found is not None
    assert found.cost == pytest.approx(spent)
    assert spent <= part * full + 1e-6
    rows = 3 if even else 1  # an even ladder adds to all rows at once
    if any(head < 4 for head, _ in counts):
        assert spent + rows * cost(1, 0) > part * full - 1e-6
    if any(neuron < 8 for _, neuron in counts):
        assert spent + rows * cost(0, multiple) > part * full - 1e-6


@given(st.integers(0, 50), st.floats(0.25, 0.9))
def test_the_search_finds_what_trying_every_pair_of_rungs_finds(seed: int, part: float) -> None:
    kinds = of_heads(drawn(2, 3, seed), 1, [1, 2]), of_neurons(drawn(2, 4, seed + 1), 2, 2, [2, 1])
    ladders = [kind.ladder(kind.alive, even=False) for kind in kinds]
    cap = part * 3 * cost(3, 4)
    pairs = product(range(len(ladders[0].counts)), range(len(ladders[1].counts)))
    best = max(
        (
            float(ladders[0].importance[i] + ladders[1].importance[j])
            for i, j in pairs
            if kinds[0].costs(ladders[0].counts[i]).sum() + kinds[1].costs(ladders[1].counts[j]).sum() <= cap
        ),
        default=None,
    )
    found = within_budget(*kinds, cap)
    assert (None if found is None else found.importance) == (best if best is None else pytest.approx(best))


def test_units_of_a_shared_row_cost_what_all_its_uses_cost() -> None:
    heads, neurons = torch.tensor([[3.0, 2.0]]), torch.tensor([[1.0, 1.0]])
    once, twice = (within_budget(of_heads(heads, 0, [n]), of_neurons(neurons, 1, 0, [n]), 8.5) for n in (1, 2))
    assert (counts_of(once), counts_of(twice)) == (([2], [2]), ([1], [1]))


def test_what_is_masked_already_does_not_come_back() -> None:
    neurons = torch.tensor([[0.3, -math.inf, 0.1, 0.2], [-math.inf] * 4])
    found = counts_of(within_budget(of_heads(drawn(2, 2, 0)), of_neurons(neurons), 100))
    assert found == ([2, 2], [3, 0])


# Whole blocks


def test_a_block_goes_when_what_it_costs_keeps_more_elsewhere() -> None:
    """Three attentions, each of which costs 10 before its first head: two of them pay for all that matters."""
    heads = torch.tensor([[5.0, 4.0], [5.0, 4.0], [0.2, 0.1]])
    neurons = of_neurons(torch.ones(3, 1), fixed=0.0)
    kinds, cap = (of_heads(heads, fixed=10.0), neurons), 3 * 1.25 + 2 * 16 + 1.0
    assert within_budget(*kinds, cap) is None, "one head of each costs 39"
    assert counts_of(within_budget(*kinds, cap, whole_blocks=True)) == ([2, 2, 0], [1, 1, 1])
    assert counts_of(within_budget(*kinds, 100, whole_blocks=True)) == ([2, 2, 2], [1, 1, 1]), (
        "there is room for all"
    )


def test_a_block_whose_units_matter_more_together_than_one_by_one_stays() -> None:
    heads, cap = torch.tensor([[5.0, 4.0], [5.0, 4.0], [0.2, 0.1]]), 3 * 1.25 + 2 * 16 + 1.0
    kinds = of_heads(heads, fixed=10.0), of_neurons(torch.ones(3, 1))
    together = replace(kinds[0], beyond=torch.tensor([0.0, 0.0, 9.0]))
    found = within_budget(together, kinds[1], cap, whole_blocks=True)
    assert counts_of(found) in ((([2, 0, 2]), [1, 1, 1]), ([0, 2, 2], [1, 1, 1]))
    assert found is not None
    assert found.importance == pytest.approx(5 + 4 + 0.3 + 3)


@given(st.integers(0, 200), st.floats(0.05, 1.0), st.floats(0, 20), st.floats(0, 20))
def test_whole_blocks_only_ever_keep_more_within_the_budget(
    seed: int, part: float, attention: float, feed_forward: float
) -> None:
    kinds = (
        of_heads(drawn(3, 4, seed), fixed=attention),
        of_neurons(drawn(3, 8, seed + 1), 2, 2, fixed=feed_forward),
    )
    full = float(sum(kind.costs(torch.full((3,), kind.scores.shape[1])).sum() for kind in kinds))
    cap, plain = part * full, within_budget(*kinds, part * full)
    found = within_budget(*kinds, cap, whole_blocks=True)
    if found is None:
        assert plain is None
        assert cap < sum(kind.price(kind.least) for kind in kinds)
        return
    assert found.cost <= cap * (1 + 1e-9)
    assert plain is None or found.importance >= plain.importance
    for kind, counts in zip(kinds, found.counts, strict=True):
        assert counts.max() > 0, "one of each kind stays"
        assert ((counts == 0) | (counts >= kind.least)).all()
        assert (counts % kind.multiple == 0).all()


@given(st.integers(0, 60), st.floats(0.1, 0.9), st.floats(0, 12))
def test_no_single_block_that_goes_as_well_would_keep_more(seed: int, part: float, fixed: float) -> None:
    kinds = of_heads(drawn(3, 3, seed), fixed=fixed), of_neurons(drawn(3, 4, seed + 1), fixed=fixed)
    cap = part * float(sum(kind.costs(torch.full((3,), kind.scores.shape[1])).sum() for kind in kinds))
    found = within_budget(*kinds, cap, whole_blocks=True)
    for kind, row in product(range(2), range(3)) if found else ():
        left = [kinds[0].scores.clone(), kinds[1].scores.clone()]
        for each, counts in zip(left, found.counts, strict=True):
            each[counts == 0] = -math.inf
        left[kind][row] = -math.inf
        if all(scores.isfinite().any() for scores in left):
            without = [replace(kind, scores=scores) for kind, scores in zip(kinds, left, strict=True)]
            other = within_budget(*without, cap)
            assert other is None or other.importance <= found.importance + 1e-9


def test_multiply_accumulates_are_those_of_the_subject() -> None:
    for length in (16, 128):
        assert 12 * cuts.macs_per_layer(BASE, length)(12, 3072) == BASE.macs(length)
    per_head = 3 * 20 * 768 * 64 + 2 * 20**2 * 64 + 20 * 64 * 768
    layer = cuts.macs_per_layer(BASE, 20)
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


@given(st.floats(0.05, 1.0), st.sampled_from([0, 1, 3]), st.booleans())
def test_a_forecast_keeps_to_any_cost_that_something_is_small_enough_for(
    part: float, min_heads: int, whole_blocks: bool
) -> None:
    def price(heads: int, neurons: int) -> float:
        return 0.1 + 2 * (heads > 0) + heads + (neurons > 0) + neurons / 64

    cut = Cut(6, 0, 0, 768, 64, 64, max(min_heads, int(whole_blocks)), whole_blocks)
    cap = part * 6 * price(12, 3072)
    shapes = cuts.forecast(price, cap, (12, 3072), cut)
    assert (shapes is None) == (cut.least(price) > cap)
    if shapes:
        assert len(shapes) == 6
        assert sum(price(*shape) for shape in shapes) <= cap * (1 + 1e-9)
        assert whole_blocks or len(set(shapes)) == 1


def test_the_least_part_is_that_of_the_smallest_network_at_its_dearest_length() -> None:
    small = BASE.having(heads=2, intermediate=64, layers=2)
    kept = parameters(small, budget="macs", target=0.5, whole_blocks=False)
    block = small.having(heads=1, intermediate=32)
    ratios = [block.macs(length) / small.macs(length) for length in range(1, 513)]
    assert cuts.least_part(small, kept) == pytest.approx(max(ratios))
    assert cuts.least_part(small, kept | {"whole_blocks": True}) == pytest.approx(max(ratios) / 2)


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

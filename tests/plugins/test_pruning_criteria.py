"""What matters: importance read off the network, masks that are learned, and scales found by least squares."""

from __future__ import annotations

import math

import pytest
import torch
from compress_search_plugins.pruning import importance, rescale
from compress_search_plugins.pruning.allocation import best_units
from compress_search_plugins.pruning.gates import (
    HardConcrete,
    Lagrangian,
    Movement,
    hard_concrete,
    open_probability,
)
from compress_search_plugins.pruning.layer_dropping import STRATEGIES, kept_layers, most_changing_layers, similarity
from compress_search_plugins.pruning.masks import Masks, Units, remove_masked
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compress_search import Candidate
from compress_search.encoders import layers, parts, share_parts
from compress_search.testing import tiny_batches, tiny_candidate, tiny_context
from tests.pruning import FAMILIES, inputs, logits

# Importance


def gradients(candidate: Candidate, batches: int = 1) -> tuple[Masks, Units]:
    masks, context = Masks(candidate.network), tiny_context(candidate)
    given = list(tiny_batches(candidate, examples=8 * batches))
    return masks, importance.mask_gradients(candidate.network, masks, given, context.task_loss)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_that_says_nothing_has_no_taylor_score(family: str) -> None:
    candidate = tiny_candidate(family, layers=2)
    view = parts(layers(candidate.network)[1])
    with torch.no_grad():
        view.attention_output.weight[:, view.head_dim : 2 * view.head_dim] = 0
        view.down.weight[:, 5] = 0
    scores = importance.taylor(gradients(candidate)[1])
    assert scores.heads[1, 1] == 0
    assert scores.neurons[1, 5] == 0
    assert scores.heads.count_nonzero() == scores.heads.numel() - 1


def test_fisher_is_the_square_of_taylor_for_one_batch_and_a_sum_over_several() -> None:
    candidate = tiny_candidate(layers=2)
    _, single = gradients(candidate)
    for taylor, fisher in zip(importance.taylor(single), importance.fisher(single), strict=True):
        torch.testing.assert_close(fisher, taylor.square())
        assert fisher.min() >= 0
    _, several = gradients(candidate, 3)
    each = [importance.fisher(Units(*(kind[number][None] for kind in several))).neurons for number in range(3)]
    torch.testing.assert_close(importance.fisher(several).neurons, each[0] + each[1] + each[2])


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_taylor_is_the_change_of_the_loss_to_first_order(kind: int) -> None:
    candidate = tiny_candidate(layers=2)
    masks, found = gradients(candidate)
    context, batch = tiny_context(candidate), next(tiny_batches(candidate, examples=8))
    scores, losses = importance.taylor(found)[kind], []
    unit = int(scores[0].argmax())
    for value in (0.99, 1.01):
        masks.units[kind][0, unit] = value
        losses.append(context.task_loss(candidate.network, batch).item())
    assert abs(losses[1] - losses[0]) / 0.02 == pytest.approx(scores[0, unit].item(), rel=0.02)


def test_importance_of_a_shared_block_is_of_all_its_uses_at_once() -> None:
    """The gradient of the one variable is the sum over the layers that use it, Fisher information its square."""
    shared = tiny_candidate(layers=2)
    share_parts(shared.network, ("query", "key", "value", "attention_output", "up", "down"), {1: 0})
    apart = tiny_candidate(layers=2)
    apart.network.load_state_dict(shared.network.state_dict())
    (_, one), (_, two) = gradients(shared, 3), gradients(apart, 3)
    for together, each in zip(one[:2], two[:2], strict=True):
        assert (together.shape[1], each.shape[1]) == (1, 2)
        torch.testing.assert_close(together, each.sum(1, keepdim=True), rtol=1e-4, atol=1e-6)
    summed = Units(*(each.sum(1, keepdim=True) for each in two))
    torch.testing.assert_close(importance.fisher(one).heads, importance.fisher(summed).heads, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("criterion", ["taylor", "fisher"])
def test_a_block_has_the_importance_of_one_mask_on_all_its_units(criterion: str) -> None:
    candidate = tiny_candidate(layers=2)
    masks, found = gradients(candidate, 2)
    whole = importance.of_blocks(criterion, found)
    loss, given = tiny_context(candidate).task_loss, list(tiny_batches(candidate, examples=16))
    slopes = []
    for batch in given:
        losses = []
        for value in (0.999, 1.001):
            masks.units.heads[1] = value
            losses.append(loss(candidate.network, batch).item())
        slopes.append((losses[1] - losses[0]) / 0.002)
    expected = sum(map(abs, slopes)) / 2 if criterion == "taylor" else sum(slope**2 for slope in slopes)
    assert whole[0][1].item() == pytest.approx(expected, rel=0.05)


def test_units_that_stand_in_for_each_other_make_their_block_matter_more_than_they_do() -> None:
    alike, opposed = torch.tensor([[1.0, 1.0], [2.0, 2.0]]), torch.tensor([[1.0, -1.0], [2.0, -2.0]])
    heads = torch.stack([alike, opposed], 1)  # (batches, rows, units)
    found = Units(heads, heads, heads)
    blocks, _ = importance.of_blocks("fisher", found)
    assert blocks.tolist() == [4 + 16, 0]
    scores = importance.fisher(found).heads  # 5 each, 20 in all, as the blocks have
    assert importance.beyond_units(scores, blocks).tolist() == [10, 0]
    scores[1, 0] = -math.inf
    assert importance.beyond_units(scores, blocks).tolist() == [5, 0]


def test_gradients_leave_mode_weights_and_gradients_alone() -> None:
    candidate = tiny_candidate(layers=2)
    candidate.network.train()
    masks, _ = gradients(candidate)
    assert candidate.network.training
    assert all(parameter.grad is None for parameter in candidate.network.parameters())
    assert not any(mask.requires_grad for mask in masks.units)


@pytest.mark.parametrize("criterion", ["magnitude", "taylor", "fisher"])
def test_permuting_heads_permutes_their_scores_and_what_is_kept(criterion: str) -> None:
    candidate, order = tiny_candidate(layers=2), torch.tensor([2, 0, 3, 1])
    permuted = candidate.copy()
    view = parts(layers(permuted.network)[0])
    rows = (order[:, None] * view.head_dim + torch.arange(view.head_dim)).flatten()
    with torch.no_grad():
        for linear in (view.query, view.key, view.value):
            linear.weight.copy_(linear.weight[rows])
            linear.bias.copy_(linear.bias[rows])
        view.attention_output.weight.copy_(view.attention_output.weight[:, rows])

    def scores(of: Candidate) -> Tensor:
        if criterion == "magnitude":
            return importance.magnitude(of.network, Masks(of.network)).heads[0]
        return getattr(importance, criterion)(gradients(of)[1]).heads[0]  # type: ignore[no-any-return]

    torch.testing.assert_close(scores(permuted), scores(candidate)[order], rtol=1e-3, atol=1e-7)
    kept = best_units(scores(candidate)[None], [2])[0]
    assert torch.equal(best_units(scores(permuted)[None], [2])[0], kept[order])


def test_magnitude_is_the_norm_of_a_units_weights() -> None:
    candidate = tiny_candidate(layers=2)
    view = parts(layers(candidate.network)[1])
    head = slice(view.head_dim, 2 * view.head_dim)
    weights = [m.weight[head] for m in (view.query, view.key, view.value)] + [
        view.attention_output.weight[:, head].T
    ]
    scores = importance.magnitude(candidate.network, Masks(candidate.network))
    flat = torch.cat([w.flatten() for w in weights])
    torch.testing.assert_close(scores.heads[1, 1], flat.norm() / len(flat) ** 0.5)
    torch.testing.assert_close(scores.neurons[1, 3], view.up.weight[3].norm() * view.down.weight[:, 3].norm())
    assert scores.hidden.shape == (1, 32)


def test_normalised_scores_have_no_scale_of_their_layer() -> None:
    scores = Units(*(torch.tensor([[3.0, 4.0], [0.0, 0.0]]) for _ in range(3)))
    assert importance.normalised(scores).heads.tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [0, 0]]


@given(st.integers(0, 200), st.integers(2, 8), st.data())
def test_rearranging_keeps_the_count_and_never_loses(seed: int, units: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(5, 2, units, generator=generator, dtype=torch.float64)
    mask = best_units(found.square().sum(0), [data.draw(st.integers(0, units)) for _ in range(2)])

    def together(mask: Tensor) -> Tensor:
        return (found * (1 - mask)).sum(2).square().sum(0)

    better = importance.rearranged(mask, found)
    assert better.sum(1).tolist() == mask.sum(1).tolist()
    assert (together(better) <= together(mask) + 1e-9).all()


def test_rearranging_prunes_what_stands_in_for_each_other() -> None:
    """Units 0 and 1 hurt little alone and much together; 2 undoes 0."""
    found = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.1, 0.0], [5.0, 5.0]]).T[:, None]
    mask = best_units(found.square().sum(0), [2])
    assert mask.tolist() == [[0, 0, 1, 1]]
    assert importance.rearranged(mask, found)[0].tolist() in ([1, 0, 0, 1], [0, 1, 0, 1])


# Learned masks


def ones() -> Units:
    return Units(torch.ones(2, 4), torch.ones(2, 6), torch.ones(1, 8))


def test_movement_keeps_the_best_and_hands_gradients_to_masked_units_too() -> None:
    movement = Movement(ones())
    with torch.no_grad():
        movement.scores.heads[0].copy_(torch.tensor([0.3, -0.1, 0.5, 0.0]))
    masks = movement.masks(lambda scores: Units(*(best_units(s, [2] * len(s)) for s in scores)))
    assert masks.heads[0].tolist() == [1, 0, 1, 0]
    (masks.heads[0] * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert movement._raw[0].grad is not None
    assert movement._raw[0].grad[:4].tolist() == [1, 2, 3, 4]


def test_hard_concrete_is_zero_and_one_as_often_as_the_closed_form_says() -> None:
    uniform = (torch.arange(200_000) + 0.5) / 200_000
    for alpha in (-3.0, -0.5, 0.0, 2.0):
        gates = hard_concrete(torch.tensor(alpha), uniform)
        is_open = open_probability(torch.tensor(alpha))
        assert (gates > 0).float().mean().item() == pytest.approx(is_open.item(), abs=1e-3)
        assert gates.min() >= 0
        assert gates.max() <= 1
        closed_form = torch.sigmoid(torch.tensor(alpha - 2 / 3 * math.log(0.1 / 1.1))).item()
        assert is_open.item() == pytest.approx(closed_form)


def test_gates_of_a_block_and_of_its_units_multiply_and_stay_within_bounds() -> None:
    gates = HardConcrete(ones(), (True, True, False), seed=0)
    for units in (gates.sample(), gates.expected(), gates.settled()):
        assert [tuple(unit.shape) for unit in units] == [(2, 4), (2, 6), (1, 8)]
        assert (units.hidden == 1).all()
    with torch.no_grad():
        gates._moved["attention"].fill_(-100)
        gates._moved["heads"].fill_(100)
    gates.hold(steps=300)
    assert gates.stretch == 10
    both = math.log(1e-2)
    assert gates.expected().heads.mean().item() == pytest.approx(
        (open_probability(torch.tensor(both)) * open_probability(torch.tensor(-both))).item()
    )


def test_multipliers_climb_while_the_gap_descends() -> None:
    penalty, expected = Lagrangian(1, torch.device("cpu")), torch.tensor([0.2], requires_grad=True)
    with torch.no_grad():
        penalty._first.fill_(-2.0)
        penalty._second.fill_(3.0)
    value = penalty(expected, torch.tensor([0.5]))
    assert value.item() == pytest.approx(-2 * -0.3 + 3 * 0.09)
    value.backward()
    assert penalty._first.grad is not None
    assert penalty._first.grad.item() == pytest.approx(0.3)  # descending on it raises λ₁·(ŝ − t)
    assert expected.grad is not None
    assert expected.grad.item() == pytest.approx(-2 + 2 * 3 * -0.3)


# Least squares


def test_normal_equations_are_those_of_the_contributions() -> None:
    torch.manual_seed(0)
    x, w, missing = torch.randn(7, 6).double(), torch.randn(5, 6).double(), torch.randn(7, 5).double()
    contributions = torch.stack([x[:, u : u + 2] @ w[:, u : u + 2].T for u in (0, 2, 4)], -1).flatten(
        0, 1
    )  # (35, 3)
    gram, moment = rescale.normal_equations(x, w, missing, width=2)
    torch.testing.assert_close(gram, contributions.T @ contributions)
    torch.testing.assert_close(moment, contributions.T @ missing.flatten())


@given(st.integers(0, 99), st.integers(1, 6), st.integers(1, 3))
def test_scales_never_leave_more_missing_than_no_scales(seed: int, units: int, width: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = (9, units * width), (5, units * width), (9, 5)
    x, w, missing = (torch.randn(*size, generator=generator).double() for size in sizes)
    change = rescale.solve(*rescale.normal_equations(x, w, missing, width))
    left = missing - (x * change.repeat_interleave(width)) @ w.T
    assert left.norm() <= missing.norm() * (1 + 1e-9)


def tuned(candidate: Candidate, masks: Masks) -> Tensor:
    pooled = candidate.subject.task != "token-classification"
    rescale.tune(candidate.network, masks, tiny_batches(candidate, examples=64), pooled=pooled)
    return logits(candidate.network, inputs(candidate, seed=5))


@pytest.mark.parametrize("family", FAMILIES)
def test_tuning_a_whole_network_changes_nothing(family: str) -> None:
    candidate = tiny_candidate(family)
    before, masks = logits(candidate.network, inputs(candidate, seed=5)), Masks(candidate.network)
    torch.testing.assert_close(tuned(candidate, masks), before, rtol=0, atol=1e-4)
    assert all((mask - 1).abs().max() < 1e-3 for mask in masks.units)


@pytest.mark.parametrize("task", ["text-classification", "token-classification"])
@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_tuning_makes_up_for_a_twin_that_went(family: str, task: str) -> None:
    """Two neurons that do the same: without one of them the other has to do twice as much."""
    candidate = tiny_candidate(family, task)
    masks = Masks(candidate.network)
    with torch.no_grad():
        for view in map(parts, layers(candidate.network)):
            view.up.weight[1], view.up.bias[1] = view.up.weight[0], view.up.bias[0]
            view.down.weight[:, 1] = view.down.weight[:, 0]
    whole = logits(candidate.network, inputs(candidate, seed=5))
    masks.units.neurons[:, 1] = 0
    broken = logits(candidate.network, inputs(candidate, seed=5))
    found = tuned(candidate, masks)
    assert (found - whole).abs().max() < 0.1 * (broken - whole).abs().max()
    assert masks.units.neurons[:, 0].median().item() == pytest.approx(2.0, rel=0.05)
    assert (masks.units.heads[0] == 1).all()  # the first attention is what it was
    remove_masked(candidate.network, masks)
    torch.testing.assert_close(logits(candidate.network, inputs(candidate, seed=5)), found, rtol=0, atol=1e-5)


def test_tuning_stops_before_a_scale_that_is_no_correction_any_more() -> None:
    candidate = tiny_candidate(layers=2)
    view, masks = parts(layers(candidate.network)[0]), Masks(candidate.network)
    with torch.no_grad():
        view.up.weight[1], view.up.bias[1] = view.up.weight[0], view.up.bias[0]
        view.down.weight[:, 1] = 20 * view.down.weight[:, 0]
    masks.units.neurons[0, 1:] = 0
    tuned(candidate, masks)
    assert masks.units.neurons[0, 0] == 1
    assert all(mask.unique().tolist() in ([1.0], [0.0, 1.0]) for mask in masks.units)


# Layers


def test_layer_strategies() -> None:
    assert kept_layers(12, 4, "top") == [0, 1, 2, 3, 4, 5, 6, 7]
    assert kept_layers(12, 4, "bottom") == [4, 5, 6, 7, 8, 9, 10, 11]
    assert kept_layers(12, 4, "alternate") == [0, 1, 2, 3, 5, 7, 9, 11]
    # LayerDrop: d ≡ 0 (mod ⌊1/p⌋), d from 1, for p = 1/2, 1/3, 1/4 and 1/12
    assert kept_layers(12, 6, "layer_drop") == [0, 2, 4, 6, 8, 10]
    assert kept_layers(12, 4, "layer_drop") == [0, 1, 3, 4, 6, 7, 9, 10]
    assert kept_layers(12, 3, "layer_drop") == [0, 1, 2, 4, 5, 6, 8, 9, 10]
    assert kept_layers(12, 1, "layer_drop") == list(range(11))
    assert kept_layers(12, 5, "layer_drop") == [0, 1, 2, 4, 6, 8, 10]  # of the six even ones the lowest stays
    assert kept_layers(12, 6, "symmetric") == [0, 1, 2, 9, 10, 11]
    assert kept_layers(5, 2, "symmetric") == [0, 1, 4]


@given(st.integers(1, 24), st.data(), st.sampled_from(STRATEGIES))
def test_every_strategy_keeps_the_right_number_in_order(depth: int, data: st.DataObject, strategy: str) -> None:
    drop = data.draw(st.integers(0, depth - 1))
    kept = kept_layers(depth, drop, strategy)
    assert kept == sorted(set(kept))
    assert len(kept) == depth - drop
    assert set(kept) <= set(range(depth))


def test_the_layer_that_changes_least_goes_first() -> None:
    candidate = tiny_candidate()
    with torch.no_grad():
        view = parts(layers(candidate.network)[2])
        for linear in (view.attention_output, view.down):
            linear.weight.mul_(1e-3)
            linear.bias.zero_()
    batches = list(tiny_batches(candidate, examples=16))
    assert similarity(candidate.network, batches).argmax() == 2
    assert most_changing_layers(candidate.network, batches, 1) == [0, 1, 3]
    assert most_changing_layers(candidate.network, batches, 0) == [0, 1, 2, 3]

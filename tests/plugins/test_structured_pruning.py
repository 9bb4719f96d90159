"""Structured pruning: masks against surgery, importances, allocation, schedule, and the sizes it promises."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from compress_search_plugins import importance, structured_pruning
from compress_search_plugins.importance import Masks, Units
from compress_search_plugins.structured_pruning import Cut, StructuredPruning, kept_layers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from compress_search import Candidate, Subject, TrialError
from compress_search.encoders import layers, parts, subject_of
from compress_search.space import active, defaults
from compress_search.testing import TinyContext, tiny_batches, tiny_candidate, tiny_context

FAMILIES = ("bert", "distilbert", "roberta", "electra")
BASE = Subject("bert", "text-classification", 12, 12, 64, 768, 3072, 30522, 512, 2, 2)


def parameters(subject: Subject, **changes: Any) -> dict[str, Any]:
    """The method's defaults with some values changed, active ones only, made effective."""
    space = StructuredPruning().search_space(subject)
    wanted = {name: dim.default for name, dim in space.items()} | changes
    return dict(
        StructuredPruning().effective(subject, {n: v for n, v in wanted.items() if active(space[n], wanted)})
    )


def inputs(candidate: Candidate, seed: int = 0) -> dict[str, Tensor]:
    batch = next(tiny_batches(candidate, seed=seed))
    return {name: batch[name] for name in candidate.tokenizer.model_input_names}


def logits(network: nn.Module, given: dict[str, Tensor]) -> Tensor:
    result: Tensor = network(**given).logits
    return result


def random_masks(network: nn.Module, seed: int = 0) -> Masks:
    """Masks that differ from layer to layer; every layer keeps its first head and neuron."""
    masks, generator = Masks(network), torch.Generator().manual_seed(seed)
    units = [(torch.rand(mask.shape, generator=generator) < 0.6).float() for mask in masks.units]
    for mask in units:
        mask[:, 0] = 1
    masks.units = Units(*units)
    return masks


# Masks and surgery


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_of_ones_change_nothing_to_the_bit(family: str) -> None:
    candidate = tiny_candidate(family, layers=2)
    before = logits(candidate.network, inputs(candidate))
    Masks(candidate.network)
    assert torch.equal(logits(candidate.network, inputs(candidate)), before)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_surgery_computes_what_the_masked_network_did(family: str, attention: str) -> None:
    candidate = tiny_candidate(family, "token-classification")
    candidate.network.set_attn_implementation(attention)  # type: ignore[operator]
    full = logits(candidate.network, inputs(candidate))
    masks = random_masks(candidate.network)
    kept = [mask.sum().item() for mask in masks.units]
    masked = logits(candidate.network, inputs(candidate))
    structured_pruning.remove_masked(candidate.network, masks)
    torch.testing.assert_close(logits(candidate.network, inputs(candidate)), masked, rtol=0, atol=1e-5)
    assert (masked - full).abs().max() > 1e-2
    views = [parts(layer) for layer in layers(candidate.network)]
    assert [sum(view.heads for view in views), sum(view.neurons for view in views)] == kept


def test_masked_units_get_no_gradient_and_survive_optimizer_steps() -> None:
    candidate = tiny_candidate(layers=2)
    masks = random_masks(candidate.network)
    context = tiny_context(candidate, steps=5)
    context.task_loss(candidate.network, next(tiny_batches(candidate))).backward()
    for index, view in enumerate(map(parts, layers(candidate.network))):
        heads, neurons = (mask[index] == 0 for mask in masks.units)
        rows = heads.repeat_interleave(view.head_dim)
        assert heads.any() or neurons.any()
        for linear in (view.query, view.key, view.value):
            assert linear.weight.grad is not None
            assert linear.weight.grad[rows].abs().sum() == 0
        assert view.attention_output.weight.grad is not None
        assert view.attention_output.weight.grad[:, rows].abs().sum() == 0
        assert view.up.weight.grad is not None
        assert view.up.weight.grad[neurons].abs().sum() == 0
        assert view.up.weight.grad[~neurons].abs().sum() > 0
    context.fit(candidate.network)
    masked = logits(candidate.network, inputs(candidate))
    structured_pruning.remove_masked(candidate.network, masks)
    torch.testing.assert_close(logits(candidate.network, inputs(candidate)), masked, rtol=0, atol=1e-5)


# Importance


def gradients(candidate: Candidate, criterion: str, batches: int = 1) -> tuple[Masks, Units]:
    masks, context = Masks(candidate.network), tiny_context(candidate)
    given = list(tiny_batches(candidate, examples=8 * batches))
    assert len(given) == batches
    scores = importance.from_gradients(candidate.network, masks, given, context.task_loss, criterion)
    return masks, scores


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_that_says_nothing_has_no_taylor_score(family: str) -> None:
    candidate = tiny_candidate(family, layers=2)
    view = parts(layers(candidate.network)[1])
    with torch.no_grad():
        view.attention_output.weight[:, view.head_dim : 2 * view.head_dim] = 0
        view.down.weight[:, 5] = 0
    _, scores = gradients(candidate, "taylor")
    assert scores.heads[1, 1] == 0
    assert scores.neurons[1, 5] == 0
    assert scores.heads.count_nonzero() == scores.heads.numel() - 1


def test_fisher_is_the_square_of_taylor_for_one_batch_and_a_sum_over_several() -> None:
    candidate = tiny_candidate(layers=2)
    for taylor, fisher in zip(gradients(candidate, "taylor")[1], gradients(candidate, "fisher")[1], strict=True):
        torch.testing.assert_close(fisher, taylor.square())
        assert fisher.min() >= 0
    context, masks = tiny_context(candidate), Masks(candidate.network)
    batches = list(tiny_batches(candidate, examples=24))
    single = [
        importance.from_gradients(candidate.network, masks, [batch], context.task_loss, "fisher").neurons
        for batch in batches
    ]
    together = importance.from_gradients(candidate.network, masks, batches, context.task_loss, "fisher").neurons
    torch.testing.assert_close(together, sum(single, torch.zeros_like(single[0])))


def test_taylor_is_the_change_of_the_loss_to_first_order() -> None:
    candidate = tiny_candidate(layers=2)
    masks, scores = gradients(candidate, "taylor")
    context, batch = tiny_context(candidate), next(tiny_batches(candidate, examples=8))
    step, losses = 1e-2, []
    for sign in (-1, 1):
        masks.units.heads[1, 2] = 1 + sign * step
        losses.append(context.task_loss(candidate.network, batch).item())
    slope = abs(losses[1] - losses[0]) / (2 * step)
    assert slope == pytest.approx(scores.heads[1, 2].item(), rel=0.02)


@pytest.mark.parametrize("criterion", ["taylor", "fisher"])
def test_gradient_scores_leave_mode_weights_and_gradients_alone(criterion: str) -> None:
    candidate = tiny_candidate(layers=2)
    candidate.network.train()
    masks, _ = gradients(candidate, criterion)
    assert candidate.network.training
    assert all(parameter.grad is None for parameter in candidate.network.parameters())
    assert not any(mask.requires_grad for mask in masks.units)


@pytest.mark.parametrize("criterion", ["magnitude", "taylor", "fisher"])
def test_permuting_heads_permutes_their_scores(criterion: str) -> None:
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
        found = importance.magnitude(of.network) if criterion == "magnitude" else gradients(of, criterion)[1]
        return found.heads[0]

    torch.testing.assert_close(scores(permuted), scores(candidate)[order], rtol=1e-3, atol=1e-7)
    kept = structured_pruning.best_units(scores(candidate)[None], [2])[0]
    assert torch.equal(structured_pruning.best_units(scores(permuted)[None], [2])[0], kept[order])


def test_magnitude_is_the_norm_of_a_units_weights() -> None:
    candidate = tiny_candidate(layers=2)
    view = parts(layers(candidate.network)[1])
    head = slice(view.head_dim, 2 * view.head_dim)
    weights = [m.weight[head] for m in (view.query, view.key, view.value)] + [
        view.attention_output.weight[:, head].T
    ]
    scores = importance.magnitude(candidate.network)
    flat = torch.cat([w.flatten() for w in weights])
    torch.testing.assert_close(scores.heads[1, 1], flat.norm() / len(flat) ** 0.5)
    torch.testing.assert_close(scores.neurons[1, 3], view.up.weight[3].norm() * view.down.weight[:, 3].norm())


# Allocation


def test_layer_strategies() -> None:
    assert kept_layers(12, 4, "top") == [0, 1, 2, 3, 4, 5, 6, 7]
    assert kept_layers(12, 4, "bottom") == [4, 5, 6, 7, 8, 9, 10, 11]
    assert kept_layers(12, 4, "alternate") == [0, 1, 2, 3, 5, 7, 9, 11]
    assert kept_layers(12, 6, "symmetric") == [0, 1, 2, 9, 10, 11]
    assert kept_layers(5, 2, "symmetric") == [0, 1, 4]


@given(st.integers(1, 24), st.data(), st.sampled_from(structured_pruning.STRATEGIES))
def test_every_strategy_keeps_the_right_number_in_order(depth: int, data: st.DataObject, strategy: str) -> None:
    drop = data.draw(st.integers(0, depth - 1))
    kept = kept_layers(depth, drop, strategy)
    assert kept == sorted(set(kept))
    assert len(kept) == depth - drop
    assert set(kept) <= set(range(depth))


@given(st.data())
def test_global_allotment_is_exact_and_keeps_the_most_important(data: st.DataObject) -> None:
    rows, multiple, groups = (data.draw(st.integers(1, n)) for n in (4, 3, 5))
    least = data.draw(st.integers(1, groups)) * multiple
    keep = data.draw(st.integers(rows * least // multiple, rows * groups)) * multiple
    scores = torch.rand(
        rows, groups * multiple, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    )
    counts = structured_pruning.allot(scores, keep, multiple, least)
    mask = structured_pruning.best_units(scores, counts)
    assert mask.sum() == keep == sum(counts)
    assert all(count >= least and count % multiple == 0 for count in counts)
    if multiple == 1:  # a unit that went is less important than any that stayed without being forced to
        forced = structured_pruning.best_units(scores, [least] * rows)
        free, gone = scores[(mask == 1) & (forced == 0)], scores[mask == 0]
        assert not len(free) or not len(gone) or gone.max() <= free.min()


def test_masked_units_stay_masked_whatever_their_score() -> None:
    mask, scores = torch.tensor([[1.0, 0, 1, 1]]), torch.tensor([[0.3, 9.0, 0.1, 0.2]])
    assert structured_pruning.shrink(mask, scores, 2, 1, 1, even=False).tolist() == [[1, 0, 0, 1]]


def test_an_even_spread() -> None:
    assert structured_pruning.spread(8, 4) == [2, 2, 2, 2]
    assert structured_pruning.spread(40, 3, 8) == [16, 16, 8]


# Schedule


def test_cubic_schedule_starts_ends_rises_and_has_done_seven_eighths_by_half() -> None:
    def sparsity(t: float) -> float:
        return structured_pruning.cubic_sparsity(t, 10, 50, 0.1, 0.9)

    assert [sparsity(t) for t in (0, 10)] == pytest.approx([0.1, 0.1])
    assert [sparsity(t) for t in (50, 60)] == [0.9, 0.9]
    assert sparsity(30) == pytest.approx(0.1 + 7 / 8 * 0.8)
    assert all(a <= b for a, b in pairwise([sparsity(t) for t in range(70)]))
    assert structured_pruning.cubic_sparsity(0.5, 0, 1) == pytest.approx(7 / 8)


# Sizes promised from the subject alone


def test_ratios_are_the_part_removed_rounded_to_whole_structures() -> None:
    params = parameters(BASE, head_ratio=0.3, ffn_ratio=0.51, layer_ratio=0.3, scope="per_layer")
    assert params["layer_ratio"] == pytest.approx(4 / 12)
    assert params["head_ratio"] == pytest.approx(4 / 12)
    assert params["ffn_ratio"] == pytest.approx(1 - 1536 / 3072)  # 1505.28 are kept, in groups of 32
    assert Cut.of(BASE, params) == Cut(8, 8 * 8, 8 * 1536, 32, 1)


def test_a_global_scope_rounds_over_all_layers_at_once() -> None:
    params = parameters(BASE, head_ratio=0.3, ffn_ratio=0.505)
    assert Cut.of(BASE, params).heads == 144 - 43
    assert Cut.of(BASE, params).neurons == 32 * math.ceil(0.495 * 3072 * 12 / 32)


@given(
    st.floats(0, 0.75),
    st.floats(0, 0.9),
    st.floats(0, 0.75),
    st.sampled_from(["global", "per_layer"]),
    st.sampled_from([1, 8, 16, 32, 64]),
    st.integers(1, 12),
)
def test_effective_is_idempotent_and_agrees_with_after(
    head: float, ffn: float, layer: float, scope: str, multiple: int, least: int
) -> None:
    ratios = {"head_ratio": head, "ffn_ratio": ffn, "layer_ratio": layer}
    params = parameters(BASE, **ratios, scope=scope, ffn_multiple=multiple, min_heads=least)
    method = StructuredPruning()
    assert method.effective(BASE, params) == params
    after = method.after(BASE, params)
    assert 1 <= after.layers <= 12
    assert after.heads >= least
    assert after.heads == pytest.approx(12 * (1 - params["head_ratio"]))
    assert after.intermediate == pytest.approx(3072 * (1 - params["ffn_ratio"]))
    assert after.intermediate >= multiple


@pytest.mark.parametrize("name", ["head_ratio", "ffn_ratio", "layer_ratio"])
@pytest.mark.parametrize("value", [1.0, -0.1, float("nan")])
def test_a_ratio_that_leaves_nothing_is_refused_with_what_is_allowed(name: str, value: float) -> None:
    with pytest.raises(TrialError, match=rf"{name} is {value:g}, .* expected a number from 0 to below 1"):
        parameters(BASE, **{name: value})


def test_the_space_never_offers_what_would_leave_no_head_or_layer() -> None:
    small = BASE.having(heads=2, layers=3, intermediate=48)
    space = StructuredPruning().search_space(small)
    assert space["head_ratio"].distribution.high == 0.5  # type: ignore[attr-defined]
    assert space["layer_ratio"].distribution.high == pytest.approx(2 / 3)  # type: ignore[attr-defined]
    assert space["ffn_multiple"].distribution.choices == (1, 8, 16)  # type: ignore[attr-defined]
    least = StructuredPruning().after(small, parameters(small, head_ratio=0.5, ffn_ratio=0.9, layer_ratio=2 / 3))
    assert (least.layers, least.heads, least.intermediate) == (1, 1, 16)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scope", ["per_layer", "global"])
def test_promised_sizes_are_the_measured_ones(family: str, scope: str) -> None:
    candidate = tiny_candidate(family)
    ratios = {"head_ratio": 0.5, "ffn_ratio": 0.6, "layer_ratio": 0.25}
    params = parameters(candidate.subject, **ratios, scope=scope, ffn_multiple=8, schedule="one_shot")
    result = StructuredPruning().apply(candidate, params, tiny_context(candidate))
    measured = subject_of(result.network, candidate.subject.task)
    assert result.subject == StructuredPruning().after(candidate.subject, params)
    assert (measured.layers, measured.heads) == (3, 2.0)
    assert measured.without("non-uniform") == result.subject.without("non-uniform", "lossy")
    assert measured.parameters == sum(p.numel() for p in result.network.parameters())
    assert ("non-uniform" in result.subject.traits) == (scope == "global")
    assert all(view.neurons % 8 == 0 and view.heads >= 1 for view in map(parts, layers(result.network)))


# The method


def recorded(context: TinyContext) -> list[dict[str, Any]]:
    """What each call of the context's fit is asked, and the size of the network it is asked to train."""
    calls, fit = [], context.fit

    def recording(network: nn.Module, **options: Any) -> None:
        calls.append(options | {"parameters": sum(p.numel() for p in network.parameters())})
        fit(network, **options)

    context.fit = recording  # type: ignore[method-assign]
    return calls


@pytest.mark.parametrize("schedule", ["one_shot", "cubic"])
def test_ratio_zero_changes_nothing(schedule: str) -> None:
    candidate = tiny_candidate()
    params = parameters(candidate.subject, head_ratio=0.0, ffn_ratio=0.0, schedule=schedule)
    context = tiny_context(candidate)
    calls = recorded(context)
    result = StructuredPruning().apply(candidate, params, context)
    assert not StructuredPruning().trains(params)
    assert calls == []
    assert result.subject == candidate.subject
    assert torch.equal(logits(result.network, inputs(candidate)), logits(candidate.network, inputs(candidate)))


def test_one_shot_needs_no_training() -> None:
    candidate = tiny_candidate()
    before = {name: value.clone() for name, value in candidate.network.state_dict().items()}
    params = parameters(candidate.subject, schedule="one_shot")
    context = tiny_context(candidate)
    calls = recorded(context)
    result = StructuredPruning().apply(candidate, params, context)
    assert not StructuredPruning().trains(params)
    assert calls == []
    assert result.subject.parameters < candidate.subject.parameters
    assert all(torch.equal(value, before[name]) for name, value in candidate.network.state_dict().items())


@pytest.mark.parametrize("task", ["text-classification", "text-regression", "token-classification"])
@pytest.mark.parametrize("kd", [False, True])
def test_cubic_trains_behind_masks_unscored_then_the_small_network(task: str, kd: bool) -> None:
    candidate = tiny_candidate("bert", task, layers=2)
    params = parameters(candidate.subject, kd=kd, s_cooldown=0.4)
    context = tiny_context(candidate)
    calls = recorded(context)
    result = StructuredPruning().apply(candidate, params, context)
    assert StructuredPruning().trains(params)
    first, second = calls
    assert (first["scored"], second["scored"]) == (False, True)
    assert first["share"] == pytest.approx(0.6)
    assert first["share"] + second["share"] == pytest.approx(1)
    assert first["parameters"] == candidate.subject.parameters
    assert second["parameters"] == result.subject.parameters
    assert not any(module._forward_pre_hooks for module in result.network.modules())


@pytest.mark.parametrize("scope", ["global", "per_layer"])
@pytest.mark.parametrize("criterion", importance.CRITERIA)
def test_gradual_pruning_only_ever_shrinks_and_follows_the_schedule(
    scope: str, criterion: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidate = tiny_candidate()
    alive: list[tuple[float, Units]] = []
    prune = structured_pruning.Pruner.prune

    def watched(pruner: structured_pruning.Pruner, fraction: float) -> None:
        prune(pruner, fraction)
        alive.append((fraction, pruner.masks.units))

    monkeypatch.setattr(structured_pruning.Pruner, "prune", watched)
    how = {"scope": scope, "criterion": criterion, "num_prune_steps": 4, "ffn_multiple": 8}
    params = parameters(candidate.subject, head_ratio=0.5, ffn_ratio=0.75, **how)
    StructuredPruning().apply(candidate, params, tiny_context(candidate, steps=20))
    assert [fraction for fraction, _ in alive] == pytest.approx([1 - (1 - j / 4) ** 3 for j in (1, 2, 3, 4)])
    for (_, before), (_, after) in pairwise(alive):
        assert all((b >= a).all() for b, a in zip(before, after, strict=True))
    assert [mask.sum().item() for mask in alive[-1][1]] == [8, 64]


def test_the_most_important_head_of_a_layer_stays() -> None:
    """A network whose loss hangs on known heads keeps exactly those."""
    candidate = tiny_candidate(layers=2)
    silent = {0: (0, 1, 3), 1: (1, 2)}
    with torch.no_grad():
        for layer, heads in silent.items():
            view = parts(layers(candidate.network)[layer])
            for head in heads:
                view.attention_output.weight[:, head * view.head_dim : (head + 1) * view.head_dim] = 0
    params = parameters(candidate.subject, head_ratio=0.6, ffn_ratio=0.0, schedule="one_shot")
    result = StructuredPruning().apply(candidate, params, tiny_context(candidate))
    assert [parts(layer).heads for layer in layers(result.network)] == [1, 2]
    torch.testing.assert_close(
        logits(result.network, inputs(candidate)), logits(candidate.network, inputs(candidate)), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("schedule", ["one_shot", "cubic"])
def test_a_dry_run_spreads_evenly_and_asks_for_no_gradients(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    candidate = tiny_candidate()
    params = parameters(candidate.subject, head_ratio=0.4, ffn_ratio=0.5, schedule=schedule)

    def refuse(*args: Any) -> Units:
        raise AssertionError("a dry run must not compute gradients")

    monkeypatch.setattr(importance, "from_gradients", refuse)
    result = StructuredPruning().apply(candidate, params, tiny_context(candidate, dry=True))
    heads = [parts(layer).heads for layer in layers(result.network)]
    assert max(heads) - min(heads) <= 1
    assert sum(heads) == 16 - 6
    assert result.subject == StructuredPruning().after(candidate.subject, params)


@pytest.mark.parametrize("criterion", ["taylor", "random"])
def test_the_seed_decides_everything(criterion: str) -> None:
    candidate = tiny_candidate(layers=2)
    params = parameters(candidate.subject, criterion=criterion)
    runs = [
        StructuredPruning().apply(candidate, params, tiny_context(candidate, seed=seed)).network
        for seed in (0, 0, 1)
    ]
    outputs = [logits(network, inputs(candidate)) for network in runs]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize(("trait", "reason"), [("shared", "share weights"), ("non-uniform", "differ in shape")])
def test_layers_that_cannot_be_counted_alike_are_refused(trait: str, reason: str) -> None:
    assert StructuredPruning().unsupported(BASE) is None
    assert reason in (StructuredPruning().unsupported(BASE.having(trait)) or "")


def test_defaults_are_a_legal_recipe_for_any_teacher() -> None:
    for subject in (BASE, BASE.having(layers=1, heads=1, intermediate=7), BASE.having(heads=3, intermediate=100)):
        space = StructuredPruning().search_space(subject)
        assert all(dim.contains(dim.default) for dim in space.values())
        StructuredPruning().after(subject, StructuredPruning().effective(subject, defaults(space)))

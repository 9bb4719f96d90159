"""Structured pruning as a method: the sizes it promises, its phases, and what comes of it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compress_search_plugins.pruning import importance, pruner
from compress_search_plugins.pruning.cuts import Cut
from compress_search_plugins.pruning.gradual import train_while_pruning
from compress_search_plugins.pruning.masks import Units
from compress_search_plugins.pruning.pruner import CRITERIA, Pruner
from compress_search_plugins.pruning.recovery import RECOVERIES, TRAINED
from compress_search_plugins.sharing import Sharing
from compress_search_plugins.structured_pruning import SCOPES, StructuredPruning
from hypothesis import given
from hypothesis import strategies as st

from compress_search.encoders import layers, parts, share_parts, subject_of
from compress_search.runtimes import load_runner
from compress_search.runtimes.lowering import lower
from compress_search.space import defaults, fix_experts
from compress_search.testing import tiny_candidate, tiny_context
from tests.pruning import BASE, FAMILIES, inputs, layer_shapes, logits, parameters, recorded

METHOD = StructuredPruning()
UNTRAINED = {"recover": "none"}


# Sizes promised from the subject alone


@given(
    st.floats(0, 0.75),
    st.floats(0, 0.9),
    st.floats(0, 0.75),
    st.floats(0, 0.5),
    st.sampled_from(SCOPES),
    st.sampled_from([1, 8, 16, 32, 64]),
    st.integers(0, 12),
)
def test_effective_is_idempotent_and_agrees_with_after(
    head: float, ffn: float, layer: float, hidden: float, scope: str, multiple: int, least: int
) -> None:
    ratios = {"head_ratio": head, "ffn_ratio": ffn, "layer_ratio": layer, "hidden_ratio": hidden}
    params = parameters(BASE, **ratios, scope=scope, ffn_multiple=multiple, min_heads=least)
    assert METHOD.effective(BASE, params) == params
    after = METHOD.after(BASE, params)
    assert 1 <= after.layers <= 12
    assert after.heads >= least or params["head_ratio"] == 0
    assert after.heads == pytest.approx(12 * (1 - params["head_ratio"]))
    assert after.intermediate == pytest.approx(3072 * (1 - params["ffn_ratio"]))
    assert after.hidden == pytest.approx(768 * (1 - params["hidden_ratio"]))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"head_ratio": 0.251}, {"head_ratio": 0.252}),
        ({"layer_ratio": 0.0, "layer_strategy": "bottom"}, {}),
        ({"head_ratio": 0.0, "min_heads": 3}, {"head_ratio": 0.0}),
        ({"ffn_ratio": 0.0, "ffn_multiple": 8}, {"ffn_ratio": 0.0, "ffn_multiple": 1}),
        ({"criterion": "magnitude", "calib_examples": 256}, {"criterion": "magnitude"}),
        ({"recover": "none", "schedule": "iterative"}, {"recover": "none"}),
        ({"recover": "none", "learning_rate": 1e-3}, {"recover": "none"}),
        ({"criterion": "movement", "recover": "none"}, {"criterion": "movement", "recover": "finetune"}),
        ({"criterion": "l0", "num_prune_steps": 2}, {"criterion": "l0", "schedule": "iterative"}),
        ({"budget": "macs", "target": 0.6041}, {"budget": "macs", "target": 0.6}),
        (
            {"head_ratio": 0.0, "ffn_ratio": 0.0, "layer_ratio": 0.5, "criterion": "random"},
            {"head_ratio": 0.0, "ffn_ratio": 0.0, "layer_ratio": 0.49, "num_prune_steps": 3},
        ),
        (
            {"head_ratio": 0.0, "ffn_ratio": 0.0, "recover": "rescale"},
            {"head_ratio": 0.0, "ffn_ratio": 0.0, "criterion": "fisher"},
        ),
    ],
)
def test_recipes_that_do_the_same_are_the_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert parameters(BASE, **one) == parameters(BASE, **other)


def test_only_a_handful_is_searched_by_default() -> None:
    searched = [name for name, dim in fix_experts(METHOD.search_space(BASE)).items() if not dim.fixed]
    assert searched == ["head_ratio", "ffn_ratio", "layer_ratio", "schedule"]


def test_the_space_never_offers_what_would_leave_no_head_or_layer() -> None:
    small = BASE.having(heads=2, layers=3, intermediate=48)
    space = METHOD.search_space(small)
    assert space["head_ratio"].distribution.high == 0.5  # type: ignore[attr-defined]
    assert space["layer_ratio"].distribution.high == pytest.approx(2 / 3)  # type: ignore[attr-defined]
    assert space["ffn_multiple"].distribution.choices == (1, 8, 16)  # type: ignore[attr-defined]
    least = METHOD.after(small, parameters(small, head_ratio=0.5, ffn_ratio=0.9, layer_ratio=2 / 3))
    assert (least.layers, least.heads, least.intermediate) == (1, 1, 16)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scope", SCOPES)
def test_promised_sizes_are_the_measured_ones(family: str, scope: str) -> None:
    candidate = tiny_candidate(family)
    ratios = {"head_ratio": 0.5, "ffn_ratio": 0.6, "layer_ratio": 0.25, "hidden_ratio": 0.3}
    params = parameters(candidate.subject, **ratios, scope=scope, ffn_multiple=8, **UNTRAINED)
    result = METHOD.apply(candidate, params, tiny_context(candidate))
    measured = subject_of(result.network, candidate.subject.task)
    assert result.subject == METHOD.after(candidate.subject, params)
    assert (measured.layers, measured.heads, measured.hidden) == (3, 2.0, 24)
    assert measured.without("non-uniform") == result.subject.without("non-uniform", "lossy", "neurons:8")
    assert measured.parameters == sum(p.numel() for p in result.network.parameters())
    assert ("non-uniform" in result.subject.traits) == (scope != "per_layer")
    assert all(view.neurons % 8 == 0 and view.heads >= 1 for view in map(parts, layers(result.network)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_narrower_network_is_saved_exported_and_run(family: str, tmp_path: Path) -> None:
    candidate = tiny_candidate(family)
    params = parameters(candidate.subject, hidden_ratio=0.5, head_ratio=0.5, ffn_multiple=8, **UNTRAINED)
    context = tiny_context(candidate)
    result = METHOD.apply(candidate, params, context)
    assert result.subject.hidden == 16
    assert result.subject.head_dim == 8
    lower(result, tmp_path / "artifact", context.task)
    given = inputs(candidate)
    found = load_runner(tmp_path / "artifact", threads=1)({name: t.numpy() for name, t in given.items()})
    np.testing.assert_allclose(found, logits(result.network, given).numpy(), atol=1e-4)


# The course of a pruning


@pytest.mark.parametrize("recover", RECOVERIES)
def test_ratio_zero_changes_nothing(recover: str) -> None:
    candidate = tiny_candidate()
    params = parameters(candidate.subject, head_ratio=0.0, ffn_ratio=0.0, recover=recover)
    context = tiny_context(candidate)
    calls = recorded(context)
    result = METHOD.apply(candidate, params, context)
    assert not METHOD.trains(params)
    assert METHOD.changes_nothing(candidate.subject, params)
    assert calls == []
    assert result.subject == candidate.subject
    assert torch.equal(logits(result.network, inputs(candidate)), logits(candidate.network, inputs(candidate)))


@pytest.mark.parametrize("recover", ["none", "rescale"])
@pytest.mark.parametrize("criterion", ["taylor", "fisher", "magnitude", "random"])
def test_without_training_nothing_is_trained(recover: str, criterion: str) -> None:
    candidate = tiny_candidate()
    before = {name: value.clone() for name, value in candidate.network.state_dict().items()}
    params = parameters(candidate.subject, recover=recover, criterion=criterion)
    context = tiny_context(candidate)
    calls = recorded(context)
    result = METHOD.apply(candidate, params, context)
    assert not METHOD.trains(params)
    assert calls == []
    assert result.subject.parameters < candidate.subject.parameters
    assert all(torch.equal(value, before[name]) for name, value in candidate.network.state_dict().items())


@pytest.mark.parametrize("task", ["text-classification", "text-regression", "token-classification"])
@pytest.mark.parametrize("recover", TRAINED)
def test_gradual_pruning_trains_behind_masks_unscored_then_the_small_network(task: str, recover: str) -> None:
    candidate = tiny_candidate("bert", task, layers=2)
    params = parameters(candidate.subject, recover=recover, s_cooldown=0.4, hidden_ratio=0.25, ffn_multiple=8)
    context = tiny_context(candidate)
    calls = recorded(context)
    result = METHOD.apply(candidate, params, context)
    assert METHOD.trains(params)
    first, second = calls
    assert (first["scored"], second.get("scored", True)) == (False, True)
    assert first["share"] == pytest.approx(0.6)
    assert first["share"] + second["share"] == pytest.approx(1)
    assert first["parameters"] == candidate.subject.parameters
    assert second["parameters"] == result.subject.parameters
    hooks = [module._forward_pre_hooks or module._forward_hooks for module in result.network.modules()]
    assert not any(hooks)


@pytest.mark.parametrize("recover", TRAINED)
def test_one_shot_spends_all_its_training_after_the_cut(recover: str) -> None:
    candidate = tiny_candidate(layers=2)
    params = parameters(candidate.subject, recover=recover, schedule="one_shot")
    context = tiny_context(candidate)
    calls = recorded(context)
    result = METHOD.apply(candidate, params, context)
    assert [call["share"] for call in calls] == [1.0]
    assert calls[0]["parameters"] == result.subject.parameters


@pytest.mark.parametrize("scope", ["global", "per_layer"])
@pytest.mark.parametrize("schedule", ["cubic", "iterative"])
def test_gradual_pruning_only_ever_shrinks_and_follows_the_schedule(
    scope: str, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidate = tiny_candidate()
    alive: list[Units] = []
    choose = Pruner.choose

    def watched(self: Pruner, scores: Units, progress: float) -> None:
        choose(self, scores, progress)
        alive.append(self.masks.units)

    monkeypatch.setattr(pruner.Pruner, "choose", watched)
    how = {"scope": scope, "schedule": schedule, "num_prune_steps": 4, "ffn_multiple": 1}
    params = parameters(candidate.subject, head_ratio=0.0, ffn_ratio=0.75, **how)
    METHOD.apply(candidate, params, tiny_context(candidate, steps=20))
    parts_left = [
        1 - 0.75 * (1 - (1 - j / 4) ** 3) if schedule == "cubic" else 0.25 ** (j / 4) for j in range(1, 5)
    ]
    left = [units.neurons.sum().item() / 256 for units in alive]
    assert left == pytest.approx(parts_left, abs=1 / 256)
    for before, after in pairwise(alive):
        assert all((b >= a).all() for b, a in zip(before, after, strict=True))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_leaves_the_promised_number(criterion: str) -> None:
    candidate = tiny_candidate()
    params = parameters(
        candidate.subject, head_ratio=0.5, ffn_ratio=0.75, hidden_ratio=0.25, criterion=criterion, ffn_multiple=8
    )
    result = METHOD.apply(candidate, params, tiny_context(candidate, steps=12))
    shapes = layer_shapes(result)
    assert (sum(heads for heads, _ in shapes), sum(neurons for _, neurons in shapes)) == (8, 64)
    assert result.subject.hidden == 24


@pytest.mark.parametrize("criterion", ["movement", "l0"])
def test_learned_masks_keep_what_the_loss_asks_for(criterion: str) -> None:
    """A loss that falls with the first eight masks of each layer and rises with all others."""
    candidate = tiny_candidate(layers=2)
    ratios = {"head_ratio": 0.0, "ffn_ratio": 0.875, "ffn_multiple": 8}
    params = parameters(candidate.subject, criterion=criterion, **ratios)
    network, cut = candidate.copy().network, Cut.of(candidate.subject, params)
    run = Pruner(network, candidate.subject, cut, params, tiny_context(candidate, steps=60))

    def loss(network: Any, batch: Any) -> torch.Tensor:
        network(**{name: batch[name] for name in candidate.tokenizer.model_input_names})
        neurons: torch.Tensor = run.masks.units.neurons
        return neurons[:, 8:].sum() - neurons[:, :8].sum()

    train_while_pruning(run, loss, 1.0)
    assert (run.masks.units.neurons[:, :8] > 0).all()
    assert (run.masks.units.neurons[:, 8:] == 0).all()
    assert (run.masks.units.heads == 1).all()


def test_the_most_important_head_of_a_layer_stays() -> None:
    """A network whose loss hangs on known heads keeps exactly those."""
    candidate = tiny_candidate(layers=2)
    silent = {0: (0, 1, 3), 1: (1, 2)}
    with torch.no_grad():
        for layer, heads in silent.items():
            view = parts(layers(candidate.network)[layer])
            for head in heads:
                view.attention_output.weight[:, head * view.head_dim : (head + 1) * view.head_dim] = 0
    params = parameters(candidate.subject, head_ratio=0.6, ffn_ratio=0.0, **UNTRAINED)
    result = METHOD.apply(candidate, params, tiny_context(candidate))
    assert [parts(layer).heads for layer in layers(result.network)] == [1, 2]
    torch.testing.assert_close(
        logits(result.network, inputs(candidate)), logits(candidate.network, inputs(candidate)), rtol=0, atol=1e-5
    )


def test_no_heads_at_all_may_be_left_in_a_layer_where_the_study_allows_it() -> None:
    candidate = tiny_candidate(layers=2)
    with torch.no_grad():
        parts(layers(candidate.network)[0]).attention_output.weight.zero_()
    params = parameters(candidate.subject, head_ratio=0.5, ffn_ratio=0.0, min_heads=0, **UNTRAINED)
    result = METHOD.apply(candidate, params, tiny_context(candidate))
    assert [heads for heads, _ in layer_shapes(result)] == [0, 4]


@pytest.mark.parametrize("recover", ["none", "kd"])
def test_a_dry_run_spreads_evenly_and_asks_for_no_gradients(recover: str, monkeypatch: pytest.MonkeyPatch) -> None:
    candidate = tiny_candidate()
    params = parameters(candidate.subject, head_ratio=0.4, ffn_ratio=0.5, hidden_ratio=0.25, recover=recover)

    def refuse(*args: Any) -> Units:
        raise AssertionError("a dry run must not compute gradients")

    monkeypatch.setattr(importance, "mask_gradients", refuse)
    result = METHOD.apply(candidate, params, tiny_context(candidate, dry=True))
    heads = [heads for heads, _ in layer_shapes(result)]
    assert max(heads) - min(heads) <= 1
    assert sum(heads) == 16 - 6
    assert result.subject == METHOD.after(candidate.subject, params)


@pytest.mark.parametrize("criterion", ["taylor", "random", "movement", "l0"])
def test_the_seed_decides_everything(criterion: str) -> None:
    candidate = tiny_candidate(layers=2)
    params = parameters(candidate.subject, criterion=criterion)
    runs = [METHOD.apply(candidate, params, tiny_context(candidate, seed=seed)).network for seed in (0, 0, 1)]
    outputs = [logits(network, inputs(candidate)) for network in runs]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


# Layers


def test_layerdrop_trains_first_and_every_other_layer_then_goes_without_further_training() -> None:
    candidate = tiny_candidate()
    ratios = {"head_ratio": 0.0, "ffn_ratio": 0.0, "layer_ratio": 0.5, "layer_strategy": "layer_drop"}
    params = parameters(candidate.subject, **ratios, layerdrop_train=0.5, recover="none")
    context = tiny_context(candidate)
    calls = recorded(context)
    result = METHOD.apply(candidate, params, context)
    assert METHOD.trains(params)
    assert [(call["share"], call["parameters"]) for call in calls] == [(1.0, candidate.subject.parameters)]
    assert result.subject.layers == len(layers(result.network)) == 2


def test_layerdrop_shares_its_budget_with_recovery() -> None:
    candidate = tiny_candidate()
    params = parameters(candidate.subject, layer_ratio=0.5, layerdrop_train=0.3, s_cooldown=0.4)
    context = tiny_context(candidate, steps=20)
    calls = recorded(context)
    METHOD.apply(candidate, params, context)
    assert [call["share"] for call in calls] == pytest.approx([0.5, 0.3, 0.2])


def test_layers_go_by_importance_where_the_study_says_so() -> None:
    candidate = tiny_candidate()
    with torch.no_grad():
        view = parts(layers(candidate.network)[1])
        for linear in (view.attention_output, view.down):
            linear.weight.mul_(1e-3)
            linear.bias.zero_()
    ratios = {"head_ratio": 0.0, "ffn_ratio": 0.0, "layer_ratio": 0.25, "layer_strategy": "importance"}
    result = METHOD.apply(candidate, parameters(candidate.subject, **ratios, **UNTRAINED), tiny_context(candidate))
    kept = [parts(layer).up.weight for layer in layers(result.network)]
    expected = [parts(layers(candidate.network)[index]).up.weight for index in (0, 2, 3)]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(kept, expected, strict=True))


# What it can follow


@pytest.mark.parametrize("criterion", ["taylor", "movement", "l0"])
def test_shared_layers_lose_the_same_units_and_stay_shared(criterion: str) -> None:
    candidate = tiny_candidate()
    names = ("query", "key", "value", "attention_output", "up", "down")
    share_parts(candidate.network, names, {1: 0, 2: 0, 3: 0})
    candidate = candidate.replace(subject=subject_of(candidate.network, candidate.subject.task))
    params = parameters(candidate.subject, head_ratio=0.5, ffn_ratio=0.5, layer_ratio=0.5, criterion=criterion)
    result = METHOD.apply(candidate, params, tiny_context(candidate))
    measured = subject_of(result.network, candidate.subject.task)
    assert measured == result.subject.without("lossy")
    assert (measured.layers, measured.heads, measured.intermediate, measured.attention_sets) == (4, 2, 32, 1)
    assert measured.parameters == sum(p.numel() for p in result.network.parameters())


def test_layers_that_lose_the_same_can_share_what_is_left_and_others_cannot() -> None:
    candidate = tiny_candidate()
    for scope, reason in (("per_layer", None), ("global", "its layers differ in shape")):
        params = parameters(candidate.subject, scope=scope, ffn_multiple=8, **UNTRAINED)
        assert Sharing().unsupported(METHOD.after(candidate.subject, params)) == reason
    params = parameters(candidate.subject, head_ratio=0.5, scope="per_layer", ffn_multiple=8, **UNTRAINED)
    pruned = METHOD.apply(candidate, params, tiny_context(candidate))
    how = {"mode": "all", "groups": 1, "share_layernorm": True, "convert_init": "average", "align": True}
    shared = Sharing().apply(pruned, how | UNTRAINED, tiny_context(pruned))
    assert subject_of(shared.network, candidate.subject.task) == shared.subject.without("lossy")
    assert (shared.subject.heads, shared.subject.intermediate, shared.subject.attention_sets) == (2, 32, 1)


@pytest.mark.parametrize(
    ("trait", "reason"),
    [
        ("non-uniform", "differ in shape"),
        ("recurrent", "no transformer"),
        ("low-rank", "products"),
        ("sparse", "zeros"),
    ],
)
def test_what_cannot_be_counted_or_cut_is_refused(trait: str, reason: str) -> None:
    assert METHOD.unsupported(BASE) is None
    assert METHOD.unsupported(BASE.having("shared")) is None
    assert reason in (METHOD.unsupported(BASE.having(trait)) or "")


def test_defaults_are_a_legal_recipe_for_any_teacher() -> None:
    for subject in (BASE, BASE.having(layers=1, heads=1, intermediate=7), BASE.having(heads=3, intermediate=100)):
        space = METHOD.search_space(subject)
        assert all(dim.contains(dim.default) for dim in space.values())
        METHOD.after(subject, METHOD.effective(subject, defaults(space)))

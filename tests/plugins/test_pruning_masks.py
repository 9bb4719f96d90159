"""Masks against surgery: what a masked network computes, the network without the masked units computes."""

from __future__ import annotations

import pytest
import torch
from compress_search_plugins.pruning.masks import Masks, Units, remove_masked

from compress_search import Candidate
from compress_search.encoders import layers, norm_over, parts, share_parts, stream, subject_of
from compress_search.testing import tiny_batches, tiny_candidate, tiny_context
from tests.pruning import FAMILIES, inputs, logits, random_masks

BLOCKS = ("query", "key", "value", "attention_output", "up", "down")


def shared(layers_: int = 4) -> Candidate:
    """Layers 0 and 2, and 1 and 3, have their blocks in common."""
    candidate = tiny_candidate(layers=layers_)
    share_parts(candidate.network, BLOCKS, {2: 0, 3: 1})
    return candidate.replace(subject=subject_of(candidate.network, candidate.subject.task))


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_of_ones_change_nothing_to_the_bit(family: str) -> None:
    candidate = tiny_candidate(family, layers=2)
    before = logits(candidate.network, inputs(candidate))
    Masks(candidate.network)
    assert torch.equal(logits(candidate.network, inputs(candidate)), before)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("task", ["text-classification", "token-classification"])
def test_surgery_computes_what_the_masked_network_did(family: str, task: str, attention: str) -> None:
    candidate = tiny_candidate(family, task)
    candidate.network.set_attn_implementation(attention)  # type: ignore[operator]
    full = logits(candidate.network, inputs(candidate))
    masks = random_masks(candidate.network)
    kept = [int(mask.sum()) for mask in masks.units]
    masked = logits(candidate.network, inputs(candidate))
    remove_masked(candidate.network, masks)
    torch.testing.assert_close(logits(candidate.network, inputs(candidate)), masked, rtol=0, atol=1e-5)
    assert (masked - full).abs().max() > 1e-2
    subject = subject_of(candidate.network, task)
    assert [subject.heads * 4, subject.intermediate * 4, subject.hidden] == pytest.approx(kept)
    assert subject.parameters == sum(p.numel() for p in candidate.network.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_units_that_are_turned_down_fold_into_the_weights(family: str) -> None:
    candidate = tiny_candidate(family)
    masks = random_masks(candidate.network, soft=True)
    masked = logits(candidate.network, inputs(candidate))
    remove_masked(candidate.network, masks)
    torch.testing.assert_close(logits(candidate.network, inputs(candidate)), masked, rtol=0, atol=1e-5)


def test_a_projection_of_narrow_embeddings_is_masked_and_cut() -> None:
    """Electra's small models: no norm stands between the projection and the first layer."""
    from transformers import AutoModelForSequenceClassification

    candidate = tiny_candidate("electra", layers=2)
    config = candidate.network.config
    config.embedding_size = 16  # type: ignore[union-attr]
    network = AutoModelForSequenceClassification.from_config(config).eval()
    assert stream(network).projection is not None
    masks = random_masks(network, soft=True)
    masked = logits(network, inputs(candidate))
    remove_masked(network, masks)
    torch.testing.assert_close(logits(network, inputs(candidate)), masked, rtol=0, atol=1e-5)
    found = subject_of(network, candidate.subject.task)
    assert found.embedding_size == 16
    assert found.parameters == sum(p.numel() for p in network.parameters())


def test_shared_blocks_lose_the_same_units_everywhere() -> None:
    candidate = shared()
    masks = random_masks(candidate.network)
    assert masks.units.heads.shape == (2, 4)
    assert masks.units.neurons.shape == (2, 64)
    masked = logits(candidate.network, inputs(candidate))
    remove_masked(candidate.network, masks)
    torch.testing.assert_close(logits(candidate.network, inputs(candidate)), masked, rtol=0, atol=1e-5)
    found = [parts(layer) for layer in layers(candidate.network)]
    assert found[0].query is found[2].query
    assert (found[1].heads, found[1].neurons) == (found[3].heads, found[3].neurons)


def test_a_layer_without_heads_or_neurons_keeps_its_biases() -> None:
    candidate = tiny_candidate(layers=2)
    masks = Masks(candidate.network)
    masks.units.heads[0], masks.units.neurons[1] = 0, 0
    masked = logits(candidate.network, inputs(candidate))
    remove_masked(candidate.network, masks)
    torch.testing.assert_close(logits(candidate.network, inputs(candidate)), masked, rtol=0, atol=1e-5)


def test_the_norm_over_some_channels_is_that_of_the_slice_and_not_of_the_zeros() -> None:
    torch.manual_seed(0)
    norm, x, alive = torch.nn.LayerNorm(32), torch.randn(4, 7, 32), torch.rand(32) < 0.5
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
        sliced = torch.nn.functional.layer_norm(
            x[..., alive], (int(alive.sum()),), norm.weight[alive], norm.bias[alive]
        )
        torch.testing.assert_close(norm_over(norm, x, alive)[..., alive], sliced)
        assert norm_over(norm, x, alive)[..., ~alive].abs().max() == 0
        assert (norm(x * alive)[..., alive] - sliced).abs().max() > 0.1


def test_the_gradient_of_a_mask_says_what_a_channel_would_be_worth_masked_or_not() -> None:
    candidate = tiny_candidate(task="token-classification", layers=2)
    masks = Masks(candidate.network)
    hidden = torch.ones_like(masks.units.hidden)
    hidden[0, :8] = 0
    masks.units = masks.units._replace(hidden=hidden.requires_grad_())
    tiny_context(candidate).task_loss(candidate.network, next(tiny_batches(candidate))).backward()
    assert hidden.grad is not None
    assert bool((hidden.grad[0, :8] != 0).all())


def test_masked_units_get_no_gradient_and_survive_optimizer_steps() -> None:
    candidate = tiny_candidate(layers=2)
    masks = random_masks(candidate.network)
    context = tiny_context(candidate, steps=5)
    context.task_loss(candidate.network, next(tiny_batches(candidate))).backward()
    dead = masks.units.hidden[0] == 0
    for index, view in enumerate(map(parts, layers(candidate.network))):
        heads, neurons = (mask[index] == 0 for mask in masks.units[:2])
        rows = heads.repeat_interleave(view.head_dim)
        for linear in (view.query, view.key, view.value):
            assert linear.weight.grad is not None
            assert linear.weight.grad[rows].abs().sum() == 0
            assert linear.weight.grad[:, dead].abs().sum() == 0
        assert view.attention_output.weight.grad is not None
        assert view.attention_output.weight.grad[:, rows].abs().sum() == 0
        assert view.attention_output.weight.grad[dead].abs().sum() == 0
        assert view.up.weight.grad is not None
        assert view.up.weight.grad[neurons].abs().sum() == 0
        assert view.up.weight.grad[~neurons].abs().sum() > 0
    context.fit(candidate.network)
    masked = logits(candidate.network, inputs(candidate))
    remove_masked(candidate.network, masks)
    torch.testing.assert_close(logits(candidate.network, inputs(candidate)), masked, rtol=0, atol=1e-5)


def test_masks_are_off_for_the_time_of_a_block() -> None:
    candidate = tiny_candidate(layers=2)
    full = logits(candidate.network, inputs(candidate))
    masks = random_masks(candidate.network)
    units: Units = masks.units
    with masks.off():
        assert torch.equal(logits(candidate.network, inputs(candidate)), full)
    assert masks.units is units

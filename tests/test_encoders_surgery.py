"""A network cut down computes what the masked network did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compress_search import Candidate
from compress_search.encoders import (
    FAMILIES,
    bake,
    describe,
    keep_layers,
    layers,
    load_network,
    parts,
    prune_heads,
    prune_hidden,
    prune_neurons,
    save,
    set_attention,
    set_layers,
    shape_key,
    subject_of,
)
from compress_search.testing import tiny_batches, tiny_candidate

LAYERS, HEADS, NEURONS = 3, 4, 16

every_family = pytest.mark.parametrize("family", FAMILIES)
Keep = Mapping[int, Sequence[int]]


def tiny(family: str, task: str = "text-classification") -> Candidate:
    return tiny_candidate(family, task, LAYERS, heads=HEADS, intermediate=NEURONS)


def logits(candidate: Candidate, network: nn.Module) -> Tensor:
    feed = {k: v for k, v in next(tiny_batches(candidate)).items() if k not in ("labels", "index")}
    with torch.no_grad():
        found: Tensor = network(**feed).logits
    return found


def masked(network: nn.Module, heads: Keep, neurons: Keep) -> nn.Module:
    """The definition: multiply each head's context and each neuron by 0 or 1 before the output projections."""
    network = deepcopy(network)

    def scale(linear: nn.Linear, mask: Tensor) -> None:
        linear.register_forward_pre_hook(lambda _, args: (args[0] * mask,))

    for index, layer in enumerate(layers(network)):
        found = parts(layer)
        if index in heads:
            scale(found.attention_output, mask_of(heads[index], HEADS).repeat_interleave(found.head_dim))
        if index in neurons:
            scale(found.down, mask_of(neurons[index], NEURONS))
    return network


def mask_of(kept: Sequence[int], size: int) -> Tensor:
    return torch.tensor([float(index in kept) for index in range(size)])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("task", ["text-classification", "token-classification"])
@every_family
def test_surgery_equals_the_mask(family: str, task: str, attention: str) -> None:
    candidate = tiny(family, task)
    heads, neurons = {0: [1, 3], 1: []}, {0: [], 1: [0, 5, 15], 2: [7]}
    expected = masked(candidate.network, heads, neurons)
    network = candidate.copy().network
    prune_heads(network, heads)
    prune_neurons(network, neurons)
    for each in (expected, network):
        set_attention(each, attention)
    torch.testing.assert_close(logits(candidate, network), logits(candidate, expected), atol=1e-5, rtol=0)


def subsets(size: int) -> st.SearchStrategy[dict[int, list[int]]]:
    kept = st.sets(st.integers(0, size - 1)).map(sorted)
    return st.dictionaries(st.integers(0, LAYERS - 1), kept)


@given(st.sampled_from(FAMILIES), subsets(HEADS), subsets(NEURONS))
@settings(max_examples=15, deadline=None)
def test_any_subset_equals_the_mask_and_the_closed_form(
    family: str, heads: dict[int, list[int]], neurons: dict[int, list[int]]
) -> None:
    candidate = tiny(family)
    network = candidate.copy().network
    prune_heads(network, heads)
    prune_neurons(network, neurons)
    expected = logits(candidate, masked(candidate.network, heads, neurons))
    torch.testing.assert_close(logits(candidate, network), expected, atol=1e-5, rtol=0)
    subject = subject_of(network, "text-classification")
    assert subject.parameters == sum(parameter.numel() for parameter in network.parameters())
    shapes = {(parts(layer).heads, parts(layer).neurons) for layer in layers(network)}
    assert ("non-uniform" in subject.traits) == (len(shapes) > 1)


@every_family
def test_a_sub_layer_without_width_is_the_norm_of_input_plus_bias(family: str) -> None:
    network = tiny(family).network
    found = parts(layers(network)[0])
    bias, norm = found.attention_output.bias.detach().clone(), found.attention_norm
    prune_heads(network, {0: []})
    prune_neurons(network, {0: []})
    hidden = torch.randn(2, 5, 32)
    after = parts(layers(network)[0])
    inner = norm(hidden + bias)
    with torch.no_grad():
        expected = after.output_norm(inner + after.down.bias)
        torch.testing.assert_close(layers(network)[0](hidden, None), expected)
    assert (after.heads, after.head_dim, after.neurons) == (0, 8, 0)


@every_family
def test_keeping_everything_changes_no_bit(family: str) -> None:
    candidate = tiny(family)
    network = candidate.copy().network
    prune_heads(network, dict.fromkeys(range(LAYERS), range(HEADS)))
    prune_neurons(network, dict.fromkeys(range(LAYERS), range(NEURONS)))
    keep_layers(network, range(LAYERS))
    assert torch.equal(logits(candidate, network), logits(candidate, candidate.network))


def test_the_order_of_heads_and_neurons_does_not_matter() -> None:
    candidate = tiny("bert")
    network = candidate.copy().network
    prune_heads(network, {0: [3, 0, 2, 1]})
    prune_neurons(network, {1: list(reversed(range(NEURONS)))})
    torch.testing.assert_close(logits(candidate, network), logits(candidate, candidate.network), atol=1e-5, rtol=0)


@every_family
def test_what_was_cut_trains_on(family: str) -> None:
    candidate = tiny(family)
    network = candidate.network.train()
    prune_heads(network, {0: []})
    prune_neurons(network, {0: [], 1: [3]})
    batch = next(tiny_batches(candidate))
    labels = {"labels": batch["labels"]}
    network(**{k: v for k, v in batch.items() if k not in ("labels", "index")}, **labels).loss.backward()
    for linear in (parts(layers(network)[0]).attention_output, parts(layers(network)[0]).down):
        assert linear.bias.grad is not None
        assert linear.bias.grad.abs().sum() > 0


@every_family
def test_dropped_layers_are_gone(family: str) -> None:
    candidate = tiny(family)
    network = candidate.copy().network
    first, _, last = layers(network)
    keep_layers(network, [0, 2])
    assert list(layers(network)) == [first, last]
    assert network.config.num_hidden_layers == 2
    assert subject_of(network, "text-classification").layers == 2


def test_a_shared_layer_is_cut_once_at_all_its_positions() -> None:
    candidate = tiny("bert")
    network = candidate.network
    set_layers(network, [layers(network)[0]] * 3)
    expected = masked(network, {0: [1, 2]}, {0: []})
    prune_heads(network, {0: [1, 2], 1: [1, 2], 2: [1, 2]})
    prune_neurons(network, {0: []})
    assert len({id(layer) for layer in layers(network)}) == 1
    torch.testing.assert_close(logits(candidate, network), logits(candidate, expected), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="layer 1 is shared"):
        prune_heads(network, {0: [0], 1: [1]})


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ({5: [0]}, "layer 5 does not exist: there are 3"),
        ({-1: [0]}, "layer -1 does not exist"),
        ({0: [4]}, r"cannot keep heads \[4\] of 4"),
        ({0: [-1]}, r"cannot keep heads \[-1\] of 4"),
        ({0: [1, 1]}, "expected distinct indices below 4"),
    ],
)
def test_impossible_requests_are_refused(heads: Keep, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prune_heads(tiny("bert").network, heads)


def test_an_encoder_keeps_a_layer() -> None:
    with pytest.raises(ValueError, match="at least one layer"):
        keep_layers(tiny("bert").network, [])


class Zero(nn.Module):
    """A mask as methods apply them, so that training cannot revive what it zeroes."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = nn.Buffer(mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def test_baking_folds_masks_and_changes_no_output() -> None:
    candidate = tiny("bert")
    network = candidate.network
    up = parts(layers(network)[0]).up
    parametrize.register_parametrization(up, "weight", Zero((torch.rand_like(up.weight) > 0.5).float()))
    with pytest.raises(ValueError, match=r"fold the masks with bake\(network\) first"):
        prune_neurons(network, {0: [1]})
    expected = logits(candidate, network)
    bake(network)
    assert torch.equal(logits(candidate, network), expected)
    assert not any(parametrize.is_parametrized(module) for module in network.modules())
    assert isinstance(up.weight, nn.Parameter)
    assert (up.weight == 0).float().mean() > 0.3


@pytest.mark.parametrize("task", ["text-classification", "token-classification"])
@every_family
def test_a_narrower_stream_has_the_closed_form_and_reloads(family: str, task: str, tmp_path: Path) -> None:
    candidate = tiny(family, task)
    network = candidate.copy().network
    prune_hidden(network, [0, 3, 5, 6, 7, 9, 11, 20, 31])
    subject = subject_of(network, task)
    assert (subject.hidden, subject.head_dim, subject.heads) == (9, 8, HEADS)
    assert subject.parameters == sum(parameter.numel() for parameter in network.parameters())
    save(network, candidate.tokenizer, tmp_path)
    again = load_network(tmp_path)
    assert torch.equal(logits(candidate, again), logits(candidate, network))
    assert describe(again)["hidden"] == 9
    assert shape_key(describe(again)) == shape_key(describe(network)) != shape_key(describe(candidate.network))


@pytest.mark.parametrize(
    ("channels", "message"),
    [([], "at least one hidden channel"), ([32], "expected distinct indices below 32"), ([1, 1], "distinct")],
)
def test_impossible_channels_are_refused(channels: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prune_hidden(tiny("bert").network, channels)

"""What is saved loads again: the same shapes, the same sharing, the same bits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compress_search import Candidate, ExportError
from compress_search.encoders import (
    FAMILIES,
    build,
    describe,
    keep_layers,
    layers,
    load,
    parts,
    prune_heads,
    prune_neurons,
    save,
    set_layers,
    shape_key,
)
from compress_search.testing import tiny_batches, tiny_candidate

TASKS = ("text-classification", "token-classification", "text-regression")


def logits(candidate: Candidate, network: nn.Module) -> Tensor:
    feed = {k: v for k, v in next(tiny_batches(candidate)).items() if k not in ("labels", "index")}
    with torch.no_grad():
        found: Tensor = network(**feed).logits
    return found


def uneven(family: str = "bert", task: str = "text-classification", hidden: int = 32) -> Candidate:
    """Four layers cut to three of different shapes, one without attention, one without feed-forward."""
    candidate = tiny_candidate(family, task, hidden=hidden)
    prune_heads(candidate.network, {0: [0, 2], 1: []})
    prune_neurons(candidate.network, {0: [], 3: range(5)})
    keep_layers(candidate.network, [0, 1, 3])
    return candidate


def canonical_bytes(network: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_uneven_networks_reload_to_the_same_bits(family: str, task: str, tmp_path: Path) -> None:
    candidate = uneven(family, task)
    save(candidate.network, candidate.tokenizer, tmp_path)
    network, tokenizer = load(tmp_path)
    assert torch.equal(logits(candidate, network), logits(candidate, candidate.network))
    assert not network.training
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert network.config.id2label == candidate.network.config.id2label
    assert tokenizer("ba de fi")["input_ids"] == candidate.tokenizer("ba de fi")["input_ids"]


def test_the_manifest_names_every_layer() -> None:
    manifest = describe(uneven().network)
    assert manifest["layers"] == [
        {"heads": 2, "head_dim": 8, "ffn": 0},
        {"heads": 0, "head_dim": 8, "ffn": 64},
        {"heads": 4, "head_dim": 8, "ffn": 5},
    ]
    assert json.loads(json.dumps(manifest)) == manifest
    assert (manifest["shared"], manifest["tied"], manifest["dtype"]) == ({}, {}, "float32")


def test_a_built_network_has_the_shapes_and_none_of_the_weights() -> None:
    network = uneven().network
    built = build(describe(network))
    assert describe(built) == describe(network)
    assert {n: p.shape for n, p in built.named_parameters()} == {n: p.shape for n, p in network.named_parameters()}
    built.load_state_dict(network.state_dict())
    assert torch.equal(logits(uneven(), built), logits(uneven(), network))


def test_file_size_is_that_of_the_parameters(tmp_path: Path) -> None:
    candidate = uneven(hidden=192)
    save(candidate.network, candidate.tokenizer, tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size == pytest.approx(canonical_bytes(candidate.network), rel=0.02)


def share_layers(network: nn.Module) -> None:
    first, second = layers(network)[:2]
    set_layers(network, [first, second, first, second])


def share_attention(network: nn.Module) -> None:
    for layer in layers(network)[1:]:
        layer.attention = layers(network)[0].attention


def share_a_tensor(network: nn.Module) -> None:
    first, *rest = map(parts, layers(network))
    for other in rest:
        other.up.weight = first.up.weight


@pytest.mark.parametrize("share", [share_layers, share_attention, share_a_tensor])
@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_shared_weights_are_saved_once_and_shared_again(family: str, share, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    candidate = tiny_candidate(family)
    share(candidate.network)
    save(candidate.network, candidate.tokenizer, tmp_path)
    network, _ = load(tmp_path)
    assert torch.equal(logits(candidate, network), logits(candidate, candidate.network))
    before, after = dict(candidate.network.named_parameters()), dict(network.named_parameters())
    assert before.keys() == after.keys(), "named_parameters lists shared tensors once, under their first name"
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == before.keys()
    for one, other in (("query", "down"), ("up", "value")):
        ours = [len({id(getattr(parts(layer), name)) for layer in layers(network)}) for name in (one, other)]
        theirs = [len({id(getattr(parts(layer), n)) for layer in layers(candidate.network)}) for n in (one, other)]
        assert ours == theirs


def test_shared_and_cut_at_once(tmp_path: Path) -> None:
    candidate = tiny_candidate("bert")
    share_layers(candidate.network)
    prune_heads(candidate.network, {0: [], 1: [2]})
    prune_neurons(candidate.network, {3: []})
    save(candidate.network, candidate.tokenizer, tmp_path)
    assert torch.equal(logits(candidate, load(tmp_path)[0]), logits(candidate, candidate.network))


def test_bfloat16_stays_bfloat16(tmp_path: Path) -> None:
    candidate = uneven()
    candidate.network.bfloat16()
    save(candidate.network, candidate.tokenizer, tmp_path)
    network, _ = load(tmp_path)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(candidate, network), logits(candidate, candidate.network))


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    candidate = uneven()
    for name in ("a", "b"):
        save(candidate.network, candidate.tokenizer, tmp_path / name)
    for file in ("manifest.json", "model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_building_leaves_the_random_state_alone() -> None:
    manifest = describe(uneven().network)
    state = torch.get_rng_state()
    build(manifest)
    assert torch.equal(torch.get_rng_state(), state)


def test_shape_key_is_of_shapes_alone() -> None:
    key = shape_key(describe(uneven().network))
    other = uneven()
    other.network.config.id2label = {0: "no", 1: "yes"}
    for parameter in other.network.parameters():
        nn.init.zeros_(parameter)
    assert shape_key(describe(other.network)) == key
    prune_neurons(other.network, {2: [0, 1]})
    assert shape_key(describe(other.network)) != key
    half = uneven()
    half.network.bfloat16()
    assert shape_key(describe(half.network)) != key
    assert shape_key(describe(uneven(task="token-classification").network)) != key


def test_what_the_manifest_cannot_say_is_refused() -> None:
    network = uneven().network
    up = parts(layers(network)[1]).up
    parametrize.register_parametrization(up, "weight", nn.Identity())
    with pytest.raises(ExportError, match="fold masks first"):
        describe(network)
    set_layers(network, [nn.Identity(), *layers(network)[:1]])
    with pytest.raises(ExportError, match="Identity is no encoder layer"):
        describe(network)


def test_one_dtype_per_network() -> None:
    network = uneven().network
    parts(layers(network)[0]).query.bfloat16()
    with pytest.raises(ExportError, match="mixes bfloat16, float32"):
        describe(network)


def test_broken_directories_are_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"manifest\.json: expected an architecture manifest"):
        load(tmp_path)
    candidate = uneven()
    save(candidate.network, candidate.tokenizer, tmp_path)
    tensors = {name: torch.zeros_like(tensor) for name, tensor in candidate.network.state_dict().items()}
    tensors.pop("classifier.bias")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ExportError, match=r"tensors do not match the manifest: classifier\.bias"):
        load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"class": "AutoModelForSequenceClassification", "config": {"model_type": "gpt2"}},
        {"class": "os"},
        {"format": 2},
    ],
)
def test_a_manifest_builds_nothing_but_encoders(change: dict[str, object]) -> None:
    with pytest.raises(ExportError, match="manifest"):
        build({**describe(uneven().network), **change})

"""Shared parts and factored tables: counted once, trained once, saved once and loaded again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.optim import SGD

from compress_search import Candidate, ExportError, Subject
from compress_search.encoders import (
    FAMILIES,
    FactoredEmbedding,
    build,
    describe,
    embeddings,
    layers,
    load,
    parts,
    prune_heads,
    prune_neurons,
    save,
    shape_key,
    share_parts,
    subject_of,
)
from compress_search.testing import tiny_batches, tiny_candidate, tiny_context

ATTENTION = ("query", "key", "value", "attention_output", "attention_norm")
FEED_FORWARD = ("up", "down", "output_norm")
MODES = {"attention": ATTENTION, "ffn": FEED_FORWARD, "all": ATTENTION + FEED_FORWARD}
BASE = Subject("bert", "text-classification", 12, 12, 64, 768, 3072, 30522, 512, 2, 2)
every_family = pytest.mark.parametrize("family", FAMILIES)


def logits(candidate: Candidate, network: nn.Module) -> Tensor:
    feed = {k: v for k, v in next(tiny_batches(candidate)).items() if k not in ("labels", "index")}
    with torch.no_grad():
        found: Tensor = network(**feed).logits
    return found


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def factor(candidate: Candidate, rank: int) -> FactoredEmbedding:
    words = embeddings(candidate.network).word_embeddings
    assert isinstance(words, nn.Embedding)
    left, values, right = torch.linalg.svd(words.weight.detach(), full_matrices=False)
    factored = FactoredEmbedding(
        (left * values)[:, :rank].contiguous(), right[:rank].T.contiguous(), words.padding_idx
    )
    embeddings(candidate.network).word_embeddings = factored
    return factored


# The subject


@pytest.mark.parametrize(
    ("sets", "millions"),
    [
        ({}, 109.5),
        ({"attention_sets": 1, "norm_sets": 13}, 83.5),
        ({"ffn_sets": 1, "norm_sets": 13}, 57.5),
        ({"attention_sets": 1, "ffn_sets": 1, "norm_sets": 2}, 31.5),
    ],
)
def test_sizes_of_bert_base_are_those_of_the_albert_table(sets: dict[str, int], millions: float) -> None:
    shared = replace(BASE, **sets)  # type: ignore[arg-type]
    assert (shared.parameters - shared.labels * (shared.hidden + 1)) / 1e6 == pytest.approx(millions, abs=0.05)
    assert shared.macs(128) == BASE.macs(128), "every layer still runs"


def test_one_set_for_all_layers_is_one_layer() -> None:
    one = replace(BASE, attention_sets=1, ffn_sets=1, norm_sets=2)
    assert one.encoder_parameters * BASE.layers == BASE.encoder_parameters
    assert one.encoder_parameters == 7_087_872
    groups = replace(BASE, attention_sets=3, ffn_sets=3, norm_sets=6)
    assert groups.encoder_parameters == 3 * one.encoder_parameters


def test_a_factored_word_table_has_two_thin_ones() -> None:
    factored = replace(BASE, word_rank=128)
    assert BASE.embedding_parameters - factored.embedding_parameters == 30522 * 768 - 128 * (30522 + 768)
    assert factored.encoder_parameters == BASE.encoder_parameters
    assert factored.macs(128) == BASE.macs(128)


def test_subjects_written_before_there_was_sharing_still_load() -> None:
    old = BASE.to_dict()
    for name in ("word_rank", "attention_sets", "ffn_sets", "norm_sets"):
        del old[name]
    assert Subject.from_dict(old) == BASE


@every_family
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("source", [[0, 0, 0, 0], [1, 1, 3, 3]])
def test_the_view_counts_what_is_distinct(family: str, mode: str, source: list[int]) -> None:
    candidate = tiny_candidate(family)
    share_parts(candidate.network, MODES[mode], dict(enumerate(source)))
    subject, sets = subject_of(candidate.network, "text-classification"), len(set(source))
    expected = {
        "attention": (sets, 0, sets + 4),
        "ffn": (0, sets, 4 + sets),
        "all": (sets, sets, 2 * sets),
    }[mode]
    assert (subject.attention_sets, subject.ffn_sets, subject.norm_sets) == expected
    assert subject.parameters == count(candidate.network)
    assert subject.traits == {"shared"}
    assert subject.layers == len({id(layer) for layer in layers(candidate.network)}) == 4


@every_family
def test_the_view_reads_a_factored_table(family: str) -> None:
    candidate = tiny_candidate(family)
    factor(candidate, 8)
    subject = subject_of(candidate.network, "text-classification")
    assert replace(subject, word_rank=0) == candidate.subject
    assert (subject.word_rank, subject.parameters) == (8, count(candidate.network))


# Sharing


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_sharing_equal_layers_changes_no_bit_and_adds_up_their_gradients(family: str) -> None:
    candidate = tiny_candidate(family)
    for layer in layers(candidate.network)[1:]:
        layer.load_state_dict(layers(candidate.network)[0].state_dict())
    shared = candidate.copy().network
    share_parts(shared, MODES["all"], dict.fromkeys(range(4), 0))
    assert torch.equal(logits(candidate, shared), logits(candidate, candidate.network))
    batch, context = next(tiny_batches(candidate)), tiny_context(candidate)
    for network in (shared, candidate.network):
        context.task_loss(network, batch).backward()
    for name, parameter in layers(shared)[0].named_parameters():
        total = sum(layer.get_parameter(name).grad for layer in layers(candidate.network))  # type: ignore[misc]
        torch.testing.assert_close(parameter.grad, total, atol=1e-5, rtol=1e-5)


def test_copies_and_optimizers_keep_what_is_shared() -> None:
    candidate = tiny_candidate()
    share_parts(candidate.network, MODES["attention"], {0: 0, 1: 0, 2: 2, 3: 2})
    network = candidate.copy().network
    optimizer = SGD(network.parameters(), lr=0.1)
    tiny_context(candidate).task_loss(network, next(tiny_batches(candidate))).backward()
    optimizer.step()
    assert [id(parts(layer).query) for layer in layers(network)] == [
        id(parts(layers(network)[owner]).query) for owner in (0, 0, 2, 2)
    ]
    assert describe(network)["shared"] == describe(candidate.network)["shared"]
    assert not torch.equal(parts(layers(network)[1]).query.weight, parts(layers(candidate.network)[1]).query.weight)


@every_family
def test_pruning_a_shared_layer_prunes_all_its_uses(family: str) -> None:
    candidate = tiny_candidate(family)
    share_parts(candidate.network, MODES["all"], dict.fromkeys(range(4), 0))
    prune_heads(candidate.network, {1: [0, 3]})
    prune_neurons(candidate.network, dict.fromkeys(range(4), range(10)))
    assert {(parts(layer).heads, parts(layer).neurons) for layer in layers(candidate.network)} == {(2, 10)}
    subject = subject_of(candidate.network, "text-classification")
    assert (subject.attention_sets, subject.ffn_sets) == (1, 1)
    assert subject.parameters == count(candidate.network)
    with pytest.raises(ValueError, match="layer 1 is shared: its positions must keep the same parts"):
        prune_heads(candidate.network, {0: [0], 1: [1]})


@pytest.mark.parametrize(
    ("names", "source", "message"),
    [
        (("query",), {0: 7}, "layer 7 does not exist: there are 4"),
        (("classifier",), {0: 1}, "'classifier' is no part of a layer that can be shared"),
        (("attention",), {0: 1}, "'attention' is no part of a layer that can be shared"),
        (("up",), {0: 1}, "layers 0 and 1, intermediate.dense: parts of shapes"),
    ],
)
def test_what_cannot_be_shared_is_refused(names: tuple[str, ...], source: dict[int, int], message: str) -> None:
    network = tiny_candidate().network
    prune_neurons(network, {0: [1, 2]})
    with pytest.raises(ValueError, match=message):
        share_parts(network, names, source)


# Saving


@every_family
@pytest.mark.parametrize("mode", [*MODES, "none"])
def test_shared_and_factored_networks_reload_to_the_same_bits(family: str, mode: str, tmp_path: Path) -> None:
    candidate = tiny_candidate(family)
    share_parts(candidate.network, MODES.get(mode, ()), {0: 1, 1: 1, 2: 3, 3: 3})
    factor(candidate, 8)
    save(candidate.network, candidate.tokenizer, tmp_path)
    network, _ = load(tmp_path)
    assert torch.equal(logits(candidate, network), logits(candidate, candidate.network))
    assert describe(network) == describe(candidate.network)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    assert stored == count(candidate.network)


def test_a_full_rank_table_looks_up_what_the_whole_one_did() -> None:
    candidate = tiny_candidate()
    ids = torch.arange(12).view(3, 4)
    expected = embeddings(candidate.network).word_embeddings(ids)
    torch.testing.assert_close(factor(candidate, 32)(ids), expected, atol=1e-5, rtol=0)


def test_the_shape_key_knows_ranks_and_sharing() -> None:
    keys = []
    for rank in (4, 8):
        candidate = tiny_candidate()
        factor(candidate, rank)
        keys.append(shape_key(describe(candidate.network)))
    keys.append(shape_key(describe(tiny_candidate().network)))
    for mode in MODES.values():
        shared = tiny_candidate().network
        share_parts(shared, mode, dict.fromkeys(range(4), 0))
        keys.append(shape_key(describe(shared)))
    assert len(set(keys)) == len(keys)


def test_building_factors_leaves_the_random_state_alone() -> None:
    candidate = tiny_candidate()
    factor(candidate, 8)
    state = torch.get_rng_state()
    build(describe(candidate.network))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_factored_table_stays_in_its_dtype(tmp_path: Path) -> None:
    candidate = tiny_candidate()
    factor(candidate, 8)
    candidate.network.bfloat16()
    save(candidate.network, candidate.tokenizer, tmp_path)
    assert torch.equal(logits(candidate, load(tmp_path)[0]), logits(candidate, candidate.network))


def test_manifests_without_factors_still_build() -> None:
    manifest = describe(tiny_candidate().network)
    del manifest["factors"]
    assert count(build(manifest)) == count(tiny_candidate().network)


def test_unknown_factors_are_refused() -> None:
    manifest = describe(tiny_candidate().network)
    path = "bert.embeddings.word_embeddings"
    with pytest.raises(ExportError, match=rf"{path}: factors of kind 'hash' are unknown: expected embedding"):
        build({**manifest, "factors": {path: {"kind": "hash", "rank": 2}}})
    with pytest.raises(TypeError, match="Linear is no embedding table"):
        FactoredEmbedding.like(nn.Linear(2, 2), 1)

"""Networks that earlier steps have changed: layers that share weights, products of two maps, cut layers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from compress_search import Candidate
from compress_search.encoders import (
    FactoredEmbedding,
    LowRankLinear,
    embeddings,
    layers,
    parts,
    prune_heads,
    prune_neurons,
    set_layers,
    subject_of,
)
from compress_search.runtimes import size_mb
from tests.quantized import (
    INT8,
    METHOD,
    PACKED,
    SCHEMES,
    distinct,
    linear_maps,
    model_of,
    operators,
    params,
    quantize,
    stored_bytes,
    tensors,
)


def sharing(candidate: Candidate) -> Candidate:
    """One layer at every position."""
    set_layers(candidate.network, [layers(candidate.network)[0]] * len(layers(candidate.network)))
    return candidate.replace(subject=subject_of(candidate.network, "text-classification"))


@pytest.mark.parametrize("name", SCHEMES)
def test_shared_layers_are_stored_once_and_used_everywhere(name: str, tmp_path: Path) -> None:
    candidate = sharing(distinct(layers=3, hidden=128, intermediate=256))
    artifact = quantize(candidate, SCHEMES[name], tmp_path / "artifact")
    assert linear_maps(model_of(artifact)) == 6 * 3 + 2
    assert stored_bytes(artifact) / 1e6 == pytest.approx(
        METHOD.after(candidate.subject, SCHEMES[name]).megabytes, rel=0.02, abs=0.012
    )


@pytest.mark.parametrize("name", ["dynamic_int8", "weight_only 4"])
@pytest.mark.parametrize(("part", "kept"), [("ffn_down", 3), ("first_layer", 18), ("classifier", 1)])
def test_a_shared_map_is_left_alone_at_all_its_places(name: str, part: str, kept: int, tmp_path: Path) -> None:
    chosen = params(name, **{f"exclude_{part}": True})
    found = operators(model_of(quantize(sharing(distinct(layers=3)), chosen, tmp_path / "artifact")))
    assert found["MatMulInteger"] + found["MatMulNBits"] == 6 * 3 + 2 - kept


def factored(candidate: Candidate, rank: int) -> Candidate:
    """The down projections as products of two matrices, and the word table too."""
    for layer in layers(candidate.network):
        down = parts(layer).down
        layer.output.dense = LowRankLinear.like(down, rank)
        for parameter in layer.output.dense.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    block = embeddings(candidate.network)
    table = block.word_embeddings.weight.data
    block.word_embeddings = FactoredEmbedding(table[:, :rank].clone(), 0.2 * torch.randn(table.shape[1], rank), 0)
    return candidate.replace(subject=subject_of(candidate.network, "text-classification"))


@pytest.mark.parametrize(("name", "exclude"), [*((name, False) for name in SCHEMES), ("weight_only 4", True)])
def test_both_factors_of_a_product_are_quantized(name: str, exclude: bool, tmp_path: Path) -> None:
    candidate = factored(distinct(layers=2, hidden=256, intermediate=1024), 64)
    assert candidate.subject.word_rank == candidate.subject.ranks[5] == 64
    chosen = params(name, exclude_ffn_down=exclude)
    artifact = quantize(candidate, chosen, tmp_path / "artifact")
    model = model_of(artifact)
    assert linear_maps(model) == 7 * 2 + 2 + 1
    floats = {key: v.shape for key, v in tensors(model).items() if v.dtype == np.float32 and v.size >= 64 * 64}
    left = sorted(shape for key, shape in floats.items() if not key.endswith("_scales"))
    assert left == ([(64, 256)] * 2 + [(1024, 64)] * 2 if exclude else [])
    predicted = METHOD.after(candidate.subject, chosen).megabytes
    assert stored_bytes(artifact) / 1e6 == pytest.approx(predicted, rel=0.02)


def test_what_projects_word_embeddings_can_have_a_higher_precision_too(tmp_path: Path) -> None:
    """Of a layer's seven maps and the projection, all eight."""
    candidate = factored(distinct(layers=1, hidden=256, intermediate=1024), 64)
    chosen = params("weight_only 4", high_precision_layers=8, exclude_pooler=True, exclude_classifier=True)
    artifact = quantize(candidate, {**chosen, "calibration_examples": 32}, tmp_path / "artifact")
    predicted = METHOD.after(candidate.subject, chosen)
    assert predicted.embedding_bits > METHOD.after(candidate.subject, params("weight_only 4")).embedding_bits
    assert stored_bytes(artifact) / 1e6 == pytest.approx(predicted.megabytes, rel=0.02)


def test_the_closed_form_holds_for_cut_networks_and_for_the_file(tmp_path: Path) -> None:
    candidate = distinct(layers=2, hidden=256, intermediate=1024)
    prune_heads(candidate.network, {0: [1], 1: [0, 2]})
    prune_neurons(candidate.network, {0: range(96), 1: range(512)})
    candidate = candidate.replace(subject=subject_of(candidate.network, "text-classification"))
    for chosen in (INT8["dynamic_int8"], PACKED["weight_only 4"]):
        artifact = quantize(candidate, chosen, tmp_path / "artifact")
        predicted = METHOD.after(candidate.subject, chosen).megabytes
        assert stored_bytes(artifact) / 1e6 == pytest.approx(predicted, rel=0.02)
        assert 0 < size_mb(artifact) - predicted < 0.1, "the graph itself takes a few ten thousand bytes"


@pytest.mark.parametrize("name", ["dynamic_int8", "weight_only 4"])
def test_layers_without_any_heads_or_neurons_have_nothing_to_quantize(name: str, tmp_path: Path) -> None:
    candidate = distinct(layers=2)
    prune_heads(candidate.network, {0: []})
    prune_neurons(candidate.network, {1: []})
    candidate = candidate.replace(subject=subject_of(candidate.network, "text-classification"))
    found = operators(model_of(quantize(candidate, params(name), tmp_path / "artifact")))
    assert found["MatMulInteger"] + found["MatMulNBits"] == 2 + 4 + 2

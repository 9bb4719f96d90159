"""Networks that earlier steps have changed: layers that share weights, products of two maps, cut layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compress_search import Candidate
from compress_search.encoders import layers, prune_heads, prune_neurons, set_layers, subject_of
from compress_search.runtimes import size_mb
from compress_search.runtimes.onnx_export import export
from compress_search.testing import tiny_context
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


class Product(torch.nn.Module):
    """A map through a narrow middle, as a low-rank step leaves it."""

    def __init__(self, linear: torch.nn.Linear, rank: int) -> None:
        super().__init__()
        self.first = torch.nn.Linear(linear.in_features, rank, bias=False)
        self.second = torch.nn.Linear(rank, linear.out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize("name", ["dynamic_int8", "weight_only 4", "ternary"])
def test_both_factors_of_a_product_are_quantized(name: str, exclude: bool, tmp_path: Path) -> None:
    candidate = distinct(layers=2)
    for layer in layers(candidate.network):
        layer.output.dense = Product(layer.output.dense, 8)
    chosen = params(name, exclude_ffn_down=exclude)
    path = tmp_path / "0.onnx"
    result = METHOD.apply(candidate, chosen, tiny_context(candidate))
    export(result.network, path)
    for number, function in enumerate(result.lowering, start=1):
        function(path, tmp_path / f"{number}.onnx")
        path = tmp_path / f"{number}.onnx"
    path.rename(tmp_path / "model.onnx")
    found = operators(model_of(tmp_path))
    if name != "ternary":
        assert found["MatMulInteger"] + found["MatMulNBits"] == 7 * 2 + 2 - 4 * exclude
    packed = [key for key in tensors(model_of(tmp_path)) if key.endswith("_packed")]
    assert len(packed) == (name == "ternary") * (7 * 2 + 2 - 4 * exclude)


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

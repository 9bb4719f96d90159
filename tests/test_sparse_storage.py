"""Packed arrays come back bit for bit, take the bytes the closed form says, and are never larger than dense."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress_search import ExportError
from compress_search.candidate import packed_bits
from compress_search.encoders import layers, load_network, parts, save
from compress_search.encoders.sparse_storage import GAP_BITS, pack, pack_tensors, pack_with, unpack, unpack_tensors
from compress_search.testing import tiny_candidate


@st.composite
def arrays(draw: st.DrawFn) -> NDArray[np.int32]:
    """Few or many values among zeros, in runs and at distances of up to several times 256."""
    count = draw(st.integers(1, 3000))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    density = draw(st.sampled_from([0.0, 0.001, 0.01, 0.1, 0.5, 1.0]))
    return np.where(rng.random(count) < density, rng.integers(-5, 6, count), 0).astype(np.int32)


@given(arrays(), st.sampled_from([0, 3]))
@settings(max_examples=60, deadline=None)
def test_both_forms_give_the_same_array_back(array: NDArray[np.int32], fill: int) -> None:
    for packed in (pack_with(bits, array, fill) for bits in GAP_BITS):
        assert np.array_equal(unpack(packed, len(array), fill), array)
    smaller = pack(array, fill)
    assert smaller is None or smaller.nbytes < array.nbytes


@pytest.mark.parametrize("density", [0.02, 0.1, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [np.int32, np.int16, np.uint8])
def test_the_smaller_form_takes_what_the_closed_form_says(density: float, dtype: type[np.integer]) -> None:
    count = 40_000
    array = np.zeros(count, dtype)
    kept = np.random.default_rng(0).permutation(count)[: round(density * count)]
    array[kept] = 1
    packed = pack(array)
    found = array.nbytes if packed is None else packed.nbytes
    expected = packed_bits(8 * array.itemsize, density) * count / 8
    assert found == pytest.approx(expected, rel=0.015), "wide gaps are bridged"


@pytest.mark.parametrize(("distance", "bits"), [(2, 4), (15, 4), (16, 8), (255, 8), (700, 8)])
def test_gaps_have_no_more_bits_than_they_need(distance: int, bits: int) -> None:
    array = np.zeros(8000, np.int32)
    array[::distance] = 1
    found = pack(array)
    assert found is not None
    assert found.gap_bits == bits


def special(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """One weight in ten, among them −0.0, infinity and NaN: numbers that are no plain zeros."""
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weights[torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.9] = 0.0
    weights[0, :3] = torch.tensor([-0.0, torch.inf, torch.nan])
    return weights.to(dtype)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    tensors = {"sparse": special((33, 65), dtype), "dense": torch.randn(33, 65).to(dtype), "bias": torch.zeros(33)}
    stored, forms = pack_tensors(tensors)
    assert set(forms) == {"sparse"}
    assert set(stored) == {"sparse.gaps", "sparse.values", "dense", "bias"}
    restored = unpack_tensors(stored, json.loads(json.dumps(forms)))
    for name, tensor in tensors.items():
        assert restored[name].dtype == tensor.dtype
        assert torch.equal(bits(restored[name]), bits(tensor))


def sparse_tiny(density: float) -> torch.nn.Module:
    network = tiny_candidate(hidden=64, intermediate=128).network
    generator = torch.Generator().manual_seed(0)
    for layer in layers(network):
        for linear in (parts(layer).query, parts(layer).up, parts(layer).down):
            kept = torch.rand(linear.weight.shape, generator=generator) < density
            linear.weight.data[~kept] = 0.0
    return network


def test_a_sparse_network_is_saved_small_and_reloads_to_the_same_bits(tmp_path: Path) -> None:
    tokenizer = tiny_candidate().tokenizer
    network = sparse_tiny(0.1)
    save(network, tokenizer, tmp_path / "sparse")
    save(sparse_tiny(1.0), tokenizer, tmp_path / "dense")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("sparse", "dense")]
    weights = 4 * (64 * 64 + 2 * 64 * 128)
    assert sizes[1] - sizes[0] == pytest.approx(weights * (32 - packed_bits(32, 0.1)) / 8, rel=0.03)
    state = load_network(tmp_path / "sparse").state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("gaps", None, "is incomplete: .*query.weight.gaps is missing"),
        ("values", slice(0, 5), "which do not fit 5 values"),
        ("gaps", slice(0, 5), "5 bytes of gaps, which do not fit"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, part: str, change: slice | None, message: str) -> None:
    save(sparse_tiny(0.2), tiny_candidate().tokenizer, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = f"bert.encoder.layer.0.attention.self.query.weight.{part}"
    damaged = tensors.pop(name)
    if change is not None:
        tensors[name] = damaged[change].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ExportError, match=message):
        load_network(tmp_path)

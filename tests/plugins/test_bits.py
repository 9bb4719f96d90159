"""The formulas of rounding: error bounds, zeros, more bits and finer scales err less, bytes, and gradients."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from compress_search_plugins.precision.bits import (
    CLIP,
    CODEBOOK,
    Grid,
    Kind,
    digits,
    fake_quantize,
    fake_quantize_activations,
    pack,
    unpacked,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from onnx import TensorProto, helper
from onnxruntime import InferenceSession
from onnxruntime.capi._pybind_state import quantize_matmul_2bits, quantize_matmul_4bits, quantize_matmul_8bits

quick = settings(max_examples=50, deadline=None)

FLOATS = st.floats(-100, 100, width=32).filter(lambda x: x == 0 or abs(x) > 1e-3)
MATRICES = arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=40), elements=FLOATS).map(
    torch.from_numpy
)
UNIFORM = st.one_of(
    st.builds(Grid, st.just("signed"), st.integers(2, 16), st.sampled_from(("tensor", "channel", 16))),
    st.builds(
        Grid, st.sampled_from(("block", "affine")), st.sampled_from((2, 4, 8)), st.sampled_from((16, 32, "channel"))
    ),
)
ANY = UNIFORM | st.builds(
    Grid, st.sampled_from(("ternary", "binary")), st.just(2), st.sampled_from(("tensor", "channel"))
)
NORMAL = st.integers(0, 2**16).map(lambda seed: torch.randn(24, 64, generator=torch.Generator().manual_seed(seed)))


def error(weight: torch.Tensor, grid: Grid) -> float:
    """Root of the mean squared distance."""
    return float((weight - grid.round(weight)).square().mean().sqrt())


@quick
@given(MATRICES, UNIFORM)
def test_a_weight_moves_by_half_a_step_at_most_unless_it_is_clipped(weight: torch.Tensor, grid: Grid) -> None:
    distance, steps = (weight - grid.round(weight)).abs(), grid.scales(weight)
    inside = grid.inside(weight)
    # code times step is rounded to float32 as well, which at 16 bits is some thousandths of the step
    slack = steps * 1e-4 + weight.abs() * 2 * torch.finfo(torch.float32).eps
    assert (distance[inside] <= (steps * 0.5 + slack)[inside]).all()
    assert (distance <= steps + slack).all(), "the lone lowest code costs the other end one step"
    assert grid.kind == "block" or inside.all(), "codes from end to end clip nothing"


@quick
@given(MATRICES, ANY)
def test_zeros_stay_zero_on_every_grid_that_has_one(weight: torch.Tensor, grid: Grid) -> None:
    weight[:, ::2] = 0
    rounded = grid.round(weight)
    assert rounded.shape == weight.shape
    assert rounded.isfinite().all()
    assert grid.kind == "binary" or (rounded[:, ::2] == 0).all()


def test_a_row_of_zeros_stays_one_without_a_code_for_it() -> None:
    weight = torch.tensor([[0.0, 0.0, 0.0], [1.0, -3.0, 2.0]])
    assert Grid("binary", 1).round(weight).tolist() == [[0.0] * 3, [2.0, -2.0, 2.0]]


@quick
@given(MATRICES, ANY)
def test_what_was_rounded_stays_as_it_is(weight: torch.Tensor, grid: Grid) -> None:
    once = grid.round(weight)
    torch.testing.assert_close(grid.round(once), once, rtol=1e-5, atol=1e-6)


@quick
@given(NORMAL)
def test_more_bits_err_less_down_to_nothing(weight: torch.Tensor) -> None:
    for kind in ("signed", "block"):
        errors = [error(weight, Grid(kind, bits)) for bits in range(2, 17)]
        assert all(finer < coarser for coarser, finer in pairwise(errors))
        assert errors[-1] < 1e-4


@quick
@given(NORMAL, st.floats(1, 30))
def test_the_fewer_weights_share_a_scale_the_less_they_err(weight: torch.Tensor, spread: float) -> None:
    weight = weight * torch.linspace(1, spread, len(weight))[:, None]
    for bits in (4, 8):
        tensor, channel, group = (Grid("signed", bits, share) for share in ("tensor", "channel", 16))
        assert (channel.scales(weight) <= tensor.scales(weight)).all()
        assert (group.scales(weight) <= channel.scales(weight)).all()
        assert error(weight, group) < error(weight, channel) <= error(weight, tensor) * (1 + 1e-6)
        worst = [(weight - grid.round(weight)).abs().amax() for grid in (channel, tensor)]
        assert worst[0] <= worst[1] * 1.01


@quick
@given(NORMAL)
def test_ternary_weights_are_those_of_the_paper(weight: torch.Tensor) -> None:
    threshold = 0.7 * weight.abs().mean()
    kept = weight.abs() > threshold
    alpha = weight.abs()[kept].mean()
    expected = torch.where(kept, weight.sign() * alpha, torch.zeros(()))
    torch.testing.assert_close(Grid("ternary", 2, "tensor").round(weight), expected)
    assert error(weight, Grid("ternary", 2)) <= error(weight, Grid("binary", 1)), "zero is a third value"


@quick
@given(NORMAL)
def test_binary_weights_are_the_nearest_of_one_size(weight: torch.Tensor) -> None:
    grid = Grid("binary", 1, "tensor")
    rounded = grid.round(weight)
    assert set((rounded / weight.abs().mean()).round(decimals=4).flatten().tolist()) == {-1.0, 1.0}
    assert all(error(weight, grid) <= float((weight - rounded * c).square().mean().sqrt()) for c in (0.9, 1.1))


@quick
@given(NORMAL, st.sampled_from(("ternary", "binary")), st.floats(0.1, 10))
def test_scales_of_codebooks_are_a_rows_own_and_grow_with_it(
    weight: torch.Tensor, kind: Kind, factor: float
) -> None:
    """As TernaryBERT has it of embeddings; of a matrix with one scale the rows' differences are lost."""
    grid = Grid(kind, len(CODEBOOK[kind]) - 1)
    grown = weight.clone()
    grown[0] *= factor
    rounded = grid.round(grown)
    torch.testing.assert_close(rounded[0], factor * grid.round(weight)[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(rounded[1:], grid.round(weight)[1:])
    kept = rounded[0] != 0
    assert kept.equal(weight[0].abs() > 0.7 * weight[0].abs().mean()) or kind == "binary"
    torch.testing.assert_close(rounded[0][kept].abs().mean(), grown[0][kept].abs().mean(), rtol=1e-5, atol=1e-6)


def test_seven_bits_do_not_saturate_a_pair_of_products() -> None:
    assert Grid("signed", 8, reduced=True).codes == (-64, 64)
    assert 255 * 64 * 2 <= 2**15 < 255 * 127 * 2


@pytest.mark.parametrize("kind", ["block", "affine"])
@pytest.mark.parametrize(
    ("bits", "quantizer"), [(2, quantize_matmul_2bits), (4, quantize_matmul_4bits), (8, quantize_matmul_8bits)]
)
def test_packed_codes_and_scales_are_those_of_onnx_runtime(bits: int, quantizer: object, kind: Kind) -> None:
    outputs, inputs, group = 5, 96, 32
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(bits))
    packed = np.zeros((outputs, inputs // group, group * bits // 8), np.uint8)
    scales = np.zeros((outputs, inputs // group), np.float32)
    points = np.zeros((outputs, math.ceil(inputs // group * bits / 8)), np.uint8)
    columns = np.ascontiguousarray(weight.T.numpy())
    quantizer(packed, columns, scales, points, group, outputs, inputs, kind == "block")  # type: ignore[operator]

    def fields(packed: np.ndarray) -> np.ndarray:
        found = [packed >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)]
        return np.stack(found, axis=-1).astype(int)

    zeros = fields(points).reshape(outputs, -1)[:, : inputs // group].reshape(-1, 1)
    theirs = fields(packed).reshape(-1, group) - (1 << bits - 1 if kind == "block" else zeros)
    codes, steps = Grid(kind, bits, group).encode(weight)
    np.testing.assert_array_equal(codes.numpy(), theirs)
    np.testing.assert_array_equal(steps.numpy().ravel(), scales.ravel())


def test_activations_are_rounded_as_onnx_runtime_does() -> None:
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, None]) for name in "xy"]
    model = helper.make_model(
        helper.make_graph(nodes, "g", values[:1], values[1:]),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    session = InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    for x in (torch.randn(7, 9, generator=generator) + shift for shift in (-5, 0, 0.3, 5)):
        np.testing.assert_allclose(fake_quantize_activations(x), session.run(None, {"x": x.numpy()})[0], atol=1e-6)
    assert (fake_quantize_activations(torch.zeros(3, 3)) == 0).all()


@quick
@given(MATRICES, ANY)
def test_the_gradient_is_one_inside_the_clip_range_and_zero_outside(weight: torch.Tensor, grid: Grid) -> None:
    weight.requires_grad_(True)
    rounded = fake_quantize(weight, grid)
    assert torch.equal(rounded, grid.round(weight.detach())), "going forward it is the grid's value, exactly"
    upstream = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    (rounded * upstream).sum().backward()
    held = (weight == 0) & (grid.kind != "binary")
    expected = torch.where(grid.inside(weight.detach()) & ~held, upstream, 0.0)
    assert weight.grad is not None
    assert torch.equal(weight.grad, expected)


def test_the_clip_range_ends_where_codes_do() -> None:
    weight = torch.tensor([[-8.0, 7.4, 7.6, 1.0]])
    assert Grid("block", 4).inside(weight).tolist() == [[True, True, False, True]]
    assert Grid("binary", 1).inside(torch.tensor([[CLIP, CLIP + 0.1]])).tolist() == [[True, False]]


@quick
@given(st.sampled_from((2, 3)), st.lists(st.integers(0, 2), min_size=1, max_size=60))
def test_packing_loses_nothing(levels: int, found: list[int]) -> None:
    codes = torch.tensor(found) % levels
    packed = pack(codes, levels)
    assert packed.dtype == torch.uint8
    assert len(packed) == math.ceil(len(codes) / digits(levels))
    assert torch.equal(unpacked(levels)[packed.long()].flatten()[: len(codes)], codes)


def test_as_many_codes_as_fit_are_in_a_byte() -> None:
    assert (digits(2), digits(3)) == (8, 5)
    assert all(levels ** digits(levels) <= 256 < levels ** (digits(levels) + 1) for levels in (2, 3))
    assert [len(CODEBOOK[kind]) for kind in ("ternary", "binary")] == [3, 2]


@pytest.mark.parametrize(
    ("grid", "bits_per_weight"),
    [
        (Grid("block", 8, 64), 8 + 32 / 64),
        (Grid("block", 4, 32), 4 + 32 / 32),
        (Grid("block", 4, 16), 4 + 32 / 16),
        (Grid("block", 2, 128), 2 + 32 / 128),
        (Grid("affine", 4, 32), 4 + 36 / 32),
        (Grid("signed", 8), 8 + 40 / 768),
        (Grid("ternary", 2, "tensor"), 8 / 5),
        (Grid("binary", 1), 1 + 32 / 768),
    ],
)
def test_stored_bits_are_a_closed_form(grid: Grid, bits_per_weight: float) -> None:
    assert grid.stored_bits(768, 768) / 768**2 == pytest.approx(bits_per_weight, rel=1e-4)

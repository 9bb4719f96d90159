"""What the produced file holds: which kernels, how far its weights are from the originals, how many bytes."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compress_search_plugins.precision.bits import Grid
from compress_search_plugins.precision.number_formats import EXCLUDABLE, Setting
from compress_search_plugins.precision.onnx_quantizers import quantize_static
from compress_search_plugins.precision.qat import embedding_tables
from compress_search_plugins.precision.stored_bits import stored_bits
from compress_search_plugins.precision.weight_maps import node_patterns
from compress_search_plugins.quantization import Quantization

from compress_search import Candidate, Params, Subject, TrialError
from compress_search.encoders import FAMILIES, embeddings, layers, parts
from compress_search.runtimes import load_runner, size_mb
from compress_search.testing import tiny_candidate, tiny_context
from tests import quantized
from tests.quantized import (
    CODEBOOKS,
    INT8,
    METHOD,
    PACKED,
    SCHEMES,
    Array,
    argmax_agreement,
    distinct,
    feed_of,
    linear_maps,
    model_of,
    operators,
    params,
    reference,
    stored_bytes,
    tensors,
)

every_scheme = pytest.mark.parametrize("name", SCHEMES)


@pytest.fixture
def quantize(tmp_path: Path) -> Callable[[Candidate, Params], Path]:
    """Apply, lower, and return the artefact."""
    return lambda candidate, chosen: quantized.quantize(candidate, chosen, tmp_path / "artifact")


Quantize = Callable[[Candidate, Params], Path]


# --- what the file holds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_map_becomes_an_integer_product(family: str, quantize: Quantize) -> None:
    model = model_of(quantize(distinct(family, layers=2), INT8["dynamic_int8"]))
    found = operators(model)
    assert found["MatMulInteger"] == 6 * 2 + 2, "pooler and classifier included"
    assert found["MatMul"] == 2 * 2, "the products of two activations of each layer"
    assert found["Gemm"] == 0


@pytest.mark.parametrize("calibration", ["minmax", "percentile", "entropy"])
def test_static_ranges_replace_the_ones_found_at_run_time(calibration: str, quantize: Quantize) -> None:
    candidate = distinct(layers=2)
    artifact = quantize(candidate, params("static_int8", calibration=calibration))
    found = operators(model_of(artifact))
    assert found["DynamicQuantizeLinear"] == found["MatMulInteger"] == 0
    # one range for each distinct input of a linear map: per layer hidden states, context, FFN input and output
    assert found["QuantizeLinear"] == 2 * 4 + 2
    assert found["MatMul"] == 2 * 6 + 2 + 2 * 2
    feed = feed_of(candidate)
    distance = np.abs(load_runner(artifact, 1)(feed) - reference(candidate, feed)).max()
    assert distance < 0.15 * np.abs(reference(candidate, feed)).max()


def test_percentiles_clip_what_extremes_do_not(quantize: Quantize) -> None:
    def ranges(calibration: str) -> Array:
        found = tensors(model_of(quantize(distinct(layers=1), params("static_int8", calibration=calibration))))
        return np.array([value for name, value in sorted(found.items()) if name.endswith("output_0_scale")])

    assert (ranges("percentile") <= ranges("minmax") * 1.01).all()
    assert (ranges("percentile") < ranges("minmax")).any()


def test_static_ranges_leave_the_residual_stream_alone(quantize: Quantize) -> None:
    graph = model_of(quantize(distinct(layers=2), INT8["static_int8"])).graph
    rounded = {node.output[0] for node in graph.node if node.op_type == "QuantizeLinear"}
    back = {
        node.output[0] for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in rounded
    }
    readers = {node.op_type for node in graph.node if back & set(node.input)}
    assert readers == {"MatMul"}


@pytest.mark.parametrize("name", PACKED)
def test_every_linear_map_is_packed(name: str, quantize: Quantize) -> None:
    model = model_of(quantize(distinct(layers=2), PACKED[name]))
    found = operators(model)
    assert found["MatMulNBits"] == 6 * 2 + 2
    assert found["Gemm"] == 0
    attributes = {a.name: a.i for node in model.graph.node if node.op_type == "MatMulNBits" for a in node.attribute}
    assert (attributes["bits"], attributes["block_size"]) == (
        PACKED[name]["weight_bits"],
        PACKED[name]["group_size"],
    )


@pytest.mark.parametrize("name", CODEBOOKS)
def test_every_linear_map_is_decoded_from_bytes(name: str, quantize: Quantize) -> None:
    model = model_of(quantize(distinct(layers=2), CODEBOOKS[name]))
    assert linear_maps(model) == 6 * 2 + 2
    packed = {key: value for key, value in tensors(model).items() if key.endswith("_packed")}
    assert len(packed) == 6 * 2 + 2
    assert all(value.dtype == np.uint8 for value in packed.values())


def test_embeddings_follow_their_own_bits(quantize: Quantize) -> None:
    candidate = distinct(layers=1)
    for bits, dtype, stored, lookups in (
        (32, np.float32, 3, 3),
        (16, np.float16, 2, 3),
        (8, np.int8, 2, 5),
        (4, np.uint8, 2, 5),
    ):
        model = model_of(quantize(candidate, params("dynamic_int8", embedding_bits=bits)))
        found = tensors(model)
        tables = {key for key, value in found.items() if value.dtype == dtype and "embeddings.weight" in key}
        assert len(tables) == stored, "the two rows of token types are floats"
        reads = [node for node in model.graph.node if node.op_type == "Gather"]
        assert sum("embeddings.weight" in node.input[0] for node in reads) == lookups, "each scale is looked up too"


def test_embeddings_alone_can_be_quantized(quantize: Quantize) -> None:
    candidate = distinct(layers=1)
    found = operators(model_of(quantize(candidate, {"weight_bits": 32, "embedding_bits": 8})))
    assert found["MatMul"] + found["Gemm"] == 6 + 2 + 2
    assert METHOD.effective(candidate.subject, {"weight_bits": 32, "embedding_bits": 32})["embedding_bits"] == 16


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", [8, 4])
def test_networks_of_every_family_read_their_rounded_tables(bits: int, family: str, quantize: Quantize) -> None:
    candidate = distinct(family, layers=1)
    artifact, feed = quantize(candidate, {"weight_bits": 32, "embedding_bits": bits}), feed_of(candidate)
    for table in embedding_tables(candidate.network):
        table.weight.data = (Grid("signed", 8) if bits == 8 else Grid("block", 4, 32)).round(table.weight.data)
    np.testing.assert_allclose(load_runner(artifact, 1)(feed), reference(candidate, feed), atol=1e-4, rtol=0)


@every_scheme
def test_no_matrix_is_left_in_float32(name: str, quantize: Quantize) -> None:
    found = tensors(model_of(quantize(distinct(layers=2), SCHEMES[name])))
    assert [key for key, v in found.items() if v.dtype == np.float32 and v.size >= 32 * 32] == []


@every_scheme
def test_nothing_is_printed(name: str, quantize: Quantize, capfd: pytest.CaptureFixture[str]) -> None:
    """Not even by a logger that nobody has set up."""
    with warnings.catch_warnings(), bare_logging():
        warnings.simplefilter("error")
        quantize(distinct(layers=1), params(name))
    assert capfd.readouterr() == ("", "")


@contextmanager
def bare_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    root.handlers[:] = []
    root.setLevel(logging.WARNING)
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


# --- size ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("excluded", [(), EXCLUDABLE[::2], EXCLUDABLE[1::2]])
@pytest.mark.parametrize("name", [*INT8, *PACKED])
def test_the_closed_form_predicts_the_bytes(name: str, excluded: tuple[str, ...], quantize: Quantize) -> None:
    candidate = distinct(layers=3, hidden=64, intermediate=128)
    chosen = params(name, **{f"exclude_{part}": True for part in excluded})
    stored = stored_bytes(quantize(candidate, chosen))
    assert stored == pytest.approx(METHOD.after(candidate.subject, chosen).megabytes * 1e6, rel=0.02)


@pytest.mark.parametrize(
    ("name", "granularity"),
    [("ternary", "per_channel"), ("binary", "per_tensor"), ("dynamic_int8", "per_tensor")],
)
def test_the_closed_form_predicts_packed_bytes(name: str, granularity: str, quantize: Quantize) -> None:
    candidate = distinct(layers=2, hidden=192, heads=4, intermediate=768)
    chosen = params(name, granularity=granularity, exclude_first_layer=name == "binary")
    stored = stored_bytes(quantize(candidate, chosen))
    assert stored == pytest.approx(METHOD.after(candidate.subject, chosen).megabytes * 1e6, rel=0.02)


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_sixteen_bits_halve_the_file(kind: str, quantize: Quantize) -> None:
    candidate, chosen = distinct(layers=2, hidden=128), {"weight_bits": 16, "float_type": kind}
    before = {name: value.clone() for name, value in candidate.network.state_dict().items()}
    subject = METHOD.after(candidate.subject, chosen)
    artifact = quantize(candidate, chosen)
    assert size_mb(artifact) == pytest.approx(subject.megabytes, rel=0.02)
    assert subject.megabytes == candidate.subject.megabytes / 2
    assert all(torch.equal(value, before[name]) for name, value in candidate.network.state_dict().items())
    assert argmax_agreement(candidate, artifact, apart=0.2) == 1


def test_bits_fall_as_promised() -> None:
    subject = Subject("bert", "text-classification", 6, 12, 32, 384, 1536, 30522, 512, 2, 4)
    assert subject.megabytes == pytest.approx(90.9, abs=0.05)
    sizes = {name: METHOD.after(subject, chosen).megabytes for name, chosen in SCHEMES.items()}
    assert sizes["dynamic_int8"] == pytest.approx(23.0, rel=0.015)
    assert sizes["weight_only 4"] == pytest.approx(14.8, rel=0.05)
    assert sizes["binary"] < sizes["weight_only 4"]
    assert stored_bits(subject, Setting.of(PACKED["weight_only 4"]))[1] == pytest.approx(5, rel=0.01)
    assert stored_bits(subject, Setting.of(CODEBOOKS["ternary"]))[0] == pytest.approx(1.6, rel=0.1)


# --- what it computes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "least"),
    [("dynamic_int8", 0.98), ("static_int8", 0.98), ("weight_only 8", 0.99), ("weight_only 4", 0.88)],
)
def test_answers_stay_the_same(name: str, least: float, quantize: Quantize) -> None:
    candidate = distinct(layers=2, hidden=64)
    assert argmax_agreement(candidate, quantize(candidate, SCHEMES[name]), apart=0.2) >= least


def test_more_bits_err_less(quantize: Quantize) -> None:
    candidate = distinct(layers=2, hidden=64, intermediate=128)
    feed = feed_of(candidate, size=64)

    def error(name: str, accuracy_level: int = 0) -> float:
        chosen = params(name, embedding_bits=32, accuracy_level=accuracy_level)
        return float(np.abs(load_runner(quantize(candidate, chosen), 1)(feed) - reference(candidate, feed)).mean())

    two, four, eight = error("weight_only 2", accuracy_level=4), error("weight_only 4"), error("weight_only 8")
    assert eight < four / 4
    assert error("weight_only 4, asymmetric") < four < two


@pytest.mark.parametrize("name", ["static_int8", *PACKED, *CODEBOOKS])
def test_companions_and_padding_change_nothing_without_run_time_ranges(name: str, quantize: Quantize) -> None:
    candidate = distinct(layers=2)
    run, feed = load_runner(quantize(candidate, SCHEMES[name]), 1), feed_of(candidate)
    alone = {key: value[:1] for key, value in feed.items()}
    np.testing.assert_allclose(run(alone), run(feed)[:1], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "changes"),
    [("dynamic_int8", {}), ("weight_only 4", {"activation_bits": 4}), ("ternary", {"activation_bits": 8})],
)
def test_companions_count_where_ranges_are_found_at_run_time(
    name: str, changes: dict[str, Any], quantize: Quantize
) -> None:
    """So that whatever is lowered is scored in the batches that it is deployed in."""
    candidate = distinct(layers=2)
    run, feed = load_runner(quantize(candidate, params(name, **changes)), 1), feed_of(candidate)
    alone = {key: value[:1] for key, value in feed.items()}
    assert np.abs(run(alone) - run(feed)[:1]).max() > 1e-4


@pytest.mark.parametrize("part", EXCLUDABLE)
@pytest.mark.parametrize(("family", "name"), [("bert", "dynamic_int8"), ("distilbert", "weight_only 4")])
def test_excluded_parts_are_left_alone(family: str, name: str, part: str, quantize: Quantize) -> None:
    found = operators(model_of(quantize(distinct(family, layers=3), params(name, **{f"exclude_{part}": True}))))
    kept = {"pooler": 1, "classifier": 1, "first_layer": 6, "last_layer": 6}.get(part, 3)
    assert found["MatMulInteger"] + found["MatMulNBits"] == 3 * 6 + 2 - kept


def test_exclusions_add_up(quantize: Quantize) -> None:
    both = params("dynamic_int8", exclude_pooler=True, exclude_first_layer=True, exclude_ffn_down=True)
    assert operators(model_of(quantize(distinct(layers=3), both)))["MatMulInteger"] == 20 - 1 - 6 - 2


def test_patterns_match_repeated_uses_and_nothing_else() -> None:
    candidate = distinct(layers=2)
    (pattern,) = node_patterns(candidate.network, ["bert.encoder.layer.1.output.dense"])
    names = [
        "/network/bert/encoder/layer.1/output/dense/MatMul",
        "/bert/encoder/layer.1/output/dense_2/MatMul_quant",
    ]
    others = ["/bert/encoder/layer.1/attention/output/dense/MatMul", "/bert/encoder/layer.11/output/dense/MatMul"]
    assert [bool(re.search(pattern, name)) for name in names + others] == [True, True, False, False]


def test_seven_bits_stay_in_seven_bits(quantize: Quantize) -> None:
    found = tensors(model_of(quantize(distinct(layers=1), params("dynamic_int8", reduce_range=True))))
    weights = [v for key, v in found.items() if "_rows" not in key and v.dtype == np.int8 and v.ndim == 2]
    assert sum(weight.size for weight in weights) == sum(
        module.weight.numel()
        for module in distinct(layers=1).network.modules()
        if isinstance(module, torch.nn.Linear)
    )
    assert max(int(np.abs(value.astype(int)).max()) for value in weights) <= 64


def test_static_ranges_are_of_texts_without_padding() -> None:
    candidate = tiny_candidate()
    context, asked = tiny_context(candidate), []
    calibration = context.calibration

    def recorded(examples: int, batch_size: int = 32) -> Iterator[Any]:
        asked.append(batch_size)
        yield from calibration(examples, batch_size)

    context.calibration = recorded  # type: ignore[method-assign]
    chosen = params("static_int8")
    Quantization().apply(candidate, chosen, context)
    Quantization().apply(candidate, {**chosen, "high_precision_layers": 1}, context)
    assert asked == [1, 32, 1], "and how sensitive maps are is told by whole batches"


def test_calibration_needs_examples(tmp_path: Path) -> None:
    with pytest.raises(TrialError, match="needs calibration examples"):
        quantize_static(tmp_path / "a.onnx", tmp_path / "b.onnx", examples=())


def test_the_argument_stays_as_it_was() -> None:
    candidate = distinct(layers=2)
    result = METHOD.apply(candidate, INT8["dynamic_int8"], tiny_context(candidate))
    assert candidate.lowering == ()
    assert len(result.lowering) == 3
    assert result.subject.traits == {"onnx-only"}
    assert not result.simulated


def test_the_root_logger_is_left_alone(quantize: Quantize) -> None:
    root = logging.getLogger()
    before = (root.level, list(root.handlers))
    quantize(distinct(layers=1), PACKED["weight_only 4"])
    assert (root.level, list(root.handlers)) == before


def integer_products(found: dict[str, Array]) -> Iterator[tuple[Array, Array]]:
    """Each quantized matrix (K, N) as floats, with the steps (N,) of its columns."""
    for name, value in found.items():
        steps = found.get(name.removesuffix("_quantized") + "_scale")
        if name.endswith("_quantized") and steps is not None and steps.ndim == 1:
            yield value * steps, steps
        if value.dtype == np.int8 and name.endswith("/weight"):  # queries, keys and values side by side
            steps = found[name.removesuffix("weight") + "scale"]
            yield from zip(np.split(value * steps, 3, axis=1), np.split(steps, 3), strict=True)


@pytest.mark.parametrize("name", INT8)
def test_int8_weights_are_within_half_a_step_of_their_channel(name: str, quantize: Quantize) -> None:
    candidate = distinct(layers=2)
    eight = params(name, reduce_range=False)
    products = list(integer_products(tensors(model_of(quantize(candidate, eight)))))
    linears = [module for module in candidate.network.modules() if isinstance(module, torch.nn.Linear)]
    assert len(products) == len(linears) == 6 * 2 + 2
    for original in (linear.weight.detach().numpy().T for linear in linears):
        same: Any = [(np.abs(v - original), steps) for v, steps in products if v.shape == original.shape]
        error, steps = min(same, key=lambda pair: float(pair[0].max()))
        assert (error <= steps / 2 * (1 + 1e-5)).all()
        np.testing.assert_allclose(steps, np.abs(original).max(axis=0) / 127, rtol=1e-5)


def test_the_padding_row_and_other_zeros_stay_zero(quantize: Quantize) -> None:
    candidate = distinct(layers=1)
    up = parts(layers(candidate.network)[0]).up.weight
    up.data[:, ::2] = 0
    embeddings(candidate.network).word_embeddings.weight.data[0] = 0
    found = tensors(model_of(quantize(candidate, INT8["dynamic_int8"])))
    halves = [v[::2] for v, _ in integer_products(found) if v.shape == up.T.shape]
    assert any((half == 0).all() for half in halves)
    (words,) = (v for name, v in found.items() if name.endswith("word_embeddings.weight_rows"))
    assert (words[0] == 0).all()
    assert (words[1:] != 0).any(axis=1).all()

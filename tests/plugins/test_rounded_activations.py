"""What is rounded in training is what the file computes: activations by kernels or nodes, and weights with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from compress_search_plugins.embedding_factorization import factorize_words
from compress_search_plugins.precision.bits import fake_quantize_activations
from compress_search_plugins.precision.number_formats import Setting
from compress_search_plugins.precision.onnx_activations import round_activations
from compress_search_plugins.precision.qat import rounded_inputs
from compress_search_plugins.precision.weight_maps import excluded_maps, linear_maps
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import InferenceSession

from compress_search import Candidate, Params
from compress_search.encoders import subject_of
from compress_search.runtimes import Artifact, load_runner
from compress_search.runtimes.lowering import lower
from compress_search.testing import tiny_context
from tests.quantized import (
    CLASSIFICATION,
    INT8,
    METHOD,
    Array,
    distinct,
    feed_of,
    model_of,
    operators,
    params,
    quantize,
    reference,
)


def product(folder: Path, *, size: int = 6, names: tuple[str, ...] = ("/a/MatMul", "/b/MatMul")) -> Path:
    """A file in which each map multiplies the same input by the identity."""
    nodes = [helper.make_node("MatMul", ["x", "one"], [f"y{n}"], name=name) for n, name in enumerate(names)]
    floats: Any = [None, None, size]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, floats)],
        [helper.make_tensor_value_info(f"y{n}", TensorProto.FLOAT, floats) for n in range(len(names))],
        [numpy_helper.from_array(np.eye(size, dtype=np.float32), "one")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "source.onnx")
    return folder / "source.onnx"


def run(path: Path, x: torch.Tensor) -> list[Array]:
    return InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def rounding(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """For each number of bits a file that does nothing but round."""
    folder = tmp_path_factory.mktemp("rounding")
    source = product(folder)
    for bits in (4, 8):
        round_activations(source, folder / f"{bits}.onnx", bits=bits)
    return {bits: folder / f"{bits}.onnx" for bits in (4, 8)}


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000), shift=st.floats(-5, 5), spread=st.floats(0.01, 100), bits=st.sampled_from((4, 8))
)
def test_nodes_round_as_training_does(
    rounding: dict[int, Path], seed: int, shift: float, spread: float, bits: int
) -> None:
    x = spread * (torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(seed)) + shift)
    expected = fake_quantize_activations(x, bits).numpy()
    found = run(rounding[bits], x)
    assert len(np.unique(found[0])) <= 2**bits
    for output in found:
        np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-6 * spread)
    step = float(x.clamp(min=0).max() - x.clamp(max=0).min()) / (2**bits - 1)
    assert np.abs(found[0] - x.numpy()).max() <= step * 1.001, "half a step, and as much where zero is no level"


def test_nothing_but_zeros_stays_zero(rounding: dict[int, Path]) -> None:
    for path in rounding.values():
        assert (run(path, torch.zeros(1, 2, 6))[0] == 0).all()


def test_a_tensor_that_several_maps_read_is_rounded_once_and_excluded_maps_read_it_as_it_is(tmp_path: Path) -> None:
    source = product(tmp_path, names=("/a/MatMul", "/b/MatMul", "/c/MatMul"))
    target = tmp_path / "target.onnx"
    round_activations(source, target, bits=4, excluded=("/c/",))
    graph = onnx.load(target).graph
    assert sum(node.op_type == "Clip" for node in graph.node) == 1
    x = torch.randn(1, 2, 6, generator=torch.Generator().manual_seed(0))
    first, second, third = run(target, x)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(third, x.numpy())
    assert not np.array_equal(first, third)


def trained(candidate: Candidate, chosen: Params, folder: Path) -> tuple[Candidate, Path]:
    result = METHOD.apply(candidate, chosen, tiny_context(candidate, steps=3))
    lower(result, folder / "artifact", CLASSIFICATION)
    return result, folder / "artifact"


def as_trained(result: Candidate, chosen: Params, feed: dict[str, Array]) -> Array:
    """Logits of the trained network with its activations rounded as they were in training."""
    setting = Setting.of(chosen)
    left = excluded_maps(result.network, setting.excluded)
    maps = [module for path, module in linear_maps(result.network).items() if path not in left]
    with rounded_inputs(maps, setting.rounded_activations):
        return reference(result, feed)


CASES: list[tuple[str, dict[str, Any]]] = [
    ("dynamic_int8", {"qat": True}),
    ("dynamic_int8", {"qat": True, "granularity": "per_tensor"}),
    ("weight_only 4", {"qat": True, "activation_bits": 8, "accuracy_level": 0}),
    ("weight_only 4", {"qat": True, "activation_bits": 4, "accuracy_level": 0}),
    ("ternary", {"activation_bits": 8}),
    ("binary", {"activation_bits": 4, "exclude_classifier": True}),
]


@pytest.mark.parametrize(("name", "changes"), CASES)
def test_the_file_computes_what_was_trained(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """Up to sums in another order, which now and then take a value across the border between two levels."""
    candidate = distinct(layers=1)
    chosen = params(name, learning_rate=1e-3, **changes)
    result, artifact = trained(candidate, chosen, tmp_path)
    feed = feed_of(candidate)
    expected, exact = as_trained(result, chosen, feed), reference(result, feed)
    found = load_runner(artifact, 1)(feed)
    distance = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    rounding = np.linalg.norm(exact - expected) / np.linalg.norm(expected)
    assert distance <= 0.02
    assert distance < rounding / 3, "far nearer than without rounding"


@pytest.mark.parametrize("name", ["weight_only 4", "ternary", "binary"])
def test_rounded_activations_are_simulated_and_take_no_space(name: str, tmp_path: Path) -> None:
    candidate = distinct(layers=1)
    chosen = params(name, activation_bits=4)
    found = operators(model_of(quantize(candidate, chosen, tmp_path / "artifact")))
    # queries, keys and values read the same; the others each their own
    assert found["ReduceMin"] == 4 + 2
    assert Artifact.read(tmp_path / "artifact").simulated
    assert METHOD.after(candidate.subject, chosen) == METHOD.after(candidate.subject, params(name))


def test_what_projects_a_table_of_few_bits_reads_rounded_rows(tmp_path: Path) -> None:
    candidate = distinct(layers=1)
    factorize_words(candidate.network, 16)
    factored = candidate.replace(subject=subject_of(candidate.network, candidate.subject.task))
    chosen = params("weight_only 4", activation_bits=8, embedding_bits=8)
    artifact = quantize(factored, chosen, tmp_path / "artifact")
    assert np.isfinite(load_runner(artifact, 1)(feed_of(factored))).all()


def test_four_bits_err_more_than_eight(tmp_path: Path) -> None:
    candidate = distinct(layers=2)
    feed = feed_of(candidate)

    def error(bits: int) -> float:
        chosen = params("weight_only 4", activation_bits=bits, accuracy_level=0)
        found = load_runner(quantize(candidate, chosen, tmp_path / str(bits)), 1)(feed)
        return float(np.abs(found - load_runner(tmp_path / "32", 1)(feed)).mean())

    assert error(32) == 0
    assert 0 < error(8) < error(4) / 4


def test_simulated_activations_are_not_there_where_time_counts() -> None:
    subject = distinct(layers=1).subject
    timed = subject.having("timed", "kernel:int8", "kernel:weight-only", "kernel:weight-only-2")
    assert "activation_bits" in METHOD.search_space(subject)
    assert "activation_bits" not in METHOD.search_space(timed)
    assert "activation_bits" in METHOD.missing(timed)
    for name in (*INT8, "weight_only 8"):
        asked = params(name, activation_bits=4)
        assert "activation_bits" not in METHOD.effective(subject, asked), "their kernels settle them"

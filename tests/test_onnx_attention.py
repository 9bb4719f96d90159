"""An attention that became one node computes what its nodes computed, and what is none stays as it is."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from compress_search import Candidate, Params
from compress_search.encoders import (
    FAMILIES,
    LowRankLinear,
    layers,
    parts,
    prune_heads,
    prune_hidden,
    set_layers,
    subject_of,
)
from compress_search.runtimes import engines, onnx_attention
from compress_search.runtimes.layer_stacks import layer_stack, runner
from compress_search.runtimes.lowering import lower
from compress_search.runtimes.onnx_attention import fuse_attention
from compress_search.runtimes.onnx_export import export
from compress_search.testing import tiny_context
from tests.quantized import CLASSIFICATION, INT8, METHOD, PACKED, distinct, feed_of, model_of, params, stored_bytes

FUSED = {"float32": "Attention", "int8": "QAttention"}


Both = Callable[[Candidate, Params | None], tuple[Path, Path]]


@pytest.fixture
def both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Both:
    """The artefact of a candidate, and the one without fused nodes; quantized where parameters are given."""

    def lowered(candidate: Candidate, chosen: Params | None) -> tuple[Path, Path]:
        if chosen:
            candidate = METHOD.apply(candidate, chosen, tiny_context(candidate))
        lower(candidate, tmp_path / "fused", CLASSIFICATION)
        with monkeypatch.context() as patch:
            patch.setattr(onnx_attention, "fuse_attention", lambda path: 0)
            lower(candidate, tmp_path / "plain", CLASSIFICATION)
        return tmp_path / "fused", tmp_path / "plain"

    return lowered


def kinds(artifact: Path) -> Counter[str]:
    return Counter(node.op_type for node in model_of(artifact).graph.node)


def answers(artifact: Path, feed: dict[str, Any]) -> Any:
    return engines.OnnxRunner(artifact / "model.onnx", 1, "cpu")(feed)


def cut(candidate: Candidate) -> Candidate:
    """Another number of heads in every layer, none in the first, and a narrower hidden state."""
    prune_heads(candidate.network, {0: [], 1: [1, 3]})
    if candidate.subject.family != "distilbert":
        prune_hidden(candidate.network, range(24))
    return resized(candidate)


def resized(candidate: Candidate) -> Candidate:
    return candidate.replace(subject=subject_of(candidate.network, candidate.subject.task))


@pytest.mark.parametrize("bits", FUSED)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_node_computes_what_many_did(family: str, bits: str, both: Both) -> None:
    candidate = distinct(family, layers=3)
    fused, plain = both(candidate, INT8["dynamic_int8"] if bits == "int8" else None)
    assert kinds(fused)[FUSED[bits]] == 3
    assert not {"Softmax", "Transpose", "Sub"} & set(kinds(fused)), "nothing of the old nodes is left"
    assert not set(FUSED.values()) & set(kinds(plain))
    feed = feed_of(candidate, size=8)
    assert not feed["attention_mask"].all(), "some of it is padding"
    np.testing.assert_allclose(answers(fused, feed), answers(plain, feed), atol=1e-5, rtol=0)


@pytest.mark.parametrize("bits", FUSED)
def test_layers_that_lost_heads_are_fused_and_those_without_any_have_nothing_to_fuse(bits: str, both: Both) -> None:
    candidate = cut(distinct(layers=3))
    fused, plain = both(candidate, INT8["dynamic_int8"] if bits == "int8" else None)
    heads = [node.attribute for node in model_of(fused).graph.node if node.op_type == FUSED[bits]]
    assert [a.i for one in heads for a in one if a.name == "num_heads"] == [2, 4]
    feed = feed_of(candidate, size=8)
    np.testing.assert_allclose(answers(fused, feed), answers(plain, feed), atol=1e-5, rtol=0)


@pytest.mark.parametrize("bits", FUSED)
def test_shared_maps_are_stored_once(bits: str, both: Both) -> None:
    candidate = distinct(layers=3)
    set_layers(candidate.network, [layers(candidate.network)[0]] * 3)
    fused, plain = both(resized(candidate), INT8["dynamic_int8"] if bits == "int8" else None)
    assert kinds(fused)[FUSED[bits]] == 3
    assert stored_bytes(fused) <= stored_bytes(plain)
    feed = feed_of(candidate)
    np.testing.assert_allclose(answers(fused, feed), answers(plain, feed), atol=1e-5, rtol=0)


@pytest.mark.parametrize("bits", FUSED)
def test_maps_that_are_shared_in_other_company_stay_apart(bits: str, both: Both) -> None:
    candidate = distinct(layers=3)
    first, second, _ = (parts(layer) for layer in layers(candidate.network))
    second.query.weight = first.query.weight
    fused, plain = both(candidate, INT8["dynamic_int8"] if bits == "int8" else None)
    assert kinds(fused)[FUSED[bits]] == 1, "the last layer alone"
    assert stored_bytes(fused) <= stored_bytes(plain)


def factored(candidate: Candidate) -> Candidate:
    """Queries of the first layer as a product of two matrices."""
    attention = layers(candidate.network)[0].attention.self
    left, values, right = torch.linalg.svd(attention.query.weight.detach(), full_matrices=False)
    bias = attention.query.bias.detach()
    attention.query = LowRankLinear(left[:, :4] * values[:4], right[:4], bias)
    return candidate


def whole(candidate: Candidate) -> Candidate:
    return candidate


@pytest.mark.parametrize(
    ("make", "chosen", "found"),
    [
        (factored, None, {"Attention": 1}),
        (factored, INT8["dynamic_int8"], {"QAttention": 1}),
        (whole, params("dynamic_int8", exclude_first_layer=True), {"Attention": 1, "QAttention": 1}),
        (whole, params("dynamic_int8", granularity="per_tensor"), {}),
        (whole, INT8["static_int8"], {}),
        (whole, PACKED["weight_only 4"], {}),
    ],
)
def test_maps_of_other_forms_stay_as_they_are(
    make: Callable[[Candidate], Candidate], chosen: Params | None, found: dict[str, int], both: Both
) -> None:
    candidate = make(distinct(layers=2))
    fused, plain = both(candidate, chosen)
    assert {kind: number for kind, number in kinds(fused).items() if kind in FUSED.values()} == found
    feed = feed_of(candidate)
    np.testing.assert_allclose(answers(fused, feed), answers(plain, feed), atol=1e-5, rtol=0)


def test_what_is_added_to_scores_besides_the_mask_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    export(distinct(layers=2).network, path)
    model = onnx.load(path)
    (hidden,) = (node for node in model.graph.node if node.op_type == "Sub")
    hidden.op_type = "Add"
    onnx.save(model, path)
    before = path.read_bytes()
    assert fuse_attention(path) == 0
    assert path.read_bytes() == before


def test_maps_that_are_tied_within_a_layer_stay_apart(both: Both) -> None:
    candidate = distinct(layers=2)
    first = parts(layers(candidate.network)[0])
    first.query.weight = first.key.weight
    fused, plain = both(candidate, None)
    assert kinds(fused)["Attention"] == 1
    assert stored_bytes(fused) <= stored_bytes(plain)


@pytest.mark.parametrize("strange", ["two axes", "no order", "a list of sizes"])
def test_graphs_of_other_hands_are_left_alone(strange: str, tmp_path: Path) -> None:
    """Lowering functions of a stranger's method write what they like."""
    order = {"two axes": {"perm": [1, 0]}, "no order": {}, "a list of sizes": {"perm": [0, 2, 1, 3]}}[strange]
    rank = 2 if strange == "two axes" else 4
    sizes: dict[str, Any] = {"value_ints": [1, 1, 16]}
    if strange != "a list of sizes":
        sizes = {"value": onnx.numpy_helper.from_array(np.array([1, 1, 16]))}
    nodes = [
        onnx.helper.make_node("Transpose", ["x"], ["t"], **order),
        onnx.helper.make_node("Constant", [], ["sizes"], **sizes),
        onnx.helper.make_node("Reshape", ["t", "sizes"], ["y"]),
    ]
    ends = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in (("x", [2, 8] if rank == 2 else [1, 2, 2, 4]), ("y", [1, 1, 16]))
    ]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", ends[:1], ends[1:]), ir_version=8)
    onnx.save(model, tmp_path / "model.onnx")
    assert fuse_attention(tmp_path / "model.onnx") == 0


def test_files_for_other_devices_keep_to_the_standard(tmp_path: Path) -> None:
    candidate = distinct(layers=2).replace(runtime={"engine": "onnxruntime"})
    for device, domains in (("cpu", {"", "com.microsoft"}), ("cuda", {""})):
        subject = dataclasses.replace(candidate.subject, device=device)
        lower(candidate.replace(subject=subject), tmp_path / device, CLASSIFICATION)
        assert {node.domain for node in model_of(tmp_path / device).graph.node} == domains


def test_layers_are_timed_as_candidates_run(tmp_path: Path) -> None:
    subject = distinct().subject
    runner(layer_stack(subject, 2, 2, 16), tmp_path / "stack.onnx", 1, "cpu")
    assert fuse_attention(tmp_path / "stack.onnx") == 0, "they are fused already"
    assert "Attention" in {node.op_type for node in onnx.load(tmp_path / "stack.onnx").graph.node}

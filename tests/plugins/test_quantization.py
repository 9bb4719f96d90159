"""What the produced file holds: which kernels, how far its weights are from the originals, how many bytes."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import optuna
import pytest
import torch
from compress_search_plugins.quantization import Quantization, node_scopes, quantize_static, stored_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper

from compress_search import Candidate, Params, Subject, TrialError
from compress_search.encoders import FAMILIES, layers, parts, prune_heads, prune_neurons, set_layers
from compress_search.runtimes import Artifact, load_runner, lower, size_mb
from compress_search.space import defaults, fix_experts, suggest
from compress_search.tasks import Task
from compress_search.testing import tiny_batches, tiny_candidate, tiny_context

METHOD = Quantization()
CLASSIFICATION = Task("text-classification", ("first", "second"))
Array = NDArray[Any]

INT8: dict[str, Params] = {
    "dynamic_int8": {"weight_bits": 8, "scheme": "dynamic_int8", "embedding_bits": 8},
    "static_int8": {"weight_bits": 8, "scheme": "static_int8", "embedding_bits": 8, "calibration_examples": 32},
}
PACKED: dict[str, Params] = {
    "weight_only 8": {"weight_bits": 8, "scheme": "weight_only", "group_size": 32, "embedding_bits": 8},
    "weight_only 4": {"weight_bits": 4, "group_size": 32, "embedding_bits": 4},
    "weight_only 4 in 64": {"weight_bits": 4, "group_size": 64, "embedding_bits": 8},
}
SCHEMES = {**INT8, **PACKED}
every_scheme = pytest.mark.parametrize("name", SCHEMES)


def distinct(family: str = "bert", **sizes: int) -> Candidate:
    """No two tensors alike: the exporter stores equal ones once, such as the norms of an untrained network."""
    candidate = tiny_candidate(family, **sizes)
    generator = torch.Generator().manual_seed(1)
    for parameter in candidate.network.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return candidate


def params(name: str, **changes: Any) -> Params:
    return {**SCHEMES[name], **changes}


@pytest.fixture
def quantize(tmp_path: Path) -> Callable[[Candidate, Params], Path]:
    """Apply, lower, and return the artefact."""

    def run(candidate: Candidate, chosen: Params) -> Path:
        context = tiny_context(candidate)
        lower(METHOD.apply(candidate, chosen, context), tmp_path / "artifact", CLASSIFICATION)
        return tmp_path / "artifact"

    return run


Quantize = Callable[[Candidate, Params], Path]


def model_of(artifact: Path) -> ModelProto:
    return onnx.load(artifact / "model.onnx")


def operators(model: ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def tensors(model: ModelProto) -> dict[str, Array]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def stored_bytes(artifact: Path) -> int:
    """Of all constants; numpy would unpack 4-bit tensors."""
    return sum(len(t.raw_data) or numpy_helper.to_array(t).nbytes for t in model_of(artifact).graph.initializer)


def feed_of(candidate: Candidate, size: int = 8, seed: int = 5) -> dict[str, Array]:
    batch = next(tiny_batches(candidate, batch_size=size, seed=seed))
    return {name: tensor.numpy() for name, tensor in batch.items() if name not in ("labels", "index")}


def reference(candidate: Candidate, feed: dict[str, Array]) -> Array:
    with torch.no_grad():
        logits = candidate.network(**{name: torch.from_numpy(value) for name, value in feed.items()}).logits
    return np.asarray(logits)


# --- the space -------------------------------------------------------------------------------------------------


def test_every_kernel_that_runs_is_offered_where_only_size_counts() -> None:
    space = METHOD.search_space(distinct().subject)
    assert space["weight_bits"].distribution.choices == (8, 4, 16)
    assert space["scheme"].distribution.choices == ("dynamic_int8", "static_int8", "weight_only")
    assert set(fix_experts(space)) == set(space)
    searched = {name for name, dim in space.items() if not dim.expert}
    assert searched == {"weight_bits", "scheme", "group_size", "embedding_bits"}


@pytest.mark.parametrize(
    ("kernels", "bits", "schemes"),
    [
        (("int8",), (8,), ("dynamic_int8", "static_int8")),
        (("weight-only",), (8, 4), ("weight_only",)),
        (("bf16",), (16,), None),
        (("int8", "bf16"), (8, 16), ("dynamic_int8", "static_int8")),
    ],
)
def test_only_real_kernels_are_offered_where_time_counts(
    kernels: tuple[str, ...], bits: tuple[int, ...], schemes: tuple[str, ...] | None
) -> None:
    space = METHOD.search_space(distinct().subject.having("timed", *(f"kernel:{name}" for name in kernels)))
    assert space["weight_bits"].distribution.choices == bits
    assert (space["scheme"].distribution.choices if "scheme" in space else None) == schemes
    assert ("group_size" in space) == ("weight-only" in kernels)
    assert ("calibration_examples" in space) == ("int8" in kernels)


def test_without_a_real_kernel_it_cannot_follow() -> None:
    subject = distinct().subject
    assert METHOD.unsupported(subject) is None
    assert METHOD.search_space(subject.having("timed")) == {}
    assert "as fast as float32" in str(METHOD.unsupported(subject.having("timed")))


def test_recipes_that_do_the_same_are_the_same() -> None:
    subject = distinct().subject
    effective = [METHOD.effective(subject, params("dynamic_int8", group_size=size)) for size in (32, 128)]
    assert effective[0] == effective[1] == INT8["dynamic_int8"]
    assert METHOD.effective(subject, PACKED["weight_only 4"]) == PACKED["weight_only 4"]
    assert METHOD.effective(subject, {"weight_bits": 16}) == {"weight_bits": 16}


@cache
def two_layers() -> Candidate:
    return distinct(layers=2)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=12, deadline=None)
def test_every_point_of_the_space_applies_and_runs(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    candidate = two_layers()
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed)).ask()
    chosen = suggest(trial, "quantization", METHOD.search_space(candidate.subject))
    effective = METHOD.effective(candidate.subject, chosen)
    assert METHOD.effective(candidate.subject, effective) == effective
    result = METHOD.apply(candidate, effective, tiny_context(candidate))
    assert result.subject == METHOD.after(candidate.subject, effective)
    artifact = tmp_path_factory.mktemp("point") / "artifact"
    lower(result, artifact, CLASSIFICATION)
    feed = feed_of(candidate)
    logits = load_runner(artifact, 1)(feed)
    assert np.isfinite(logits).all()
    assert np.abs(logits - reference(candidate, feed)).max() < np.abs(reference(candidate, feed)).max()
    assert Artifact.read(artifact).engine == ("torch" if effective["weight_bits"] == 16 else "onnxruntime")


# --- what the file holds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_map_becomes_an_integer_product(family: str, quantize: Quantize) -> None:
    model = model_of(quantize(distinct(family, layers=2), INT8["dynamic_int8"]))
    found = operators(model)
    assert found["MatMulInteger"] == 6 * 2 + 2, "pooler and classifier included"
    assert found["MatMul"] == 2 * 2, "the products of two activations of each layer"
    assert found["Gemm"] == 0


def test_static_ranges_replace_the_ones_found_at_run_time(quantize: Quantize) -> None:
    found = operators(model_of(quantize(distinct(layers=2), INT8["static_int8"])))
    assert found["DynamicQuantizeLinear"] == found["MatMulInteger"] == 0
    # one range for each distinct input of a linear map: per layer hidden states, context, FFN input and output
    assert found["QuantizeLinear"] == 2 * 4 + 2
    assert found["MatMul"] == 2 * 6 + 2 + 2 * 2


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
    found = operators(model_of(quantize(distinct(layers=2), PACKED[name])))
    assert found["MatMulNBits"] == 6 * 2 + 2
    assert found["Gemm"] == 0


def test_embeddings_follow_their_own_bits(quantize: Quantize) -> None:
    candidate = distinct(layers=2)
    found = {
        bits: operators(model_of(quantize(candidate, params("dynamic_int8", embedding_bits=bits))))
        for bits in (32, 8, 4)
    }
    assert found[8]["DequantizeLinear"] == 3
    assert found[4]["GatherBlockQuantized"] == 3
    assert found[32]["DequantizeLinear"] == found[32]["GatherBlockQuantized"] == 0


@every_scheme
def test_no_matrix_is_left_in_float32(name: str, quantize: Quantize) -> None:
    found = tensors(model_of(quantize(distinct(layers=2), SCHEMES[name])))
    left = [key for key, value in found.items() if value.dtype == np.float32 and value.size >= 32 * 32]
    assert left == []


@pytest.mark.parametrize("name", SCHEMES)
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


@pytest.mark.parametrize("shared", [True, False])
def test_shared_layers_are_quantized_once(shared: bool, quantize: Quantize) -> None:
    candidate = distinct(layers=3)
    if shared:
        set_layers(candidate.network, [layers(candidate.network)[0]] * 3)
    model = model_of(quantize(candidate, INT8["dynamic_int8"]))
    assert operators(model)["MatMulInteger"] == 6 * 3 + 2
    matrices = [t for t in tensors(model).values() if t.dtype == np.int8 and t.ndim == 2 and 32 in t.shape]
    linears = [m for m in matrices if m.shape[0] not in (len(candidate.tokenizer), 40, 2)]
    assert len(linears) == (6 if shared else 18) + 2


def integer_products(found: dict[str, Array]) -> Iterator[tuple[Array, Array]]:
    """Each quantized matrix (K, N) as floats, with the steps (N,) of its columns."""
    for name, value in found.items():
        steps = found.get(name.removesuffix("_quantized") + "_scale")
        if name.endswith("_quantized") and steps is not None and steps.ndim == 1:
            yield value * steps, steps


@pytest.mark.parametrize("name", INT8)
def test_int8_weights_are_within_half_a_step_of_their_channel(name: str, quantize: Quantize) -> None:
    candidate = distinct(layers=2)
    products = list(integer_products(tensors(model_of(quantize(candidate, SCHEMES[name])))))
    linears = [module for module in candidate.network.modules() if isinstance(module, torch.nn.Linear)]
    assert len(products) == len(linears) == 6 * 2 + 2
    for original in (linear.weight.detach().numpy().T for linear in linears):
        same_shape = [
            (np.abs(value - original), steps) for value, steps in products if value.shape == original.shape
        ]
        error, steps = min(same_shape, key=lambda pair: float(pair[0].max()))
        assert (error <= steps / 2 * (1 + 1e-5)).all()
        np.testing.assert_allclose(steps, np.abs(original).max(axis=0) / 127, rtol=1e-5)


def test_packed_weights_are_within_half_a_step_or_clipped(quantize: Quantize) -> None:
    """Four bits reach from -8 to 7 steps: only the largest weight of the other sign can be a whole step off."""
    candidate = distinct(layers=1, hidden=64, intermediate=96)
    found = tensors(model_of(quantize(candidate, PACKED["weight_only 4"])))
    up = parts(layers(candidate.network)[0]).up.weight.detach().numpy()  # (96, 64)
    packed = next(v for k, v in found.items() if k.endswith("_Q4") and v.shape == (96, 2, 16))
    scales = next(found[k.replace("_Q4", "_scales")] for k, v in found.items() if v is packed)
    nibbles = np.stack([packed & 15, packed >> 4], axis=-1).reshape(96, 2, 32).astype(np.float32) - 8
    steps = scales.reshape(96, 2, 1)
    error = np.abs(nibbles * steps - up.reshape(96, 2, 32))
    clipped = nibbles == 7
    assert (error <= np.abs(steps) * np.where(clipped, 1, 0.5) * (1 + 1e-5)).all()
    assert (nibbles.min(axis=-1) == -8).all(), "the largest weight of each group uses the whole range"


# --- size ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exclude", ["none", "head", "ends", "ffn_down", "attention_output"])
@every_scheme
def test_the_closed_form_predicts_the_bytes(name: str, exclude: str, quantize: Quantize) -> None:
    candidate = distinct(layers=3, hidden=64, intermediate=128)
    chosen = params(name, exclude=exclude)
    stored = stored_bytes(quantize(candidate, chosen))
    predicted = METHOD.after(candidate.subject, chosen).megabytes * 1e6
    assert stored == pytest.approx(predicted, rel=0.02)


def test_the_closed_form_holds_for_cut_networks_and_for_the_file(quantize: Quantize) -> None:
    from compress_search.encoders import subject_of

    candidate = distinct(layers=2, hidden=256, intermediate=1024)
    prune_heads(candidate.network, {0: [1], 1: [0, 2]})
    prune_neurons(candidate.network, {0: range(96), 1: range(512)})
    candidate = candidate.replace(subject=subject_of(candidate.network, "text-classification"))
    for chosen in (INT8["dynamic_int8"], PACKED["weight_only 4"]):
        artifact = quantize(candidate, chosen)
        predicted = METHOD.after(candidate.subject, chosen).megabytes
        assert stored_bytes(artifact) / 1e6 == pytest.approx(predicted, rel=0.02)
        assert 0 < size_mb(artifact) - predicted < 0.1, "the graph itself takes a few ten thousand bytes"


def test_bfloat16_halves_the_file(quantize: Quantize) -> None:
    candidate = distinct(layers=2, hidden=128)
    before = {name: value.clone() for name, value in candidate.network.state_dict().items()}
    subject = METHOD.after(candidate.subject, {"weight_bits": 16})
    assert size_mb(quantize(candidate, {"weight_bits": 16})) == pytest.approx(subject.megabytes, rel=0.02)
    assert subject.megabytes == candidate.subject.megabytes / 2
    assert all(torch.equal(value, before[name]) for name, value in candidate.network.state_dict().items())


def test_bits_fall_as_promised() -> None:
    subject = Subject("bert", "text-classification", 6, 12, 32, 384, 1536, 30522, 512, 2, 4)
    assert subject.megabytes == pytest.approx(90.9, abs=0.05)
    sizes = {name: METHOD.after(subject, chosen).megabytes for name, chosen in SCHEMES.items()}
    assert sizes["dynamic_int8"] == pytest.approx(23.0, rel=0.01)
    assert sizes["weight_only 4"] == pytest.approx(14.8, rel=0.05)
    assert stored_bits(subject, PACKED["weight_only 4"])[1] == pytest.approx(5, rel=0.01), "4 and a scale per 32"


# --- what it computes ------------------------------------------------------------------------------------------


def argmax_agreement(candidate: Candidate, artifact: Path) -> float:
    feed = feed_of(candidate, size=200)
    agree = load_runner(artifact, 1)(feed).argmax(-1) == reference(candidate, feed).argmax(-1)
    return float(agree.mean())


@pytest.mark.parametrize(
    ("name", "least"),
    [("dynamic_int8", 0.98), ("static_int8", 0.97), ("weight_only 8", 0.98), ("weight_only 4", 0.85)],
)
def test_answers_stay_the_same(name: str, least: float, quantize: Quantize) -> None:
    candidate = distinct(layers=2, hidden=64)
    assert argmax_agreement(candidate, quantize(candidate, SCHEMES[name])) >= least


def test_more_bits_err_less(quantize: Quantize) -> None:
    candidate = distinct(layers=2, hidden=64, intermediate=128)
    feed = feed_of(candidate, size=64)

    def error(chosen: Params) -> float:
        return float(np.abs(load_runner(quantize(candidate, chosen), 1)(feed) - reference(candidate, feed)).mean())

    four, eight = (
        error(params("weight_only 4", embedding_bits=32)),
        error(params("weight_only 8", embedding_bits=32)),
    )
    assert eight < four / 4


@pytest.mark.parametrize("name", ["static_int8", *PACKED])
def test_companions_and_padding_change_nothing_without_run_time_ranges(name: str, quantize: Quantize) -> None:
    candidate = distinct(layers=2)
    run, feed = load_runner(quantize(candidate, SCHEMES[name]), 1), feed_of(candidate)
    alone = {key: value[:1] for key, value in feed.items()}
    np.testing.assert_allclose(run(alone), run(feed)[:1], atol=1e-5)


@pytest.mark.parametrize("embedding_bits", [32, 8, 4])
@pytest.mark.parametrize("exclude", ["head", "ends", "ffn_down", "attention_output"])
@pytest.mark.parametrize(("family", "name"), [("bert", "dynamic_int8"), ("distilbert", "weight_only 4")])
def test_presets_leave_their_maps_alone(
    family: str, name: str, exclude: str, embedding_bits: int, quantize: Quantize
) -> None:
    chosen = params(name, exclude=exclude, embedding_bits=embedding_bits)
    found = operators(model_of(quantize(distinct(family, layers=3), chosen)))
    kept = {"head": 2, "ends": 2 * 6, "ffn_down": 3, "attention_output": 3}[exclude]
    assert found["MatMulInteger"] + found["MatMulNBits"] == 3 * 6 + 2 - kept


def test_scopes_are_written_as_the_exporter_writes_them() -> None:
    scopes = node_scopes(distinct(layers=2).network, "ffn_down")
    assert scopes == ("/bert/encoder/layer.0/output/dense/", "/bert/encoder/layer.1/output/dense/")


def test_seven_bits_stay_in_seven_bits(quantize: Quantize) -> None:
    found = tensors(model_of(quantize(distinct(layers=1), params("dynamic_int8", reduce_range=True))))
    weights = [
        value for key, value in found.items() if "MatMul" in key and value.dtype == np.int8 and value.ndim == 2
    ]
    assert weights
    assert max(int(np.abs(value.astype(int)).max()) for value in weights) <= 64


def test_calibration_needs_examples(tmp_path: Path) -> None:
    with pytest.raises(TrialError, match="needs calibration examples"):
        quantize_static(tmp_path / "a.onnx", tmp_path / "b.onnx", examples=())


def test_the_argument_stays_as_it_was() -> None:
    candidate = distinct(layers=2)
    result = METHOD.apply(candidate, INT8["dynamic_int8"], tiny_context(candidate))
    assert candidate.lowering == ()
    assert len(result.lowering) == 3
    assert result.subject.traits == {"onnx-only"}


def test_the_root_logger_is_left_alone(quantize: Quantize) -> None:
    root = logging.getLogger()
    before = (root.level, list(root.handlers))
    quantize(distinct(layers=1), PACKED["weight_only 4"])
    assert (root.level, list(root.handlers)) == before


def test_defaults_are_a_legal_point() -> None:
    chosen = METHOD.effective(two_layers().subject, defaults(METHOD.search_space(two_layers().subject)))
    assert chosen["scheme"] == "dynamic_int8"
    assert "group_size" not in chosen

"""Looking into quantized artefacts: the one candidate, what its file holds, and how it answers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from compress_search_plugins.quantization import Quantization
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper

from compress_search import Candidate, Params
from compress_search.runtimes import load_runner
from compress_search.runtimes.lowering import lower
from compress_search.runtimes.probe import kernels
from compress_search.tasks import Task
from compress_search.testing import tiny_batches, tiny_candidate, tiny_context

METHOD = Quantization()
CLASSIFICATION = Task("text-classification", ("first", "second"))
Array = NDArray[Any]

EIGHT_BITS: Params = {"weight_bits": 8, "embedding_bits": 8, "reduce_range": "int8-exact" not in kernels()}
"""Of which weights use seven where this machine's products of eight saturate, as a study has it by default."""
INT8: dict[str, Params] = {
    "dynamic_int8": {**EIGHT_BITS, "scheme": "dynamic_int8"},
    "static_int8": {**EIGHT_BITS, "scheme": "static_int8", "calibration_examples": 32},
}
PACKED: dict[str, Params] = {
    "weight_only 8": {"weight_bits": 8, "scheme": "weight_only", "group_size": 32, "embedding_bits": 8},
    "weight_only 4": {"weight_bits": 4, "group_size": 32, "embedding_bits": 4},
    "weight_only 4 in 64": {"weight_bits": 4, "group_size": 64, "embedding_bits": 8},
    "weight_only 4, asymmetric": {"weight_bits": 4, "symmetric": False, "group_size": 32, "embedding_bits": 4},
    "weight_only 2": {"weight_bits": 2, "codebook": "uniform", "group_size": 32, "embedding_bits": 16},
}
CODEBOOKS: dict[str, Params] = {
    "ternary": {"weight_bits": 2, "codebook": "ternary", "embedding_bits": 8},
    "binary": {"weight_bits": 1, "embedding_bits": 4},
}
SCHEMES = {**INT8, **PACKED, **CODEBOOKS}


def distinct(family: str = "bert", **sizes: int) -> Candidate:
    """No two tensors alike: the exporter stores equal ones once, such as the norms of an untrained network."""
    candidate = tiny_candidate(family, **sizes)
    generator = torch.Generator().manual_seed(1)
    for parameter in candidate.network.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return candidate


def params(name: str, **changes: Any) -> Params:
    return {**SCHEMES[name], **changes}


def quantize(candidate: Candidate, chosen: Params, directory: Path) -> Path:
    """Apply, lower, and return the artefact."""
    lower(METHOD.apply(candidate, chosen, tiny_context(candidate)), directory, CLASSIFICATION)
    return directory


def model_of(artifact: Path) -> ModelProto:
    return onnx.load(artifact / "model.onnx")


def operators(model: ModelProto) -> Counter[str]:
    """How often each occurs; an attention that is one node counts as the three maps and two products it holds."""
    found = Counter(node.op_type for node in model.graph.node)
    for fused, kind in (("Attention", "MatMul"), ("QAttention", "MatMulInteger")):
        found[kind] += 3 * found[fused]
        found["MatMul"] += 2 * found[fused]
    return found


def tensors(model: ModelProto) -> dict[str, Array]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def stored_bytes(artifact: Path) -> int:
    """Of all constants; numpy would unpack 4-bit tensors."""
    return sum(len(t.raw_data) or numpy_helper.to_array(t).nbytes for t in model_of(artifact).graph.initializer)


def linear_maps(model: ModelProto) -> int:
    """How many products with stored weights there are, in whatever form."""
    constants = {tensor.name for tensor in model.graph.initializer}
    made = {output for node in model.graph.node if node.op_type == "Mul" for output in node.output}
    decoded = {name for name in made if name.endswith("_decoded")}
    dequantized = {
        node.output[0]
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in constants
    }
    stored = constants | decoded | dequantized
    maps = {"Attention": 3, "QAttention": 3}
    read = [node for node in model.graph.node if len(node.input) > 1 and node.input[1] in stored]
    return sum(maps.get(node.op_type, int("MatMul" in node.op_type)) for node in read)


def feed_of(candidate: Candidate, size: int = 8, seed: int = 5) -> dict[str, Array]:
    batch = next(tiny_batches(candidate, batch_size=size, seed=seed))
    return {name: tensor.numpy() for name, tensor in batch.items() if name not in ("labels", "index")}


def reference(candidate: Candidate, feed: dict[str, Array]) -> Array:
    with torch.no_grad():
        logits = candidate.network(**{name: torch.from_numpy(value) for name, value in feed.items()}).logits
    return np.asarray(logits)


def argmax_agreement(candidate: Candidate, artifact: Path, apart: float = 0.0) -> float:
    """On how many of 200 texts both say the same; of those alone whose two logits lie ``apart`` or further.

    That is counted in standard deviations of how far they lie apart. Of a network that was never trained some are
    as good as equal, and which one is larger then hangs on how a processor rounds.
    """
    feed = feed_of(candidate, size=200)
    logits = reference(candidate, feed)
    margins = logits[:, 0] - logits[:, 1]
    told = np.abs(margins) >= apart * margins.std()
    agree = load_runner(artifact, 1)(feed).argmax(-1) == logits.argmax(-1)
    return float(agree[told].mean())

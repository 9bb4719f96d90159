"""Fewer bits for weights, and for activations where integer kernels exist, after all training.

Eight bits: ONNX Runtime's integer matrix products with activation ranges found at run time (``dynamic_int8``) or
on training examples beforehand (``static_int8``), or packed weights alone (``weight_only``), as four bits always
are. Sixteen bits: the whole network in bfloat16, run by torch. Rounding is to nearest, symmetric for weights
(Jacob et al. 2018, https://arxiv.org/abs/1712.05877), one scale per output channel or per group of inputs.

The integer schemes rewrite the exported ONNX file; nothing trains after them.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from compress_search import Candidate, Context, Dim, Method, Params, Stage, Subject, TrialError
from compress_search.encoders import head, layers, parts

if TYPE_CHECKING:
    from torch import nn

Inputs = Mapping[str, NDArray[np.int64]]

EMBEDDING_GROUP = 32
"""Weights that share a scale in a 4-bit embedding table."""

_KERNELS = {"bf16": "bf16", "dynamic_int8": "int8", "static_int8": "int8", "weight_only": "weight-only"}
_EXCLUDE = ("none", "head", "ends", "ffn_down", "attention_output")


class Quantization(Method):
    """Post-training quantization; owns its backend, and so narrows the engines that can follow."""

    stage = Stage.PRECISION

    def search_space(self, teacher: Subject) -> Mapping[str, Dim]:
        """Bits, scheme and group size, out of the kernels that are real where running time counts."""
        eight = [s for s in ("dynamic_int8", "static_int8", "weight_only") if _offered(teacher, s)]
        offers = {8: bool(eight), 4: _offered(teacher, "weight_only"), 16: _offered(teacher, "bf16")}
        bits = [number for number, offered in offers.items() if offered]
        if not bits:
            return {}
        integer = {"weight_bits": (8, 4)}
        space = {"weight_bits": Dim.choice(bits, bits[0])}
        if eight:
            space["scheme"] = Dim.choice(eight, eight[0], when={"weight_bits": (8,)})
        if 4 in bits:
            space["group_size"] = Dim.choice((32, 64, 128), 32, when=integer)
        if set(bits) != {16}:
            space["embedding_bits"] = Dim.choice((32, 8, 4), 8, when=integer)
            space["exclude"] = Dim.choice(_EXCLUDE, "none", when=integer, expert=True)
            space["reduce_range"] = Dim.flag(False, when={"weight_bits": (8,)}, expert=True)
        if "static_int8" in eight:
            static = {"scheme": ("static_int8",)}
            space["calibration_examples"] = Dim.integer(32, 512, 128, when=static, expert=True)
        return space

    def unsupported(self, subject: Subject) -> str | None:
        """Whether any kernel for fewer bits is real here."""
        if self.search_space(subject):
            return None
        return "no kernel for fewer bits is as fast as float32 on this machine"

    def effective(self, subject: Subject, params: Params) -> Params:
        """Without what the scheme has no use for: a group size, or seven bits against saturation."""
        unused = {"reduce_range"} if _scheme(params) == "weight_only" else {"group_size"}
        return {name: value for name, value in params.items() if name not in unused}

    def after(self, subject: Subject, params: Params) -> Subject:
        """The mean stored bits, scales and what stays in float32 included; which engine is left."""
        bits, embedding_bits = stored_bits(subject, params)
        only = "torch-only" if _scheme(params) == "bf16" else "onnx-only"
        return subject.having(only, bits=bits, embedding_bits=embedding_bits)

    def apply(self, candidate: Candidate, params: Params, context: Context) -> Candidate:
        """Convert to bfloat16 at once, or add the rewriting of the ONNX file to the candidate's lowering."""
        subject = self.after(candidate.subject, params)
        if _scheme(params) == "bf16":
            converted = candidate.copy()
            converted.network.bfloat16()
            return converted.replace(subject=subject)
        return candidate.replace(
            subject=subject, lowering=candidate.lowering + lowering(candidate, params, context)
        )


def _offered(subject: Subject, scheme: str) -> bool:
    """Any kernel will do where only size counts; where time counts it must be one that was found to be real."""
    return "timed" not in subject.traits or f"kernel:{_KERNELS[scheme]}" in subject.traits


def _scheme(params: Params) -> str:
    implied = {16: "bf16", 4: "weight_only"}
    bits = cast(int, params["weight_bits"])
    return implied[bits] if bits in implied else cast(str, params["scheme"])


# --- size in closed form ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Matrix:
    """``count`` weight matrices of K inputs and N outputs each; ``kept`` of them stay in float32."""

    inputs: float
    outputs: float
    count: float
    kept: float = 0

    def bits(self, scheme: str, weight_bits: int, group_size: int) -> float:
        """Stored bits, scales included, without the bias."""
        weights = self.inputs * self.outputs
        if scheme == "weight_only":
            quantized = math.ceil(self.inputs / group_size) * self.outputs * (group_size * weight_bits + 32)
        else:
            quantized = weights * 8 + self.outputs * (32 + 8)  # a float32 scale and an int8 zero point per channel
        return (self.count - self.kept) * quantized + self.kept * weights * 32


def stored_bits(subject: Subject, params: Params) -> tuple[float, float]:
    """Mean stored bits of an encoder or head parameter, and of an embedding parameter.

    Biases and norms stay in float32, and so do matrices that ``exclude`` names; a bfloat16 network has 16 of each.
    """
    scheme = _scheme(params)
    if scheme == "bf16":
        return 16.0, 16.0
    setting = (scheme, cast(int, params["weight_bits"]), cast(int, params.get("group_size", 0)))
    matrices = _matrices(subject, cast(str, params.get("exclude", "none")))
    plain = subject.encoder_parameters + subject.head_parameters
    plain -= round(sum(m.inputs * m.outputs * m.count for m in matrices))
    bits = sum(m.bits(*setting) for m in matrices) + 32 * plain
    width = subject.embedding_size or subject.hidden
    table = subject.vocabulary + subject.positions + subject.token_types
    embedding = table * _row_bits(width, cast(int, params["embedding_bits"]))
    projection = Matrix(width, subject.hidden, count=0 if width == subject.hidden else 1)
    rest = subject.embedding_parameters - table * width - projection.count * width * subject.hidden
    embedding += projection.bits(*setting) + 32 * rest
    return (
        bits / (subject.encoder_parameters + subject.head_parameters),
        embedding / subject.embedding_parameters,
    )


def _matrices(subject: Subject, exclude: str) -> list[Matrix]:
    hidden, width, number = subject.hidden, subject.heads * subject.head_dim, subject.layers
    ends = min(2, number) if exclude == "ends" else 0
    heads = {"count": 1.0, "kept": float(exclude == "head")}
    return [
        Matrix(hidden, width, 3 * number, 3 * ends),
        Matrix(width, hidden, number, number if exclude == "attention_output" else ends),
        Matrix(hidden, subject.intermediate, number, ends),
        Matrix(subject.intermediate, hidden, number, number if exclude == "ffn_down" else ends),
        *([Matrix(hidden, hidden, **heads)] if subject.pooler else []),
        Matrix(hidden, subject.labels, **heads),
    ]


def _row_bits(width: int, bits: int) -> float:
    """Bits of one embedding row: 8 share one scale per table, 4 have a float32 scale per group."""
    if bits == 4:
        return width * 4 + math.ceil(width / EMBEDDING_GROUP) * 32
    return width * bits


# --- rewriting the ONNX file -----------------------------------------------------------------------------------


def lowering(candidate: Candidate, params: Params, context: Context) -> tuple[Callable[[Path, Path], None], ...]:
    """The file-level steps: prepare, embeddings, then weights, so that calibration sees the final embeddings."""
    scheme, excluded = _scheme(params), node_scopes(candidate.network, cast(str, params.get("exclude", "none")))
    reduce_range = bool(params.get("reduce_range", False))
    weights: Callable[[Path, Path], None]
    if scheme == "weight_only":
        bits, group = cast(int, params["weight_bits"]), cast(int, params["group_size"])
        weights = partial(pack_weights, bits=bits, group_size=group, excluded=excluded)
    elif scheme == "static_int8":
        examples = calibration_inputs(context, cast(int, params["calibration_examples"]))
        weights = partial(quantize_static, examples=examples, excluded=excluded, reduce_range=reduce_range)
    else:
        weights = partial(quantize_dynamic, excluded=excluded, reduce_range=reduce_range)
    tables = {8: (quantize_embeddings,), 4: (pack_embeddings,), 32: ()}[cast(int, params["embedding_bits"])]
    return (prepare, *tables, weights)


def calibration_inputs(context: Context, examples: int) -> tuple[Inputs, ...]:
    """Training examples as int64 arrays (B, S)."""
    return tuple(
        {name: tensor.cpu().numpy() for name, tensor in batch.items() if name not in ("labels", "index")}
        for batch in context.calibration(examples)
    )


def node_scopes(network: nn.Module, exclude: str) -> tuple[str, ...]:
    """The scopes, as ONNX node names hold them, of the modules that a preset leaves in float32."""
    stack = list(layers(network))
    presets: dict[str, list[nn.Module]] = {
        "none": [],
        "head": head(network),
        "ends": [stack[0], stack[-1]],
        "ffn_down": [parts(layer).down for layer in stack],
        "attention_output": [parts(layer).attention_output for layer in stack],
    }
    chosen = {id(module) for module in presets[exclude]}
    paths = [path for path, module in network.named_modules(remove_duplicate=False) if id(module) in chosen]
    # a.layer.0.b -> /a/layer.0/b/
    return tuple("/" + re.sub(r"\.(?!\d+(\.|$))", "/", path) + "/" for path in paths)


def prepare(source: Path, target: Path) -> None:
    """Fold constants, infer shapes and write every linear map as one MatMul, the form that all schemes know.

    Without folding, shared weights hide behind transposes and stay in float32.
    """
    import onnx
    from onnxruntime.quantization.onnx_model import ONNXModel
    from onnxruntime.quantization.shape_inference import quant_pre_process

    # symbolic inference knows no more about these graphs, and needs sympy
    quant_pre_process(str(source), str(target), skip_symbolic_shape=True)
    model = ONNXModel(onnx.load(target))
    model.replace_gemm_with_matmul()
    model.save_model_to_file(str(target))


def quantize_dynamic(
    source: Path, target: Path, *, excluded: Sequence[str] = (), reduce_range: bool = False
) -> None:
    """Every linear map as DynamicQuantizeLinear and MatMulInteger, with one int8 scale per output channel."""
    _quantize_dynamic(source, target, ["MatMul"], _nodes(source, excluded), reduce_range)


def quantize_embeddings(source: Path, target: Path) -> None:
    """Embedding tables as int8 with one scale per table; the rows that are looked up are dequantized."""
    _quantize_dynamic(source, target, ["Gather"], [], reduce_range=False)


def quantize_static(
    source: Path,
    target: Path,
    *,
    examples: Sequence[Inputs],
    excluded: Sequence[str] = (),
    reduce_range: bool = False,
) -> None:
    """Every linear map in int8 with input ranges from examples; all that is between the maps stays in float32.

    Ranges are the extremes seen: entropy calibration clips the few large activations that these encoders need.

    Raises:
        TrialError: there are no examples.
    """
    from onnxruntime import quantization as ort

    if not examples:
        raise TrialError("static quantization needs calibration examples, and there are none")
    with _quiet_quantizer():
        ort.quantize_static(
            str(source),
            str(target),
            _Reader(source, examples),
            quant_format=ort.QuantFormat.QDQ,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            reduce_range=reduce_range,
            activation_type=ort.QuantType.QUInt8,
            weight_type=ort.QuantType.QInt8,
            nodes_to_exclude=[*_nodes(source, excluded), *_products(source)],
            calibrate_method=ort.CalibrationMethod.MinMax,
            extra_options={**_options(), "OpTypesToExcludeOutputQuantization": ["MatMul"]},
        )
    _restore_residuals(target)


def _products(source: Path) -> list[str]:
    """Names of the products of two activations: scores and context, whose rounding costs most and gains nothing."""
    import onnx

    graph = onnx.load(source).graph
    constants = {tensor.name for tensor in graph.initializer}
    return [node.name for node in graph.node if node.op_type == "MatMul" and node.input[1] not in constants]


def _restore_residuals(path: Path) -> None:
    """Let only linear maps read rounded activations: the quantizer redirects every reader of the same tensor."""
    import onnx

    model = onnx.load(path)
    rounded = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    dequantized = [
        node for node in model.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in rounded
    ]
    original = {node.output[0]: rounded[node.input[0]] for node in dequantized}
    for node in model.graph.node:
        if node.op_type != "MatMul":
            node.input[:] = [original.get(name, name) for name in node.input]
    onnx.save(model, path)


def pack_weights(source: Path, target: Path, *, bits: int, group_size: int, excluded: Sequence[str] = ()) -> None:
    """Every linear map as MatMulNBits: packed weights with a scale per group, int8 activations in the kernel."""
    import onnx
    from onnxruntime.quantization.onnx_model import ONNXModel

    model = ONNXModel(onnx.load(source))
    model.replace_gemm_with_matmul()  # only MatMul has a packed form
    _pack(
        model.model, target, "MatMul", bits=bits, block_size=group_size, nodes_to_exclude=_nodes(source, excluded)
    )


def pack_embeddings(source: Path, target: Path) -> None:
    """Embedding tables as GatherBlockQuantized: 4 bits and a scale per :data:`EMBEDDING_GROUP` weights of a row."""
    import onnx
    from onnx import version_converter

    model = onnx.load(source)
    prepared = list(model.metadata_props)  # the mark that preparation left, which conversion drops
    model = version_converter.convert_version(model, 21)  # the first to know 4-bit tensors
    model.ir_version = 10
    model.metadata_props.extend(prepared)
    _pack(model, target, "Gather", bits=4, block_size=EMBEDDING_GROUP, quant_axes=(("Gather", 1),))


def _pack(model: Any, target: Path, operator: str, **settings: Any) -> None:
    with _quiet_quantizer():
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    quantizer = MatMulNBitsQuantizer(
        model, is_symmetric=True, accuracy_level=4, op_types_to_quantize=(operator,), **settings
    )
    with np.errstate(invalid="ignore"):  # a group of zeros, as in the padding token's row, has scale 0
        quantizer.process()
    quantizer.model.save_model_to_file(str(target))


def _quantize_dynamic(
    source: Path, target: Path, operators: list[str], excluded: list[str], reduce_range: bool
) -> None:
    from onnxruntime import quantization as ort

    with _quiet_quantizer():
        ort.quantize_dynamic(
            str(source),
            str(target),
            op_types_to_quantize=operators,
            per_channel=True,
            reduce_range=reduce_range,
            weight_type=ort.QuantType.QInt8,
            nodes_to_exclude=excluded,
            extra_options=_options(),
        )


def _options() -> dict[str, Any]:
    from onnx import TensorProto

    # products of two activations (scores, context) stay float32; types behind contrib operators are not inferred
    return {"MatMulConstBOnly": True, "DefaultTensorType": TensorProto.FLOAT}


def _nodes(source: Path, scopes: Sequence[str]) -> list[str]:
    """Names of the nodes within these scopes."""
    import onnx

    names = [node.name for node in onnx.load(source).graph.node] if scopes else []
    return [name for name in names if any(scope in name for scope in scopes)]


class _Reader:
    """Calibration examples as ONNX Runtime asks for them: the next feed, None at the end."""

    def __init__(self, model: Path, examples: Sequence[Inputs]) -> None:
        import onnx

        self.names = [entry.name for entry in onnx.load(model).graph.input]
        self.examples = iter(examples)

    def get_next(self) -> dict[str, NDArray[np.int64]] | None:
        """The graph's inputs of the next batch; segments that the tokenizer does not know are zeros."""
        if (batch := next(self.examples, None)) is None:
            return None
        zeros = np.zeros_like(batch["input_ids"])
        return {name: batch.get(name, zeros) for name in self.names}


@contextmanager
def _quiet_quantizer() -> Iterator[None]:
    """Undo what a module does to the root logger when it is imported, and drop a warning without meaning here."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)

    def unexpected(record: logging.LogRecord) -> bool:
        # the embeddings are, on purpose
        return not str(record.msg).startswith("Please check if the model is already quantized")

    root.addFilter(unexpected)
    try:
        yield
    finally:
        root.removeFilter(unexpected)
        root.setLevel(level)
        root.handlers[:] = handlers

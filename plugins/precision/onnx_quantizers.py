"""ONNX file in, ONNX file with fewer bits out: one function for each form that ONNX Runtime has kernels for.

Owns the settings of ONNX Runtime's quantizers and the repairs that their results need. Knows nothing of networks or
parameters of a search; which nodes to leave alone comes in as patterns of their names.
"""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress_search import TrialError

Inputs = Mapping[str, NDArray[np.int64]]
Transform = Callable[[Path, Path], None]

PERCENTILE = 99.99
"""Part of the activations, in hundredths, that calibration by percentile leaves inside the range."""


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
    source: Path,
    target: Path,
    *,
    excluded: Sequence[str] = (),
    per_channel: bool = True,
    reduce_range: bool = False,
) -> None:
    """Every linear map as DynamicQuantizeLinear and MatMulInteger, with one int8 scale per output channel."""
    from onnxruntime import quantization as ort

    with _quiet_quantizer():
        ort.quantize_dynamic(
            str(source),
            str(target),
            op_types_to_quantize=["MatMul"],
            per_channel=per_channel,
            reduce_range=reduce_range,
            weight_type=ort.QuantType.QInt8,
            nodes_to_exclude=nodes(source, excluded),
            extra_options=_options(),
        )


def quantize_static(
    source: Path,
    target: Path,
    *,
    examples: Sequence[Inputs],
    excluded: Sequence[str] = (),
    calibration: str = "minmax",
    per_channel: bool = True,
    reduce_range: bool = False,
) -> None:
    """Every linear map in int8 with input ranges from examples; all that is between the maps stays in float32.

    Ranges are by default the extremes seen: to clip by entropy or percentile loses the few large activations that
    these encoders need.

    Raises:
        TrialError: there are no examples.
    """
    from onnxruntime import quantization as ort

    if not examples:
        raise TrialError("static quantization needs calibration examples, and there are none")
    methods = {"minmax": "MinMax", "percentile": "Percentile", "entropy": "Entropy"}
    options = {
        "OpTypesToExcludeOutputQuantization": ["MatMul"],
        # one batch at a time, whatever the method: histograms are made of equal lengths only
        "CalibStridedMinMax": 1,
        "CalibPercentile": PERCENTILE,
        "CalibTensorRangeSymmetric": False,
    }
    with _quiet_quantizer(), redirect_stdout(io.StringIO()):  # calibration prints
        ort.quantize_static(
            str(source),
            str(target),
            _Reader(source, examples),
            quant_format=ort.QuantFormat.QDQ,
            op_types_to_quantize=["MatMul"],
            per_channel=per_channel,
            reduce_range=reduce_range,
            activation_type=ort.QuantType.QUInt8,
            weight_type=ort.QuantType.QInt8,
            nodes_to_exclude=[*nodes(source, excluded), *_products(source)],
            calibrate_method=ort.CalibrationMethod[methods[calibration]],
            extra_options={**_options(), **options},
        )
    _restore_residuals(target)


def pack_weights(
    source: Path,
    target: Path,
    *,
    bits: int,
    group_size: int,
    accuracy_level: int = 4,
    symmetric: bool = True,
    excluded: Sequence[str] = (),
    only: Sequence[str] | None = None,
) -> None:
    """Every linear map (or ``only`` those) as MatMulNBits: packed weights, a scale per group of inputs.

    Unless it is ``symmetric``, a group has a zero point too.
    """
    import onnx

    left = nodes(source, excluded)
    if only is not None:
        left += sorted(set(nodes(source, [""])) - set(nodes(source, only)))
    with _quiet_quantizer():
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    quantizer = MatMulNBitsQuantizer(
        onnx.load(source),
        bits=bits,
        block_size=group_size,
        accuracy_level=accuracy_level,
        is_symmetric=symmetric,
        nodes_to_exclude=left,
        op_types_to_quantize=("MatMul",),
    )
    with np.errstate(invalid="ignore"):  # a group of zeros, as in a sparse matrix, has scale 0
        quantizer.process()
    quantizer.model.save_model_to_file(str(target))


def add_constant(graph: Any, name: str, value: NDArray[Any]) -> str:
    """Store a tensor under a name, unless it is there already; returns the name."""
    from onnx import numpy_helper

    if all(tensor.name != name for tensor in graph.initializer):
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
    return name


def drop_unused(graph: Any) -> None:
    """Remove the constants that no node reads."""
    read = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def nodes(source: Path, patterns: Sequence[str]) -> list[str]:
    """Names of the nodes that any of these patterns is found in."""
    import onnx

    names = [node.name for node in onnx.load(source).graph.node] if patterns else []
    return [name for name in names if any(re.search(pattern, name) for pattern in patterns)]


def linear_maps(graph: Any, left: Collection[str] = ()) -> list[tuple[Any, NDArray[np.float32]]]:
    """The products with a constant, and these constants (inputs, outputs); ``left`` are nodes to skip."""
    from onnx import numpy_helper

    constants = {tensor.name: tensor for tensor in graph.initializer}
    found = [node for node in graph.node if node.op_type == "MatMul" and node.input[1] in constants]
    return [(n, numpy_helper.to_array(constants[n.input[1]])) for n in found if n.name not in left]


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


def _options() -> dict[str, Any]:
    from onnx import TensorProto

    # products of two activations (scores, context) stay float32; types behind contrib operators are not inferred
    return {"MatMulConstBOnly": True, "DefaultTensorType": TensorProto.FLOAT}


class _Reader:
    """Calibration examples as ONNX Runtime asks for them: the next feed of a range, None at its end."""

    def __init__(self, model: Path, examples: Sequence[Inputs]) -> None:
        import onnx

        self.names = [entry.name for entry in onnx.load(model).graph.input]
        self.all = examples
        self.set_range(0, len(examples))

    def __len__(self) -> int:
        return len(self.all)

    def set_range(self, start_index: int, end_index: int) -> None:
        """Begin again, with these batches only."""
        self.examples = iter(self.all[start_index:end_index])

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

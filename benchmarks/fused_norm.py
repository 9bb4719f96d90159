"""Is ONNX Runtime's fused kernel for a residual sum and its layer normalisation worth having on a CPU?

``python -m benchmarks.fused_norm``; decision 0029 rests on it. The two operators in a graph of their own, on one
thread, as the optimiser fuses them and as two kernels, in turn.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

from benchmarks import tables
from compress_search.runtimes.engines import CPU_SESSION

ROUNDS = 200
SHAPES = [(1, 28, 384), (1, 128, 384), (32, 128, 384), (1, 28, 768), (1, 128, 768), (32, 128, 768)]
"""(batch, length, hidden)."""


def residual(hidden: int) -> bytes:
    """An ONNX model: ``y`` = the layer normalisation of ``x`` + ``r``, all (batch, length, hidden)."""
    x, r, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["B", "S", hidden]) for name in "xry")
    weights = [("scale", np.ones(hidden, np.float32)), ("shift", np.zeros(hidden, np.float32))]
    nodes = [
        helper.make_node("Add", ["x", "r"], ["sum"]),
        helper.make_node("LayerNormalization", ["sum", "scale", "shift"], ["y"]),
    ]
    held = [numpy_helper.from_array(value, name) for name, value in weights]
    graph = helper.make_graph(nodes, "residual", [x, r], [y], held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def session(model: bytes, config: dict[str, str]) -> onnxruntime.InferenceSession:
    """The model on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    for name, value in config.items():
        options.add_session_config_entry(name, value)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def rows() -> Iterator[list[object]]:
    """Shape, microseconds as one kernel and as two, and the median of their ratios between its outer tenths."""
    for shape in SHAPES:
        model = residual(shape[-1])
        arms = [session(model, {}), session(model, CPU_SESSION)]
        array = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        taken = np.array([[timed(arm, array) for arm in arms] for _ in range(ROUNDS)])
        fused, apart = np.median(taken, axis=0) * 1e6
        low, middle, high = np.percentile(taken[:, 0] / taken[:, 1], (10, 50, 90))
        yield [
            " × ".join(map(str, shape)),
            f"{fused:.0f}",
            f"{apart:.0f}",
            f"{middle:.1f} ({low:.1f} … {high:.1f})",
        ]


def timed(arm: onnxruntime.InferenceSession, array: np.ndarray) -> float:
    """Seconds of one pass; another goes before it."""
    feed = {"x": array, "r": array}
    arm.run(None, feed)
    started = time.perf_counter()
    arm.run(None, feed)
    return time.perf_counter() - started


def main() -> None:
    """Write benchmarks/results/fused_norm.md."""
    told = (
        f"ONNX Runtime {onnxruntime.__version__}, float32, one thread, {ROUNDS} rounds in turn: microseconds "
        "(medians) of the kernel SkipLayerNormalization, which the optimiser puts in the place of a sum and the "
        "layer normalisation after it, and of the two apart; and the ratio of the two in a round, with its 10th "
        "and 90th percentiles."
    )
    table = tables.table(["batch × length × hidden", "fused", "apart", "ratio"], rows())
    print(tables.write("fused_norm", "A residual sum and its normalisation, fused and apart", [told, table]))


if __name__ == "__main__":
    main()

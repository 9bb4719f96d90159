"""Matrices of two or three values in an ONNX file: several weights to a byte, decoded by a table when it is loaded.

No kernel computes on such weights, so the product itself is one of float32 and as slow; what is small is the file.
Owns the encoding in the graph; the grids and the packing of digits are those of ``bits``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .bits import CODEBOOK, Grid, pack, unpacked
from .onnx_quantizers import add_constant, drop_unused, linear_maps, nodes


def encode_weights(source: Path, target: Path, *, grid: Grid, excluded: Sequence[str] = ()) -> None:
    """Every linear map with its weights as digits: 8 binary or 5 ternary ones to a byte, and their scales.

    Weights that several maps share are stored and decoded once.
    """
    import onnx

    model = onnx.load(source)
    decoded: dict[str, str] = {}
    decoders: list[Any] = []
    for node, weight in linear_maps(model.graph, nodes(source, excluded)):
        name = node.input[1]
        if name not in decoded:
            decoded[name] = f"{name}_decoded"
            decoders += _decoder(model.graph, name, weight, grid)
        node.input[1] = decoded[name]
    after = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*decoders, *after])
    drop_unused(model.graph)
    onnx.save(model, target)


def _decoder(graph: Any, name: str, weight: NDArray[np.float32], grid: Grid) -> list[Any]:
    """The nodes from bytes to a matrix (inputs, outputs), which ONNX Runtime runs once, when it loads the file."""
    from onnx import TensorProto, helper

    book = CODEBOOK[grid.kind]
    codes, scales = grid.encode(torch.from_numpy(weight.T.copy()))
    # codes run from -1 in equal steps, so that they are digits times a step
    step = (book[-1] - book[0]) // (len(book) - 1)
    digits = ((codes - book[0]) / step).reshape(weight.T.shape).T
    table = unpacked(len(book)) * step + book[0]
    constants = {
        "packed": pack(digits, len(book)).numpy(),
        "scales": scales.numpy().reshape(1, -1),
        "size": np.array([weight.size]),
        "shape": np.array(weight.shape),
    }
    at = {part: add_constant(graph, f"{name}_{part}", value) for part, value in constants.items()}
    codebook = add_constant(graph, f"codebook_{grid.kind}", table.numpy().astype(np.int8))
    flat, start = add_constant(graph, "codebook_flat", np.array([-1])), add_constant(graph, "zero", np.array([0]))
    out = [f"{name}_{part}" for part in ("indices", "digits", "flat", "codes", "floats", "matrix", "decoded")]
    return [
        helper.make_node("Cast", [at["packed"]], [out[0]], to=TensorProto.INT32),
        helper.make_node("Gather", [codebook, out[0]], [out[1]]),
        helper.make_node("Reshape", [out[1], flat], [out[2]]),
        helper.make_node("Slice", [out[2], start, at["size"]], [out[3]]),  # what fills the last byte
        helper.make_node("Cast", [out[3]], [out[4]], to=TensorProto.FLOAT),
        helper.make_node("Reshape", [out[4], at["shape"]], [out[5]]),
        helper.make_node("Mul", [out[5], at["scales"]], [out[6]]),
    ]

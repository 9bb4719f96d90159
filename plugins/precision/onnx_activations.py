"""Activations of few bits in an ONNX file: nodes that round what the linear maps read, and no kernel to gain by it.

No engine computes on such activations, so that they cost time; what they show is the score a device with such
arithmetic would reach. Owns these nodes; the formula is ``bits.fake_quantize_activations``'s.

Source: Zhang et al. 2020, TernaryBERT, section 3.1 (asymmetric between the extremes, of each tensor at run time).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .onnx_quantizers import add_constant, linear_maps, nodes


def round_activations(source: Path, target: Path, *, bits: int, excluded: Sequence[str] = ()) -> None:
    """Every linear map with inputs of 2^bits levels; a tensor that several maps read is rounded once."""
    import onnx

    model = onnx.load(source)
    rounded: dict[str, list[Any]] = {}
    reading = {node.name for node, _ in linear_maps(model.graph, nodes(source, excluded))}
    after = []
    for node in model.graph.node:
        if node.name in reading:
            name = node.input[0]
            if name not in rounded:
                rounded[name] = _rounding(model.graph, name, bits)
                after += rounded[name]
            node.input[0] = rounded[name][-1].output[0]
        after.append(node)
    del model.graph.node[:]
    model.graph.node.extend(after)
    onnx.save(model, target)


def _rounding(graph: Any, name: str, bits: int) -> list[Any]:
    """The nodes from a tensor to its rounded values, the last of which writes them."""
    from onnx import helper

    numbers = {"zero": 0.0, "most": 2.0**bits - 1, "tiny": float(np.finfo(np.float32).tiny)}
    constants = {
        key: add_constant(graph, f"rounding_{key}_{bits}", np.array(value, np.float32))
        for key, value in numbers.items()
    }

    def node(operator: str, output: str, *inputs: str, **attributes: Any) -> Any:
        read = [constants.get(part) or (name if part == "x" else f"{name}_rounding_{part}") for part in inputs]
        return helper.make_node(operator, read, [f"{name}_rounding_{output}"], **attributes)

    return [
        node("ReduceMin", "least", "x", keepdims=0),
        node("Min", "low", "least", "zero"),
        node("ReduceMax", "greatest", "x", keepdims=0),
        node("Max", "high", "greatest", "zero"),
        node("Sub", "range", "high", "low"),
        node("Div", "step", "range", "most"),
        node("Max", "scale", "step", "tiny"),
        node("Div", "lowest", "low", "scale"),
        node("Round", "below", "lowest"),  # minus the code of 0
        node("Div", "steps", "x", "scale"),
        node("Round", "codes", "steps"),
        node("Sub", "shifted", "codes", "below"),
        node("Clip", "clipped", "shifted", "zero", "most"),
        node("Add", "levels", "clipped", "below"),
        node("Mul", "rounded", "levels", "scale"),
    ]

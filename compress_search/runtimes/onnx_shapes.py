"""Reshapes of a traced ONNX graph that need not compute what they reshape to.

A trace computes every new shape from the shape of an earlier value, by five nodes that no optimiser folds while
batch and length are open. They take a microsecond each, a twentieth of a small student's time on a short text.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import numpy as np
import onnx
from onnx import numpy_helper


def copy_dimensions(path: Path) -> None:
    """Rewrite the file so that the new shapes of its reshapes are constants.

    A size that was read at the same place of another value's shape becomes 0, which ONNX takes as the input's own;
    the nodes that computed it go. For networks whose values all have batch and length there when they are reshaped.
    """
    model = onnx.load(path)
    makers = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        if node.op_type == "Reshape" and (shape := _copying_shape(node.input[1], makers)):
            node.input[1] = f"{node.name}/shape"
            model.graph.initializer.append(numpy_helper.from_array(np.array(shape), node.input[1]))
    _drop_unread(model.graph)
    onnx.save(model, path)


def _copying_shape(shape: str, makers: Mapping[str, onnx.NodeProto]) -> list[int] | None:
    """The shape with 0 for every size read at its own place from another shape; None if others are computed."""
    maker = makers.get(shape)
    if maker is None or maker.op_type != "Concat":
        return None
    sizes = [
        0 if _place(name, makers) == place else _constant(name, makers) for place, name in enumerate(maker.input)
    ]
    return None if None in sizes else cast(list[int], sizes)


def _place(size: str, makers: Mapping[str, onnx.NodeProto]) -> int | None:
    """Which place of a value's shape a size was read from."""
    unsqueeze = makers.get(size)
    gather = makers.get(unsqueeze.input[0]) if unsqueeze is not None and unsqueeze.op_type == "Unsqueeze" else None
    if gather is None or gather.op_type != "Gather" or makers[gather.input[0]].op_type != "Shape":
        return None
    return _constant(gather.input[1], makers)


def _constant(name: str, makers: Mapping[str, onnx.NodeProto]) -> int | None:
    """The one number of a constant."""
    maker = makers.get(name)
    if maker is None or maker.op_type != "Constant":
        return None
    return int(numpy_helper.to_array(maker.attribute[0].t).item())


def _drop_unread(graph: onnx.GraphProto) -> None:
    """Remove the nodes whose outputs nobody reads any more."""
    read = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):  # nodes stand after what they read
        if read.intersection(node.output):
            kept.append(node)
            read.update(node.input)
    del graph.node[:]
    graph.node.extend(reversed(kept))

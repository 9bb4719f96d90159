"""Reshapes of a traced ONNX graph that need not compute what they reshape to.

A trace computes every new shape from the shape of an earlier value, by five nodes that no optimiser folds while
batch and length are open. They take a microsecond each, a twentieth of a small student's time on a short text.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import onnx
from onnx import numpy_helper

from compress_search.runtimes.onnx_graph import Graph, drop_unread


def copy_dimensions(path: Path) -> None:
    """Rewrite the file so that the new shapes of its reshapes are constants.

    A size that was read at the same place of another value's shape becomes 0, which ONNX takes as the input's own;
    the nodes that computed it go. For networks whose values all have batch and length there when they are reshaped.
    """
    model = onnx.load(path)
    graph = Graph(model.graph)
    for node in model.graph.node:
        if node.op_type == "Reshape" and (shape := _copying_shape(graph, node.input[1])):
            node.input[1] = f"{node.name}/shape"
            model.graph.initializer.append(numpy_helper.from_array(np.array(shape), node.input[1]))
    drop_unread(model.graph)
    onnx.save(model, path)


def _copying_shape(graph: Graph, shape: str) -> list[int] | None:
    """The shape with 0 for every size read at its own place from another shape; None if others are computed."""
    concat = graph.made(shape, "Concat")
    if concat is None:
        return None
    sizes = [0 if _place(graph, name) == place else graph.number(name) for place, name in enumerate(concat.input)]
    return None if None in sizes else [int(cast(float, size)) for size in sizes]


def _place(graph: Graph, size: str) -> float | None:
    """Which place of a value's shape a size was read from."""
    unsqueeze = graph.made(size, "Unsqueeze")
    gather = graph.made(unsqueeze.input[0], "Gather") if unsqueeze is not None else None
    if gather is None or graph.made(gather.input[0], "Shape") is None:
        return None
    return graph.number(gather.input[1])

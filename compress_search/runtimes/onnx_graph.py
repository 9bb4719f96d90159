"""Reading and thinning the graph of an ONNX file: who makes a value, which values are constants, what nobody reads.

Knows nothing of what a graph computes.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper


class Graph:
    """Look-ups in a graph that does not change meanwhile."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.nodes = list(graph.node)
        self.makers = {name: node for node in self.nodes for name in node.output}
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        self.reads = Counter(
            self.base(name) for node in self.nodes if node.op_type != "Identity" for name in node.input
        )

    def made(self, name: str, kind: str) -> onnx.NodeProto | None:
        """The node of this kind that makes a value, if one does."""
        maker = self.makers.get(name)
        return maker if maker is not None and maker.op_type == kind else None

    def base(self, name: str) -> str:
        """The value that this name is only another name of: shared weights are written as Identity nodes."""
        while (maker := self.makers.get(name)) is not None and maker.op_type == "Identity":
            name = maker.input[0]
        return name

    def is_constant(self, name: str) -> bool:
        """Whether it is stored in the file, and not computed."""
        base = self.base(name)
        return base in self.initializers or self.made(base, "Constant") is not None

    def array(self, name: str) -> NDArray[Any] | None:
        """A constant's value; None for what is computed."""
        base = self.base(name)
        if base in self.initializers:
            return numpy_helper.to_array(self.initializers[base])
        maker = self.made(base, "Constant")
        if maker is None or maker.attribute[0].name != "value":
            return None
        return numpy_helper.to_array(maker.attribute[0].t)

    def number(self, name: str) -> float | None:
        """The one number of a constant; None for what is computed or has more."""
        array = self.array(name)
        return np.asarray(array).item() if array is not None and array.size == 1 else None


def drop_unread(graph: onnx.GraphProto) -> None:
    """Remove the nodes and initializers that no output depends on any more."""
    read = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):  # nodes stand after what they read
        if read.intersection(node.output):
            kept.append(node)
            read.update(node.input)
    tensors = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(reversed(kept))
    graph.initializer.extend(tensors)

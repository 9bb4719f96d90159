"""Sparse weights in an ONNX file: stored packed, and expanded by nodes that ONNX Runtime folds when it loads.

Owns the nodes. The file stays an ordinary one, which any ONNX Runtime runs without code of ours; once loaded, the
graph and its speed are those of the dense file. The forms are :mod:`compress_search.encoders.sparse_storage`'s.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from compress_search.encoders import sparse_storage
from compress_search.encoders.sparse_storage import Packed

if TYPE_CHECKING:
    import onnx

OVERHEAD = 1024
"""Bytes that the nodes and constants of one packed array take, at most: so much must be won at least."""

_PREFIX = "sparse/"
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def pack(path: Path) -> int:
    """Store the initializers of a file, in place, in the smallest form; how many are packed.

    What is not stored is 0, or in arrays of bytes, which may hold two weights each, the most frequent byte.
    """
    import onnx

    model = onnx.load(path)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    packed = {name: found for name, tensor in tensors.items() if (found := _packed(tensor))}
    if packed:
        _expand(model.graph, packed)
        onnx.save(model, path)
    return len(packed)


def _packed(tensor: onnx.TensorProto) -> tuple[Packed, NDArray[Any], NDArray[Any]] | None:
    """The packed form, the array itself and its fill (1,); None where the array is better left as it is."""
    from onnx import TensorProto, numpy_helper

    types = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT8, TensorProto.UINT8)
    if tensor.data_type not in types or np.prod(tensor.dims) < sparse_storage.LEAST_ELEMENTS:
        return None
    array = numpy_helper.to_array(tensor)
    bits = array.reshape(-1).view(_UNSIGNED[array.itemsize])
    fill = int(np.bincount(bits).argmax()) if array.itemsize == 1 else 0
    packed = sparse_storage.pack(bits, fill)
    if packed is None or packed.nbytes + OVERHEAD > array.nbytes:
        return None
    return packed, array, np.array([fill], bits.dtype).view(array.dtype)


def _expand(graph: onnx.GraphProto, packed: dict[str, tuple[Packed, NDArray[Any], NDArray[Any]]]) -> None:
    """Put nodes of the same outputs in place of these initializers."""
    writer = _Writer()
    for name, (form, array, fill) in packed.items():
        writer.expand(name, form, array, fill)
    kept = [tensor for tensor in graph.initializer if tensor.name not in packed]
    nodes = [*writer.nodes, *graph.node]
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend([*kept, *writer.constants.values()])
    graph.node.extend(nodes)


class _Writer:
    """Collects nodes and constants, under names that no exporter gives."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}

    def expand(self, name: str, packed: Packed, array: NDArray[Any], fill: NDArray[Any]) -> None:
        """Nodes whose last output is the array, under its name."""
        from onnx import TensorProto, numpy_helper

        gaps = self._constant(f"{name}/gaps", packed.gaps)
        if packed.gap_bits == 4:
            gaps = self._halves(gaps, len(packed.values))
        steps = self._node("Cast", gaps, to=TensorProto.INT32)  # 64 bits would double what loading takes
        places = self._node("CumSum", steps, self._constant("axis", np.array(0)))
        values = self._constant(f"{name}/values", packed.values.view(array.dtype))
        size = self._constant(f"length {array.size}", np.array([array.size]))
        empty = self._node("ConstantOfShape", size, value=numpy_helper.from_array(fill))
        flat = self._node("ScatterElements", empty, places, values, axis=0)
        self._node("Reshape", flat, self._constant(f"{name}/shape", np.array(array.shape)), output=name)

    def _halves(self, pairs: str, count: int) -> str:
        """The first ``count`` of the 4-bit numbers in these bytes, lower bits first."""
        columns = self._node("Unsqueeze", pairs, self._constant("columns", np.array([1])))
        shifts = self._constant("shifts", np.array([0, 4], np.uint8))
        shifted = self._node("BitShift", columns, shifts, direction="RIGHT")  # (⌈k/2⌉, 2)
        halves = self._node("Mod", shifted, self._constant("sixteen", np.array(16, np.uint8)))
        flat = self._node("Reshape", halves, self._constant("flat", np.array([-1])))
        limits = self._constant("start", np.array([0])), self._constant(f"length {count}", np.array([count]))
        return self._node("Slice", flat, *limits)

    def _node(self, kind: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        from onnx import helper

        name = output or f"{_PREFIX}{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def _constant(self, name: str, array: NDArray[Any]) -> str:
        from onnx import numpy_helper

        name = _PREFIX + name
        self.constants[name] = numpy_helper.from_array(array, name)
        return name

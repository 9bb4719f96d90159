"""Embedding tables of few bits in an ONNX file: rows are looked up as stored, and become float32 after that.

Owns the nodes that read such a row; the grids are those of ``bits``. Every node is of the ONNX standard:
GatherBlockQuantized, ONNX Runtime's own for 4 bits, takes four to seven times as long (decision 0033).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .bits import Grid
from .number_formats import FEW_ROWS
from .onnx_quantizers import add_constant, drop_unused


def quantize_embeddings(source: Path, target: Path, *, grid: Grid | None) -> None:
    """Embedding tables on a grid of 8 or 4 bits, or without one as float16."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(source)
    tables = {tensor.name: tensor for tensor in model.graph.initializer if len(tensor.dims) == 2}
    rewritten: list[Any] = []
    for node in model.graph.node:
        if node.op_type == "Gather" and node.input[0] in tables:
            rewritten += _Lookup(model.graph, node).of(numpy_helper.to_array(tables[node.input[0]]), grid)
        else:
            rewritten.append(node)
    del model.graph.node[:]
    model.graph.node.extend(rewritten)
    drop_unused(model.graph)
    onnx.save(model, target)


class _Lookup:
    """The nodes that look rows up in a smaller table and write what a Gather wrote."""

    def __init__(self, graph: Any, gather: Any) -> None:
        self.graph, self.gather = graph, gather
        self.table, self.ids = gather.input
        self.output = gather.output[0]

    def of(self, weight: NDArray[np.float32], grid: Grid | None) -> list[Any]:
        """Of a table (rows, width) for ids (B, S)."""
        if len(weight) <= FEW_ROWS:
            return list(self._floats(weight, grid))
        if grid is None:
            return list(self._halves(weight))
        codes, scales = (part.numpy() for part in grid.encode(torch.from_numpy(weight.copy())))
        if grid.bits == 8:
            return list(self._bytes(codes, scales))
        return list(self._pairs(codes, scales, weight.shape[1]))

    def _floats(self, weight: NDArray[np.float32], grid: Grid | None) -> Iterator[Any]:
        rounded = grid.round(torch.from_numpy(weight.copy())).numpy() if grid else weight.astype(np.float16)
        yield self._rows(self._constant("values", rounded.astype(np.float32)), self.output, self.gather.name)

    def _halves(self, weight: NDArray[np.float32]) -> Iterator[Any]:
        yield self._rows(self._constant("half", weight.astype(np.float16)), self._at("half"), self.gather.name)
        yield self._floating(self._at("half"), self.output)

    def _bytes(self, codes: NDArray[np.float32], scales: NDArray[np.float32]) -> Iterator[Any]:
        """A code in a byte, and a scale for each row."""
        yield self._rows(self._constant("rows", codes.astype(np.int8)), self._at("row"), self.gather.name)
        # ONNX Runtime's own quantizer names what a linear map reads "…_quantized" and "…_scale"
        yield self._rows(self._constant("row_scales", scales), self._at("row_scale"))
        yield self._floating(self._at("row"), self._at("codes"))
        yield self._node("Mul", self._at("codes"), self._at("row_scale"), output=self.output)

    def _pairs(self, codes: NDArray[np.float32], scales: NDArray[np.float32], width: int) -> Iterator[Any]:
        """Two codes in a byte, those of a row's first half in the lower bits; a scale for each group of a row."""
        group, groups, half = codes.shape[1], -(-width // codes.shape[1]), -(-width // 2)
        rows = len(codes) // groups
        digits = np.full((rows, 2 * half), 8, np.uint8)  # what fills up an odd row is code 0
        digits[:, :width] = codes.reshape(rows, -1)[:, :width] + 8
        packed = self._constant("pairs", digits[:, :half] | digits[:, half:] << 4)
        yield self._rows(packed, self._at("pair"), self.gather.name)
        yield self._rows(self._constant("scales", scales.reshape(rows, groups, 1)), self._at("scales"))
        yield from self._taken_apart()
        yield from self._scaled(2 * half, width, group, groups)

    def _taken_apart(self) -> Iterator[Any]:
        """Bytes (B, S, half) to codes (B, S, 2·half), by floating point: sooner than shifts on short texts."""
        yield self._floating(self._at("pair"), self._at("both"))
        yield self._node("Mul", self._at("both"), self._number(1 / 16), output=self._at("sixteenth"))
        yield self._node("Floor", self._at("sixteenth"), output=self._at("upper"))
        yield self._node("Mul", self._at("upper"), self._number(-16), output=self._at("shifted"))
        yield self._node("Add", self._at("both"), self._at("shifted"), output=self._at("lower"))
        yield self._node("Concat", self._at("lower"), self._at("upper"), output=self._at("digits"), axis=-1)
        yield self._node("Add", self._at("digits"), self._number(-8), output=self._at("codes"))

    def _scaled(self, found: int, width: int, group: int, groups: int) -> Iterator[Any]:
        """Codes (B, S, ``found``) times the scales of their groups, (B, S, ``width``)."""
        whole = groups * group
        codes = self._at("codes")
        if whole != found:
            codes = self._at("filled")
            yield self._node("Pad", self._at("codes"), self._sizes(0, 0, 0, 0, 0, whole - found), output=codes)
        yield self._node("Reshape", codes, self._sizes(0, 0, groups, group), output=self._at("groups"))
        yield self._node("Mul", self._at("groups"), self._at("scales"), output=self._at("scaled"))
        row = self.output if whole == width else self._at("row")
        yield self._node("Reshape", self._at("scaled"), self._sizes(0, 0, whole), output=row)
        if whole != width:
            limits = self._sizes(0), self._sizes(width), self._sizes(2)
            yield self._node("Slice", row, *limits, output=self.output)

    def _at(self, part: str) -> str:
        return f"{self.output}_{part}"

    def _rows(self, table: str, output: str, name: str | None = None) -> Any:
        return self._node("Gather", table, self.ids, output=output, name=name)

    def _floating(self, source: str, output: str) -> Any:
        from onnx import TensorProto

        return self._node("Cast", source, output=output, to=TensorProto.FLOAT)

    def _node(self, kind: str, *inputs: str, output: str, name: str | None = None, **attributes: Any) -> Any:
        from onnx import helper

        return helper.make_node(kind, list(inputs), [output], name=name or output, **attributes)

    def _constant(self, part: str, value: NDArray[Any]) -> str:
        return add_constant(self.graph, f"{self.table}_{part}", value)

    def _number(self, value: float) -> str:
        return add_constant(self.graph, f"number {value}", np.array(value, np.float32))

    def _sizes(self, *sizes: int) -> str:
        return add_constant(self.graph, f"sizes {sizes}", np.array(sizes))

"""A smaller table hands out the rows that its grid says, whatever its width."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from compress_search_plugins.precision.bits import Grid
from compress_search_plugins.precision.number_formats import FEW_ROWS, TABLE_GROUP
from compress_search_plugins.precision.onnx_tables import quantize_embeddings
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

GRIDS = {8: Grid("signed", 8), 4: Grid("block", 4, TABLE_GROUP), 16: None}


def lookup(folder: Path, table: NDArray[np.float32], grid: Grid | None) -> onnx.ModelProto:
    """The file of one table that is looked up."""
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "length"])
    rows = helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["batch", "length", table.shape[1]])
    node = helper.make_node("Gather", ["table", "ids"], ["rows"], name="words")
    graph = helper.make_graph([node], "g", [ids], [rows], [numpy_helper.from_array(table, "table")])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "a.onnx"
    )
    quantize_embeddings(folder / "a.onnx", folder / "b.onnx", grid=grid)
    return onnx.load(folder / "b.onnx")


@settings(deadline=None, max_examples=60)
@given(
    bits=st.sampled_from(list(GRIDS)),
    rows=st.sampled_from([2, FEW_ROWS, FEW_ROWS + 1, 40]),
    width=st.integers(1, 100),
    seed=st.integers(0, 1000),
)
def test_rows_are_those_of_the_grid(bits: int, rows: int, width: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    table = generator.normal(size=(rows, width)).astype(np.float32)
    table[generator.integers(rows)] = 0  # as the padding token's
    grid = GRIDS[bits]
    with tempfile.TemporaryDirectory() as folder:
        model = lookup(Path(folder), table, grid)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    ids = generator.integers(rows, size=(2, 7))
    (found,) = session.run(None, {"ids": ids})
    rounded = grid.round(torch.from_numpy(table)).numpy() if grid else table.astype(np.float16).astype(np.float32)
    np.testing.assert_allclose(found, rounded[ids], rtol=1e-6, atol=0)


def test_files_keep_to_the_standard_and_few_rows_to_one_node(tmp_path: Path) -> None:
    for bits, grid in GRIDS.items():
        table = np.random.default_rng(0).normal(size=(1000, 64)).astype(np.float32)
        large = lookup(tmp_path, table, grid)
        assert {node.domain for node in large.graph.node} == {""}
        stored = sum(numpy_helper.to_array(tensor).nbytes for tensor in large.graph.initializer)
        scales = {8: 1000, 4: 2 * 1000, 16: 0}[bits] * 4
        assert 0 <= stored - table.size * bits / 8 - scales < 200
        few = lookup(tmp_path, table[:FEW_ROWS], grid)
        assert Counter(node.op_type for node in few.graph.node) == {"Gather": 1}

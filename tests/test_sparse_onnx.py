"""A packed ONNX file is an ordinary one that loads to the same graph, with the same weights to the last bit."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from compress_search.runtimes import sparse_onnx

ROWS, COLUMNS = 67, 131  # their product is no multiple of 8


def model(path: Path, *arrays: NDArray[np.generic]) -> Path:
    """A graph that hands out each of these arrays, which is all that it holds."""
    kinds = [helper.np_dtype_to_tensor_dtype(array.dtype) for array in arrays]
    outputs = [
        helper.make_tensor_value_info(f"y{i}", kind, array.shape)
        for i, (kind, array) in enumerate(zip(kinds, arrays, strict=True))
    ]
    nodes = [helper.make_node("Identity", [f"w{i}"], [f"y{i}"]) for i in range(len(arrays))]
    stored = [numpy_helper.from_array(array, f"w{i}") for i, array in enumerate(arrays)]
    graph = helper.make_graph(nodes, "g", [], outputs, stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def run(path: Path) -> tuple[list[NDArray[np.generic]], Counter[str]]:
    """The graph's outputs, and the operators that are left once it is loaded."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(path.with_suffix(".loaded"))
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    left = onnx.load(path.with_suffix(".loaded")).graph.node
    return session.run(None, {}), Counter(node.op_type for node in left)


def sparse(density: float, dtype: type, fill: int = 0) -> NDArray[np.generic]:
    rng = np.random.default_rng(0)
    values = rng.integers(1, 100, (ROWS, COLUMNS))
    return np.where(rng.random((ROWS, COLUMNS)) < density, values, fill).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8, np.uint8])
@pytest.mark.parametrize("density", [0.0, 0.001, 0.05, 0.4])
def test_the_same_numbers_and_the_same_graph_after_loading(tmp_path, dtype, density):
    array = sparse(density, dtype)
    full, packed = (model(tmp_path / f"{name}.onnx", array) for name in ("full", "packed"))
    assert sparse_onnx.pack(packed) == 1
    onnx.checker.check_model(onnx.load(packed), full_check=True)
    assert packed.stat().st_size < full.stat().st_size
    (found,), operators = run(packed)
    assert found.dtype == dtype
    assert np.array_equal(found, array)
    assert operators == run(full)[1], "all that expands the array is folded"


def test_negative_zeros_and_nan_keep_their_bits(tmp_path):
    array = sparse(0.05, np.float32)
    array[0, :3] = [-0.0, np.nan, np.inf]
    path = model(tmp_path / "model.onnx", array)
    assert sparse_onnx.pack(path) == 1
    assert run(path)[0][0].tobytes() == array.tobytes()


def test_bytes_that_hold_two_weights_each_leave_out_the_most_frequent_one(tmp_path):
    array = sparse(0.3, np.uint8, fill=0x88)
    path = model(tmp_path / "model.onnx", array)
    assert sparse_onnx.pack(path) == 1
    assert np.array_equal(run(path)[0][0], array)


def test_arrays_side_by_side_are_packed_each_in_its_own_form(tmp_path):
    arrays = [sparse(0.02, np.float32), sparse(0.3, np.float32), sparse(0.3, np.int8), sparse(0.02, np.int8)]
    path = model(tmp_path / "model.onnx", *arrays)
    assert sparse_onnx.pack(path) == 4
    assert all(np.array_equal(found, array) for found, array in zip(run(path)[0], arrays, strict=True))


@given(st.integers(0, 2500), st.sampled_from([np.float32, np.int8]))
@settings(max_examples=20, deadline=None)
def test_no_file_gets_larger(zeros, dtype):
    array = np.ones((50, 50), dtype)
    array.reshape(-1)[:zeros] = 0
    with tempfile.TemporaryDirectory() as folder:
        path = model(Path(folder) / "a_long_name_for_a_model_of_one_array.onnx", array)
        before = path.stat().st_size
        packed = sparse_onnx.pack(path)
        assert path.stat().st_size < before if packed else path.stat().st_size == before


def test_what_would_not_get_smaller_stays_as_it_is(tmp_path):
    dense, small, integers = sparse(1.0, np.float32), np.zeros((32, 31), np.int8), np.zeros((64, 64), np.int64)
    path = model(tmp_path / "model.onnx", dense, small, integers)
    before = path.read_bytes()
    assert sparse_onnx.pack(path) == 0
    assert path.read_bytes() == before
    assert TensorProto.INT64 in {tensor.data_type for tensor in onnx.load(path).graph.initializer}

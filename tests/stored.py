"""The tensors of an artefact as its engine loads them, and what each would take packed or whole."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from safetensors.torch import load_file

from compress_search.candidate import packed_bits
from compress_search.encoders import manifest

_PREFIX = "sparse/"


@dataclass(frozen=True)
class Stored:
    """An array of so many elements of so many bits; ``density`` is the part of them that is not ``fill``."""

    elements: int
    bits: int
    density: float
    nbytes: int
    packed: bool

    @property
    def whole(self) -> int:
        """Bytes of all its elements."""
        return self.elements * self.bits // 8

    @property
    def closed(self) -> float:
        """Bytes in closed form, where the elements that are not stored lie at random places."""
        return self.elements * packed_bits(self.bits, self.density) / 8


def arrays_of(directory: Path) -> list[Stored]:
    """All arrays of the file that an artefact's engine loads."""
    model = directory / "model.onnx"
    return _of_graph(onnx.load(str(model)).graph) if model.exists() else _of_weights(directory / "weights")


def _array(array: np.ndarray[Any, Any], fill: Any = None) -> Stored:
    """One that is stored as it is; of bytes the most frequent one is the one that would not be stored."""
    bits = array.itemsize * 8
    if fill is None:
        fill = np.bincount(array.reshape(-1).view(np.uint8)).argmax() if bits == 8 and array.size else 0
    kept = int(np.count_nonzero(array.reshape(-1).view(f"u{array.itemsize}") != fill))
    return Stored(array.size, bits, kept / max(1, array.size), array.nbytes, packed=False)


def _packed(values: np.ndarray[Any, Any], gaps: np.ndarray[Any, Any], elements: int, fill: int = 0) -> Stored:
    kept = _array(values, fill).density * values.size
    return Stored(elements, values.itemsize * 8, kept / elements, values.nbytes + gaps.nbytes, packed=True)


def _of_weights(directory: Path) -> list[Stored]:
    tensors, forms = load_file(directory / manifest.WEIGHTS), manifest.read(directory)["sparse"]
    numbers = {2: torch.int16, 4: torch.int32}  # numpy has no bfloat16
    arrays = {
        name: (tensor.view(numbers[tensor.element_size()]) if tensor.is_floating_point() else tensor).numpy()
        for name, tensor in tensors.items()
    }
    found = [
        _packed(arrays.pop(f"{name}.values"), arrays.pop(f"{name}.gaps"), int(np.prod(form["shape"])))
        for name, form in forms.items()
    ]
    return found + [_array(array) for array in arrays.values()]


def _of_graph(graph: onnx.GraphProto) -> list[Stored]:
    constants = [a.t for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.TENSOR]
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    names = [n.removeprefix(_PREFIX) for n in arrays if n.startswith(_PREFIX) and n.endswith("/values")]
    found = []
    for name in (n.removesuffix("/values") for n in names):
        empty = makers[makers[makers[name].input[0]].input[0]]  # reshaped, scattered into what is filled
        fill = numpy_helper.to_array(empty.attribute[0].t)
        values, gaps = (arrays.pop(f"{_PREFIX}{name}/{part}") for part in ("values", "gaps"))
        elements = int(np.prod(arrays[f"{_PREFIX}{name}/shape"]))
        found.append(_packed(values, gaps, elements, int(fill.view(f"u{fill.itemsize}")[0])))
    return found + [_array(array) for array in (*arrays.values(), *map(numpy_helper.to_array, constants))]

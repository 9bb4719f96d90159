"""Arrays most of whose elements are one and the same, stored as the others and where they stand.

Owns the two forms, the choice between them, and how a dictionary of tensors is written and read back bit for bit.
Knows nothing of files or of why the elements are equal.

``bitmap``   one bit for each element, set where a value is stored: n/8 + b·k bytes for k of n elements, of b bytes.
``gaps``     one byte for each value, how many elements lie between it and the one before: (1 + b)·k bytes. Where
             more than 255 do, the common element is stored on the way. The smaller one below one value in eight.

Source: Han et al. 2016, Deep Compression, section 2 (gaps).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray

from compress_search.errors import ExportError

Form = Literal["bitmap", "gaps"]

LEAST_ELEMENTS = 1024
"""Smaller arrays stay as they are: nothing is to be won."""

_REACH = 256
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


@dataclass(frozen=True)
class Packed:
    """``places``: uint8, (⌈n/8⌉,) for a bitmap, lowest bit first, or (k,) for gaps; ``values``: (k,)."""

    form: Form
    places: NDArray[np.uint8]
    values: NDArray[Any]

    @property
    def nbytes(self) -> int:
        """Bytes of both arrays."""
        return self.places.nbytes + self.values.nbytes


def pack(array: NDArray[Any], fill: int = 0) -> Packed | None:
    """The smaller form of an array of integers, such as the bits of other numbers; None when neither saves a byte.

    Args:
        array: (n,); bits rather than numbers, so that −0.0 is no 0.0.
        fill: the element that is not stored.
    """
    smallest = min((bitmap(array, fill), gaps(array, fill)), key=lambda packed: packed.nbytes)
    return smallest if smallest.nbytes < array.nbytes else None


def bitmap(array: NDArray[Any], fill: int = 0) -> Packed:
    """The array (n,) as a bitmap."""
    kept = array != fill
    return Packed("bitmap", np.packbits(kept, bitorder="little"), array[kept])


def gaps(array: NDArray[Any], fill: int = 0) -> Packed:
    """The array (n,) as gaps."""
    indices = np.flatnonzero(array != fill)
    steps = np.diff(indices, prepend=-1)  # ≥ 1
    bridges = (steps - 1) // _REACH  # how often the common element is stored before each value
    ends = np.cumsum(bridges + 1) - 1
    count = int(ends[-1]) + 1 if len(ends) else 0
    values, places = np.full(count, fill, array.dtype), np.full(count, _REACH - 1, np.uint8)
    values[ends] = array[indices]
    places[ends] = steps - _REACH * bridges - 1
    return Packed("gaps", places, values)


def unpack(packed: Packed, count: int, fill: int = 0) -> NDArray[Any]:
    """The array of ``count`` elements that was packed.

    Raises:
        ExportError: places and values do not belong together.
    """
    array = np.full(count, fill, packed.values.dtype)
    if packed.form == "bitmap":
        where = np.unpackbits(packed.places, bitorder="little")[:count].astype(bool)
        fits = len(packed.places) == -(-count // 8) and int(where.sum()) == len(packed.values)
    else:
        where = np.cumsum(packed.places.astype(np.int64) + 1) - 1
        fits = len(where) == len(packed.values) and (not len(where) or int(where[-1]) < count)
    if not fits:
        raise ExportError(f"a sparse tensor of {count} elements has places and values that do not fit")
    array[where] = packed.values
    return array


def pack_tensors(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors to store, and the forms of those that take less space packed than as they are.

    Returns:
        a packed tensor ``name`` as ``name.places`` and ``name.values``, every other one as it is; and
        name -> ``{"form", "shape"}`` of the packed ones, as plain data.
    """
    stored: dict[str, torch.Tensor] = {}
    forms: dict[str, Any] = {}
    for name, tensor in tensors.items():
        packed = _packed(tensor)
        if packed is None:
            stored[name] = tensor
            continue
        stored[f"{name}.places"] = torch.from_numpy(packed.places)
        stored[f"{name}.values"] = torch.from_numpy(packed.values).view(tensor.dtype)
        forms[name] = {"form": packed.form, "shape": list(tensor.shape)}
    return stored, forms


def unpack_tensors(stored: Mapping[str, torch.Tensor], forms: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The inverse of :func:`pack_tensors`.

    Raises:
        ExportError: a packed tensor is missing, or its parts do not fit.
    """
    tensors = dict(stored)
    for name, entry in forms.items():
        try:
            places, values = tensors.pop(f"{name}.places"), tensors.pop(f"{name}.values")
        except KeyError as error:
            raise ExportError(f"the sparse tensor {name} is incomplete: {error.args[0]} is missing") from error
        bits = values.view(_BITS[values.element_size()]).numpy()
        packed = Packed(cast(Form, entry["form"]), places.numpy(), bits)
        flat = torch.from_numpy(unpack(packed, int(np.prod(entry["shape"])))).view(values.dtype)
        tensors[name] = flat.view(entry["shape"])
    return tensors


def _packed(tensor: torch.Tensor) -> Packed | None:
    if tensor.numel() < LEAST_ELEMENTS or tensor.element_size() not in _BITS:
        return None
    return pack(tensor.flatten().view(_BITS[tensor.element_size()]).numpy())

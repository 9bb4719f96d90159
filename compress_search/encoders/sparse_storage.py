"""Arrays most of whose elements are one and the same, stored as the others and the gaps between them.

Owns the form, and how a dictionary of tensors is written and read back bit for bit. Knows nothing of files or of
why the elements are equal.

Each stored value comes with its distance from the one before, in 4 or 8 bits, whichever takes less; where a gap is
wider than that can say, the common element itself is stored on the way. Of n elements k values of b bits take
about (4 + b)·k bits: as few as with one bit for the place of each element, and below one in five fewer. It also
takes little memory to expand, as nothing but the result is as large as the array.

Source: Han et al. 2016, Deep Compression, section 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from compress_search.errors import ExportError

GAP_BITS = (4, 8)
LEAST_ELEMENTS = 1024
"""Smaller arrays stay as they are: nothing is to be won."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


@dataclass(frozen=True)
class Packed:
    """``values``: (k,); ``gaps``: uint8, the distance of each from the one before, of the first from the start.

    Of ``gap_bits`` = 8 (k,); of 4 (⌈k/2⌉,), the first of two in the lower bits.
    """

    gap_bits: int
    gaps: NDArray[np.uint8]
    values: NDArray[Any]

    @property
    def nbytes(self) -> int:
        """Bytes of both arrays."""
        return self.gaps.nbytes + self.values.nbytes


def pack(array: NDArray[Any], fill: int = 0) -> Packed | None:
    """The smallest form of an array of integers, such as the bits of other numbers; None when none saves a byte.

    Args:
        array: (n,); bits rather than numbers, so that −0.0 is no 0.0.
        fill: the element that is not stored.
    """
    if np.count_nonzero(array != fill) * (4 + 8 * array.itemsize) >= 8 * array.nbytes:
        return None  # told at once, as most arrays are dense
    smallest = min((pack_with(bits, array, fill) for bits in GAP_BITS), key=lambda packed: packed.nbytes)
    return smallest if smallest.nbytes < array.nbytes else None


def pack_with(gap_bits: int, array: NDArray[Any], fill: int = 0) -> Packed:
    """The array (n,) with so many bits for each gap."""
    reach = 2**gap_bits - 1
    kept = np.flatnonzero(array != fill)
    steps = np.diff(kept, prepend=0)  # ≥ 1 but for the first
    bridges = np.maximum(steps - 1, 0) // reach  # how often the common element is stored before each value
    ends = np.cumsum(bridges + 1) - 1
    count = int(ends[-1]) + 1 if len(ends) else 0
    values, gaps = np.full(count, fill, array.dtype), np.full(count, reach, np.uint8)
    values[ends] = array[kept]
    gaps[ends] = steps - reach * bridges
    if gap_bits == 4:
        pairs = np.resize(np.append(gaps, np.uint8(0)), 2 * -(-count // 2)).reshape(-1, 2)
        gaps = (pairs[:, 0] | pairs[:, 1] << 4).astype(np.uint8)
    return Packed(gap_bits, gaps, values)


def unpack(packed: Packed, count: int, fill: int = 0) -> NDArray[Any]:
    """The array of ``count`` elements that was packed.

    Raises:
        ExportError: gaps and values do not belong together.
    """
    gaps, stored = packed.gaps, len(packed.values)
    if len(gaps) != (-(-stored // 2) if packed.gap_bits == 4 else stored):
        raise ExportError(f"a sparse tensor has {len(gaps)} bytes of gaps, which do not fit {stored} values")
    if packed.gap_bits == 4:
        gaps = np.stack([gaps & 15, gaps >> 4], axis=1).reshape(-1)[:stored]
    places = np.cumsum(gaps, dtype=np.int64)
    if stored and places[-1] >= count:
        raise ExportError(f"a sparse tensor has a value at {places[-1]}, beyond its {count} elements")
    array = np.full(count, fill, packed.values.dtype)
    array[places] = packed.values
    return array


def pack_tensors(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors to store, and the forms of those that take less space packed than as they are.

    Returns:
        a packed tensor ``name`` as ``name.gaps`` and ``name.values``, every other one as it is; and
        name -> ``{"gap_bits", "shape"}`` of the packed ones, as plain data.
    """
    stored: dict[str, torch.Tensor] = {}
    forms: dict[str, Any] = {}
    for name, tensor in tensors.items():
        packed = _packed(tensor)
        if packed is None:
            stored[name] = tensor
            continue
        stored[f"{name}.gaps"] = torch.from_numpy(packed.gaps)
        stored[f"{name}.values"] = torch.from_numpy(packed.values).view(tensor.dtype)
        forms[name] = {"gap_bits": packed.gap_bits, "shape": list(tensor.shape)}
    return stored, forms


def unpack_tensors(stored: Mapping[str, torch.Tensor], forms: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The inverse of :func:`pack_tensors`.

    Raises:
        ExportError: a packed tensor is missing, or its parts do not fit.
    """
    tensors = dict(stored)
    for name, entry in forms.items():
        try:
            gaps, values = tensors.pop(f"{name}.gaps"), tensors.pop(f"{name}.values")
        except KeyError as error:
            raise ExportError(f"the sparse tensor {name} is incomplete: {error.args[0]} is missing") from error
        bits = values.view(_BITS[values.element_size()]).numpy()
        packed = Packed(int(entry["gap_bits"]), gaps.numpy(), bits)
        flat = torch.from_numpy(unpack(packed, int(np.prod(entry["shape"])))).view(values.dtype)
        tensors[name] = flat.view(entry["shape"])
    return tensors


def _packed(tensor: torch.Tensor) -> Packed | None:
    if tensor.numel() < LEAST_ELEMENTS or tensor.element_size() not in _BITS:
        return None
    return pack(tensor.flatten().view(_BITS[tensor.element_size()]).numpy())

"""What the teacher computes on the training rows, kept on disk within a limit, else computed again.

Owns the files and the rule of what is kept: a request whose features fit into the limit together, and are sooner
read than computed, is answered from disk, any other by a forward pass. To make room, what was longest out of use
goes, other studies' first if it is older, but nothing that another worker reads now: where that leaves too little,
the answer is computed, too, which differs from what is kept by rounding alone. Knows nothing of the losses these go
into.

Each feature is a directory: ``values.npy`` is (tokens, …), flat as the split's tokens are, or (N, …) for
``pooled`` and ``logits`` of whole texts. All workers share them; the first that needs one runs the whole split.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Collection, Mapping
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor, nn

from compress_search.data import Split, ordered_batches
from compress_search.encoders.features import derive, feature_shape, parse, primitives, read_features
from compress_search.mixed_precision import Precision, computing_in
from compress_search.recipe import digest
from compress_search.teacher.room import FILE, HEADER, LOCK, hold, make_room, new_array
from compress_search.training import to_device

if TYPE_CHECKING:
    from compress_search.method import Batch

BATCH = 64
"""Rows at a time, where the whole split is run."""

READING = 1e9
"""Bytes a second from a memory-mapped file to an accelerator: about what one fast disk gives."""
ARITHMETIC = {"cuda": 2e13}
"""Products a second of a forward pass, by type of device: a fraction of what data sheets promise of 16 bits.

A CPU core reads any feature sooner than it computes one (benchmarks/results/distillation_speed.md)."""

Array = NDArray[Any]
Values = np.memmap[Any, np.dtype[np.float32]]


class TeacherOutputs:
    """The outputs of one teacher on the batches of one study."""

    def __init__(
        self,
        teacher: nn.Module,
        key: str,
        split: Split,
        cache: Path,
        limit: float,
        precision: Precision = "fp32",
    ) -> None:
        """Nothing is computed yet.

        Args:
            teacher: frozen and in evaluation mode, where batches are to be run.
            key: names the teacher by its content.
            split: the training rows.
            cache: holds the directory with the outputs.
            limit: bytes that the outputs of all teachers and splits in ``cache`` may take on disk.
            precision: of the teacher's forward passes; what is kept and given is float32.
        """
        self.teacher, self.split, self.limit, self.precision = teacher, split, limit, precision
        self.directory = cache / "outputs" / digest(["outputs", key, split.path.name, precision])
        self._open: dict[str, Array] = {}
        self._signs: list[FileLock] = []
        self._refused: Collection[str] | None = None

    def __call__(self, batch: Batch, features: Collection[str]) -> dict[str, Tensor]:
        """The features of a batch, without gradients, on the teacher's device.

        Raises:
            TrialError: the teacher has no such feature.
            ValueError: no feature has such a name.
        """
        wanted = primitives(features)
        rows = self.split.rows_of(batch)
        kept = rows is not None and self.fits(wanted) and self.pays(wanted)
        arrays = self._arrays(wanted) if kept else None
        if rows is None or arrays is None:
            with torch.no_grad(), computing_in(self.precision, self.teacher):
                return read_features(self.teacher, batch, features)
        device, width = batch["input_ids"].device, batch["input_ids"].shape[1]
        read = {name: self._padded(name, arrays[name], rows, width).to(device) for name in wanted}
        return derive(read, features, batch["attention_mask"])

    def read_by(self, teacher: nn.Module, split: Split) -> TeacherOutputs:
        """The same for a teacher that reads other pieces: computed when asked, as few trials share its reading."""
        reader = copy(self)
        reader.teacher, reader.split, reader.limit = teacher, split, 0
        reader._open, reader._signs, reader._refused = {}, [], None
        return reader

    def release(self) -> None:
        """Read nothing any more until asked again, so that other features can take the place of these."""
        self._open, self._refused = {}, None
        while self._signs:
            self._signs.pop().release()

    def fits(self, names: Collection[str]) -> bool:
        """Whether these primitive features together stay within the limit."""
        return sum(self._bytes(name) for name in names) <= self.limit

    def pays(self, names: Collection[str]) -> bool:
        """Whether to read these primitive features takes less time than to compute them again, by an estimate."""
        speed = ARITHMETIC.get(next(self.teacher.parameters()).device.type)
        if speed is None:
            return True
        weights = sum(part.weight.numel() for part in self.teacher.modules() if isinstance(part, nn.Linear))
        products = weights * int(self.split.offsets[-1])
        return sum(self._bytes(name) for name in names) / READING < products / speed

    def _shape(self, name: str) -> tuple[int, ...]:
        rows = int(self.split.offsets[-1]) if _per_token(name, self.split) else len(self.split)
        return (rows, *feature_shape(self.teacher, name))

    def _bytes(self, name: str) -> int:
        return HEADER + 4 * math.prod(self._shape(name))

    def _arrays(self, names: Collection[str]) -> dict[str, Array] | None:
        """Memory-mapped values of primitive features, computed if they are not there; None without room."""
        if names == self._refused:
            return None
        if not all(name in self._open for name in names):
            self.release()
            self.directory.mkdir(parents=True, exist_ok=True)
            # one worker computes or makes room; the others wait, for it may be computing just what they need
            with FileLock(self.directory / LOCK):
                if not self._make(names):
                    self._refused = names
                    return None
                self._signs = [hold(self.directory / name) for name in names]
                self._open = {name: np.load(self.directory / name / FILE, mmap_mode="r") for name in names}
        return self._open

    def _make(self, names: Collection[str]) -> bool:
        """Compute what is missing of these features; False where there is no room for it."""
        missing = {name: self._shape(name) for name in names if not (self.directory / name / FILE).is_file()}
        unfinished = {name: self.directory / f".{name}" for name in missing}
        for directory in unfinished.values():
            shutil.rmtree(directory, ignore_errors=True)  # left behind by a process that died
        with FileLock(self.directory.parent / LOCK):
            room = make_room(self.directory, sum(map(self._bytes, missing)), self.limit, names)
            if missing and not room:
                return False
            arrays = {name: _allocated(unfinished[name], shape) for name, shape in missing.items()}
        if arrays:
            with computing_in(self.precision, self.teacher):
                _compute(self.teacher, self.split, arrays)
        for name, directory in unfinished.items():
            directory.replace(self.directory / name)
        for name in names:
            os.utime(self.directory / name)
        return True

    def _padded(self, name: str, values: Array, rows: Array, width: int) -> Tensor:
        """(B, S, …) from flat tokens, zero at padding, or (B, …); heads before tokens for projections."""
        if not _per_token(name, self.split):
            return torch.from_numpy(np.asarray(values[rows]))
        mask = np.arange(width) < self.split.lengths[rows][:, None]
        padded = np.zeros((*mask.shape, *values.shape[1:]), dtype=np.float32)
        padded[mask] = values[self.split.places(rows)]
        return _heads_first(torch.from_numpy(padded))


def _allocated(directory: Path, shape: tuple[int, ...]) -> Values:
    directory.mkdir()
    return new_array(directory / FILE, shape)


def _compute(network: nn.Module, split: Split, arrays: Mapping[str, Values]) -> None:
    """Run the whole split once and write down each feature's values."""
    device = next(network.parameters()).device
    with torch.no_grad():
        for batch in ordered_batches(split, BATCH):
            found = read_features(network, to_device(batch, device), list(arrays))
            for name, output in found.items():
                values = output.cpu()
                if _per_token(name, split):
                    # the real tokens of each row, one after the other
                    mask, places = batch["attention_mask"].bool(), split.places(batch["index"].numpy())
                    arrays[name][places] = _heads_first(values)[mask].numpy()
                else:
                    arrays[name][batch["index"].numpy()] = values.numpy()
    for array in arrays.values():
        array.flush()


def _per_token(name: str, split: Split) -> bool:
    return split.token_labels or parse(name)[0] not in ("pooled", "logits")


def _heads_first(values: Tensor) -> Tensor:
    """(B, S, A, d) as (B, A, S, d), or the other way about; what has no heads as it is."""
    return values.transpose(1, 2) if values.ndim == 4 else values

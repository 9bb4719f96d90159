"""What the teachers say: of the training rows computed once per study and memory-mapped, of others when asked.

Owns the files. Knows nothing of the losses these go into.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compress_search.cache import content_addressed
from compress_search.data import Split, ordered_batches
from compress_search.encoders import inputs
from compress_search.recipe import digest
from compress_search.teacher import load_teacher
from compress_search.teacher.ensemble import Average, average
from compress_search.teacher.reading import cut, matching_places
from compress_search.teacher.room import new_array
from compress_search.training import forward, to_device

if TYPE_CHECKING:
    from compress_search.method import Batch

FILE = "logits.npy"


class TeacherLogits:
    """The logits that students learn from: the first teacher's, or the average of all."""

    def __init__(
        self, teacher: nn.Module, paths: Sequence[Path], split: Split, cache: Path, how: Average = "logits"
    ) -> None:
        """Runs each teacher on the split, unless its logits are in the cache.

        Args:
            teacher: the first one, where it is to run.
            paths: directories of all teachers, the first one's in front.
            split: the training rows.
            cache: holds the directories with the results.
            how: what of several teachers is averaged.
        """
        self.split, self.how = split, how
        self._first, self._further = teacher, paths[1:]
        self.device = next(teacher.parameters()).device
        self._caches = [teacher_logits(path, split, cache, self.device) for path in paths]
        self._kept: Sequence[int] | None = None

    def read_by(self, split: Split, kept: Sequence[int]) -> TeacherLogits:
        """The same for another reading of the training rows, by a tokenizer with only these pieces."""
        reader = copy(self)
        reader.__dict__.pop("_networks", None)
        reader._caches = [cache.read_by(self.split, split) for cache in self._caches]
        reader.split, reader._kept = split, kept
        return reader

    @property
    def several(self) -> bool:
        """Whether they are an average."""
        return bool(self._further)

    @cached_property
    def _networks(self) -> list[nn.Module]:
        """All teachers; further ones are only loaded for what is no training row."""
        networks = [self._first, *(load_teacher(path, self.device)[0] for path in self._further)]
        return networks if self._kept is None else [cut(network, self._kept) for network in networks]

    def __call__(self, batch: Batch) -> Tensor:
        """(B, C) or (B, S, C) on the teacher's device: from disk for training rows, else computed."""
        rows = self.split.rows_of(batch)
        if rows is None:
            with torch.no_grad():
                return average([_ask(network, batch) for network in self._networks], self.how)
        index, width = torch.from_numpy(rows), batch["input_ids"].shape[1]
        return average([cache.batch(index, width) for cache in self._caches], self.how).to(self.device)


class LogitCache:
    """(N, C) logits of a split, or flat (tokens, C) with the split's own offsets; between processes a path."""

    def __init__(self, path: Path, offsets: NDArray[Any] | None, places: NDArray[Any] | None = None) -> None:
        """``places`` are those of the tokens' logits among all in the file, where they are not in its order."""
        self.path, self._offsets, self._places = Path(path), offsets, places
        self._logits = np.load(self.path / FILE, mmap_mode="r")

    def __reduce__(self) -> tuple[type[LogitCache], tuple[Any, ...]]:
        return LogitCache, (self.path, self._offsets, self._places)

    def read_by(self, before: Split, after: Split) -> LogitCache:
        """The logits for another reading of the same rows; those of whole texts are the same."""
        if self._offsets is None:
            return self
        places = matching_places(before, after)
        return LogitCache(self.path, after.offsets, places if self._places is None else self._places[places])

    def batch(self, index: Tensor, width: int) -> Tensor:
        """The teacher's logits for rows of the split: float32 on the CPU.

        Args:
            index: (B,) row numbers, a batch's ``index``.
            width: S, the batch's padded length.

        Returns:
            (B, C); for token tasks (B, S, C), zero where there is padding.
        """
        rows = index.numpy()
        if self._offsets is None:
            return torch.from_numpy(np.asarray(self._logits[rows]))
        starts, lengths = self._offsets[rows], self._offsets[rows + 1] - self._offsets[rows]
        columns = np.arange(width)
        mask = columns < lengths[:, None]
        padded = np.zeros((*mask.shape, self._logits.shape[-1]), dtype=np.float32)
        places = (starts[:, None] + columns)[mask]
        padded[mask] = self._logits[places if self._places is None else self._places[places]]
        return torch.from_numpy(padded)


def teacher_logits(
    path: Path, split: Split, cache: Path, device: torch.device | str = "cpu", batch_size: int = 64
) -> LogitCache:
    """The teacher's logits on every row of a split, from the cache after the first call.

    Args:
        path: the teacher's directory, named by its content, as the split's is.
        split: what to run it on.
        cache: holds the directory with the result.
        device: where to run it.
        batch_size: rows at a time.
    """
    key = digest(["logits", Path(path).name, split.path.name])
    directory = content_addressed(
        cache, key, lambda unfinished: _compute(path, split, unfinished, device, batch_size)
    )
    return LogitCache(directory, split.offsets if split.token_labels else None)


def _compute(path: Path, split: Split, directory: Path, device: torch.device | str, batch_size: int) -> None:
    network, _ = load_teacher(path, device)
    rows = int(split.offsets[-1]) if split.token_labels else len(split)
    config: Any = network.config
    shape = (rows, config.num_labels)
    logits = new_array(directory / FILE, shape)
    with torch.no_grad():
        for batch in ordered_batches(split, batch_size):
            output = _ask(network, to_device(batch, device)).float().cpu().numpy()
            index = batch["index"].numpy()
            if not split.token_labels:
                logits[index] = output
                continue
            for row, values in zip(index, output, strict=True):
                start, end = split.offsets[row : row + 2]
                logits[start:end] = values[: end - start]
    logits.flush()
    (directory / "made.json").write_text(json.dumps({"teacher": Path(path).name, "split": split.path.name}))


def _ask(network: nn.Module, batch: Batch) -> Tensor:
    """A teacher's logits; of families without segments those of the others are kept from it."""
    return forward(network, {name: batch[name] for name in inputs(network) if name in batch})

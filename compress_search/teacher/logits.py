"""The teacher's outputs on a split, computed once per study and memory-mapped by every worker.

Owns their files. Knows nothing of the losses they go into.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress_search.cache import content_addressed
from compress_search.data import Split, ordered_batches
from compress_search.recipe import digest
from compress_search.teacher import load_teacher
from compress_search.training import forward, to_device

FILE = "logits.npy"


class LogitCache:
    """(N, C) logits of a split, or flat (tokens, C) with the split's own offsets; between processes a path."""

    def __init__(self, path: Path, offsets: NDArray[Any] | None) -> None:
        self.path, self._offsets = Path(path), offsets
        self._logits = np.load(self.path / FILE, mmap_mode="r")

    def __reduce__(self) -> tuple[type[LogitCache], tuple[Path, NDArray[Any] | None]]:
        return LogitCache, (self.path, self._offsets)

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
        padded[mask] = self._logits[(starts[:, None] + columns)[mask]]
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
    logits = np.lib.format.open_memmap(directory / FILE, mode="w+", dtype=np.float32, shape=shape)
    with torch.no_grad():
        for batch in ordered_batches(split, batch_size):
            output = forward(network, to_device(batch, device)).float().cpu().numpy()
            index = batch["index"].numpy()
            if not split.token_labels:
                logits[index] = output
                continue
            for row, values in zip(index, output, strict=True):
                start, end = split.offsets[row : row + 2]
                logits[start:end] = values[: end - start]
    logits.flush()
    (directory / "made.json").write_text(json.dumps({"teacher": Path(path).name, "split": split.path.name}))

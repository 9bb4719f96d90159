"""Room on the disk for what teachers computed: one limit for the directories of all studies, and who reads there.

Owns which files go when there is too little. Knows nothing of what is in them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from filelock import FileLock, Timeout

FILE = "values.npy"
"""What a kept feature's directory holds."""
LOCK = "lock"
"""Held by who makes something in a directory, or deletes something there."""


def new_array(path: Path, shape: Sequence[int]) -> np.memmap[Any, np.dtype[np.float32]]:
    """A file of zeros (``shape``), to be written through memory.

    Raises:
        OSError: the disk is full; without asking now, a process would die once it writes a page that has no place.
    """
    array: np.memmap[Any, np.dtype[np.float32]]
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=tuple(shape))
    if hasattr(os, "posix_fallocate"):
        with path.open("rb+") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def hold(directory: Path) -> FileLock:
    """A sign that somebody reads from the directory: until it is released, or the process ends.

    To be called under the directory's lock.
    """
    _readers(directory)  # or signs of processes that ended would gather
    sign = FileLock(directory / f"{uuid4().hex}.reader")
    sign.acquire()
    return sign


def make_room(own: Path, needed: float, limit: float, keep: Collection[str]) -> None:
    """Delete what was longest out of use until so many bytes fit, in this directory and those beside it.

    What others read from now stays, so that all together may take more than the limit; this directory never does.
    To be called under this directory's lock.

    Args:
        own: whoever still reads features that go here keeps its own view.
        needed: bytes; at most ``limit`` with those of ``keep``.
        limit: bytes of all directories together.
        keep: features of this directory that stay.
    """
    features = sorted((path.parent for path in own.parent.glob(f"*/*/{FILE}")), key=_latest_use)
    free = limit - sum(map(_size, features))
    for feature in features:
        if free >= needed:
            break
        if feature.parent != own:
            free += _freed(feature)
        elif feature.name not in keep:
            free += _deleted(feature)


def _freed(feature: Path) -> int:
    """The bytes that were deleted with another directory's feature: none where somebody is at work there."""
    try:
        with FileLock(feature.parent / LOCK, timeout=0):
            return 0 if _readers(feature.parent) else _deleted(feature)
    except Timeout:
        return 0


def _deleted(feature: Path) -> int:
    size = _size(feature)
    if not feature.name.startswith("."):  # which a process left half deleted
        # whoever looks for it finds all of it or nothing, though a file that somebody reads may outlive its name
        feature = feature.rename(feature.with_name(f".{feature.name}-{uuid4().hex}"))
    shutil.rmtree(feature, ignore_errors=True)
    return size


def _readers(directory: Path) -> int:
    """How many read from it; signs that processes left which have ended are removed."""
    return sum(_is_locked(sign) for sign in directory.glob("*.reader"))


def _is_locked(sign: Path) -> bool:
    try:
        with FileLock(sign, timeout=0):
            sign.unlink(missing_ok=True)
    except Timeout:
        return True
    return False


def _size(feature: Path) -> int:
    """Bytes; none where another process has just deleted it."""
    try:
        return (feature / FILE).stat().st_size
    except FileNotFoundError:
        return 0


def _latest_use(feature: Path) -> float:
    try:
        return feature.stat().st_mtime
    except FileNotFoundError:
        return 0.0

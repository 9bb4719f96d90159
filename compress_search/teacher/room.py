"""Room on the disk for what teachers computed: one limit for the features of all studies, and who reads which.

Owns which of them go when there is too little. Knows nothing of what is in them. Each is a directory with a file
inside, in a directory of its teacher's and split's; one whose name begins with a dot is half made or half deleted.
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
"""In a teacher's directory; held by who makes something there, or deletes something."""


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


def hold(feature: Path) -> FileLock:
    """A sign that somebody reads the feature: until it is released, or the process ends.

    To be called under the lock of its teacher's directory.
    """
    _readers(feature)  # or signs of processes that ended would gather
    sign = FileLock(feature / f"{uuid4().hex}.reader")
    sign.acquire()
    return sign


def make_room(own: Path, needed: float, limit: float, keep: Collection[str]) -> bool:
    """Delete what was longest out of use until so many bytes fit, in this teacher's directory and those beside it.

    What somebody reads stays, for to delete it would free nothing. To be called under this directory's lock.

    Args:
        own: the directory.
        needed: bytes.
        limit: bytes of all directories together.
        keep: features of this directory that stay.

    Returns:
        Whether they fit now.
    """
    features = sorted((path.parent for path in own.parent.glob(f"*/*/{FILE}")), key=_latest_use)
    free = limit - sum(map(_size, features))
    for feature in features:
        if free >= needed:
            break
        if feature.parent != own:
            free += _freed_elsewhere(feature)
        elif feature.name not in keep:
            free += _freed(feature)
    return free >= needed


def _freed_elsewhere(feature: Path) -> int:
    """The bytes that were deleted with another directory's feature: none where somebody is at work there."""
    try:
        with FileLock(feature.parent / LOCK, timeout=0):
            return _freed(feature)
    except Timeout:
        return 0


def _freed(feature: Path) -> int:
    """The bytes that were deleted with a feature: none where somebody reads it."""
    if _readers(feature):
        return 0
    size = _size(feature)
    if not feature.name.startswith("."):
        # whoever looks for it finds all of it or nothing
        feature = feature.rename(feature.with_name(f".{feature.name}-{uuid4().hex}"))
    shutil.rmtree(feature, ignore_errors=True)
    return size


def _readers(feature: Path) -> int:
    """How many read it; signs that processes left which have ended are removed."""
    return sum(_is_locked(sign) for sign in feature.glob("*.reader"))


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

"""Room on the disk for what teachers computed: one limit for the features of all studies, and who reads which.

Owns which of them go when there is too little. Knows nothing of what is in them. Each is a directory with a file
inside, in a directory of its teacher's and split's; one whose name begins with a dot is half made or half deleted.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from filelock import FileLock, Timeout

FILE = "values.npy"
"""What a kept feature's directory holds."""
HEADER = 128
"""Bytes of such a file that are no values."""
LOCK = "lock"
"""In a teacher's directory; held by who makes something there, or deletes something. In that of all teachers; held
from where somebody looks for room until it is taken."""


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

    What somebody reads stays, for to delete it would free nothing; where that leaves too little, nothing goes.
    To be called under this directory's lock, and until the bytes are taken under that of all directories.

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
    others = [feature for feature in features if feature.parent != own or feature.name not in keep]
    if free >= needed:
        return True
    if free + sum(_where_idle(_size, feature, own) for feature in others) < needed:
        return False
    for feature in others:
        if free >= needed:
            break
        free += _where_idle(_deleted, feature, own)
    return free >= needed


def _where_idle(action: Callable[[Path], int], feature: Path, own: Path) -> int:
    """The action's bytes; none where somebody reads the feature, or is at work in its directory."""
    lock = nullcontext() if feature.parent == own else FileLock(feature.parent / LOCK, timeout=0)
    try:
        with lock:
            return 0 if _readers(feature) else action(feature)
    except Timeout:
        return 0


def _deleted(feature: Path) -> int:
    """The bytes that went with a feature: none where another process was first."""
    size = _size(feature)
    if size and not feature.name.startswith("."):
        # whoever looks for it finds all of it or nothing
        feature = feature.rename(feature.with_name(f".{feature.name}-{uuid4().hex}"))
    shutil.rmtree(feature, ignore_errors=True)
    return size - _size(feature)


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

"""Content-addressed directories: made once, whole or not at all, shared by every process on the host.

Owns where they are, the lock and the atomic rename. Knows nothing of what is inside.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import platformdirs
from filelock import FileLock


def cache_folder() -> Path:
    """Where teachers, tokenised data and what is known of this machine are kept between studies."""
    chosen = os.environ.get("COMPRESS_SEARCH_CACHE")
    return Path(chosen).expanduser().resolve() if chosen else platformdirs.user_cache_path("compress-search")


def content_addressed(cache: Path, key: str, build: Callable[[Path], None]) -> Path:
    """The directory ``cache/<key>``, built by whoever comes first; the others wait.

    ``build`` fills the empty directory it is given, which only takes its final name once it returns.
    """
    directory = cache / key
    if directory.is_dir():
        return directory
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{key}.lock"):
        if not directory.is_dir():
            unfinished = cache / f"{key}.tmp"
            # left behind by a process that died: whoever holds the lock is alone
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            try:
                build(unfinished)
            except BaseException:
                shutil.rmtree(unfinished)
                raise
            unfinished.replace(directory)
    return directory

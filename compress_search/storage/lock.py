"""One driver for each study: a lock that the operating system or the server drops when its holder dies.

A file lock beside an SQLite database, an advisory lock inside PostgreSQL. Knows nothing of the tables; who holds
a lock is written down elsewhere, and only to be shown.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Protocol

from filelock import FileLock, Timeout
from sqlalchemy import URL, Connection, create_engine, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from compress_search.errors import StorageError


class StudyLock(Protocol):
    """What both kinds can do."""

    def acquire(self) -> bool:
        """Take the lock without waiting; whether it was free."""

    def held(self) -> bool:
        """Whether the lock is still ours."""

    def release(self) -> None:
        """Give it back; releasing a lock that is not held does nothing."""


def lock_for(url: URL, study: str) -> StudyLock:
    """The lock of a study in a database.

    Raises:
        StorageError: neither SQLite nor PostgreSQL.
    """
    backend = url.get_backend_name()
    if backend == "sqlite":
        return FileStudyLock(lock_file(Path(str(url.database)), study))
    if backend == "postgresql":
        return AdvisoryStudyLock(url, study)
    raise StorageError(f"{backend} is not supported: expected sqlite:///… or postgresql+psycopg://…")


def lock_file(database: Path, study: str) -> Path:
    """The lock's file: beside the database, named after both and distinct for distinct names."""
    readable = re.sub(r"[^\w.-]", "_", study)[:64]
    return database.with_name(f"{database.name}.{readable}-{_number(study) & 0xFFFFFFFF:08x}.lock")


def _number(study: str) -> int:
    """A signed 64-bit number of a study's name, as advisory locks are called."""
    digest = hashlib.sha256(f"compress-search:{study}".encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


class FileStudyLock:
    """``flock`` on a file; the kernel drops it with the process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(path)

    def acquire(self) -> bool:
        """Take the lock without waiting; whether it was free."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            return False
        except OSError as error:
            raise StorageError(f"cannot write {self.path}: {error.strerror or error}") from error
        return True

    def held(self) -> bool:
        """Whether the lock is still ours."""
        return self._lock.is_locked

    def release(self) -> None:
        """Give it back."""
        self._lock.release()


class AdvisoryStudyLock:
    """``pg_try_advisory_lock`` on a connection of its own; the server drops it with the connection."""

    def __init__(self, url: URL, study: str) -> None:
        self._engine = create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
        self._key = _number(study)
        self._connection: Connection | None = None

    def acquire(self) -> bool:
        """Take the lock without waiting; whether it was free. Raises what SQLAlchemy raises."""
        self.release()
        connection = self._engine.connect()
        if connection.scalar(text("SELECT pg_try_advisory_lock(:key)"), {"key": self._key}):
            self._connection = connection
            return True
        connection.close()
        return False

    def held(self) -> bool:
        """Whether the connection, and with it the lock, is still there."""
        try:
            return self._connection is not None and self._connection.scalar(text("SELECT 1")) == 1
        except SQLAlchemyError:
            return False

    def release(self) -> None:
        """Give it back by closing the connection."""
        if self._connection is not None:
            self._connection.close()
        self._connection = None

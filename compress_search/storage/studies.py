"""A study as a whole in the database: the row that it has, and the one driver that may write.

Knows nothing of trials.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from compress_search.errors import StorageError, StudyLocked
from compress_search.storage.database import Database
from compress_search.storage.lock import StudyLock, lock_for
from compress_search.storage.stored import StudyInfo, plain, study_info
from compress_search.storage.tables import OPTUNA_STUDIES, StudyRow, now


class Studies(Database):
    """The rows of studies; see :class:`compress_search.storage.database.Database` for its arguments."""

    _lock: StudyLock | None = None

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Be the study's only driver inside the block.

        Raises:
            StudyLocked: there is another one; the text names it.
        """
        lock = lock_for(self._url, name)
        if not self._acquire(lock):
            raise StudyLocked(f"study {name!r} is already being run by {self._holder(name)}")
        self._lock = lock
        try:
            yield
        finally:
            self._lock = None
            lock.release()

    def _acquire(self, lock: StudyLock) -> bool:
        try:
            return lock.acquire()
        except SQLAlchemyError as error:
            raise self._fault(error) from error

    def renew_lock(self, name: str) -> None:
        """Take the lock again if its connection broke.

        Raises:
            StudyLocked: another driver was faster, and the study is its own now.
        """
        if self._lock and not self._lock.held() and not self.patiently(self._lock.acquire):
            raise StudyLocked(f"study {name!r} was taken over by {self._holder(name)}")

    def _holder(self, name: str) -> str:
        study = self.find(name) if self.exists else None
        if study is None or not study.driver:
            return "another process"
        return "process {pid} on {host} since {since}".format(**study.driver)

    def find(self, name: str) -> StudyInfo | None:
        """What is stored of a study; None when there is none of this name."""

        def work(session: Session) -> StudyInfo | None:
            row = session.scalar(select(StudyRow).filter_by(name=name))
            return None if row is None else study_info(row)

        return self._run(work)

    def study(self, name: str) -> StudyInfo:
        """What is stored of a study.

        Raises:
            StorageError: there is no database, or no study of this name in it.
        """
        self.check()
        found = self.find(name)
        if found is None:
            raise StorageError(f"no study named {name!r} in {self.safe_url}: it has not been run yet")
        return found

    def begin(self, name: str, **columns: Any) -> StudyInfo:
        """Write down that this process drives the study now, and the given columns of its row.

        A new study needs ``definition``, ``identity``, ``space_hash`` and ``subject``.

        Raises:
            StorageError: the study is new to us, but Optuna has one of this name: somebody else's.
        """

        def work(session: Session) -> StudyInfo:
            row = session.scalar(select(StudyRow).filter_by(name=name))
            if row is None:
                self._refuse_stranger(session, name)
                row = StudyRow(name=name, seconds=0.0, created=now(), **{"reference": {}, "environment": {}})
                session.add(row)
            for column, value in columns.items():
                setattr(row, column, plain(value))
            row.driver = _myself()
            session.flush()
            return study_info(row)

        return self._run(work)

    def _refuse_stranger(self, session: Session, name: str) -> None:
        if session.scalar(select(OPTUNA_STUDIES.c.study_id).where(OPTUNA_STUDIES.c.study_name == name)):
            raise StorageError(f"{self.safe_url}: holds another Optuna study named {name!r}; choose another name")

    def update_study(self, name: str, **columns: Any) -> None:
        """Set columns of a study's row: ``seconds``, ``reference``, ``environment``."""

        def work(session: Session) -> None:
            row = study_row(session, name)
            for column, value in columns.items():
                setattr(row, column, plain(value))

        self._run(work)


def study_row(session: Session, name: str) -> StudyRow:
    """The study's row, which the rows of its trials refer to.

    Raises:
        StorageError: there is no study of this name.
    """
    row = session.scalar(select(StudyRow).filter_by(name=name))
    if row is None:
        raise StorageError(f"no study named {name!r}: it has not been run yet")
    return row


def _myself() -> dict[str, Any]:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": since}

"""A database by its URL: opening and creating it, and patience while it is locked or away.

Owns connections, the schema's version and how errors of databases become one line without a password. Knows
nothing of what is in the tables.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import optuna
from optuna.exceptions import StorageInternalError
from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError, SQLAlchemyError
from sqlalchemy.orm import Session

from compress_search.errors import StorageError
from compress_search.storage import schema
from compress_search.study import hide_passwords

T = TypeVar("T")
Direction = Literal["maximize", "minimize"]

LONGEST_PAUSE = 10.0
HOPELESS = (
    "readonly database",
    "read-only",
    "disk is full",
    "disk full",
    "no space left",
    "disk i/o error",
    "no such table",
    "no such column",
    "unable to open database file",
    "does not exist",
    "authentication failed",
)
"""Texts of operational errors that no waiting will mend."""

OVERTAKEN = ("already exists", "duplicate key")


class Database:
    """A database, by URL. Nothing is opened, let alone created, before it is asked for.

    Args:
        url: an SQLAlchemy URL of SQLite (a file) or PostgreSQL.
        patience: seconds to go on trying while the database is locked or away; a driver wants minutes.
        timeout: seconds that one statement waits for a lock, or one connection for its server.

    Raises:
        StorageError: the URL cannot be used.
    """

    def __init__(
        self,
        url: str,
        *,
        patience: float = 0.0,
        timeout: float = 10.0,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._url = parse_url(url)
        self.patience, self._sleep, self._clock = patience, sleep, clock
        self._file = Path(str(self._url.database)) if self._url.get_backend_name() == "sqlite" else None
        wait = {"timeout": timeout} if self._file else {"connect_timeout": math.ceil(timeout)}
        self._options: dict[str, Any] = {"connect_args": wait, "pool_pre_ping": not self._file}
        try:
            self._engine = _tuned(create_engine(self._url, **self._options))
        except (ImportError, SQLAlchemyError) as error:
            raise StorageError(f"{self.safe_url}: cannot be used: {error}".splitlines()[0]) from error

    @property
    def safe_url(self) -> str:
        """The URL as it may be shown: without its password."""
        return hide_passwords(self._url.render_as_string(hide_password=False))

    # ---- opening ------------------------------------------------------------------------------------------------

    @property
    def exists(self) -> bool:
        """Whether there is a database with our tables; creates nothing.

        Raises:
            StorageError: the database cannot be reached.
        """
        if self._file and not self._file.exists():
            return False
        with self._connected() as connection:
            return schema.revision(connection) is not None

    @property
    def outdated(self) -> bool:
        """Whether there are tables of an older version, which :meth:`create` brings up to date."""
        if not self.exists:
            return False
        with self._connected() as connection:
            return schema.revision(connection) in schema.revisions()[1:]

    def check(self) -> None:
        """Make sure that there is something to read.

        Raises:
            StorageError: no such database, or tables of another version.
        """
        if not self.exists:
            raise StorageError(f"no study in {self.safe_url}: it has not been run yet")
        with self._connected() as connection:
            found, known = schema.revision(connection), schema.revisions()
        if found not in known:
            raise StorageError(f"{self.safe_url}: written by a newer version of compress-search (schema {found})")
        if found != known[0]:
            raise StorageError(f"{self.safe_url}: written by an older version; `compress-search run` upgrades it")

    def create(self) -> None:
        """Create the database's tables, ours and Optuna's, or bring ours up to date.

        Raises:
            StorageError: it cannot be reached or written, or was written by a newer version.
        """
        if self._file:
            self._make_folder(self._file.parent)
        if self.exists:
            self._refuse_newer()
        try:
            self._create()
        except StorageError as error:
            # another driver was creating the same tables: let it finish, then look again
            if not any(sign in str(error) for sign in OVERTAKEN):
                raise
            self._sleep(1.0)
            self._create()

    def _create(self) -> None:
        if self._file:
            with self._connected() as connection:  # stays with the file; a reader of any file does not change it
                connection.exec_driver_sql("PRAGMA journal_mode=WAL")
        self._optuna_storage(create=True)
        try:
            with self._engine.begin() as connection:
                schema.upgrade(connection)
        except SQLAlchemyError as error:
            raise self._fault(error) from error

    def _refuse_newer(self) -> None:
        with self._connected() as connection:
            found = schema.revision(connection)
        if found is not None and found not in schema.revisions():
            raise StorageError(f"{self.safe_url}: written by a newer version of compress-search (schema {found})")

    def _make_folder(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot create {folder}: {error.strerror or error}") from error

    def _optuna_storage(self, create: bool = False) -> optuna.storages.RDBStorage:
        url = self._url.render_as_string(hide_password=False)
        try:
            storage = optuna.storages.RDBStorage(url, engine_kwargs=self._options, skip_table_creation=not create)
            storage.engine = _tuned(storage.engine)
            return storage
        except RuntimeError as error:  # Optuna's tables are of another version; its text says what to do
            text = str(error).replace("$STORAGE_URL", self.safe_url)
            raise StorageError(f"{self.safe_url}: {text}") from error
        except (SQLAlchemyError, StorageInternalError) as error:
            raise self._fault(error) from error

    def optuna_study(self, name: str, directions: Mapping[str, Direction]) -> optuna.Study:
        """The Optuna study of this name, created when it is not there. ``directions`` are by objective."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # progress is the driver's to tell
        storage = self._optuna_storage()
        return self.patiently(
            lambda: optuna.create_study(
                storage=storage, study_name=name, directions=list(directions.values()), load_if_exists=True
            )
        )

    # ---- patience -----------------------------------------------------------------------------------------------

    def patiently(self, call: Callable[[], T]) -> T:
        """The call's value, tried again with growing pauses while the database is locked or away.

        Raises:
            StorageError: patience ran out, or no waiting would help.
        """
        deadline, pause = self._clock() + self.patience, 0.1
        while True:
            try:
                return call()
            except (SQLAlchemyError, StorageInternalError) as error:
                if not _passing(error) or self._clock() + pause > deadline:
                    raise self._fault(error) from error
            self._sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _fault(self, error: Exception) -> StorageError:
        """One line on what is wrong, without the password."""
        cause = error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ else error
        origin = cause.orig if isinstance(cause, DBAPIError) and cause.orig else cause
        text = hide_passwords(" ".join(str(origin).split()))
        return StorageError(f"{self.safe_url}: {text}")

    @contextmanager
    def _connected(self) -> Iterator[Connection]:
        try:
            with self._engine.connect() as connection:
                yield connection
        except SQLAlchemyError as error:
            raise self._fault(error) from error

    def _run(self, work: Callable[[Session], T]) -> T:
        """Do some work in one transaction."""
        if self._file and not self._file.exists():
            raise StorageError(f"no study in {self.safe_url}: there is no such file")

        def once() -> T:
            with Session(self._engine, expire_on_commit=False) as session, session.begin():
                return work(session)

        return self.patiently(once)


def parse_url(url: str) -> URL:
    """The URL with the driver we install.

    Raises:
        StorageError: it is none, or names a database in memory; the text does not repeat it.
    """
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise StorageError("not a database URL; expected for example sqlite:///study.db") from None
    if parsed.drivername in ("postgres", "postgresql"):
        return parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername.startswith("sqlite") and parsed.database in (None, "", ":memory:"):
        raise StorageError("a database in memory cannot be resumed; expected for example sqlite:///study.db")
    return parsed


def _tuned(engine: Engine) -> Engine:
    """The engine; on SQLite with a write-ahead log that is not forced to the disk at each commit.

    A killed process loses nothing by this. A machine that loses power may lose the newest commits, never the
    database, and the results that workers left behind are told again.
    """
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _do_not_force)
        engine.dispose()  # what was connected before does not know the pragmas
    return engine


def _do_not_force(connection: Any, _: object) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.close()


def _passing(error: Exception) -> bool:
    """Whether the error may pass by itself: a lock, a server that restarts, a network that comes back."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    text = str(cause).lower()
    lost = isinstance(cause, DBAPIError) and cause.connection_invalidated
    return (lost or isinstance(cause, OperationalError)) and not any(sign in text for sign in HOPELESS)

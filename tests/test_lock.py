from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url

from compress_search.errors import StorageError
from compress_search.storage.lock import lock_file, lock_for
from tests.databases import database

HOLDER = """
import sys, time
from sqlalchemy.engine import make_url
from compress_search.storage.lock import lock_for
lock = lock_for(make_url(sys.argv[1]), sys.argv[2])
print(lock.acquire(), flush=True)
time.sleep(60)
"""


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    with database(request.param, tmp_path) as found:
        yield found


@contextmanager
def holder(url: str, study: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock."""
    command = [sys.executable, "-c", HOLDER, url, study]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "True\n"
        try:
            yield process
        finally:
            process.kill()


def test_only_one_can_hold_a_study(url: str) -> None:
    first, second = lock_for(make_url(url), "s"), lock_for(make_url(url), "s")
    assert first.acquire()
    assert first.held()
    assert not second.acquire()
    assert not second.held()
    first.release()
    assert not first.held()
    assert second.acquire()
    second.release()


def test_studies_of_one_database_do_not_lock_each_other(url: str) -> None:
    one, other = lock_for(make_url(url), "a b"), lock_for(make_url(url), "a_b")
    assert one.acquire()
    assert other.acquire()
    one.release()
    other.release()


def test_releasing_twice_or_without_holding_does_nothing(url: str) -> None:
    lock = lock_for(make_url(url), "s")
    lock.release()
    assert lock.acquire()
    lock.release()
    lock.release()
    assert not lock.held()


@pytest.mark.parametrize("death", [signal.SIGTERM, signal.SIGKILL])
def test_the_lock_dies_with_its_holder(url: str, death: signal.Signals) -> None:
    lock = lock_for(make_url(url), "s")
    with holder(url, "s") as process:
        assert not lock.acquire()
        os.kill(process.pid, death)
        process.wait()
        for _ in range(100):  # the server notices a closed connection in its own time
            if lock.acquire():
                break
        assert lock.held()
    lock.release()


def test_a_lock_whose_connection_broke_is_not_held(tmp_path: Path) -> None:
    with database("postgresql", tmp_path) as url:
        lock = lock_for(make_url(url), "s")
        assert lock.acquire()
        _end_other_connections(url)
        assert not lock.held()
        assert lock.acquire()
        assert lock.held()
        lock.release()


def _end_other_connections(url: str) -> None:
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(
            text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        )
    engine.dispose()


def test_the_file_stands_beside_the_database_and_is_named_after_the_study() -> None:
    path = lock_file(Path("/runs/study.db"), "my study/2")
    assert path.parent == Path("/runs")
    assert path.name.startswith("study.db.my_study_2-")
    assert path.suffix == ".lock"


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    lock = lock_for(make_url(f"sqlite:///{tmp_path / 'file' / 'study.db'}"), "s")
    with pytest.raises(StorageError, match=r"^cannot write .*study\.db.*lock: "):
        lock.acquire()


def test_other_databases_are_refused() -> None:
    with pytest.raises(StorageError, match=r"^mysql is not supported: expected sqlite"):
        lock_for(make_url("mysql://localhost/x"), "s")

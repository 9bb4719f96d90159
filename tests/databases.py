"""Databases for tests: SQLite always, PostgreSQL when ``CS_TEST_PG_URL`` names a server to create some on."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url


@contextmanager
def postgres() -> Iterator[str]:
    """The URL of a new and empty PostgreSQL database, dropped afterwards; skips where there is no server."""
    server = os.environ.get("CS_TEST_PG_URL")
    if not server:
        pytest.skip("CS_TEST_PG_URL is not set: nothing on PostgreSQL is tested")
    name = f"cs_test_{uuid.uuid4().hex[:12]}"
    engine = create_engine(server, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    try:
        yield make_url(server).set(database=name).render_as_string(hide_password=False)
    finally:
        with engine.connect() as connection:
            connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
        engine.dispose()


@contextmanager
def database(kind: str, folder: Path) -> Iterator[str]:
    """The URL of a database that is not there yet (sqlite) or empty (postgresql)."""
    if kind == "sqlite":
        yield f"sqlite:///{folder / 'study.db'}"
        return
    with postgres() as url:
        yield url

"""Brings a database's ``cs_*`` tables to this version's schema, and tells whether they are.

Owns the use of alembic: our own version table, and a filter that hides every table that is not ours. Knows
nothing of Optuna's schema.
"""

from __future__ import annotations

from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

from compress_search.storage.tables import PREFIX, VERSION_TABLE, Base


def options() -> dict[str, Any]:
    """How alembic is configured: without the filter, autogenerate would drop Optuna's tables."""
    return {
        "target_metadata": Base.metadata,
        "version_table": VERSION_TABLE,
        "include_name": lambda name, kind, parents: kind != "table" or name.startswith(PREFIX),
        "render_as_batch": True,  # SQLite cannot alter most of a table in place
    }


def _config(connection: Connection | None = None) -> Config:
    config = Config()
    config.set_main_option("script_location", "compress_search.storage:migrations")
    config.attributes["connection"] = connection
    return config


def upgrade(connection: Connection) -> None:
    """Create the tables, or migrate them to this version."""
    command.upgrade(_config(connection), "head")


def revision(connection: Connection) -> str | None:
    """The schema's revision in the database; None where there are no tables of ours."""
    found = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE}).get_current_revision()
    return str(found) if found else None


def revisions() -> list[str]:
    """The revisions this version knows, the newest first."""
    return [script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()]

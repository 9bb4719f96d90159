"""What alembic runs: migrations of our own tables over a connection it is handed, beside Optuna's.

The connection comes in ``config.attributes["connection"]``. Never imported; alembic executes this file.
"""

from __future__ import annotations

from alembic import context

from compress_search.storage.schema import options

connection = context.config.attributes["connection"]
context.configure(connection=connection, **options())
with context.begin_transaction():
    context.run_migrations()

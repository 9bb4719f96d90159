"""The schema's history; run by :mod:`compress_search.storage.schema`, or by hand with ``alembic``."""

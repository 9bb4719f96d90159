"""The schema's history; run by :mod:`compress_search.schema`, or by hand with ``alembic``."""

"""The database of a study, with complaints that name where the study names it. Knows nothing of the tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress_search.errors import StorageError
from compress_search.storage import Store

if TYPE_CHECKING:
    from compress_search.study import Study


def open_store(study: Study, *, patience: float = 0.0) -> Store:
    """The study's database, which has answered, though nothing may be in it yet; nothing is created.

    Raises:
        StudyError: its driver is not installed, or it cannot be reached or read.
    """
    try:
        store = Store(study.storage, patience=patience)
        _ = store.exists
    except StorageError as error:
        raise study.error("storage", str(error)) from error
    return store

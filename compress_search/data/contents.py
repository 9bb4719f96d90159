"""What the data of a study hold, as one hash for each key that names some: so that changed files are noticed.

Knows nothing of where hashes are kept or what a change means.
"""

from __future__ import annotations

from compress_search.data.rows import Raw
from compress_search.recipe import digest
from compress_search.study import Study
from compress_search.tasks import Task


def data_digests(study: Study, raw: Raw, task: Task) -> dict[str, str]:
    """A hash of the rows behind each of the study's data keys, in the order of the file.

    It is of what was read, so that a file in another format, or with a further column, is the same, and data sets
    of the hub are hashed like any. The classes' names count as training data, and so do the rows held out of it
    where the study names no validation data.
    """
    found = {name: [rows.digest] for name, rows in raw.splits().items()}
    found["train"].append(digest(list(task.labels)))
    if not study.data.validation:
        found["train"] += found.pop("validation")
    keys = {"unlabelled": "unlabeled"}
    return {f"data.{keys.get(name, name)}": digest(parts) for name, parts in found.items()}

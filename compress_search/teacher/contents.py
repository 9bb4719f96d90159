"""What the models that a study names hold, as one hash for each key: so that changed files are noticed.

Knows nothing of where hashes are kept or what a change means.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from compress_search.recipe import digest
from compress_search.study import Study
from compress_search.teacher.pretrained import files_digest


def teacher_digests(study: Study) -> dict[str, str]:
    """A hash of the files behind each key of the teacher that names directories or files.

    Keys that name models of the hub are left out: they may not have been fetched, and their names stand for them.
    """
    teacher = study.teacher
    named = {
        "model": [teacher.model],
        "ensemble": teacher.ensemble,
        "masked_lm": [teacher.masked_lm],
        "student_start": [teacher.student_start],
    }
    found = {}
    for key, models in named.items():
        folders = [Path(model) for model in models if model]
        if folders and all(folder.is_dir() for folder in folders):
            found[f"teacher.{key}"] = digest([files_digest(folder) for folder in folders])
    vocabulary = teacher.architecture.vocabulary if teacher.architecture else None
    if isinstance(vocabulary, Path):
        found["teacher.architecture.vocabulary"] = hashlib.sha256(vocabulary.read_bytes()).hexdigest()
    return found

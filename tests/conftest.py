"""Fixtures shared by all tests; the tiny data and models themselves are made in tests/tiny.py."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests import tiny

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

# The same examples at every run, so that only a change can turn one red; HYPOTHESIS_PROFILE=explore draws new ones.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.register_profile("explore", deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tiny_teacher(kind, family)``: a saved untrained teacher, made once a session; not to be written to."""
    made: dict[tuple[str, str], Path] = {}

    def teacher(kind: str = "text-classification", family: str = "bert") -> Path:
        if (kind, family) not in made:
            folder = tmp_path_factory.mktemp(f"teacher-{kind}-{family}")
            made[kind, family] = tiny.tiny_teacher(folder, kind, family)
        return made[kind, family]

    return teacher


@pytest.fixture
def tiny_study(tmp_path: Path) -> Callable[..., Path]:
    """``tiny_study(task=…, search={…})``: the path of a study file that runs, data and teacher beside it."""

    def study(task: str = "text-classification", **sections: Any) -> Path:
        return tiny.tiny_study(tmp_path, task, **sections)

    return study


@pytest.fixture(scope="module")
def migrations_read_once() -> Iterator[None]:
    """The newest of Optuna's migrations is looked up once: to tell which it is, each opening imports them all."""
    from alembic.script import ScriptDirectory

    read, heads = ScriptDirectory.get_current_head, {}

    def head(scripts: ScriptDirectory) -> str | None:
        if scripts.dir not in heads:
            heads[scripts.dir] = read(scripts)
        return heads[scripts.dir]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ScriptDirectory, "get_current_head", head)
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and a real encoder, outside the project; the test is skipped where there is none."""
    default = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("COMPRESS_SEARCH_SHARED", default))
    if not (folder / "data").is_dir():
        pytest.skip(f"REAL DATA MISSING: set COMPRESS_SEARCH_SHARED (looked in {folder})")
    return folder

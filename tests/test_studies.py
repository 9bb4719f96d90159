"""Every study file of the repository says what it asks, loads, and names spaces that exist."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from compress_search.errors import StudyError
from compress_search.plan import make_plan
from compress_search.registry import Registry
from compress_search.study import Study, load_study
from compress_search.tasks import Task
from compress_search.teacher import teacher_subject

FOLDER = Path(__file__).resolve().parents[1] / "studies"
FILES = sorted(FOLDER.glob("*.yaml"))


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """Loads a study; what it needs from outside the repository is made up or, where it is real data, asked for."""
    monkeypatch.setenv("COMPRESS_SEARCH_DATABASE", "postgresql+psycopg://user:secret@localhost/studies")

    def study(path: Path) -> Study:
        if path.stem == "quickstart":
            path = _beside_its_data(path, tmp_path)
        try:
            return load_study(path)
        except StudyError as error:
            if "../shared" in str(error):
                pytest.skip(f"REAL DATA MISSING: {error}")
            raise

    return study


def _beside_its_data(path: Path, folder: Path) -> Path:
    """A copy of the quickstart with rows where its script would have written some."""
    data = folder / "runs" / "quickstart" / "data"
    data.mkdir(parents=True)
    for name in ("train", "validation", "test"):
        rows = ({"text": f"sentence {i}", "label": f"library {i % 8}"} for i in range(16))
        (data / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "studies").mkdir()
    return Path(shutil.copy(path, folder / "studies"))


def test_there_are_studies() -> None:
    assert {path.stem for path in FILES} >= {
        "quickstart",
        "sst2_minilm",
        "wikigold_minilm",
        "bert_base_gpu_cluster",
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_study_opens_with_its_question_its_cost_and_what_to_expect(path: Path) -> None:
    comment = path.read_text(encoding="utf-8").split("\n\n")[0]
    lines = comment.splitlines()
    assert all(line.startswith("#") for line in lines)
    assert [
        word for word in ("# Question:", "# Cost:", "# Expect:") if any(ln.startswith(word) for ln in lines)
    ] == [
        "# Question:",
        "# Cost:",
        "# Expect:",
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_study_loads(path: Path, load: object) -> None:
    study: Study = load(path)  # type: ignore[operator]
    assert study.name
    assert Study.from_dict(study.to_dict()).directions == study.directions


@pytest.mark.parametrize("stem", ["quickstart", "sst2_minilm", "wikigold_minilm"])
def test_a_study_resolves_to_a_space(stem: str, load: object) -> None:
    study: Study = load(FOLDER / f"{stem}.yaml")  # type: ignore[operator]
    labels = ("O", "B-X", "I-X") if study.task == "token-classification" else tuple("abcdefgh")
    subject = teacher_subject(study, Task(study.task, labels, entities="O" in labels))
    plan = make_plan(study, Registry(), subject.having("timed", "kernel:int8"))
    assert plan.dimensions > 3
    assert plan.starting_points()


def test_the_quickstart_asks_for_nothing_from_outside(load: object) -> None:
    study: Study = load(FOLDER / "quickstart.yaml")  # type: ignore[operator]
    assert study.teacher.model is None
    assert study.teacher.architecture is not None
    assert study.cluster.gpus_per_trial == 0
    assert study.search.trials <= 12
    assert all(
        Path(str(source)).is_absolute() for source in (study.data.train, study.data.validation, study.data.test)
    )


def test_the_cluster_study_keeps_its_password_out_of_everything(load: object) -> None:
    study: Study = load(FOLDER / "bert_base_gpu_cluster.yaml")  # type: ignore[operator]
    assert "secret" in study.storage
    assert "secret" not in json.dumps(study.to_dict()) + repr(study)

"""Every study file of the repository says what it asks, loads, and names spaces that exist."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from compress_search.candidate import Subject
from compress_search.driver import device_of
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


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_study_resolves_to_a_space(path: Path, load: object) -> None:
    study: Study = load(path)  # type: ignore[operator]
    plan = make_plan(study, Registry(), teacher_of(study).having(*traits_of(study), device=device_of(study)))
    assert plan.dimensions > 1
    assert plan.starting_points()


def teacher_of(study: Study) -> Subject:
    """What the study's teacher is; a stand-in where it lies on a hub."""
    if study.teacher.model == "bert-base-uncased":
        return Subject("bert", study.task, 12, 12, 64, 768, 3072, 30522, 512, 2, 2)
    labels = ("O", "B-X", "I-X") if study.task == "token-classification" else tuple("abcdefgh")
    return teacher_subject(study, Task(study.task, labels, entities="O" in labels))


def traits_of(study: Study) -> set[str]:
    """What the engine would tell methods on a machine with the usual kernels."""
    told = {"timed": study.timed, "sized": study.sized, "came-trained": not study.teacher.fine_tune}
    kernels = ("bf16",) if study.cluster.gpus_per_trial else ("int8", "weight-only", "bf16")
    return {name for name, holds in told.items() if holds} | {f"kernel:{name}" for name in kernels}


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

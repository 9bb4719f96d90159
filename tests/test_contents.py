"""Files that change under a study that was begun: noticed by what they hold, refused before anything is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from compress_search.cli import main
from compress_search.data.contents import data_digests
from compress_search.data.rows import read
from compress_search.driver import Prepared, prepare
from compress_search.errors import StudyError
from compress_search.search import Search
from compress_search.search.identity import identity, refuse_change
from compress_search.storage import Store
from compress_search.study import load_study
from compress_search.teacher.contents import teacher_digests
from tests import tiny

METHODS = ["quantization"]
WITH_ALL = (
    "data.unlabeled=[data/more.jsonl]",
    "teacher.ensemble=[other]",
    "teacher.masked_lm=teacher",
    "teacher.student_start=teacher",
)


def more(folder: Path) -> None:
    tiny.write_jsonl(folder / "data" / "more.jsonl", [{"text": "good"}])
    shutil.copytree(folder / "teacher", folder / "other")


def begun(prepared: Prepared, **changes: Any) -> Store:
    """The study's database as it is after the first moment of a run."""
    store = Store(prepared.study.storage)
    prepared.study.output.mkdir(parents=True)
    store.create()
    Search.open(prepared.plan, store, contents=prepared.contents())
    if changes:
        store.begin(prepared.study.name, **changes)
    return store


def test_every_file_that_a_study_names_counts(tiny_study: Callable[..., Path], tmp_path: Path) -> None:
    path = tiny_study(methods=METHODS)
    more(tmp_path)

    def contents() -> dict[str, str]:
        study = load_study(path, WITH_ALL)
        return {**teacher_digests(study), **data_digests(study, *read(study))}

    before = contents()
    assert list(before) == [
        *("teacher.model", "teacher.ensemble", "teacher.masked_lm", "teacher.student_start"),
        *("data.train", "data.validation", "data.test", "data.unlabeled"),
    ]
    for split in ("train", "validation", "test", "more"):
        file = tmp_path / "data" / f"{split}.jsonl"
        file.write_text(file.read_text() + file.read_text().splitlines()[-1] + "\n")
        after = contents()
        key = "data.unlabeled" if split == "more" else f"data.{split}"
        assert {name for name in before if before[name] != after[name]} == {key}
        before = after
    config = tmp_path / "other" / "config.json"
    config.write_text(config.read_text() + "\n")
    assert {name for name, value in contents().items() if before[name] != value} == {"teacher.ensemble"}


def test_rows_held_out_and_names_of_classes_are_training_data(
    tiny_study: Callable[..., Path], tmp_path: Path
) -> None:
    path = tiny_study(methods=METHODS, data={"validation": None, "test": None}, teacher=tiny_architecture())
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]) + "\n")
    options = ("teacher.architecture.vocabulary=vocab.txt",)
    train = tmp_path / "data" / "train.jsonl"
    seen = []
    for change in (lambda text: text, rows_renamed, lambda text: text.replace('"text": "', '"text": "x', 1)):
        train.write_text(change(train.read_text()))
        seen.append(prepare(load_study(path, options)).contents())
    assert [list(found) for found in seen] == [["teacher.architecture.vocabulary", "data.train"]] * 3
    assert len({found["data.train"] for found in seen}) == 3


def tiny_architecture() -> dict[str, Any]:
    shape = {"layers": 1, "hidden": 16, "heads": 2, "intermediate": 16, "vocabulary": 100}
    return {"model": None, "architecture": shape, "fine_tune": {}}


def rows_renamed(text: str) -> str:
    """The rows with every class called otherwise, in the same order of the alphabet."""
    rows = [json.loads(line) for line in text.splitlines()]
    return "".join(json.dumps({**row, "label": f"class {row['label']}"}) + "\n" for row in rows)


def snapshot(folder: Path, store: Store) -> list[Any]:
    """The database as it reads, and every other file: whoever looks into SQLite moves its marks."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("study.db")]
    return [store.study("tiny"), store.trials("tiny"), {str(path): path.read_bytes() for path in files}]


@pytest.mark.parametrize(("key", "name"), [("data.test", "data/test.jsonl"), ("teacher.model", "teacher")])
def test_a_changed_file_is_refused_by_name_and_nothing_is_written(
    tiny_study: Callable[..., Path], tmp_path: Path, key: str, name: str
) -> None:
    path = tiny_study(methods=METHODS)
    store = begun(prepare(load_study(path)))
    changed = tmp_path / name
    if changed.is_dir():
        changed /= "config.json"
        changed.write_text(changed.read_text() + "\n")
    else:
        changed.write_text("".join(f"{line}\n" for line in changed.read_text().splitlines()[1:]))
    before = snapshot(tmp_path, store)
    result = CliRunner().invoke(main, ["run", str(path), "--executor", "local"])
    assert result.exit_code == 2
    (line,) = result.output.splitlines()
    assert f"{key}: {tmp_path / name} was changed after this study was begun" in line
    assert "name another output" in line
    assert snapshot(tmp_path, store) == before


def test_a_study_from_before_all_this_goes_on(tiny_study: Callable[..., Path]) -> None:
    """It was stored with the keys of its day: neither later ones nor the contents of files count against it."""
    path = tiny_study(methods=METHODS)
    prepared = prepare(load_study(path))
    old = identity(prepared.plan)
    del old["contents"], old["data"]["unlabeled"], old["teacher"]["average"], old["training"]["precision"]
    old["training"]["teacher_cache_gb"] = 4.0
    store = begun(prepared, identity=old)
    later = prepare(load_study(path, ["training.teacher_cache_gb=1"]))
    Search.open(later.plan, store, contents=later.contents())
    assert store.study(prepared.study.name).identity["contents"] == prepared.contents()


@pytest.mark.parametrize(
    "change",
    [
        "training.precision=bf16",
        "teacher.average=probabilities",
        "training.epochs=2.5",
        "data.unlabeled=data/test.jsonl",
    ],
)
def test_what_decides_results_is_still_refused(tiny_study: Callable[..., Path], change: str) -> None:
    path = tiny_study(methods=METHODS)
    old = identity(prepare(load_study(path)).plan)
    del old["contents"], old["data"]["unlabeled"], old["teacher"]["average"], old["training"]["precision"]
    plan = prepare(load_study(path, [change])).plan
    with pytest.raises(StudyError, match=rf"begun otherwise \({change.partition('=')[0]} was "):
        refuse_change(plan, old, identity(plan))

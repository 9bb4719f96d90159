"""Further tasks beside a study's own: read, checked before any work, and learnt by turns in trials."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from transformers import BertTokenizer

from compress_search import Context, StudyError, driver
from compress_search.cli import main
from compress_search.driver import Prepared, prepare
from compress_search.encoders import keep_pieces
from compress_search.errors import NotFinite
from compress_search.pipeline import Budget, StepContext, run_recipe
from compress_search.recipe import Recipe, Step
from compress_search.space import defaults
from compress_search.study import Study, load_study
from compress_search.teacher import auxiliary, load_teacher
from compress_search.training import forward
from compress_search.workbench import Workbench
from tests import tiny
from tests.workers import HereExecutor

KINDS = ("text-classification", "text-regression", "token-classification")
Maker = Callable[..., Path]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_SEARCH_CACHE", str(tmp_path / "cache"))


def beside(folder: Path, kind: str, **changes: Any) -> dict[str, Any]:
    """A further task, its 48 rows and its teacher below the study's folder, as the study file has it."""
    tiny.write_jsonl(folder / "further" / "train.jsonl", tiny.tiny_rows(kind, 48, seed=7))
    tiny.tiny_teacher(folder / "further" / "teacher", kind)
    section = {
        "task": tiny.task_of(kind),
        "teacher": {"model": "further/teacher"},
        "data": {"train": "further/train.jsonl"},
    }
    return section | changes


def studied(
    make: Maker, tmp_path: Path, own: str = "text-classification", further: str = "pos", **task: Any
) -> Path:
    return make(own, methods=["plain_student", "distill"], auxiliary={"further": beside(tmp_path, further, **task)})


def prepared(path: Path, *changes: str) -> Prepared:
    return prepare(load_study(path, list(changes)))


@pytest.mark.parametrize("own", KINDS)
@pytest.mark.parametrize("further", KINDS)
def test_a_student_of_any_task_learns_any_other_by_turns(
    tiny_study: Maker, tmp_path: Path, own: str, further: str
) -> None:
    found = prepared(studied(tiny_study, tmp_path, own, further))
    bench = Workbench(found.brief)
    steps = [Step.of(name, defaults(found.plan.spaces[name])) for name in ("plain_student", "distill")]
    assert steps[1].params["by_turns"] > 0
    student, _ = run_recipe(Recipe(tuple(steps)), found.plan.methods, bench.materials, seed=0, scratch=tmp_path)
    assert student.subject.task == own
    ours = dict(student.network.named_parameters())
    theirs = dict(bench.materials.teacher.network.named_parameters())
    assert set(ours) <= set(theirs), "what a further task had on top of the student is gone"


def lent(found: Prepared, tmp_path: Path) -> tuple[Workbench, Context]:
    bench = Workbench(found.brief)
    return bench, StepContext(bench.materials, Budget(10, None), 10, 3, tmp_path, dry=False)


@pytest.mark.parametrize("further", [*KINDS, "pairs"])
def test_methods_are_lent_its_rows_and_what_its_teacher_says(
    tiny_study: Maker, tmp_path: Path, further: str
) -> None:
    found = prepared(studied(tiny_study, tmp_path, "pairs", further))
    assert "auxiliary" in found.plan.teacher.traits
    _, context = lent(found, tmp_path)
    (task,) = context.auxiliary()
    assert (task.kind, task.outputs, task.examples) == (
        tiny.task_of(further),
        len(tiny.labels_of(further)) or 1,
        48,
    )
    teacher, _ = load_teacher(tmp_path / "further" / "teacher")
    seen: set[int] = set()
    for _ in range(3):
        batch = next(task.batches)
        logits = forward(teacher, batch)
        real = batch["attention_mask"].bool() if further == "token-classification" else slice(None)
        torch.testing.assert_close(task.teacher_logits(batch)[real], logits[real])
        assert task.loss(logits, batch["labels"]).ndim == 0
        seen |= set(batch["index"].tolist())
    assert seen == set(range(48)), "an epoch has every row"


def test_a_teacher_is_trained_on_its_own_task_once(tiny_study: Maker, tmp_path: Path) -> None:
    trained = {"model": "further/teacher", "fine_tune": {"epochs": 20, "batch_size": 16, "learning_rate": 3e-3}}
    found = prepared(studied(tiny_study, tmp_path, teacher=trained))
    bench, context = lent(found, tmp_path)
    (task,) = context.auxiliary()
    batch = next(task.batches)
    right = batch["labels"] != -100
    assert (task.teacher_logits(batch).argmax(-1) == batch["labels"])[right].float().mean() > 0.9
    made = {path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")}
    assert Workbench(found.brief).materials.auxiliary[0].digest == bench.materials.auxiliary[0].digest
    assert made == {path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")}


def test_a_training_that_diverges_names_its_task(
    tiny_study: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = prepared(studied(tiny_study, tmp_path))

    def diverge(*_: object, **__: object) -> Path:
        raise NotFinite("loss is nan at step 3")

    monkeypatch.setattr(auxiliary, "prepare_teacher", diverge)
    with pytest.raises(StudyError, match="loss is nan at step 3") as caught:
        _ = Workbench(found.brief).materials
    assert caught.value.key == "auxiliary.further.teacher.fine_tune"


def test_the_estimate_counts_its_teachers_training(tiny_study: Maker, tmp_path: Path) -> None:
    trained = {"model": "further/teacher", "fine_tune": {"epochs": 4, "batch_size": 16}}
    found = prepared(studied(tiny_study, tmp_path, teacher=trained)).estimate()
    assert found.teacher_minutes * 60 == pytest.approx(4 * 3 * found.step_seconds), "three batches of 48 rows"
    assert prepared(studied(tiny_study, tmp_path)).estimate().teacher_minutes == 0


def test_its_rows_are_read_by_a_students_own_tokenizer(tiny_study: Maker, tmp_path: Path) -> None:
    bench, context = lent(prepared(studied(tiny_study, tmp_path)), tmp_path)
    stream = context.auxiliary()[0].batches
    whole = [next(stream) for _ in range(6)]
    tokenizer = bench.materials.teacher.tokenizer
    letters = len([piece for piece in tiny.tiny_vocabulary() if len(piece.removeprefix("##")) == 1 or "[" in piece])
    fewer = bench.materials.read_by(keep_pieces(tokenizer, range(letters)))
    (task,) = StepContext(fewer, Budget(10, None), 10, 3, tmp_path, dry=False).auxiliary()
    batches = [next(task.batches) for _ in range(6)]
    assert largest_piece(whole) >= letters > largest_piece(batches)
    # what was said of a word's first piece is said of its first letter
    before = {int(row): next(iter(said)) for row, said in said_by_row(context.auxiliary()[0])}
    after = {int(row): next(iter(said)) for row, said in said_by_row(task)}
    assert before.keys() == after.keys()
    for row, said in before.items():
        torch.testing.assert_close(after[row], said)


def largest_piece(batches: list[dict[str, torch.Tensor]]) -> int:
    return max(int(batch["input_ids"].max()) for batch in batches)


def said_by_row(task: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Row numbers with the teacher's logits where there is a label, over an epoch."""
    found = []
    for _ in range(3):
        batch = next(task.batches)
        logits = task.teacher_logits(batch)
        labelled = batch["labels"] != -100
        found += [(row, logits[i][labelled[i]]) for i, row in enumerate(batch["index"])]
    return found


def test_no_more_of_a_text_is_read_than_the_study_reads(tiny_study: Maker, tmp_path: Path) -> None:
    rows = [{**row, "text": " ".join(["film"] * 60)} for row in tiny.tiny_rows(size=8)]
    path = studied(tiny_study, tmp_path, further="text-classification")
    tiny.write_jsonl(tmp_path / "further" / "train.jsonl", rows)
    assert set(Workbench(prepared(path).brief).materials.auxiliary[0].train.lengths) == {32}
    shorter = prepared(path, "auxiliary.further.data.max_length=16")
    assert set(Workbench(shorter.brief).materials.auxiliary[0].train.lengths) == {16}


def test_rows_and_teacher_are_part_of_what_artefacts_are_made_of(tiny_study: Maker, tmp_path: Path) -> None:
    path, recipe = studied(tiny_study, tmp_path), Recipe((Step.of("distill", {}),))

    def artifact() -> Path:
        return Workbench(prepared(path).brief).artifact(recipe, 0)

    first = artifact()
    tiny.write_jsonl(tmp_path / "further" / "train.jsonl", tiny.tiny_rows("pos", 48, seed=8))
    second = artifact()
    tiny.tiny_teacher(tmp_path / "further" / "teacher", "pos", layers=1)
    assert len({first, second, artifact()}) == 3


def test_the_order_of_its_batches_is_the_trials_the_phases_and_its_own(tiny_study: Maker, tmp_path: Path) -> None:
    sections = {name: beside(tmp_path, "pos") for name in ("one", "two")}
    found = prepared(tiny_study(methods=["plain_student", "distill"], auxiliary=sections))
    materials = Workbench(found.brief).materials

    def orders(seed: int, done: int) -> list[tuple[int, ...]]:
        context = StepContext(materials, Budget(10, None, done), 10, seed, tmp_path, dry=False)
        return [tuple(next(task.batches)["index"].tolist()) for task in context.auxiliary()]

    assert orders(3, 0) == orders(3, 0)
    assert len({*orders(3, 0), *orders(4, 0), *orders(3, 1)}) == 6


def test_the_order_of_the_tasks_does_not_count(tiny_study: Maker, tmp_path: Path) -> None:
    pos = beside(tmp_path, "pos")
    sections = {"tags": pos, "numbers": {**pos, "task": "text-regression"}}
    tiny.write_jsonl(tmp_path / "numbers.jsonl", tiny.tiny_rows("text-regression", 16))
    tiny.tiny_teacher(tmp_path / "numbers", "text-regression")
    sections["numbers"] |= {"teacher": {"model": "numbers"}, "data": {"train": "numbers.jsonl"}}

    def kinds(names: list[str]) -> list[str]:
        path = tiny_study(methods=["plain_student", "distill"], auxiliary={name: sections[name] for name in names})
        return [further.task.name for further in Workbench(prepared(path).brief).materials.auxiliary]

    assert kinds(["tags", "numbers"]) == kinds(["numbers", "tags"]) == ["text-regression", "token-classification"]


def test_no_segments_are_folded_that_a_further_task_tells_apart(tiny_study: Maker, tmp_path: Path) -> None:
    found = prepared(studied(tiny_study, tmp_path, further="pairs"))
    assert "pairs" in found.plan.teacher.traits
    assert "pairs" not in prepared(studied(tiny_study, tmp_path)).plan.teacher.traits


def test_a_study_with_one_runs_and_refuses_to_go_on_with_other_rows(
    tiny_study: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "LocalExecutor", HereExecutor)
    path = studied(tiny_study, tmp_path)
    ran = CliRunner().invoke(main, ["run", str(path), "--executor", "local"])
    assert ran.exit_code == 0, ran.output
    report = json.loads(CliRunner().invoke(main, ["report", str(path), "--format", "json"]).output)
    recipes = [trial["recipe"] for trial in report["trials"] if trial["state"] == "complete"]
    assert any(step["params"].get("by_turns") for recipe in recipes for step in recipe)
    rows = tiny.write_jsonl(tmp_path / "further" / "train.jsonl", tiny.tiny_rows("pos", 47, seed=7))
    again = CliRunner().invoke(main, ["run", str(path), "--executor", "local"])
    assert again.exit_code == 2
    (line,) = again.output.splitlines()
    assert f"auxiliary.further.data.train: {rows} was changed after this study was begun" in line


def test_without_one_nothing_is_new(tiny_study: Maker, tmp_path: Path) -> None:
    path = tiny_study(methods=["plain_student", "distill"])
    found = prepared(path)
    assert "auxiliary" not in found.plan.teacher.traits
    assert "by_turns" not in found.plan.spaces["distill"]
    assert "auxiliary" not in found.study.identity(defaults=False)
    assert lent(found, tmp_path)[1].auxiliary() == []
    with pytest.raises(StudyError, match=r"methods\.distill\.by_turns: .*further tasks: name some under auxiliary"):
        prepared(tiny_study(methods={"plain_student": {}, "distill": {"by_turns": 0.5}}))


def test_it_travels_with_the_study(tiny_study: Maker, tmp_path: Path) -> None:
    study = load_study(studied(tiny_study, tmp_path))
    assert Study.from_dict(study.to_dict()).auxiliary == study.auxiliary
    assert study.auxiliary["further"].data.train == str(tmp_path / "further" / "train.jsonl")


# what is refused before any work


def line_of(path: Path, text: str) -> int:
    return next(n for n, line in enumerate(path.read_text().splitlines(), 1) if line.strip().startswith(text))


def refused(path: Path, *changes: str) -> str:
    with pytest.raises(StudyError) as caught:
        prepared(path, *changes)
    assert not (path.parent / "run").exists()
    assert not (path.parent / "cache").exists()
    (line,) = str(caught.value).splitlines()
    return line


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"task": "tagging"}, "task: expected one of text-classification, text-regression, token-classification"),
        ({"labels": 3}, "labels: unknown key; expected one of task, teacher, data"),
        ({"teacher": {}}, "teacher: expected either model or architecture, got neither"),
        ({"teacher": {"model": "further/none"}}, "teacher.model: no such directory"),
        ({"teacher": {"model": "further/teacher", "average": "probabilities"}}, "teacher.average: nothing reads"),
        ({"teacher": {"model": "further/teacher", "fine_tune": {"crf": True}}}, "fine_tune.crf: expected false"),
        ({"data": {"train": "further/train.jsonl", "test": "data/test.jsonl"}}, "data.test: nothing reads this"),
        ({"data": {"train": "further/none.jsonl"}}, "data.train: no such file"),
        ({"data": {"train": "further/train.jsonl", "tags": "kinds"}}, "data.train: .*no column 'kinds'"),
        ({"data": {"train": "further/train.jsonl", "max_length": 2}}, "data.max_length: expected at least 4"),
        ({"data": {}}, "data.train: missing; expected training data"),
        ({"task": "text-classification"}, "data.train: .*no column 'text'"),
    ],
)
def test_what_is_wrong_with_one_is_one_line_with_its_place(
    tiny_study: Maker, tmp_path: Path, task: dict[str, Any], message: str
) -> None:
    path = studied(tiny_study, tmp_path, **task)
    text = refused(path)
    place, _, said = text.partition(": auxiliary.further.")
    file, _, line = place.rpartition(":")
    assert Path(file) == path, text
    assert int(line) > line_of(path, "auxiliary"), "it stands last in the file"
    assert re.search(message, said), text


@pytest.mark.parametrize("name", ["task", "teacher", "data"])
def test_a_task_may_be_called_as_its_keys_are(tiny_study: Maker, tmp_path: Path, name: str) -> None:
    section = beside(tmp_path, "pos")
    assert prepared(tiny_study(methods=["plain_student", "distill"], auxiliary={name: section})).auxiliary[name]
    wrong = tiny_study(auxiliary={name: {**section, "data": {"trian": "further/train.jsonl"}}})
    assert f'auxiliary.{name}.data.trian: unknown key (did you mean "train"?)' in refused(wrong)


def test_a_forgotten_name_is_told_by_what_was_expected(tiny_study: Maker, tmp_path: Path) -> None:
    text = refused(tiny_study(auxiliary=beside(tmp_path, "pos")))
    assert "auxiliary.task: expected a mapping with the keys task, teacher, data" in text


@pytest.mark.parametrize("name", ["a.b", "a b", "", "a\nb"])
def test_a_name_is_one_word(tiny_study: Maker, tmp_path: Path, name: str) -> None:
    text = refused(tiny_study(auxiliary={name: beside(tmp_path, "pos")}))
    assert "auxiliary: expected names of letters, digits, _ and -, got " in text


def test_of_roberta_words_and_texts_do_not_go_together(tiny_study: Maker, tmp_path: Path) -> None:
    def path(own: str, further: str) -> Path:
        section = beside(tmp_path, further)
        tiny.tiny_teacher(tmp_path / "further" / "teacher", further, "roberta")
        return tiny_study(
            own, family="roberta", methods=["plain_student", "distill"], auxiliary={"further": section}
        )

    for own, further in (("text-classification", "pos"), ("pos", "text-classification")):
        assert "auxiliary.further.task: expected one like " in refused(path(own, further))
    for kind in ("text-classification", "pos"):
        assert prepared(path(kind, kind)).auxiliary


def test_pairs_are_refused_where_the_study_cannot_tell_segments_apart(tiny_study: Maker, tmp_path: Path) -> None:
    section = beside(tmp_path, "pairs")
    path = tiny_study(family="distilbert", auxiliary={"further": section})
    assert "auxiliary.further.data.train: these are pairs of texts" in refused(path)


def test_a_teacher_with_a_crf_is_refused(tiny_study: Maker, tmp_path: Path) -> None:
    path = studied(tiny_study, tmp_path)
    config = tmp_path / "further" / "teacher" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "crf": True}))
    assert "auxiliary.further.teacher.model: it has a CRF" in refused(path)


def test_a_list_of_tasks_is_refused_by_what_was_expected(tiny_study: Maker) -> None:
    assert "auxiliary: expected a mapping" in refused(tiny_study(auxiliary=[]), "auxiliary=[{task: pos}]")
    assert "auxiliary.further: expected a mapping with the keys task, teacher, data" in refused(
        tiny_study(), "auxiliary.further=3"
    )


def test_a_teacher_of_other_labels_is_refused(tiny_study: Maker, tmp_path: Path) -> None:
    path = studied(tiny_study, tmp_path)
    tiny.tiny_teacher(tmp_path / "further" / "teacher", "token-classification")
    assert "auxiliary.further.teacher.model: " in refused(path)


def test_a_teacher_of_another_vocabulary_is_refused(tiny_study: Maker, tmp_path: Path) -> None:
    path = studied(tiny_study, tmp_path)
    tokenizer = tiny.tiny_tokenizer()
    keep_pieces(tokenizer, range(len(tokenizer) - 1)).save_pretrained(tmp_path / "further" / "teacher")
    text = refused(path)
    assert "auxiliary.further.teacher.model: " in text
    assert "its vocabulary is not that of the study's teacher" in text


def test_of_a_teacher_from_scratch_the_vocabulary_is_compared_once_it_is_there(
    tiny_study: Maker, tmp_path: Path
) -> None:
    path, size = studied(tiny_study, tmp_path), 100
    pieces = [*tiny.tiny_vocabulary(), *(f"more{n}" for n in range(size))][:size]
    tiny.tiny_teacher(tmp_path / "further" / "teacher", "pos", vocab_size=size)
    tokenizer = BertTokenizer(vocab={piece: number for number, piece in enumerate(pieces)})
    tokenizer.save_pretrained(tmp_path / "further" / "teacher")
    content = yaml.safe_load(path.read_text())
    shape = {"layers": 1, "hidden": 16, "heads": 2, "intermediate": 16, "vocabulary": size}
    content["teacher"] = {"architecture": shape, "fine_tune": {"epochs": 1}}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    shutil.rmtree(tmp_path / "teacher")
    with pytest.raises(StudyError, match="its vocabulary is not that of the study's teacher") as caught:
        _ = Workbench(prepared(path).brief).materials
    assert caught.value.key == "auxiliary.further.teacher.model"
    assert not list((tmp_path / "cache").rglob("logits.npy"))
    shutil.rmtree(tmp_path / "cache")
    text = refused(path, "teacher.architecture.vocabulary=101")
    assert f"auxiliary.further.teacher.model: its vocabulary has {size} pieces: expected that of" in text

"""The first files a person starts from: they run as they are, and say what they could not guess."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from compress_search import hub
from compress_search.errors import PluginError, StudyError
from compress_search.registry import PluginFile, Registry
from compress_search.scaffold import guess, method_test_text, method_text, study_text
from compress_search.study import METRICS, Study, load_study
from compress_search.study import reference as study_reference
from tests import tiny


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a model's configuration and three rows of data in it."""
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model")
    tiny.write_jsonl(tmp_path / "train.jsonl", tiny.tiny_rows(size=3))
    return tmp_path


def write_model(path: Path, **config: Any) -> None:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"], **config}))


def write_study(**arguments: Any) -> Study:
    path = Path(arguments.setdefault("path", Path("study.yaml")))
    path.parent.mkdir(exist_ok=True)
    path.write_text(study_text(**{"model": "model", "train": "train.jsonl", **arguments}), encoding="utf-8")
    return load_study(path)


@pytest.mark.parametrize("kind", tiny.ROWS)
def test_the_study_runs_as_it_is(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_teacher: Callable[..., Path]
) -> None:
    from compress_search.data.rows import read
    from compress_search.teacher import teacher_subject

    monkeypatch.chdir(tmp_path)
    tiny.tiny_data(tmp_path / "data", kind, train=24, validation=8)
    data = {"train": "data/train.jsonl", "validation": "data/validation.jsonl", "test": "data/test.jsonl"}
    study = write_study(model=str(tiny_teacher(kind)), **data)
    assert study.task == tiny.task_of(kind)
    assert study.teacher.fine_tune is None
    raw, task = read(study)
    assert len(raw.train) == 24
    assert raw.test is not None
    assert teacher_subject(study, task).labels == max(1, len(tiny.labels_of(kind)))


def test_every_key_is_there_and_what_is_written_out_is_the_default(folder: Path) -> None:
    text = study_text(model="model", train="train.jsonl")
    optional = {"text", "text_pair", "label", "tokens", "tags", "architecture"}
    for section in study_reference.sections(Study.model_json_schema(), Study.model_json_schema()["$defs"]):
        for row in section.rows:
            if row.key not in optional and section.key != "teacher.architecture":
                assert f"{row.key}:" in text, f"{section.key}.{row.key}"
    (folder / "study.yaml").write_text(text)
    (folder / "short.yaml").write_text(
        "name: study\ntask: text-classification\nteacher: {model: model, fine_tune: {}}\n"
        "data: {train: train.jsonl}\nmethods: all\n"
    )
    assert load_study(folder / "study.yaml").to_dict() == load_study(folder / "short.yaml").to_dict()


def test_comments_stand_in_one_column_and_lines_are_short(folder: Path) -> None:
    lines = study_text(model="model", train="train.jsonl").splitlines()
    assert max(map(len, lines)) <= 116
    columns = {line.rindex(" # ") for line in lines if " # " in line.lstrip(" #")}
    assert columns == {42}


HEADS = {
    "ForSequenceClassification": ("text-classification", "text-regression"),
    "ForTokenClassification": ("token-classification",),
}


@pytest.mark.parametrize("head", [*HEADS, "Model", "ForMaskedLM"])
@pytest.mark.parametrize("task", METRICS)
def test_a_model_without_the_tasks_head_is_fine_tuned_first(folder: Path, head: str, task: str) -> None:
    write_model(folder / "model", architectures=[f"Bert{head}"])
    row = {"tokens": ["a"], "tags": ["O"], "text": "a", "label": 1}
    tiny.write_jsonl(folder / "train.jsonl", [row])
    study = write_study(task=task)
    assert study.task == task
    assert (study.teacher.fine_tune is None) == (task in HEADS.get(head, ()))


@pytest.mark.parametrize(("head", "trained"), [("ForSequenceClassification", True), ("ForMaskedLM", False)])
def test_a_model_of_the_hub_is_known_by_its_configuration(
    folder: Path, monkeypatch: pytest.MonkeyPatch, head: str, trained: bool
) -> None:
    asked = []

    def fetch(model: str, name: str, *, local_files_only: bool) -> str:
        asked.append((model, name, local_files_only))
        return str(folder / "fetched" / name)

    write_model(folder / "fetched", architectures=[f"Bert{head}"], max_position_embeddings=64)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    monkeypatch.setattr(hub, "reachable", lambda: True)
    study = write_study(model="owner/model")
    assert asked == [("owner/model", "config.json", False)]
    assert study.teacher.model == "owner/model"
    assert study.data.max_length == 64
    assert (study.teacher.fine_tune is None) == trained


@pytest.mark.parametrize(
    ("reachable", "error", "reason"),
    [
        (
            False,
            LocalEntryNotFoundError("set local_files_only"),
            "there is no connection, and it was not fetched before",
        ),
        (True, LocalEntryNotFoundError("no answer\nor so"), "no answer"),
        (True, EntryNotFoundError("no config.json there"), "no config.json there"),
        (True, OSError(), "OSError"),
    ],
)
def test_a_model_of_the_hub_that_cannot_be_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, reachable: bool, error: Exception, reason: str
) -> None:
    def fetch(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    monkeypatch.setattr(hub, "reachable", lambda: reachable)
    with pytest.raises(StudyError) as caught:
        study_text(model="nowhere/x", train="train.jsonl")
    said = "nowhere/x is no directory here; cannot fetch its config.json from the hub"
    assert str(caught.value) == f"--model: {said}: {reason}"


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({}, 128),
        ({"max_position_embeddings": 512}, 128),
        ({"max_position_embeddings": 64}, 64),
        ({"model_type": "roberta", "max_position_embeddings": 66, "pad_token_id": 1}, 64),
    ],
)
def test_examples_are_no_longer_than_the_model_reads(folder: Path, config: Mapping[str, Any], length: int) -> None:
    write_model(folder / "model", **config)
    assert write_study().data.max_length == length


def test_paths_are_relative_to_the_study(folder: Path) -> None:
    study = write_study(path=folder / "studies/mine.yaml", test="train.jsonl")
    assert yaml.safe_load((folder / "studies/mine.yaml").read_text())["data"]["train"] == "../train.jsonl"
    assert (study.data.train, study.data.test) == (str(folder / "train.jsonl"),) * 2
    assert study.teacher.model == str(folder / "model")


def test_absolute_paths_stay_absolute(folder: Path) -> None:
    text = study_text(model=str(folder / "model"), train=str(folder / "train.jsonl"), path=Path("a/study.yaml"))
    assert yaml.safe_load(text)["teacher"]["model"] == str(folder / "model")


@pytest.mark.parametrize("name", ["with space", "a: b", "x #y", "007", "it's", "größe", "-dash"])
def test_names_that_yaml_would_misread_are_quoted(folder: Path, name: str) -> None:
    (folder / "train.jsonl").rename(folder / f"{name}.jsonl")
    (folder / "model").rename(folder / name)
    study = write_study(model=name, train=f"{name}.jsonl")
    assert study.teacher.model == str(folder / name)
    assert study.data.train == str(folder / f"{name}.jsonl")


# ---- guessing ----------------------------------------------------------------------------------------------

GUESSES: Mapping[str, tuple[Mapping[str, Any], str, Mapping[str, str]]] = {
    "classes": ({"text": "a", "label": 1}, "text-classification", {}),
    "named classes": ({"text": "a", "label": "x.y"}, "text-classification", {}),
    "pairs": ({"text": "a", "text_pair": "b", "label": 1}, "text-classification", {}),
    "GLUE pairs": (
        {"idx": 0, "premise": "a", "hypothesis": "b", "label": 1},
        "text-classification",
        {"text": "premise", "text_pair": "hypothesis"},
    ),
    "fractions": ({"text": "a", "score": 0.5}, "text-regression", {"label": "score"}),
    "whole float": ({"text": "a", "label": 5.0}, "text-regression", {}),
    "fractions as text": ({"text": "a", "label": "3.8"}, "text-regression", {}),
    "classes as text": ({"sentence": "a", "label": "3"}, "text-classification", {"text": "sentence"}),
    "no label": ({"text": "a", "label": None}, "text-classification", {}),
    "tags": ({"tokens": ["a"], "tags": ["O"]}, "token-classification", {}),
    "other tags": ({"tokens": ["a"], "ner_tags": [0]}, "token-classification", {"tags": "ner_tags"}),
    "tags beside a text": ({"text": "a", "words": ["a"], "tags": [0]}, "token-classification", {"tokens": "words"}),
}


@pytest.mark.parametrize(("row", "task", "columns"), GUESSES.values(), ids=GUESSES.keys())
def test_guess(row: Mapping[str, Any], task: str, columns: Mapping[str, str]) -> None:
    clues = guess([row, row])
    assert (clues.task, clues.columns) == (task, columns)


def test_one_fraction_among_whole_numbers_makes_a_regression() -> None:
    rows = [{"text": "a", "label": label} for label in (1, 2, 2.5)]
    assert guess(rows).task == "text-regression"
    assert guess(rows[:2]).task == "text-classification"
    assert guess(rows, "text-classification").task == "text-classification"


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet"])
def test_other_formats_are_looked_into(folder: Path, suffix: str) -> None:
    path = folder / f"train.{suffix}"
    if suffix == "parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"sentence": ["a", "b"], "score": [1.0, 2.5]}), path)
    else:
        mark = "," if suffix == "csv" else "\t"
        path.write_text(f"sentence{mark}score\na{mark}1.0\nb{mark}2.5\n")
    study = write_study(train=path.name)
    assert (study.task, study.data.text, study.data.label) == ("text-regression", "sentence", "score")


def out_of_reach(*_: object, **__: object) -> Any:
    raise ConnectionError("no answer")


WRONG: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "missing model": ({"model": "./none"}, "--model: no such directory: ./none (looked for {folder}/none)"),
    "directory without a model": ({"model": "."}, "--model: expected a directory with a config.json, got ."),
    "missing data": ({"train": "no.jsonl"}, "--train: no such file: no.jsonl (looked for {folder}/no.jsonl)"),
    "missing test data": ({"test": "no.csv"}, "--test: no such file: no.csv (looked for {folder}/no.csv)"),
    "malformed data": ({"train": "bad.jsonl"}, "--train: bad.jsonl:1: not JSON: Expecting value at column 1"),
    "header only": ({"train": "header.csv"}, "--train: there are no rows"),
    "unknown columns": (
        {"train": "odd.jsonl"},
        "--train: no column for data.text: expected one of text, sentence, sentence1, premise, question1, "
        "question, review, content, query, got a, b",
    ),
    "no tags": (
        {"task": "token-classification"},
        "--train: no column for data.tokens: expected one of tokens, words, got text, label",
    ),
    "unknown task": (
        {"task": "text-clasification"},
        '--task: unknown task text-clasification (did you mean "text-classification"?)',
    ),
    "data of the hub": (
        {"train": "owner/data"},
        "--task: needed, as the training data are out of reach: cannot load owner/data from the hub: no answer",
    ),
    "classes for numbers": (
        {"task": "text-regression"},
        "--train: train.jsonl:1: expected a number as label, got 'positive'",
    ),
    "numbers for classes": (
        {"train": "numbers.jsonl", "task": "text-classification"},
        "--train: numbers.jsonl:2: expected a class, got the number 0.5; task: text-regression predicts numbers",
    ),
    "no label": ({"train": "unlabelled.csv"}, "--train: unlabelled.csv:3: expected a class, got ''"),
    "lists of Python": (
        {"train": "lists.csv"},
        "--train: lists.csv:2: column 'tags': expected words with spaces between them or a JSON list such as "
        "[\"a\", \"b\"], got ['O', 'O']",
    ),
    "broken configuration": (
        {"model": "broken"},
        "--model: config.json cannot be read: Expecting value: line 1 column 1 (char 0)",
    ),
}


@pytest.mark.parametrize(("arguments", "expected"), WRONG.values(), ids=WRONG.keys())
def test_what_cannot_be_used_is_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: Mapping[str, Any], expected: str
) -> None:
    monkeypatch.setattr("datasets.load_dataset", out_of_reach)
    (folder / "numbers.jsonl").write_text('{"text": "a", "label": 1}\n{"text": "b", "label": 0.5}\n')
    (folder / "unlabelled.csv").write_text("text,label\na,x\nb,\n")
    (folder / "lists.csv").write_text("tokens,tags\na b,\"['O', 'O']\"\n")
    (folder / "bad.jsonl").write_text("text\n")
    (folder / "header.csv").write_text("text,label\n")
    (folder / "odd.jsonl").write_text('{"a": 1, "b": 2}\n')
    (folder / "broken").mkdir()
    (folder / "broken/config.json").write_text("x")
    with pytest.raises(StudyError) as caught:
        study_text(**{"model": "model", "train": "train.jsonl", **arguments})
    assert str(caught.value) == expected.replace("{folder}", str(folder))


def test_data_of_the_hub_with_a_task_when_out_of_reach(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", out_of_reach)
    study = write_study(train="glue:sst2", task="text-classification")
    assert study.data.train == "glue:sst2"


def test_data_that_the_hub_has_not(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", out_of_reach)
    monkeypatch.setattr(hub, "reachable", lambda: True)
    with pytest.raises(StudyError, match=r"^--train: cannot load owner/data from the hub: no answer$"):
        study_text(model="model", train="owner/data", task="text-classification")


CLASSES = datasets.ClassLabel(names=["negative", "positive"])
HELD: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any], str, Mapping[str, str]]] = {
    "glue:sst2": (
        {"sentence": ["a", "b"], "label": [0, 1], "idx": [0, 1]},
        {"label": CLASSES},
        "text-classification",
        {"text": "sentence"},
    ),
    "conll2003": (
        {"id": ["0"], "tokens": [["a"]], "pos_tags": [[0]], "ner_tags": [[1]]},
        {"ner_tags": datasets.Sequence(CLASSES)},
        "token-classification",
        {"tags": "ner_tags"},
    ),
    "glue:stsb": (
        {"sentence1": ["a"], "sentence2": ["b"], "label": [3.0]},
        {},
        "text-regression",
        {"text": "sentence1", "text_pair": "sentence2"},
    ),
}


@pytest.mark.parametrize("source", HELD)
@pytest.mark.parametrize("streaming", [True, False])
def test_data_of_the_hub_are_looked_into(
    folder: Path, monkeypatch: pytest.MonkeyPatch, source: str, streaming: bool
) -> None:
    columns, features, task, named = HELD[source]
    rows = datasets.Dataset.from_dict(dict(columns))
    for column, feature in features.items():
        rows = rows.cast_column(column, feature)
    asked = []

    def load_dataset(*_: object, streaming: bool, **__: object) -> Any:
        asked.append(streaming)
        return rows.to_iterable_dataset() if streaming else rows

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr(hub, "reachable", lambda: streaming)
    study = write_study(train=source)
    assert asked == [streaming]
    assert (study.task, study.data.train) == (task, source)
    assert {name: getattr(study.data, name) for name in named} == named


def test_classes_of_the_hub_are_no_numbers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = datasets.Dataset.from_dict({"text": ["a"], "label": [1]}).cast_column("label", CLASSES)
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: rows)
    with pytest.raises(StudyError) as caught:
        study_text(model="model", train="owner/data", task="text-regression")
    assert str(caught.value) == "--train: owner/data row 1: expected a number as label, got 'positive'"


# ---- a method of one's own ---------------------------------------------------------------------------------


def test_the_method_is_short_and_works() -> None:
    from compress_search.testing import tiny_candidate, tiny_context

    text = method_text("my_method")
    code = text.split('"""', 2)[2]
    assert len([line for line in code.splitlines() if line.strip()]) < 40
    method = Registry((PluginFile("my_method", text),))["my_method"]
    assert type(method).__name__ == "MyMethod"
    candidate = tiny_candidate(layers=1)
    context = tiny_context(candidate, steps=2)
    pruned = method.apply(candidate, {"sparsity": 0.5}, context)
    context.fit(pruned.network)
    weight = pruned.network.bert.encoder.layer[0].intermediate.dense.weight
    assert (weight == 0).float().mean().item() == pytest.approx(0.5, abs=1e-3)
    assert not (candidate.network.bert.encoder.layer[0].intermediate.dense.weight == 0).any()


@pytest.mark.slow
def test_the_methods_tests_pass(tmp_path: Path) -> None:
    (tmp_path / "my_method.py").write_text(method_text("my_method"))
    (tmp_path / "test_my_method.py").write_text(method_test_text("my_method"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
    assert "failed" not in done.stdout


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my-method", "method 'my-method': expected a name that Python can import, such as my_method"),
        ("class", "method 'class': expected a name that Python can import, such as my_method"),
        ("../x", "method '../x': expected a name that Python can import, such as my_method"),
        ("distill", "method 'distill': a method of this name is installed"),
        ("json", "method 'json': Python has a module of this name, which the file would hide"),
    ],
)
@pytest.mark.parametrize("write", [method_text, method_test_text])
def test_names_that_a_method_cannot_have(write: Callable[[str], str], name: str, message: str) -> None:
    with pytest.raises(PluginError) as caught:
        write(name)
    assert str(caught.value) == message


# ---- the reference -----------------------------------------------------------------------------------------


def test_the_reference_is_what_the_schema_says() -> None:
    page = Path(__file__).parents[1] / "docs/study-reference.md"
    command = "python -m compress_search.study.reference > docs/study-reference.md"
    assert page.read_text(encoding="utf-8") == study_reference.reference(), f"out of date: run {command}"


def test_the_reference_explains_every_key_and_metric() -> None:
    page = study_reference.reference()
    schema = Study.model_json_schema()
    for definition in (schema, *schema["$defs"].values()):
        for name, part in definition["properties"].items():
            assert part["description"], name
            assert f"| `{name}` |" in page
    for names in METRICS.values():
        assert all(f"| `{name}` |" in page for name in names)

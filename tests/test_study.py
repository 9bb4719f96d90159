"""What a study file may say, and the one line its author reads when it says something else."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_search.errors import StudyError
from compress_search.study import METRICS, Study, direction, hide_passwords, load_study, objectives_for
from compress_search.study.document import override, parse
from compress_search.study.goals import Constraint

MINIMAL = """\
task: text-classification
teacher:
  model: owner/model
data:
  train: train.jsonl
methods: [distill]
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Writes study.yaml beside a data file, in the working directory so that errors name just the file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text('{"text": "a", "label": 0}\n')

    def study(text: str) -> Path:
        Path("study.yaml").write_text(text, encoding="utf-8")
        return Path("study.yaml")

    return study


def complaint(path: Path, *overrides: str) -> str:
    """The error of loading the study, after checking that the attempt left nothing behind."""
    before = sorted(Path.cwd().rglob("*"))
    with pytest.raises(StudyError) as caught:
        load_study(path, overrides)
    assert sorted(Path.cwd().rglob("*")) == before, "something was created"
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- what is wrong is said in one line -----------------------------------------------------------------------

WRONG = {
    "unknown key": ("search: {trails: 8}", 'study.yaml:7: search.trails: unknown key (did you mean "trials"?)'),
    "unknown section": ("serach:\n  trials: 8", 'study.yaml:7: serach: unknown key (did you mean "search"?)'),
    "unknown key like no other": (
        "measure:\n  qqq: 8",
        "study.yaml:8: measure.qqq: unknown key; expected one of batch_size, threads, repeats",
    ),
    "key used twice": ("name: a\nname: b", "study.yaml:8: name: duplicate key (first on line 7)"),
    "nested key used twice": (
        "search:\n  seed: 1\n  seed: 2",
        "study.yaml:9: search.seed: duplicate key (first on line 8)",
    ),
    "text for an integer": (
        "search:\n  trials: many",
        'study.yaml:8: search.trials: expected an integer, got "many"',
    ),
    "quoted number": ("search: {trials: '8'}", 'study.yaml:7: search.trials: expected an integer, got "8"'),
    "float for an integer": ("search: {trials: 8.5}", "study.yaml:7: search.trials: expected an integer, got 8.5"),
    "boolean for an integer": (
        "search: {trials: true}",
        "study.yaml:7: search.trials: expected an integer, got true",
    ),
    "null for an integer": ("search: {trials: }", "study.yaml:7: search.trials: expected an integer, got null"),
    "text for a number": ("training: {epochs: x}", 'study.yaml:7: training.epochs: expected a number, got "x"'),
    "infinite number": (
        "training: {epochs: .inf}",
        "study.yaml:7: training.epochs: expected a finite number, got Infinity",
    ),
    "number for a text": ("name: 37", "study.yaml:7: name: expected text, got 37"),
    "list for a section": (
        "measure: [1, 2]",
        "study.yaml:7: measure: expected a mapping with the keys batch_size, threads, repeats",
    ),
    "below the range": ("search: {trials: 0}", "study.yaml:7: search.trials: expected at least 1, got 0"),
    "not above zero": ("search: {hours: 0}", "study.yaml:7: search.hours: expected a number above 0, got 0"),
    "above the range": (
        "training: {learning_rate: 5}",
        "study.yaml:7: training.learning_rate: expected at most 1, got 5",
    ),
    "warm-up throughout": (
        "training: {warmup: 1}",
        "study.yaml:7: training.warmup: expected a number below 1, got 1",
    ),
    "unknown choice": (
        "search: {sampler: cmaes}",
        'study.yaml:7: search.sampler: expected one of auto, random, tpe, gp, nsga2, got "cmaes"',
    ),
    "name that is a path": (
        "name: a/b",
        'study.yaml:7: name: expected letters, digits, spaces and any of . _ -, got "a/b"',
    ),
    "address without a port": (
        "cluster: {address: somewhere}",
        'study.yaml:7: cluster.address: expected local, auto or host:port, got "somewhere"',
    ),
    # objectives
    "unknown objective": (
        "objectives:\n  - accuracy\n  - latency",
        'study.yaml:9: objectives.1: unknown objective "latency" (did you mean "latency_ms"?)',
    ),
    "objective of another task": (
        "objectives: [pearson]",
        'study.yaml:7: objectives.0: unknown objective "pearson"; expected one of accuracy, macro_f1, latency_ms, '
        "speedup, throughput, size_mb, memory_mb",
    ),
    "objective twice": ("objectives: [accuracy, accuracy]", "study.yaml:7: objectives.1: accuracy is named twice"),
    "objective outside a list": (
        "objectives: accuracy",
        'study.yaml:7: objectives: expected a list such as [accuracy, latency_ms], got "accuracy"',
    ),
    "method's metric without direction": (
        "objectives: [distill.gap]",
        "study.yaml:7: objectives.0: a method's metric needs its direction: {distill.gap: minimize} or "
        "{distill.gap: maximize}",
    ),
    "metric of a method not searched": (
        "objectives: [{theseus.gap: minimize}]",
        "study.yaml:7: objectives.0: theseus.gap needs theseus among the methods",
    ),
    "wrong direction": (
        "objectives: [{accuracy: minimize}]",
        'study.yaml:7: objectives.0: accuracy is always to maximize, got "minimize"',
    ),
    # constraints
    "unknown metric": (
        'constraints: {size: "<= 40"}',
        'study.yaml:7: constraints.size: unknown metric (did you mean "size_mb"?)',
    ),
    "number as a bound": (
        "constraints: {size_mb: 40}",
        'study.yaml:7: constraints.size_mb: expected a bound such as "<= 40" or ">= 0.9", got 40',
    ),
    "bound with a unit": (
        'constraints: {size_mb: "<= 40 MB"}',
        'study.yaml:7: constraints.size_mb: expected a bound such as "<= 40" or ">= 0.9", got "<= 40 MB"',
    ),
    "strict bound": (
        'constraints: {size_mb: "< 40"}',
        'study.yaml:7: constraints.size_mb: expected a bound such as "<= 40" or ">= 0.9", got "< 40"',
    ),
    "negative drop": (
        'constraints: {accuracy_drop: "<= -0.01"}',
        'study.yaml:7: constraints.accuracy_drop: accuracy_drop lies between 0 and 1, got "<= -0.01"',
    ),
    "accuracy in percent": (
        'constraints: {accuracy: ">= 90"}',
        'study.yaml:7: constraints.accuracy: accuracy lies between 0 and 1, got ">= 90"',
    ),
    "no size at all": (
        'constraints: {size_mb: "<= 0"}',
        'study.yaml:7: constraints.size_mb: size_mb lies above 0, got "<= 0"',
    ),
    "low above high": (
        'constraints: {size_mb: [">= 50", "<= 40"]}',
        "study.yaml:7: constraints.size_mb: nothing is both >= 50 and <= 40",
    ),
    "two bounds from one side": (
        'constraints: {size_mb: ["<= 50", "<= 40"]}',
        'study.yaml:7: constraints.size_mb: expected one "<=" and one ">=" bound, got ["<= 50", "<= 40"]',
    ),
    "unquoted bound": (
        "constraints:\n  accuracy: >= 0.9",
        'study.yaml:8: not valid YAML: a value that begins with ">" needs quotes, for example ">= 0.9"',
    ),
    "constraints in a list": (
        "constraints: [size_mb]",
        'study.yaml:7: constraints: expected a mapping such as {size_mb: "<= 40"}, got ["size_mb"]',
    ),
    # files
    "missing plugin": (
        "plugins: [mine.py]",
        "study.yaml:7: plugins.0: no such file: mine.py (looked for {folder}/mine.py)",
    ),
    "plugin that is data": (
        "plugins: [train.jsonl]",
        "study.yaml:7: plugins.0: expected a Python file whose name can name a method, such as my_method.py, "
        "got train.jsonl",
    ),
    "output below a file": (
        "output: train.jsonl/run",
        "study.yaml:7: output: cannot be created: {folder}/train.jsonl is not a directory",
    ),
    "output that is a file": ("output: train.jsonl", "study.yaml:7: output: not a directory: train.jsonl"),
    # storage
    "no URL": (
        "storage: study.db",
        "study.yaml:7: storage: not a database URL; expected for example sqlite:///study.db",
    ),
    "unknown database": (
        "storage: nosql://host/db",
        "study.yaml:7: storage: no such kind of database; expected sqlite:///… or postgresql+psycopg://…",
    ),
    "database in memory": (
        "storage: sqlite://",
        "study.yaml:7: storage: a database in memory cannot be resumed; expected for example sqlite:///study.db",
    ),
    "undefined variable": (
        "storage: sqlite:///${NOT_DEFINED_ANYWHERE}.db",
        "study.yaml:7: storage: the environment variable NOT_DEFINED_ANYWHERE is not set",
    ),
    "database below a file": (
        "storage: sqlite:///train.jsonl/study.db",
        "study.yaml:7: storage: cannot be created: {folder}/train.jsonl is not a directory",
    ),
    # YAML
    "syntax": ("search: [1", "study.yaml:8: not valid YAML: expected ',' or ']', but got '<stream end>'"),
    "tag": ("name: !!int x", "study.yaml:7: not valid YAML: 'x' is no int"),
    "complex key": ("? [a]\n: b", "study.yaml:7: expected a plain key"),
}


@pytest.mark.parametrize(("extra", "expected"), WRONG.values(), ids=WRONG.keys())
def test_wrong_key_or_value(write: Callable[[str], Path], extra: str, expected: str) -> None:
    assert complaint(write(f"{MINIMAL}{extra}\n")) == expected.replace("{folder}", str(Path.cwd()))


WRONG_METHODS = {
    "no method": ("[]", "methods", "expected all, a list of methods or a mapping of methods to values, got []"),
    "one name": (
        "theseus",
        "methods",
        'expected all, a list of methods or a mapping of methods to values, got "theseus"',
    ),
    "name twice": ("[theseus, theseus]", "methods.1", "theseus is named twice"),
    "number for a name": ("[3]", "methods.0", "expected the name of a method, got 3"),
    "value for a method": ("{theseus: 3}", "methods.theseus", "expected a mapping of dimensions to values, got 3"),
    "use that is no boolean": (
        "{theseus: {use: yes}}",
        "methods.theseus.use",
        'expected true or false, got "yes"',
    ),
    "empty choices": ("{theseus: {n: []}}", "methods.theseus.n", "expected at least one value, got []"),
    "null": (
        "{theseus: {n: }}",
        "methods.theseus.n",
        "expected a value, a list of values or {low: …, high: …}, got null",
    ),
    "nested choices": (
        "{theseus: {n: [[2]]}}",
        "methods.theseus.n",
        "expected a value, a list of values or {low: …, high: …}, got [[2]]",
    ),
    "low above high": (
        "{theseus: {n: {low: 3, high: 2}}}",
        "methods.theseus.n",
        "the range is empty: low 3 is above high 2",
    ),
    "half a range": (
        "{theseus: {n: {low: 3}}}",
        "methods.theseus.n",
        'a range has both low and high, got {"low": 3}',
    ),
    "misspelt range": (
        "{theseus: {n: {low: 3, hihg: 4}}}",
        "methods.theseus.n",
        'unknown key hihg in a range (did you mean "high"?)',
    ),
    "text in a range": (
        "{theseus: {n: {low: 3, high: x}}}",
        "methods.theseus.n",
        'expected a finite number for high, got "x"',
    ),
}


@pytest.mark.parametrize(("methods", "key", "message"), WRONG_METHODS.values(), ids=WRONG_METHODS.keys())
def test_wrong_methods(write: Callable[[str], Path], methods: str, key: str, message: str) -> None:
    path = write(MINIMAL.replace("[distill]", methods))
    assert complaint(path) == f"study.yaml:6: {key}: {message}"


def test_wrong_narrowing_is_named_with_its_own_line(write: Callable[[str], Path]) -> None:
    methods = "\n  distill:\n  theseus:\n    mixing: [a]\n    n: {low: 3, high: 2}"
    path = write(MINIMAL.replace(" [distill]", methods))
    assert complaint(path).startswith("study.yaml:10: methods.theseus.n: the range is empty")


WRONG_TEACHERS = {
    "neither": ("{}", "teacher", "expected either model or architecture, got neither"),
    "both": (
        "{model: a/b, architecture: {}, fine_tune: {}}",
        "teacher",
        "expected either model or architecture, got both",
    ),
    "untrained": (
        "{architecture: {layers: 2}}",
        "teacher.architecture",
        "a model trained from scratch needs teacher.fine_tune",
    ),
    "null fine_tune": (
        "{model: a/b, fine_tune: }",
        "teacher.fine_tune",
        "expected a mapping, {} for the defaults; leave the key out for a fine-tuned model",
    ),
    "heads": (
        "{architecture: {hidden: 64, heads: 5}, fine_tune: {}}",
        "teacher.architecture.heads",
        "expected a divisor of hidden (64), got 5",
    ),
    "hidden": (
        "{architecture: {hidden: wide}, fine_tune: {}}",
        "teacher.architecture.hidden",
        'expected an integer, got "wide"',
    ),
    "family": (
        "{architecture: {family: gpt2}, fine_tune: {}}",
        "teacher.architecture.family",
        'expected one of bert, got "gpt2"',
    ),
    "small vocabulary": (
        "{architecture: {vocabulary: 3}, fine_tune: {}}",
        "teacher.architecture.vocabulary",
        "expected at least 100 word pieces, got 3",
    ),
    "vocabulary of another type": (
        "{architecture: {vocabulary: true}, fine_tune: {}}",
        "teacher.architecture.vocabulary",
        "expected a number of word pieces or the path of a vocab.txt, got true",
    ),
    "missing vocabulary": (
        "{architecture: {vocabulary: vocab.txt}, fine_tune: {}}",
        "teacher.architecture.vocabulary",
        "no such file: vocab.txt (looked for {folder}/vocab.txt)",
    ),
    "missing directory": (
        "{model: ./model}",
        "teacher.model",
        "no such directory: ./model (looked for {folder}/model)",
    ),
    "missing deep directory": (
        "{model: path/to/model}",
        "teacher.model",
        "no such directory: path/to/model (looked for {folder}/path/to/model)",
    ),
    "missing beside something there": (
        "{model: models/b}",
        "teacher.model",
        "no such directory: models/b (looked for {folder}/models/b)",
    ),
    "directory without a model": (
        "{model: models}",
        "teacher.model",
        "expected a directory with a config.json, got models",
    ),
    "file": ("{model: train.jsonl}", "teacher.model", "expected a directory with a config.json, got train.jsonl"),
    "nothing": ('{model: ""}', "teacher.model", "expected a directory with a config.json, got "),
}


@pytest.mark.parametrize(("teacher", "key", "message"), WRONG_TEACHERS.values(), ids=WRONG_TEACHERS.keys())
def test_wrong_teacher(write: Callable[[str], Path], teacher: str, key: str, message: str) -> None:
    path = write(MINIMAL.replace("teacher:\n  model: owner/model", f"teacher: {teacher}"))
    Path("models").mkdir()
    assert complaint(path) == f"study.yaml:2: {key}: {message}".replace("{folder}", str(Path.cwd()))


WRONG_DATA = {
    "missing": ("other.jsonl", "no such file: other.jsonl (looked for {folder}/other.jsonl)"),
    "missing in a folder": ("a/b/train.csv", "no such file: a/b/train.csv (looked for {folder}/a/b/train.csv)"),
    "empty": ("empty.csv", "the file is empty: empty.csv"),
    "directory": ("folder", "not a file: folder"),
    "another format": ("train.xlsx", "expected a file ending in .jsonl, .csv, .tsv, .parquet, got train.xlsx"),
}


@pytest.mark.parametrize(("train", "message"), WRONG_DATA.values(), ids=WRONG_DATA.keys())
@pytest.mark.parametrize("key", ["train", "validation", "test"])
def test_wrong_data(write: Callable[[str], Path], key: str, train: str, message: str) -> None:
    data = f"data: {{train: {train}}}" if key == "train" else f"data: {{train: train.jsonl, {key}: {train}}}"
    path = write(MINIMAL.replace("data:\n  train: train.jsonl", data))
    Path("empty.csv").touch()
    Path("folder").mkdir()
    Path("train.xlsx").write_text("x")
    assert complaint(path) == f"study.yaml:4: data.{key}: {message}".replace("{folder}", str(Path.cwd()))


@pytest.mark.parametrize("key", ["task", "data", "methods"])
def test_missing_key(write: Callable[[str], Path], key: str) -> None:
    content = yaml.safe_load(MINIMAL)
    del content[key]
    assert complaint(write(yaml.safe_dump(content))).startswith(f"study.yaml: {key}: missing; expected ")


def test_missing_nested_key_is_placed_at_its_section(write: Callable[[str], Path]) -> None:
    path = write(MINIMAL.replace("  train: train.jsonl", "  test: train.jsonl"))
    expected = (
        "study.yaml:4: data.train: missing; expected training data: jsonl, csv, tsv or parquet file, or hub id"
    )
    assert complaint(path) == expected


def test_a_misspelt_key_is_reported_rather_than_the_one_it_stands_for(write: Callable[[str], Path]) -> None:
    path = write(MINIMAL.replace("methods:", "method:"))
    assert complaint(path) == 'study.yaml:6: method: unknown key (did you mean "methods"?)'


def test_the_first_error_in_the_file_is_reported(write: Callable[[str], Path]) -> None:
    path = write("search: {trials: 0}\n" + MINIMAL + "measure: {threads: 0}\n")
    assert complaint(path).startswith("study.yaml:1: search.trials:")
    assert complaint(write("measure: {threads: 0}\n" + MINIMAL + "search: {trials: 0}\n")).startswith(
        "study.yaml:1: measure.threads:"
    )


def test_objectives_are_not_blamed_for_a_wrong_task(write: Callable[[str], Path]) -> None:
    path = write("objectives: [accuracy]\n" + MINIMAL.replace("text-classification", "clasification"))
    assert complaint(path).startswith("study.yaml:2: task: expected one of text-classification, text-regression")


def test_unreadable_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert complaint(Path("no.yaml")) == "no.yaml: cannot be read: No such file or directory"
    assert complaint(tmp_path) == f"{tmp_path}: cannot be read: Is a directory"
    Path("latin.yaml").write_bytes("name: é".encode("latin-1"))
    assert complaint(Path("latin.yaml")) == "latin.yaml: not UTF-8 text (byte 6)"
    Path("control.yaml").write_bytes(b"a: 1\nb: \x07")
    assert complaint(Path("control.yaml")) == "control.yaml:2: not valid YAML: special characters are not allowed"


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n", "null\n"])
def test_empty_file(write: Callable[[str], Path], text: str) -> None:
    expected = "study.yaml: the file is empty; expected the keys task, teacher, data and methods"
    assert complaint(write(text)) == expected


@pytest.mark.parametrize("text", ["- a\n", "just text\n", "3\n"])
def test_not_a_mapping(write: Callable[[str], Path], text: str) -> None:
    assert complaint(write(text)).startswith("study.yaml: expected a mapping of keys to values, got ")


def test_unwritable_output(write: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))
    expected = f"study.yaml: output: cannot be written: no permission for {Path.cwd()}"
    assert complaint(write(MINIMAL)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)),
        "a: &a [*a]\n",
        "a: " + "[" * 5000,
    ],
    ids=["exponential aliases", "alias of itself", "deep nesting"],
)
def test_hostile_yaml_is_refused(write: Callable[[str], Path], text: str) -> None:
    assert "not valid YAML: " in complaint(write(text))


def test_yaml_makes_no_objects(write: Callable[[str], Path]) -> None:
    path = write(MINIMAL + "name: !!python/object/apply:os.mkdir [made]\n")
    assert complaint(path) == 'study.yaml:7: name: expected text, got ["made"]'


# ---- YAML 1.1's surprises ----------------------------------------------------------------------------------

SCALARS = {
    "5e-5": 5e-5,
    "1e3": 1000.0,
    "-.5": -0.5,
    "+1.": 1.0,
    ".inf": float("inf"),
    "010": 10,
    "0x1F": 31,
    "0o17": 15,
    "-7": -7,
    "no": "no",
    "yes": "yes",
    "on": "on",
    "OFF": "OFF",
    "y": "y",
    "true": True,
    "False": False,
    "~": None,
    "": None,
    "null": None,
    "1:30": "1:30",
    "1_000": "1_000",
    "2024-01-01": "2024-01-01",
    "'8'": "8",
    "<= 40": "<= 40",
}


@pytest.mark.parametrize(("text", "value"), SCALARS.items())
def test_scalars_mean_what_they_say(text: str, value: Any) -> None:
    found = parse(f"key: {text}", "file").data["key"]
    assert found == value
    assert type(found) is type(value)


def test_keys_are_text() -> None:
    assert parse("{on: 1, 2: 3}", "file").data == {"on": 1, "2": 3}


def test_places_are_lines_of_keys_and_items() -> None:
    places = parse("# comment\na:\n  b: [1,\n    2]\nc:\n  - x\n", "f").places
    assert {key: place.line for key, place in places.items()} == {
        "": None,
        "a": 2,
        "a.b": 3,
        "a.b.0": 3,
        "a.b.1": 4,
        "c": 5,
        "c.0": 6,
    }


def test_aliases_are_their_value() -> None:
    assert parse("a: &x {b: 1}\nc: *x", "f").data == {"a": {"b": 1}, "c": {"b": 1}}


# ---- what is right -----------------------------------------------------------------------------------------


def test_four_keys_suffice(write: Callable[[str], Path]) -> None:
    study = load_study(write(MINIMAL))
    folder = Path.cwd()
    assert (study.name, study.output) == ("study", folder / "runs/study")
    assert study.storage == f"sqlite:///{folder}/runs/study/study.db"
    assert study.teacher.model == "owner/model"
    assert study.data.train == str(folder / "train.jsonl")
    assert study.methods == {"distill": {}}
    assert study.directions == {"accuracy": "maximize", "latency_ms": "minimize"}
    assert (study.search.trials, study.search.hours, study.training.learning_rate) == (40, None, 5e-5)
    assert sorted(os.listdir(folder)) == ["study.yaml", "train.jsonl"]


def test_empty_sections_are_their_defaults(write: Callable[[str], Path]) -> None:
    sections = "search:\ntraining:\nmeasure:\ncluster:\nobjectives:\nconstraints:\nplugins:\n"
    assert load_study(write(MINIMAL + sections)).to_dict() == load_study(write(MINIMAL)).to_dict()


def test_methods_in_their_three_forms(write: Callable[[str], Path]) -> None:
    def methods(text: str) -> Any:
        return load_study(write(MINIMAL.replace("[distill]", text))).methods

    assert methods("all") == "all"
    assert methods("[a, b]") == methods("{a: , b: {}}") == {"a": {}, "b": {}}
    narrowed = {"a": {"use": True, "n": [2, 3], "x": {"low": 0.0, "high": 1}, "kind": "y"}}
    assert methods(json.dumps(narrowed)) == narrowed


def test_architecture_defaults(write: Callable[[str], Path]) -> None:
    teacher = "teacher: {architecture: {hidden: 64, vocabulary: train.jsonl}, fine_tune: {epochs: 1}}"
    study = load_study(write(MINIMAL.replace("teacher:\n  model: owner/model", teacher)))
    shape = study.teacher.architecture
    assert shape is not None
    assert (shape.family, shape.layers, shape.hidden, shape.heads, shape.intermediate) == ("bert", 4, 64, 4, 256)
    assert shape.vocabulary == Path.cwd() / "train.jsonl"
    assert Study.from_dict(study.to_dict()).teacher == study.teacher


@pytest.mark.parametrize("name", ["bert-base-uncased", "owner/model.v2"])
def test_hub_ids_stay_as_they_are(write: Callable[[str], Path], name: str) -> None:
    assert load_study(write(MINIMAL.replace("owner/model", name))).teacher.model == name


@pytest.mark.parametrize("name", ["imdb", "owner/data", "glue:sst2", "glue:sst2:validation", "imdb::test"])
def test_hub_data_sets_stay_as_they_are(write: Callable[[str], Path], name: str) -> None:
    assert load_study(write(MINIMAL.replace("train.jsonl", name))).data.train == name


def test_paths_are_relative_to_the_study_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "studies").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.csv").write_text("text,label\na,0\n")
    (tmp_path / "studies/mine.py").write_text("x = 1\n")
    extra = "plugins: [mine.py]\nstorage: sqlite:///s.db\noutput: ../runs/x\n"
    text = MINIMAL.replace("train.jsonl", "../data/train.csv") + extra
    (tmp_path / "studies/study.yaml").write_text(text)
    monkeypatch.chdir(tmp_path / "data")
    study = load_study(Path("../studies/study.yaml"))
    assert study.data.train == str(tmp_path / "data/train.csv")
    assert study.plugins == (tmp_path / "studies/mine.py",)
    assert study.storage == f"sqlite:///{tmp_path}/studies/s.db"
    assert study.output == tmp_path / "runs/x"


def test_environment_variables_expand_in_the_storage(
    write: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DB_PASSWORD", "s3cret")
    study = load_study(write(MINIMAL + "storage: postgresql+psycopg://me:${DB_PASSWORD}@host/db\n"))
    assert study.storage == "postgresql+psycopg://me:s3cret@host/db"
    for shown in (repr(study), str(study), json.dumps(study.to_dict()), json.dumps(study.identity())):
        assert "s3cret" not in shown


def test_no_error_repeats_a_password(write: Callable[[str], Path]) -> None:
    path = write(MINIMAL)
    for url in ("nosql://me:s3cret@host/db", "postgresql://me:s3cret@host:port/db", "://me:s3cret@"):
        assert "s3cret" not in complaint(path, f"storage={url}")
        assert "s3cret" not in complaint(path, f"storage={url.removeprefix('nosql:')}")
        assert "s3cret" not in complaint(path, "storage=me:s3cret@host")
        assert "s3cret" not in complaint(write(MINIMAL + f"storage: {url}\n"))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://me:s3cret@host/db", "postgresql://me:***@host/db"),
        ("storage=postgresql://me:two words@host/db", "storage=postgresql://me:***@host/db"),
        (
            "p://me@host/db?password=s3cret&name=me&sslPassword=x",
            "p://me@host/db?password=***&name=me&sslPassword=***",
        ),
        ("sqlite:///$HERE/a b.db", "sqlite:///$HERE/a b.db"),
        ("postgresql://me:p@host: port 1 is not accepting", "postgresql://me:***@host: port 1 is not accepting"),
        ("user p at port 1, http://host:80/x", "user p at port 1, http://host:80/x"),
    ],
)
def test_passwords_of_urls_are_hidden_and_nothing_else(text: str, shown: str) -> None:
    assert hide_passwords(text) == shown


# ---- objectives and constraints ----------------------------------------------------------------------------


def test_every_task_metric_has_a_direction() -> None:
    for metrics in METRICS.values():
        assert {direction(metric) for metric in metrics} == {"maximize"}
        assert {direction(f"{metric}_drop") for metric in metrics} == {"minimize"}
    assert direction("speedup") == direction("throughput") == "maximize"
    assert direction("latency_ms") == direction("size_mb") == direction("memory_mb") == "minimize"
    with pytest.raises(ValueError, match=r"'mine\.key' is no metric of the engine's own"):
        direction("mine.key")


def test_objectives_and_their_directions(write: Callable[[str], Path]) -> None:
    study = load_study(write(MINIMAL + "objectives: [speedup, {distill.gap: minimize}, {size_mb: minimize}]\n"))
    expected = {"speedup": "maximize", "distill.gap": "minimize", "size_mb": "minimize"}
    assert study.objectives == ("speedup", "distill.gap", "size_mb")
    assert study.directions == objectives_for(study, "f1") == expected
    again = Study.from_dict(json.loads(json.dumps(study.to_dict())))
    assert again.directions == pickle.loads(pickle.dumps(study)).directions == expected


def test_default_objectives_follow_the_primary_metric(write: Callable[[str], Path]) -> None:
    study = load_study(write(MINIMAL.replace("text-classification", "token-classification")))
    assert study.objectives == ()
    assert study.directions == {"f1": "maximize", "latency_ms": "minimize"}
    assert objectives_for(study, "accuracy") == {"accuracy": "maximize", "latency_ms": "minimize"}


@pytest.mark.parametrize(
    ("extra", "timed"),
    [
        ("", True),
        ("objectives: [accuracy, size_mb]", False),
        ("objectives: [accuracy, speedup]", True),
        ('objectives: [accuracy]\nconstraints: {throughput: ">= 9"}', True),
        ('objectives: [accuracy]\nconstraints: {memory_mb: "<= 9"}', False),
    ],
)
def test_timed(write: Callable[[str], Path], extra: str, timed: bool) -> None:
    assert load_study(write(MINIMAL + extra)).timed is timed


@pytest.mark.parametrize(
    ("extra", "sized"),
    [
        ("", False),
        ("objectives: [accuracy, size_mb]", True),
        ("objectives: [accuracy, memory_mb]", False),
        ('objectives: [accuracy, latency_ms]\nconstraints: {size_mb: "<= 9"}', True),
    ],
)
def test_sized(write: Callable[[str], Path], extra: str, sized: bool) -> None:
    assert load_study(write(MINIMAL + extra)).sized is sized


def test_constraints(write: Callable[[str], Path]) -> None:
    text = 'constraints: {size_mb: ["<= 40", ">= 1e0"], accuracy_drop: "<=0.03", distill.gap: ">= -2"}'
    study = load_study(write(MINIMAL + text))
    size, drop, gap = study.constraints.values()
    assert [size.violation(value) for value in (0.5, 1, 20, 40, 41)] == [0.5, 0, -19, 0, 1]
    assert str(size) == "size_mb <= 40 and >= 1"
    assert drop == Constraint("accuracy_drop", "<=", 0.03)
    assert drop.violation(float("nan")) == float("inf")
    assert (gap.op, gap.bound, gap.violation(-3)) == (">=", -2, 1)
    assert Study.from_dict(study.to_dict()).constraints == study.constraints


def test_tolerance_widens_a_bound_by_a_fraction_of_itself() -> None:
    above, below = Constraint("size_mb", "<=", 40), Constraint("pearson", ">=", -0.5)
    assert above.violation(44, tolerance=0.1) == pytest.approx(0)
    assert below.violation(-0.55, tolerance=0.1) == pytest.approx(0)


# ---- overrides ---------------------------------------------------------------------------------------------


def test_overrides(write: Callable[[str], Path]) -> None:
    study = load_study(
        write(MINIMAL + "objectives: [accuracy, size_mb]\n"),
        [
            "search.trials=8",
            "search.trials=9",
            "training.learning_rate=5e-4",
            "objectives.1=speedup",
            "constraints.accuracy=>= 0.5",
            "constraints.distill.gap=<= 1",
            "methods={distill: {temperature: [1, 2]}}",
            "methods.distill.alpha=0.5",
            "name=a",
        ],
    )
    assert (study.search.trials, study.training.learning_rate, study.name) == (9, 5e-4, "a")
    assert study.objectives == ("accuracy", "speedup")
    assert list(study.constraints) == ["accuracy", "distill.gap"]
    assert study.methods == {"distill": {"temperature": [1, 2], "alpha": 0.5}}
    assert study.output == Path.cwd() / "runs/a"


WRONG_OVERRIDES = {
    "search.trails=8": '--set search.trails=8: search.trails: unknown key (did you mean "trials"?)',
    "search.trials=x": '--set search.trials=x: search.trials: expected an integer, got "x"',
    "search={trails: 8}": '--set search={trails: 8}: search.trails: unknown key (did you mean "trials"?)',
    "search.trials": "--set search.trials: expected KEY=VALUE, for example search.trials=8",
    "=8": "--set =8: expected KEY=VALUE, for example search.trials=8",
    "search..trials=8": "--set search..trials=8: expected KEY=VALUE, for example search.trials=8",
    "task.x=8": "--set task.x=8: task.x: nothing can be set there",
    "methods.distill.x=8": "--set methods.distill.x=8: methods.distill.x: nothing can be set there",
    "methods.4=a": "--set methods.4=a: methods.4: nothing can be set there",
    "name=[": "--set name=[: not valid YAML: expected the node content, but found '<stream end>'",
    "search={seed: 1, seed: 2}": "--set search={seed: 1, seed: 2}: seed: duplicate key (first on line 1)",
    "data.train=no.csv": "--set data.train=no.csv: data.train: no such file: no.csv (looked for {folder}/no.csv)",
}


@pytest.mark.parametrize(("assignment", "expected"), WRONG_OVERRIDES.items())
def test_wrong_overrides(write: Callable[[str], Path], assignment: str, expected: str) -> None:
    assert complaint(write(MINIMAL), assignment) == expected.replace("{folder}", str(Path.cwd()))


def test_an_override_leaves_the_document_alone() -> None:
    document = parse("a: {b: [1]}", "f")
    override(document, "a.b.0=2")
    assert document.data == {"a": {"b": [1]}}


def test_an_override_replaces_the_places_below_it() -> None:
    document = override(parse("a: {b: {c: 1}}", "f"), "a.b={d: 2}")
    assert str(document.error("a.b.c", "wrong")) == "--set a.b={d: 2}: a.b.c: wrong"
    assert str(document.error("a", "wrong")) == "f:1: a: wrong"


# ---- what others ask of a study ----------------------------------------------------------------------------


def test_error_names_the_line_of_the_key_or_its_nearest_ancestor(write: Callable[[str], Path]) -> None:
    study = load_study(write(MINIMAL + "search:\n  seed: 3\n"), ["measure.repeats=2"])
    assert str(study.error("search.seed", "no")) == "study.yaml:8: search.seed: no"
    assert str(study.error("search.trials", "no")) == "study.yaml:7: search.trials: no"
    assert str(study.error("cluster.address", "no")) == "study.yaml: cluster.address: no"
    assert str(study.error("measure.repeats", "no")) == "--set measure.repeats=2: measure.repeats: no"
    assert str(Study.from_dict(study.to_dict()).error("search.seed", "no")) == "search.seed: no"


def test_what_is_measured_runs_on_no_more_threads_than_a_trial_has_cores(write: Callable[[str], Path]) -> None:
    path = write(MINIMAL + "measure: {threads: 4}\ncluster: {cpus_per_trial: 2}\n")
    assert complaint(path) == "study.yaml:7: measure.threads: expected at most cluster.cpus_per_trial (2), got 4"
    assert load_study(path, ["cluster.cpus_per_trial=4"]).measure.threads == 4


def test_a_study_does_not_change(write: Callable[[str], Path]) -> None:
    study = load_study(write(MINIMAL))
    with pytest.raises(ValueError, match="frozen"):
        study.search.trials = 3  # type: ignore[misc]


def test_identity_is_what_must_not_change(write: Callable[[str], Path]) -> None:
    base = load_study(write(MINIMAL)).identity()
    assert json.loads(json.dumps(base)) == base
    same = ["search.trials=80", "search.sampler=tpe", "cluster.cpus_per_trial=2", "output=elsewhere", "name=other"]
    assert load_study(write(MINIMAL), [*same, "training.teacher_cache_gb=1"]).identity() == base
    assert load_study(write(MINIMAL + "objectives: [accuracy, latency_ms]\n")).identity() == base
    for change in (
        "objectives=[accuracy]",
        "task=token-classification",
        "data.max_length=64",
        "teacher.model=other/model",
        "methods=all",
        "constraints.size_mb=<= 4",
        "training.epochs=1",
        "measure.repeats=2",
        "search.seed=1",
    ):
        assert load_study(write(MINIMAL), [change]).identity() != base, change


def test_identity_without_defaults_is_what_was_written(write: Callable[[str], Path]) -> None:
    written = load_study(write(MINIMAL), ["training.precision=bf16"]).identity(defaults=False)
    assert written["training"] == {"precision": "bf16"}
    assert written["data"].keys() == {"train"}
    assert "measure" not in written


names = st.from_regex(r"[a-z]{1,8}", fullmatch=True)
scalars = st.one_of(st.booleans(), st.integers(-9, 9), st.floats(-1e6, 1e6, allow_nan=False), st.text(max_size=5))
ranges = st.tuples(st.floats(-9, 9), st.floats(0, 9)).map(lambda pair: {"low": pair[0], "high": sum(pair)})
narrowings = st.dictionaries(
    names.filter("use".__ne__), st.one_of(scalars, st.lists(scalars, min_size=1, max_size=3), ranges), max_size=3
)


@st.composite
def studies(draw: st.DrawFn) -> Mapping[str, Any]:
    task = draw(st.sampled_from(list(METRICS)))
    metrics = [*METRICS[task], "latency_ms", "speedup", "throughput", "size_mb", "memory_mb"]
    return {
        "name": draw(names),
        "task": task,
        "teacher": {"model": draw(names), "fine_tune": {"epochs": draw(st.floats(0.1, 9))}},
        "data": {
            "train": draw(names),
            "max_length": draw(st.integers(4, 512)),
            "text_pair": draw(st.none() | names),
        },
        "objectives": draw(st.lists(st.sampled_from(metrics), unique=True, max_size=4)),
        "constraints": draw(
            st.dictionaries(
                st.sampled_from([*metrics, f"{metrics[0]}_drop"]),
                st.floats(0.001, 1).flatmap(
                    lambda bound: st.sampled_from(
                        [f"<= {bound!r}", f">= {bound}", [f">= {bound / 2!r}", f"<= {bound!r}"]]
                    )
                ),
                max_size=3,
            )
        ),
        "methods": draw(st.just("all") | st.dictionaries(names, narrowings, min_size=1, max_size=3)),
        "search": {"trials": draw(st.integers(1, 999)), "hours": draw(st.none() | st.floats(0.1, 99))},
        "training": {"warmup": draw(st.floats(0, 0.9)), "weight_decay": draw(st.integers(0, 3))},
        "cluster": {"gpus_per_trial": draw(st.integers(0, 3) | st.floats(0, 1))},
        "output": f"/{draw(names)}",
    }


@given(studies())
@settings(max_examples=60, deadline=None)
def test_a_study_survives_plain_json(content: Mapping[str, Any]) -> None:
    study = Study.from_dict(content)
    plain = study.to_dict()
    again = Study.from_dict(json.loads(json.dumps(plain)))
    assert again == study
    assert again.to_dict() == plain
    assert "storage" not in plain


def test_loading_a_study_imports_nothing_heavy(write: Callable[[str], Path]) -> None:
    path = write(MINIMAL)
    code = (
        "import sys; from pathlib import Path; from compress_search.study import load_study; "
        f"load_study(Path({str(path)!r})); "
        "print({'torch', 'optuna', 'ray', 'transformers', 'numpy', 'sqlalchemy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"

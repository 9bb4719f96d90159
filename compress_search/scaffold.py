"""First files to start from: a commented study that runs as it is, and a working method with its contract test.

Owns what a model's configuration and the first rows of the data give away about a task. Writes nothing itself, and
knows nothing of torch.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import keyword
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from jinja2 import Environment, PackageLoader, StrictUndefined

from compress_search import hub
from compress_search.data.readers import Row, read_source
from compress_search.data.rows import class_name, number_of, words_of
from compress_search.errors import PluginError, StudyError
from compress_search.study.complaints import unknown
from compress_search.study.document import parse
from compress_search.study.goals import METRICS, TaskName
from compress_search.study.sections import DataConfig
from compress_search.study.sources import data_source, model_source

COLUMNS: Mapping[str, Sequence[str]] = {
    "text": ("text", "sentence", "sentence1", "premise", "question1", "question", "review", "content", "query"),
    "text_pair": ("text_pair", "sentence2", "hypothesis", "question2", "answer"),
    "label": ("label", "labels", "class", "category", "intent", "target", "score"),
    "tokens": ("tokens", "words"),
    "tags": ("tags", "ner_tags", "pos_tags", "ner", "labels"),
}
"""Names that columns have in the wild, by what the study calls them, the likeliest first."""

SAMPLE = 200
"""Rows to look at."""

_HEADS: Mapping[TaskName, str] = {
    "text-classification": "ForSequenceClassification",
    "text-regression": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
}


@dataclass(frozen=True)
class Clues:
    """What a data set's first rows say: the task, and the columns whose names are not the study's own."""

    task: TaskName
    columns: Mapping[str, str]


def study_text(
    *,
    model: str,
    train: str,
    validation: str | None = None,
    test: str | None = None,
    task: str | None = None,
    path: Path = Path("study.yaml"),
) -> str:
    """A commented study file for these, to be written at ``path``.

    Args:
        model: directory, relative to the working directory, or hub id.
        train: data file, relative to the working directory, or hub id.
        validation: the same; a part of the training data is held out without it.
        test: the same; nothing is scored on test data without it.
        task: guessed from the training data by default.
        path: relative paths in the study are written relative to its folder.

    The model's configuration and the first rows of the data come from the hub where they are not files.

    Raises:
        StudyError: something named is not there, the task or a column cannot be guessed, or a label is none of
            the task's.
    """
    if task is not None and task not in METRICS:
        raise StudyError(unknown(f"task {task}", task, METRICS), key="--task")
    splits = {"train": train, "validation": validation, "test": test}
    data = {name: _found(data_source, source, f"--{name}") for name, source in splits.items() if source}
    clues = _clues(data["train"], task)
    config = _config(_found(model_source, model, "--model"))
    return _render(
        "study.yaml.j2",
        path=path,
        task=clues.task,
        metric=METRICS[clues.task][0],
        model=_portable(model, path),
        fine_tune=not _has_head(config, clues.task),
        data={name: _portable(source, path) for name, source in splits.items() if source},
        columns=clues.columns,
        max_length=min(DataConfig.model_fields["max_length"].default, _positions(config)),
    )


def method_text(name: str) -> str:
    """The source of a working method, to be changed into one's own; ``name`` is its module's and its own.

    Raises:
        PluginError: the name cannot name a module, or is that of an installed method or module.
    """
    return _render("method.py.j2", name=_free_name(name), kind=_class_name(name))


def method_test_text(name: str) -> str:
    """The tests of :func:`method_text`: the plugin contract and the method's own claim.

    Raises:
        PluginError: as :func:`method_text`.
    """
    return _render("test_method.py.j2", name=_free_name(name), kind=_class_name(name))


def guess(rows: Sequence[Row], task: TaskName | None = None) -> Clues:
    """The task and the columns of some rows, of the task given if one is.

    A column of tags means token classification; labels that are fractions, regression; other labels, classes.

    Raises:
        ValueError: no column for something the task needs; the text names those that there are.
    """
    row = rows[0]
    if task == "token-classification" or (task is None and _named(row, "tokens") and _named(row, "tags")):
        return Clues("token-classification", _renamed({name: _column(row, name) for name in ("tokens", "tags")}))
    columns = {name: _column(row, name) for name in ("text", "label")}
    if pair := _named(row, "text_pair"):
        columns["text_pair"] = pair
    fractions = _are_fractions([row.get(columns["label"]) for row in rows])
    return Clues(task or ("text-regression" if fractions else "text-classification"), _renamed(columns))


def _renamed(columns: Mapping[str, str]) -> dict[str, str]:
    return {name: column for name, column in columns.items() if name != column}


def _named(row: Row, role: str) -> str | None:
    return next((name for name in COLUMNS[role] if name in row), None)


def _column(row: Row, role: str) -> str:
    name = _named(row, role)
    if name is None:
        raise ValueError(
            f"no column for data.{role}: expected one of {', '.join(COLUMNS[role])}, got {', '.join(row)}"
        )
    return name


def _are_fractions(labels: Sequence[Any]) -> bool:
    """Whether all are numbers and some are written with a point (text files hold numbers as text)."""
    try:
        [float(label) for label in labels]
    except (TypeError, ValueError, OverflowError):
        return False
    return any(isinstance(label, float) or "." in str(label) for label in labels)


def _clues(train: str, task: TaskName | None) -> Clues:
    """What the training data give away; of a hub's that are out of reach, no more than the task."""
    try:
        placed = list(itertools.islice(read_source(train, "train", glance=True), SAMPLE))
    except ValueError as error:
        if Path(train).is_file() or hub.reachable():
            raise StudyError(str(error), key="--train") from error
        if task is None:
            raise StudyError(f"needed, as the training data are out of reach: {error}", key="--task") from error
        return Clues(task, {})
    try:
        if not placed:
            raise ValueError("there are no rows")
        clues = guess([row for _, row in placed], task)
        for place, row in placed:
            _check(clues, place, row)
    except ValueError as error:
        raise StudyError(str(error), key="--train") from error
    return clues


def _check(clues: Clues, place: str, row: Row) -> None:
    """Refuse what the study would: classes where numbers are predicted, say, or lists that are none."""
    columns = {name: clues.columns.get(name, name) for name in COLUMNS}
    check = number_of if clues.task == "text-regression" else class_name
    try:
        if clues.task == "token-classification":
            words_of(row, columns["tokens"])
            labels = words_of(row, columns["tags"])
        else:
            labels = [row.get(columns["label"])]
        for label in labels:
            check(label)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _found(check: Any, source: str, option: str) -> str:
    try:
        return str(check(source, Path.cwd()))
    except ValueError as error:
        raise StudyError(str(error), key=option) from error


def _config(model: str) -> Mapping[str, Any]:
    """The model's configuration; a hub's is fetched, or found among what was fetched before."""
    path = Path(model) / "config.json"
    try:
        content = json.loads((path if path.is_file() else _fetched(model)).read_text(encoding="utf-8"))
        return cast("Mapping[str, Any]", dict(content))
    except (ValueError, TypeError) as error:
        raise StudyError(f"config.json cannot be read: {error}", key="--model") from error


def _fetched(model: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(model, "config.json", local_files_only=not hub.reachable()))
    except (OSError, ValueError, EntryNotFoundError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        reason = said if hub.reachable() else "there is no connection, and it was not fetched before"
        message = f"{model} is no directory here; cannot fetch its config.json from the hub: {reason}"
        raise StudyError(message, key="--model") from error


def _has_head(config: Mapping[str, Any], task: TaskName) -> bool:
    return any(str(name).endswith(_HEADS[task]) for name in config.get("architectures") or ())


def _positions(config: Mapping[str, Any]) -> float:
    """The longest sequence the model reads; RoBERTa counts its positions from behind the padding's id."""
    reserved = config.get("pad_token_id", 1) + 1 if "roberta" in config.get("model_type", "") else 0
    return (
        cast("int", config["max_position_embeddings"]) - reserved
        if "max_position_embeddings" in config
        else float("inf")
    )


def _portable(source: str, path: Path) -> str:
    """A source as the study file spells it: a relative path from its folder, in quotes where YAML asks for them."""
    given = Path(os.path.expanduser(source))
    if given.exists() and not given.is_absolute():
        source = Path(os.path.relpath(given.absolute(), path.absolute().parent)).as_posix()
    return _scalar(source)


def _scalar(text: str) -> str:
    """The text as a YAML scalar, in quotes only if it needs them."""
    try:
        plain = parse(f"key: {text}", "").data == {"key": text}
    except StudyError:
        plain = False
    return text if plain else json.dumps(text, ensure_ascii=False)


def _free_name(name: str) -> str:
    from compress_search.registry import Registry

    if not name.isidentifier() or keyword.iskeyword(name):
        raise PluginError("expected a name that Python can import, such as my_method", entry_point=name)
    if name in Registry():
        raise PluginError("a method of this name is installed", entry_point=name)
    if importlib.util.find_spec(name):
        raise PluginError("Python has a module of this name, which the file would hide", entry_point=name)
    return name


def _class_name(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))


def _render(template: str, **values: Any) -> str:
    environment = Environment(
        loader=PackageLoader("compress_search"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"scalar": _scalar, "pad": lambda text: text.ljust(42)}
    return environment.get_template(template).render(**values)

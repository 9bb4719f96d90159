"""The examples of a study as its author wrote them: read, checked and with their labels numbered.

Owns what an example must look like for each task and every complaint about data. Knows nothing of tokenizers.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from compress_search.data.readers import ClassName, Row, parse_json, read_source
from compress_search.study import Study
from compress_search.tasks import Task, is_bio

_LIST = re.compile(r"""["]?\[(['"].*|[^\s\[\]]*,.*|[-\d\s]*\d)\]["]?""", re.DOTALL)
"""A list as programs print it: ``['a', 'b']``, ``[a, b]``, ``[0 1]``, or in TSV ``"[""a""]"``."""

HELD_OUT = 0.1
"""The part of the training rows that serves as validation where a study names none."""


@dataclass(frozen=True)
class Rows:
    """Examples of one split.

    ``texts`` are strings, or lists of words for token tasks; ``pairs`` the second texts, if any; ``labels``
    a class or a number each, or a list with one class for each word.
    """

    texts: Sequence[Any]
    pairs: Sequence[str] | None
    labels: Sequence[Any]

    def __len__(self) -> int:
        return len(self.texts)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all rows in order."""
        content = hashlib.sha256()
        for column in (self.texts, self.pairs or (), self.labels):
            for value in column:
                content.update(json.dumps(value).encode() + b"\n")
            content.update(b"\n")
        return content.hexdigest()

    def take(self, rows: Sequence[int]) -> Rows:
        """Some of the rows, in the given order."""
        pairs = self.pairs and [self.pairs[row] for row in rows]
        return Rows([self.texts[row] for row in rows], pairs, [self.labels[row] for row in rows])


@dataclass(frozen=True)
class Raw:
    """The splits of a study."""

    train: Rows
    validation: Rows
    test: Rows | None = None
    unlabelled: Rows | None = None

    def splits(self) -> dict[str, Rows]:
        """Those that there are, by name."""
        found = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: rows for name, rows in (found | {"unlabelled": self.unlabelled}).items() if rows is not None}


def read(study: Study) -> tuple[Raw, Task]:
    """All rows of a study, checked, and the task with the labels found in the training data.

    Class names are sorted, as numbers where all are integers; those that a hub data set numbers stand in its order.
    Without validation data a tenth of the training
    rows is held out, the same ones every time.

    Raises:
        StudyError: the first thing wrong with a row; the text names the key, and the data file with its line.
    """
    rows, task = read_training(study)
    _check_metrics(study, task)
    paired = rows.pairs is not None
    test = _split(study, "test", task, paired=paired) if study.data.test else None
    unlabelled = _unlabelled(study, paired=paired) if study.data.unlabeled else None
    if study.data.validation:
        return Raw(rows, _split(study, "validation", task, paired=paired), test, unlabelled), task
    if len(rows) < 2:
        raise study.error("data.train", "one row; expected at least two, of which one is held out for validation")
    order = np.random.default_rng(0).permutation(len(rows)).tolist()
    cut = max(1, round(HELD_OUT * len(rows)))
    return Raw(rows.take(sorted(order[cut:])), rows.take(sorted(order[:cut])), test, unlabelled), task


def read_training(study: Study) -> tuple[Rows, Task]:
    """All training rows of a study, checked, and the task with the labels found in them; see :func:`read`.

    Raises:
        StudyError: the first thing wrong with a row.
    """
    train = list(_examples(study, "train"))
    task = _task(study, train)
    return _number(study, "train", train, task), task


@dataclass(frozen=True)
class _Example:
    """A checked row whose label is not yet a number."""

    place: str
    text: Any
    pair: str | None
    label: Any


def _split(study: Study, split: str, task: Task, *, paired: bool) -> Rows:
    return _number(study, split, list(_examples(study, split, paired)), task)


def _unlabelled(study: Study, *, paired: bool) -> Rows:
    """Texts of all unlabelled sources, without duplicates of any kind removed; their labels mean nothing."""
    texts: list[Any] = []
    pairs: list[str] = []
    for number, source in enumerate(study.data.unlabeled):
        found = len(texts)
        try:
            for place, row in read_source(source, "train"):
                try:
                    text, pair = _text_of(study, row, paired)
                except ValueError as error:
                    raise ValueError(f"{place}: {error}") from error
                texts.append(text)
                pairs.append(pair or "")
            if len(texts) == found:
                raise ValueError("there are no rows")
        except ValueError as error:
            raise study.error(f"data.unlabeled.{number}", str(error)) from error
    labels = [[0] * len(text) if study.task == "token-classification" else 0 for text in texts]
    return Rows(texts, pairs if paired else None, labels)


def _examples(study: Study, split: str, paired: bool | None = None) -> Iterator[_Example]:
    """Checked rows of one split; ``paired`` says whether there is a second text, None lets the first row say."""
    empty = True
    try:
        for place, row in read_source(getattr(study.data, split), split):
            empty = False
            if paired is None:
                paired = study.data.text_pair is not None or "text_pair" in row
            try:
                yield _example(study, place, row, paired)
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from error
        if empty:
            raise ValueError("there are no rows")
    except ValueError as error:
        raise study.error(f"data.{split}", str(error)) from error


def _example(study: Study, place: str, row: Row, paired: bool) -> _Example:
    data = study.data
    if study.task == "token-classification":
        words, tags = words_of(row, data.tokens), words_of(row, data.tags)
        if len(words) != len(tags):
            raise ValueError(f"{len(words)} {data.tokens} but {len(tags)} {data.tags}; expected one for each")
        return _Example(place, *_text_of(study, row, paired), [class_name(tag) for tag in tags])
    text, pair = _text_of(study, row, paired)
    label = _column(row, data.label)
    return _Example(place, text, pair, number_of(label) if study.task == "text-regression" else class_name(label))


def _text_of(study: Study, row: Row, paired: bool) -> tuple[Any, str | None]:
    """A row's text, or its list of words in token tasks, and its second text."""
    data = study.data
    if study.task == "token-classification":
        words = words_of(row, data.tokens)
        if not words:
            raise ValueError(f"column {data.tokens!r} is an empty list")
        return [_text(word) for word in words], None
    pair = _text(_column(row, data.text_pair or "text_pair")) if paired else None
    return _text(_column(row, data.text)), pair


def _column(row: Row, name: str) -> Any:
    if name not in row:
        raise ValueError(f"no column {name!r}; there are: {', '.join(map(str, row)) or 'none'}")
    value = row[name]
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise ValueError(f"column {name!r} holds no value")
    return value


def words_of(row: Row, name: str) -> list[Any]:
    """The list in a column: words, or their tags.

    Raises:
        ValueError: there is no such column, or no list in it.
    """
    value = _column(row, name)
    try:
        words = _cell(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ValueError(f"column {name!r}: {error}") from error
    if not isinstance(words, list):
        raise ValueError(f"column {name!r}: expected a list, got {value!r:.60}")
    return words


def _cell(text: str) -> list[Any]:
    """The words in a cell of a table, which has no lists: a JSON list, or what spaces separate."""
    text = text.strip()
    if text.startswith("["):
        with suppress(ValueError):  # a sentence may begin with a bracket
            return list(parse_json(text))
    if _LIST.fullmatch(text):
        got = text if len(text) <= 40 else text[:39] + "…"
        raise ValueError(f'expected words with spaces between them or a JSON list such as ["a", "b"], got {got}')
    return text.split()


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected text, got {value!r:.60}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can write half of a surrogate pair
        raise ValueError(f"expected text, got half a character, {value[error.start]!a}") from error
    return value


def class_name(value: Any) -> str:
    """The name of a class: the text itself, or the digits of an integer.

    Raises:
        ValueError: it is neither, or it is "nan", as programs write a value that is missing.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and value.strip().lower() == "nan":
        raise ValueError(f"expected a class, got {str(value)!r}, which stands for none and can name no class")
    if isinstance(value, str) and value.strip():
        return _text(value)
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return str(int(value))
    if isinstance(value, float) and math.isfinite(value):
        raise ValueError(f"expected a class, got the number {value}; task: text-regression predicts numbers")
    raise ValueError(f"expected a class, got {value!r:.60}")


def number_of(value: Any) -> float:
    """The number to predict, which tables write as text.

    Raises:
        ValueError: it is none, or not finite.
    """
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"expected a number as label, got {value!r:.60}")
    return number


def _task(study: Study, train: Sequence[_Example]) -> Task:
    if study.task == "text-regression":
        names, least = {example.label for example in train}, "numbers"
    elif study.task == "text-classification":
        names, least = {example.label for example in train}, "classes"
    else:
        names, least = {tag for example in train for tag in example.label}, "tags"
    if len(names) < 2:
        raise study.error("data.train", f"every label is {next(iter(names))!r}; expected at least two {least}")
    if study.task == "text-regression":
        return Task(study.task)
    labels, numbered = _in_order(names)
    entities = study.task == "token-classification" and is_bio(labels)
    return Task(study.task, labels, entities, numbered)


def _in_order(names: Set[str]) -> tuple[tuple[str, ...], bool]:
    """Class names in the order of their labels, and whether that is one which the data set gives to all of them."""
    numbers = {name.number: str(name) for name in names if isinstance(name, ClassName)}
    if len(numbers) == len(names):
        return tuple(numbers[number] for number in sorted(numbers)), set(numbers) == set(range(len(numbers)))
    return tuple(sorted(map(str, names), key=int if all(map(_is_integer, names)) else None)), False


def _check_metrics(study: Study, task: Task) -> None:
    """Refuse an aim that only these data rule out: entity F1 without entities."""
    aims = [("objectives", name) for name in study.objectives]
    aims += [(f"constraints.{name}", name) for name in study.constraints]
    for key, name in aims:
        if task.tokens and not task.entities and name.removesuffix("_drop") == "f1":
            raise study.error(key, f"{name} needs entities: tags O, B-… and I-…; the data have {task.labels[0]!r}")


def _is_integer(name: str) -> bool:
    digits = name.removeprefix("-")
    return digits.isdecimal() and digits.isascii() and len(digits) <= sys.get_int_max_str_digits()


def _number(study: Study, split: str, examples: Sequence[_Example], task: Task) -> Rows:
    """The examples with each class as its position among the task's labels."""
    positions = {label: position for position, label in enumerate(task.labels)}
    try:
        labels = [_position(example, task, positions) for example in examples]
    except ValueError as error:
        raise study.error(f"data.{split}", str(error)) from error
    pairs = None if examples[0].pair is None else [example.pair or "" for example in examples]
    return Rows([example.text for example in examples], pairs, labels)


def _position(example: _Example, task: Task, positions: Mapping[str, int]) -> Any:
    if not task.labels:
        return example.label
    try:
        return [positions[tag] for tag in example.label] if task.tokens else positions[example.label]
    except KeyError as error:
        known = ", ".join(task.labels[:8]) + (" …" if len(task.labels) > 8 else "")
        raise ValueError(
            f"{example.place}: label {error.args[0]!r} does not occur in the training data ({known})"
        ) from error

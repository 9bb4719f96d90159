"""Rows of a file or a hub data set, one mapping at a time, each with the place it came from.

Owns the formats, the names of a hub data set's classes, and what can be wrong with them. Knows nothing of tasks or
of what the columns mean.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from compress_search import hub

Row = Mapping[str, Any]
Placed = Iterator[tuple[str, Row]]
"""(where: ``train.jsonl:17``, or ``train.parquet row 17`` where there are no lines; row)."""


class ClassName(str):
    """The name of a class that a hub data set numbers, with its number there."""

    number: int

    def __new__(cls, name: str, number: int) -> ClassName:
        """Text that compares, hashes and prints as the name alone."""
        made = super().__new__(cls, name)
        made.number = number
        return made


def read_source(source: str, split: str, *, glance: bool = False) -> Placed:
    """The rows of a data set; what a hub data set numbers as classes is a :class:`ClassName`, or None without one.

    Args:
        source: a path ending in .jsonl, .csv, .tsv or .parquet; else a hub id, ``name[:configuration[:split]]``
            such as ``imdb``, ``glue:sst2`` or ``imdb::test``.
        split: the hub data set's split, where the id names none.
        glance: whether only the first rows will be read, so that a hub data set need not be fetched whole.

    Raises:
        ValueError: malformed, unreadable or not found; the text names the file and the line.
    """
    reader = FORMATS.get(Path(source).suffix)
    if reader is None:
        yield from _hub(source, split, glance)
        return
    path = Path(source)
    try:
        yield from reader(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name}: not UTF-8 text: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise ValueError(f"{path.name}: cannot be read: {error.strerror or error}") from error


def _jsonl(path: Path) -> Placed:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.isspace():
                continue
            place = f"{path.name}:{number}"
            try:
                row = parse_json(line)
            except ValueError as error:
                raise ValueError(f"{place}: not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{place}: expected a JSON object, got {line.strip()[:40]}")
            yield place, row


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is none, or nested more deeply or with longer numbers than Python reads.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except ValueError as error:  # Python's limit, with advice for programmers
        raise ValueError(f"a number of more than {sys.get_int_max_str_digits()} digits") from error


def _csv(path: Path) -> Placed:
    yield from _table(path, delimiter=",", strict=True)


def _tsv(path: Path) -> Placed:
    # quotation marks are ordinary text in TSV: as CSV, one at the start of a field would swallow the rows after it
    yield from _table(path, delimiter="\t", quoting=csv.QUOTE_NONE)


def _table(path: Path, **dialect: Any) -> Placed:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, **dialect)
        try:
            header = next(reader, [])
            if twice := [name for name in header if name and header.count(name) > 1]:
                raise ValueError(f"{path.name}:{reader.line_num}: the header names column {twice[0]!r} twice")
            for fields in reader:
                if not fields:
                    continue
                place = f"{path.name}:{reader.line_num}"
                if len(fields) != len(header):
                    raise ValueError(f"{place}: {len(fields)} fields, the header names {len(header)}")
                yield place, dict(zip(header, fields, strict=True))
        except csv.Error as error:
            raise ValueError(f"{path.name}:{reader.line_num}: {error}") from error


def _parquet(path: Path) -> Placed:
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import ParquetFile

    try:
        number = 0
        for batch in ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path.name} row {number}", row
    except ArrowInvalid as error:
        raise ValueError(f"{path.name}: no Parquet file: {error}") from error


def _hub(source: str, split: str, glance: bool) -> Placed:
    import datasets

    if not hub.reachable():
        datasets.config.HF_HUB_OFFLINE = True  # look into the cache at once
    name, configuration, named = (*source.split(":"), "", "")[:3]
    streaming = glance and hub.reachable()
    try:
        rows = datasets.load_dataset(name, configuration or None, split=named or split, streaming=streaming)
        decoders = {column: _decoder(feature) for column, feature in (rows.features or {}).items()}
        for number, row in enumerate(rows, start=1):
            yield f"{source} row {number}", {key: decoders.get(key, _as_it_is)(row[key]) for key in row}
    # not found, no network, no such configuration or split, damaged, a program rather than files
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"cannot load {source} from the hub: {reason}") from error


def _decoder(feature: Any) -> Callable[[Any], Any]:
    """From a value as the data set stores it to one with names for classes; lists of them as well."""
    from datasets import ClassLabel

    if isinstance(feature, ClassLabel):
        names = [ClassName(name, number) for number, name in enumerate(feature.names)]
        return lambda number: None if number is None or number < 0 else names[number]  # -1 stands for no label
    # datasets 3 has lists of one feature where later ones have a class
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    if inner is None or isinstance(inner, dict) or (decode := _decoder(inner)) is _as_it_is:
        return _as_it_is
    return lambda values: None if values is None else [decode(value) for value in values]


def _as_it_is(value: Any) -> Any:
    return value


FORMATS: Mapping[str, Callable[[Path], Placed]] = {
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
}

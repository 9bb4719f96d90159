"""Rows of a file or a hub data set, one mapping at a time, each with the place it came from.

Owns the formats and what can be wrong with them. Knows nothing of tasks or of what the columns mean.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from compress_search import hub

Row = Mapping[str, Any]
Placed = Iterator[tuple[str, Row]]
"""(where: ``train.jsonl:17``, or ``train.parquet row 17`` where there are no lines; row)."""


def read_source(source: str, split: str) -> Placed:
    """The rows of a data set.

    Args:
        source: a path ending in .jsonl, .csv, .tsv or .parquet; else a hub id, ``name[:configuration[:split]]``
            such as ``imdb``, ``glue:sst2`` or ``imdb::test``.
        split: the hub data set's split, where the id names none.

    Raises:
        ValueError: malformed, unreadable or not found; the text names the file and the line.
    """
    reader = FORMATS.get(Path(source).suffix)
    if reader is None:
        yield from _hub(source, split)
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
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{place}: not JSON: {error.msg} at column {error.colno}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{place}: expected a JSON object, got {line.strip()[:40]}")
            yield place, row


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


def _hub(source: str, split: str) -> Placed:
    import datasets

    if not hub.reachable():
        datasets.config.HF_HUB_OFFLINE = True  # look into the cache at once
    name, configuration, named = (*source.split(":"), "", "")[:3]
    try:
        rows = datasets.load_dataset(name, configuration or None, split=named or split)
    except (OSError, ValueError) as error:  # not found, no network, no such configuration or split
        raise ValueError(f"cannot load {source} from the hub: {str(error).splitlines()[0]}") from error
    for number, row in enumerate(rows, start=1):
        yield f"{source} row {number}", row


FORMATS: Mapping[str, Callable[[Path], Placed]] = {
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
}

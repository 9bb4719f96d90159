"""Tokenised splits on disk, memory-mapped, and the batches drawn from them.

Owns the tokenisation, its files and the order of batches. Knows nothing of networks, and imports torch only to
make tensors.

A split is a directory: ``offsets.npy`` (N + 1,) says where each row starts in the flat ``input_ids.npy`` (and
``token_type_ids.npy`` where the family has them); ``labels.npy`` is (N,), or flat as the tokens are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from compress_search.cache import content_addressed
from compress_search.data.rows import Raw, Rows, read
from compress_search.recipe import digest
from compress_search.tasks import IGNORED, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from compress_search.method import Batch
    from compress_search.study import Study

__all__ = [
    "Raw",
    "Rows",
    "Split",
    "ordered_batches",
    "read",
    "tokenize",
    "tokenize_rows",
    "training_batches",
    "without_labels",
]

FORMAT = 1
"""Raised whenever the files of a split change their meaning, so that cached ones are not mistaken for new ones."""

POOL = 50
"""Batches that are bucketed by length together."""

Array = NDArray[Any]


class Split:
    """The tokenised rows of a split. Opening one reads its offsets only; between processes it travels as a path."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        meta = json.loads((self.path / "split.json").read_text())
        self.token_labels: bool = meta["token_labels"]
        self.padding: dict[str, int] = meta["padding"]
        self._offsets: Array = np.load(self.path / "offsets.npy")
        self._columns = {
            name: np.load(self.path / f"{name}.npy", mmap_mode="r") for name in (*self.padding, "labels")
        }

    @classmethod
    def open(cls, path: Path) -> Split:
        """The split stored in a directory."""
        return cls(path)

    def __reduce__(self) -> tuple[type[Split], tuple[Path]]:
        return Split, (self.path,)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @property
    def offsets(self) -> Array:
        """(N + 1,) where each row starts among all tokens."""
        return self._offsets

    @cached_property
    def lengths(self) -> Array:
        """(N,) tokens of each row, special ones included."""
        return np.diff(self._offsets)

    @property
    def labels(self) -> list[Array] | Array:
        """Per row what :meth:`Task.score` takes: a class or number, or the classes of its labelled positions."""
        labels = self._columns["labels"]
        if not self.token_labels:
            return np.asarray(labels)
        rows = np.split(np.asarray(labels), self._offsets[1:-1])
        return [row[row != IGNORED] for row in rows]

    @property
    def labelled(self) -> Array:
        """(tokens,) whether each token of a token task carries a label: the first of each word does."""
        labelled: Array = np.asarray(self._columns["labels"]) != IGNORED
        return labelled

    def places(self, rows: Array) -> Array:
        """Where the tokens of these rows stand among all tokens, row after row."""
        lengths = self.lengths[rows]
        columns = np.arange(lengths.max())
        places: Array = (self._offsets[rows][:, None] + columns)[columns < lengths[:, None]]
        return places

    def arrays(self, rows: Sequence[int] | Array) -> dict[str, Array]:
        """A batch as NumPy arrays, padded to its longest row.

        ``input_ids``, ``attention_mask``, perhaps ``token_type_ids`` (B, S), ``labels`` (B,) or (B, S), and
        ``index`` (B,), the rows themselves; int64, and float32 for the labels of a regression.
        """
        index = np.asarray(rows, dtype=np.int64)
        lengths, places = self.lengths[index], self.places(index)
        mask = np.arange(lengths.max()) < lengths[:, None]
        padded = {**self.padding, **({"labels": IGNORED} if self.token_labels else {})}
        batch = {}
        for name, padding in padded.items():
            batch[name] = np.full(mask.shape, padding, dtype=np.int64)
            batch[name][mask] = self._columns[name][places]
        if not self.token_labels:
            batch["labels"] = np.asarray(self._columns["labels"][index])
        return {**batch, "attention_mask": mask.astype(np.int64), "index": index}

    def rows_of(self, batch: Batch) -> Array | None:
        """The rows that a batch consists of; None where it has no ``index``, or its texts are not those rows'."""
        names = (*self.padding, "attention_mask")
        if any(name not in batch for name in ("index", *names)):
            return None
        rows = batch["index"].cpu().numpy()
        if rows.min() < 0 or rows.max() >= len(self):
            return None
        own = self.arrays(rows)
        width = own["attention_mask"].shape[1]
        theirs = {name: batch[name].cpu().numpy() for name in names}
        same = all(np.array_equal(theirs[name][:, :width], own[name]) for name in theirs)
        return rows if same and not theirs["attention_mask"][:, width:].any() else None

    def batch(self, rows: Sequence[int] | Array) -> Batch:
        """:meth:`arrays` as tensors on the CPU."""
        import torch

        return {name: torch.from_numpy(array) for name, array in self.arrays(rows).items()}


def tokenize(
    raw: Raw, tokenizer: PreTrainedTokenizerBase, study: Study, task: Task, cache: Path
) -> dict[str, Split]:
    """Every split tokenised, or found in the cache; ``test`` and ``unlabelled`` only if the study has such data."""
    return {
        name: tokenize_rows(rows, tokenizer, study.data.max_length, task, cache)
        for name, rows in raw.splits().items()
    }


def tokenize_rows(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, max_length: int, task: Task, cache: Path
) -> Split:
    """Rows tokenised and cut to ``max_length`` tokens, under ``cache/<hash of all that decides the result>``.

    In token tasks a word's first piece carries its label. Words that are cut off, or of which the tokenizer
    leaves nothing, have no label, and so are not scored.
    """
    key = digest(["split", FORMAT, rows.digest, tokenizer_digest(tokenizer), max_length, task.to_dict()])

    def build(directory: Path) -> None:
        _write(directory, _encode(rows, tokenizer, max_length, task), tokenizer, task)

    return Split.open(content_addressed(cache, key, build))


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of all that decides how a tokenizer encodes, but for the length it cuts at."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    # every call sets these two anew
    state = {name: value for name, value in content.items() if name not in ("truncation", "padding")}
    return digest([state, sorted(tokenizer.model_input_names), tokenizer.pad_token_id])


def _encode(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, max_length: int, task: Task, block: int = 1000
) -> dict[str, list[Array]]:
    """Per row an array of each column; in blocks, since the tokenizer's own output takes far more memory."""
    names = [name for name in tokenizer.model_input_names if name != "attention_mask"]
    columns: dict[str, list[Array]] = {name: [] for name in (*names, "labels")}
    for start in range(0, len(rows), block):
        part = slice(start, start + block)
        encoding = tokenizer(
            list(rows.texts[part]),
            None if rows.pairs is None else list(rows.pairs[part]),
            truncation=True,
            max_length=max_length,
            return_attention_mask=False,
            is_split_into_words=task.tokens,
        )
        for name in names:
            columns[name] += [np.array(ids, dtype=np.int32) for ids in encoding[name]]
        for row, label in enumerate(rows.labels[part]):
            columns["labels"].append(_align(encoding.word_ids(row), label) if task.tokens else np.array([label]))
    return columns


def _align(words: Sequence[int | None], labels: Sequence[int]) -> Array:
    """Labels for each token: a word's own at its first piece, IGNORED elsewhere."""
    before = (None, *words)
    firsts = (word is not None and word != last for word, last in zip(words, before, strict=False))
    return np.array([labels[w] if w is not None and f else IGNORED for w, f in zip(words, firsts, strict=True)])


def _write(
    directory: Path, columns: dict[str, list[Array]], tokenizer: PreTrainedTokenizerBase, task: Task
) -> None:
    lengths = [len(row) for row in columns["input_ids"]]
    np.save(directory / "offsets.npy", np.cumsum([0, *lengths], dtype=np.int64))
    for name, rows in columns.items():
        kind = np.int32 if name != "labels" else np.int64 if task.labels else np.float32
        np.save(directory / f"{name}.npy", np.concatenate(rows).astype(kind))
    padding = {name: tokenizer.pad_token_id if name == "input_ids" else 0 for name in columns if name != "labels"}
    meta = {"format": FORMAT, "token_labels": task.tokens, "padding": padding}
    (directory / "split.json").write_text(json.dumps(meta))


def training_batches(split: Split, batch_size: int, seed: int) -> Iterator[Batch]:
    """Endless batches, every row once an epoch in an order of the seed's own.

    Rows are shuffled, sorted by length within pools of ``POOL`` batches, so that little is padded, and the
    batches shuffled again.
    """
    epoch = 0
    while True:
        generator = np.random.default_rng((seed, epoch))
        for rows in bucketed(split.lengths, batch_size, generator):
            yield split.batch(rows)
        epoch += 1


def without_labels(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Batches without ``labels``, which mean nothing where there are none, and without ``index``."""
    for batch in batches:
        yield {name: tensor for name, tensor in batch.items() if name not in ("labels", "index")}


def bucketed(lengths: Array, batch_size: int, generator: np.random.Generator) -> list[Array]:
    """One epoch's batches of row numbers; at most one is smaller than ``batch_size``."""
    order = generator.permutation(len(lengths))
    pools = _chunks(order, POOL * batch_size)
    batches = [b for pool in pools for b in _chunks(pool[np.argsort(lengths[pool], kind="stable")], batch_size)]
    return [batches[i] for i in generator.permutation(len(batches))]


def ordered_batches(split: Split, batch_size: int) -> Iterator[Batch]:
    """Every row once, from the shortest to the longest."""
    for rows in _chunks(np.argsort(split.lengths, kind="stable"), batch_size):
        yield split.batch(rows)


def _chunks(rows: Array, size: int) -> list[Array]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]

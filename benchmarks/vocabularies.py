"""What do tokenizers of fewer pieces make of text they were not counted on?

``python -m benchmarks.vocabularies SHARED``

WordPiece is the pretrained encoder's; the byte-level tokenizer is learned here from the training text of three data
sets. Both are cut by SST-2's training text and read its development and test text. SHARED is a folder with
``data/<set>/*.jsonl`` and ``models/all-minilm-l6-v2``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
from compress_search_plugins.vocabulary_pruning import choose
from tokenizers import AddedToken, ByteLevelBPETokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from benchmarks import tables
from compress_search.encoders import Pieces, keep_pieces

LEARNED_FROM = ("sst2", "emotion", "trec6")
LEARNED_PIECES = 16_000
PARTS = (0.7, 0.5, 0.25, 0.125)
HEADER = ["tokenizer", "pieces", "part", "text", "length", "read as before", "unknown tokens", "decoded to itself"]
TOLD = (
    "Pieces kept: the most frequent of SST-2's training text, and what they and all characters or bytes need. "
    "Length: tokens of all sentences beside those of the whole tokenizer; read as before, unknown and decoded to "
    "itself: parts of the sentences, of their tokens, and of the sentences again, blanks and case as the tokenizer "
    "writes them."
)


def texts(shared: Path, name: str, part: str) -> list[str]:
    """The texts of a data set."""
    lines = (shared / "data" / name / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def byte_level(sources: list[str]) -> PreTrainedTokenizerBase:
    """A byte-level BPE learned from these texts."""
    learned = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    learned.train_from_iterator(sources, LEARNED_PIECES, special_tokens=special, show_progress=False)
    named = {"pad_token": "<pad>", "unk_token": "<unk>", "mask_token": AddedToken("<mask>", lstrip=True)}
    return PreTrainedTokenizerFast(tokenizer_object=learned._tokenizer, **named)


def cut(tokenizer: PreTrainedTokenizerBase, counted: list[str], part: float) -> PreTrainedTokenizerBase:
    """The tokenizer with that part of its pieces."""
    ids = np.concatenate(tokenizer(counted)["input_ids"])
    params = {"criterion": "keep", "keep": part, "keep_characters": True}
    return keep_pieces(tokenizer, choose(Pieces(tokenizer), ids, len(tokenizer), params))


def rows(name: str, whole: PreTrainedTokenizerBase, shared: Path) -> Iterator[list[object]]:
    """One row for each part and text."""
    counted = texts(shared, "sst2", "train")
    for part in PARTS:
        fewer = cut(whole, counted, part)
        for split in ("dev", "test"):
            yield [name, f"{len(fewer):,}", part, split, *compared(whole, fewer, texts(shared, "sst2", split))]


def compared(whole: PreTrainedTokenizerBase, fewer: PreTrainedTokenizerBase, read: list[str]) -> list[str]:
    """Length, unchanged readings, unknown tokens and faithful decoding of texts."""
    before, after = _read(whole, read), _read(fewer, read)
    alike = [
        whole.convert_ids_to_tokens(a) == fewer.convert_ids_to_tokens(b) for a, b in zip(before, after, strict=True)
    ]
    unknown = [token == fewer.unk_token_id for row in after for token in row]
    faithful = [_decoded(whole, a) == _decoded(fewer, b) for a, b in zip(before, after, strict=True)]
    longer = sum(map(len, after)) / sum(map(len, before))
    return [f"{longer:.2f}", *(f"{100 * float(np.mean(found)):.1f} %" for found in (alike, unknown, faithful))]


def _read(tokenizer: PreTrainedTokenizerBase, read: list[str]) -> list[list[int]]:
    found: Any = tokenizer(read, add_special_tokens=False)["input_ids"]
    return found  # type: ignore[no-any-return]


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids))


@click.command()
@click.argument("shared", type=click.Path(exists=True, file_okay=False, path_type=Path))
def main(shared: Path) -> None:
    """Cut both tokenizers and write benchmarks/results/vocabularies.md."""
    sources = [text for name in LEARNED_FROM for text in texts(shared, name, "train")]
    learned_from = f"{', '.join(LEARNED_FROM[:-1])} and {LEARNED_FROM[-1]}"
    kinds = {
        "WordPiece of all-MiniLM-L6": AutoTokenizer.from_pretrained(shared / "models/all-minilm-l6-v2"),
        f"byte-level BPE learned from {learned_from}": byte_level(sources),
    }
    found = [row for name, tokenizer in kinds.items() for row in rows(name, tokenizer, shared)]
    title = "What tokenizers of fewer pieces make of other text"
    click.echo(tables.write("vocabularies", title, [TOLD, tables.table(HEADER, found)]))


if __name__ == "__main__":
    main()

"""The pieces of a tokenizer: how many it cannot do without, and the same tokenizer with only some of them.

Owns how tokenizers are written down by the ``tokenizers`` library. Knows no networks, and does not choose.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from transformers import AutoTokenizer, PreTrainedTokenizerBase

CONTINUATION = "##"
"""What WordPiece writes before a piece that does not begin a word."""

BYTES = "ByteLevelBPE"
"""The kind of a BPE that spells text in bytes; other kinds are called as the library calls them."""

_REASONS = {
    "Unigram": "its tokenizer is Unigram's (SentencePiece), which weighs all pieces of a word against each other",
    "WordLevel": "its tokenizer knows whole words only, and could not spell a word whose piece is gone",
    "BPE": "its tokenizer's BPE does not spell in bytes, and could meet what it cannot spell",
}
_EXPECTED = "expected WordPiece or byte-level BPE"


class Pieces:
    """What a tokenizer is made of, read off its JSON form.

    ``kind``: of the model, as the library calls it, or :data:`BYTES`; ``ids``: piece -> id of the model's own, of
    Unigram none; ``special``: ids of what was added to them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
        self.model: dict[str, Any] = self.state["model"]
        self.kind = str(self.model.get("type"))
        if self.kind == "BPE" and _reads_bytes(self.state["pre_tokenizer"]):
            self.kind = BYTES
        self.ids: dict[str, int] = {} if self.kind == "Unigram" else self.model["vocab"]
        self.special = {int(token["id"]) for token in self.state["added_tokens"]}
        self.special |= {int(number) for number in tokenizer.all_special_ids}
        self.padding = cast(int, tokenizer.pad_token_id)

    @property
    def reserved(self) -> set[int]:
        """Special pieces, and all up to the padding's, from whose id some families count positions."""
        return self.special | set(range(self.padding + 1))

    @property
    def characters(self) -> set[int]:
        """Single characters, at the start of a word or within it; for BPE, the pieces that no merge makes."""
        if self.parents:
            return set(self.ids.values()) - self.parents.keys()
        return {number for piece, number in self.ids.items() if len(piece.removeprefix(CONTINUATION)) == 1}

    @cached_property
    def parents(self) -> dict[int, tuple[int, int]]:
        """For BPE the two pieces that each piece is merged from, by id."""
        pairs = map(_pair, self.model.get("merges", ()))
        return {self.ids[left + right]: (self.ids[left], self.ids[right]) for left, right in pairs}


def refusal(kind: str) -> str | None:
    """Why no pieces can be taken out of tokenizers of this kind (:attr:`Pieces.kind`); None when they can."""
    if kind in ("WordPiece", BYTES):
        return None
    return f"{_REASONS.get(kind, f'its tokenizer is of the kind {kind}')}: {_EXPECTED}"


def keep_pieces(tokenizer: PreTrainedTokenizerBase, kept: Sequence[int]) -> PreTrainedTokenizerBase:
    """The tokenizer with only these pieces, numbered in the order given; the argument stays as it was.

    ``kept`` may name ids that no piece has, as embedding tables can be longer than vocabularies.

    Raises:
        ValueError: a special piece is missing, or the tokenizer is of a kind that is not supported.
    """
    pieces = Pieces(tokenizer)
    if reason := refusal(pieces.kind):
        raise ValueError(reason)
    number = {old: new for new, old in enumerate(kept)}
    if lost := pieces.special - number.keys():
        raise ValueError(f"special pieces must stay, and {sorted(lost)} would go")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        text = json.dumps(_rewritten(pieces.state, number), ensure_ascii=False)
        (Path(folder) / "tokenizer.json").write_text(text, encoding="utf-8")
        return cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(folder))


def kept_ids(before: PreTrainedTokenizerBase, after: PreTrainedTokenizerBase) -> list[int] | None:
    """The ids in ``before`` of all pieces of ``after``, in order; None if it has pieces or numbers of its own."""
    old, new = before.get_vocab(), after.get_vocab()
    order = sorted(new, key=new.__getitem__)
    if not new.keys() <= old.keys() or [new[piece] for piece in order] != list(range(len(order))):
        return None
    return [old[piece] for piece in order]


def _rewritten(state: Mapping[str, Any], number: Mapping[int, int]) -> dict[str, Any]:
    model = dict(state["model"])
    vocabulary = {piece: number[old] for piece, old in model["vocab"].items() if old in number}
    model["vocab"] = vocabulary
    if "merges" in model:
        model["merges"] = [
            pair for pair in map(_pair, model["merges"]) if {*pair, "".join(pair)} <= vocabulary.keys()
        ]
    added = [{**token, "id": number[token["id"]]} for token in state["added_tokens"]]
    renumbered = {part: _renumbered(state[part], number) for part in ("post_processor", "padding")}
    return {**state, **renumbered, "model": model, "added_tokens": added}


def _renumbered(node: Any, number: Mapping[int, int]) -> Any:
    """A part of the JSON form with new ids: ``ids`` lists, ``pad_id``, and the pairs ``sep`` and ``cls``."""
    if isinstance(node, list):
        return [_renumbered(item, number) for item in node]
    if not isinstance(node, dict):
        return node
    changed = {name: _renumbered(value, number) for name, value in node.items()}
    if "ids" in node:
        changed["ids"] = [number[old] for old in node["ids"]]
    if "pad_id" in node:
        changed["pad_id"] = number[node["pad_id"]]
    for name in ("sep", "cls"):
        if isinstance(node.get(name), list):
            changed[name] = [node[name][0], number[node[name][1]]]
    return changed


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    """A merge, which older files write as one string."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _reads_bytes(part: Any) -> bool:
    """Whether a pre-tokenizer spells text in bytes, on its own or as one of a sequence."""
    if not isinstance(part, dict):
        return False
    return part["type"] == "ByteLevel" or any(map(_reads_bytes, part.get("pretokenizers", ())))

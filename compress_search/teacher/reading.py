"""Teachers and what is known of them, read by a candidate's own tokenizer.

A teacher reads fewer pieces if its embeddings are cut to them. What it said of whole texts stays what it said, as
the texts are the same; what it said of tokens is looked up word by word. Owns that lookup; chooses no pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from torch import nn

from compress_search.data import Split
from compress_search.encoders import keep_tokens

Array = NDArray[Any]


def cut(network: nn.Module, kept: Sequence[int]) -> nn.Module:
    """The network with only these token embeddings, in this order; every other tensor is the argument's own."""
    tensors = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    reader: Any = deepcopy(network, tensors)
    words = reader.get_input_embeddings().weight
    keep_tokens(reader, kept)
    if isinstance(decoder := reader.get_output_embeddings(), nn.Linear):
        # a language model scores pieces, too; its matrix is often the embeddings' own, and stays so
        tied = decoder.weight is words
        decoder.weight, decoder.bias = (nn.Parameter(t[list(kept)], False) for t in (decoder.weight, decoder.bias))
        if tied:
            decoder.weight = reader.get_input_embeddings().weight
        decoder.out_features = len(kept)
    return cast(nn.Module, reader)


def matching_places(before: Split, after: Split) -> Array:
    """Where in one reading of texts the tokens are that correspond to those of another: (tokens of ``after``,).

    Both are splits of a token task and the same rows. The n-th piece of a word corresponds to the word's n-th, or
    to its last where there were fewer. A word for which there was no room before, as texts are cut at a number of
    tokens, gets the last one that there was.
    """
    old, new = _Words(before), _Words(after)
    row = np.repeat(np.arange(len(after)), after.lengths)
    number = new.word - new.first[row]
    ends = number == new.count[row] - 1
    number = np.where(ends, old.count[row] - 1, np.clip(number, 0, np.maximum(old.count[row] - 2, 0)))
    word = old.first[row] + number
    piece = np.arange(len(row)) - new.starts[new.word]
    found: Array = old.starts[word] + np.minimum(piece, old.lengths[word] - 1)
    return found


class _Words:
    """The words of a split, counted through all rows; the special tokens at both ends of a row are words too."""

    def __init__(self, split: Split) -> None:
        begins = split.labelled.copy()
        begins[split.offsets[:-1]] = begins[split.offsets[1:] - 1] = True
        self.word = np.cumsum(begins) - 1  # (tokens,) of each token
        self.starts = np.flatnonzero(begins)  # (words,)
        self.lengths = np.diff(self.starts, append=len(begins))  # (words,) in tokens
        self.first = self.word[split.offsets[:-1]]  # (rows,)
        self.count = self.word[split.offsets[1:] - 1] - self.first + 1  # (rows,)

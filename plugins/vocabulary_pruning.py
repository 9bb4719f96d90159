"""Vocabulary pruning: drop the pieces that the training text seldom or never uses, with their embeddings.

Owns which pieces stay. Fewer rows make a smaller model, not a faster one: a lookup costs what it did. Text made of
kept pieces is read as before, and so gives the same outputs; other words are spelled in shorter pieces that stay,
down to single characters or bytes. The tokenizer is rewritten, and goes with the model wherever that goes. Text
without labels, of which a study may have more, is counted on request.

``keep`` is the part of the vocabulary that *stays*. ``coverage`` and ``min_count`` let the data say how many pieces
that is, so that the number is not known before: a subject's ``vocabulary`` is then an upper bound, which the trait
"data-sized" says.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress_search import Candidate, Context, Dim, Method, Params, Stage, Subject, TrialError
from compress_search.encoders import Pieces, keep_pieces, keep_tokens, refusal

from .distillation.objective import text_missing

Ids = NDArray[np.int64]

LEAST = 2000
"""Pieces that stay at least where nothing is known of the tokenizer; half of them all where there are fewer."""

GRID = 0.05
"""Distance of the parts of a vocabulary that are tried: each has its tokenizer, and its own copy of the data."""


COUNTED = 512
"""Texts of a batch whose pieces are counted."""


class VocabularyPruning(Method):
    """A smaller embedding table with a tokenizer to match."""

    stage = Stage.VOCABULARY

    def search_space(self, teacher: Subject) -> Mapping[str, Dim]:
        """How many pieces stay: a part of all, or what covers so much of the training text, or occurs so often."""
        low = _lowest(teacher)

        def by(criterion: str) -> Mapping[str, tuple[str]]:
            return {"criterion": (criterion,)}

        return {
            "criterion": Dim.choice(("keep", "coverage", "min_count"), "keep", expert=True),
            "keep": Dim.real(low, 1.0, max(low, 0.5), step=GRID, when=by("keep")),
            "coverage": Dim.real(0.9, 1.0, 0.9999, when=by("coverage"), expert=True),
            "min_count": Dim.integer(1, 20, 1, when=by("min_count"), expert=True),
            "keep_characters": Dim.flag(True, expert=True),
            **({"unlabelled_text": Dim.flag(False, expert=True)} if "unlabelled" in teacher.traits else {}),
        }

    def missing(self, teacher: Subject) -> Mapping[str, str]:
        """Text to count that has no labels."""
        return text_missing(teacher, "unlabelled_text")

    def unsupported(self, subject: Subject) -> str | None:
        """Tokenizers out of which no pieces can be taken, where the engine knows which the teacher has."""
        kinds = [trait.partition(":")[2] for trait in subject.traits if trait.startswith("tokenizer:")]
        reasons = [reason for reason in map(refusal, kinds) if reason]
        if not reasons and _lowest(subject) >= 1:
            return f"nearly all of its {subject.vocabulary} pieces are single characters"
        return reasons[0] if reasons else None

    def changes_nothing(self, subject: Subject, params: Params) -> bool:
        """Whether every piece stays."""
        return params["criterion"] == "keep" and _number(subject, params) == subject.vocabulary

    def effective(self, subject: Subject, params: Params) -> Params:
        """The exact part that stays, after rounding to whole pieces."""
        if params["criterion"] != "keep":
            return params
        return {**params, "keep": _number(subject, params) / subject.vocabulary}

    def after(self, subject: Subject, params: Params) -> Subject:
        """The pieces that stay, where they are counted here; lossy, since other words are spelled anew."""
        if params["criterion"] != "keep":
            return subject.having("lossy", "data-sized")
        number = _number(subject, params)
        return subject if number == subject.vocabulary else subject.having("lossy", vocabulary=number)

    def apply(self, candidate: Candidate, params: Params, context: Context) -> Candidate:
        """Count, choose, and cut tokenizer and network alike."""
        pieces = Pieces(candidate.tokenizer)
        if reason := refusal(pieces.kind):
            raise TrialError(reason)
        subject = candidate.subject
        text = np.concatenate(list(_texts(context, unlabelled=bool(params.get("unlabelled_text")))))
        kept = choose(pieces, text, subject.vocabulary, params)
        pruned = candidate.copy()
        keep_tokens(pruned.network, kept)
        tokenizer = keep_pieces(candidate.tokenizer, kept)
        return pruned.replace(tokenizer=tokenizer, subject=self.after(subject, params))


def _lowest(subject: Subject) -> float:
    """The smallest part of the vocabulary to try, on the grid."""
    least = subject.alphabet or min(LEAST, subject.vocabulary // 2)
    return min(1.0, round(max(2 * GRID, math.ceil(least / subject.vocabulary / GRID) * GRID), 2))


def _number(subject: Subject, params: Params) -> int:
    return min(subject.vocabulary, math.ceil(float(params["keep"]) * subject.vocabulary - 1e-6))


def _texts(context: Context, unlabelled: bool) -> Iterator[Ids]:
    """The ids of all training rows, and of the texts without labels, one after another without padding."""
    batches = context.calibration(context.examples, batch_size=COUNTED)
    for batch in chain(batches, context.unlabelled(COUNTED, once=True) if unlabelled else ()):
        yield batch["input_ids"][batch["attention_mask"].bool()].cpu().numpy()


# --- which pieces stay ----------------------------------------------------------------------------------------


def choose(pieces: Pieces, text: Ids, size: int, params: Params) -> list[int]:
    """Ids of the pieces that stay, in their old order.

    Those the tokenizer cannot do without, then the most frequent, each with the pieces it is merged from; of
    equally frequent ones the lower id, as vocabularies are written from the most frequent piece on. Where a word of
    the training text could no longer be spelled, all the pieces it has stay too.

    Args:
        pieces: of the tokenizer.
        text: ids of the training text, rows one after another.
        size: rows of the embedding table.
        params: the method's.

    Raises:
        TrialError: ``keep`` is less than what must stay.
    """
    counts = np.bincount(text, minlength=size)
    needed = pieces.reserved | (pieces.characters if params["keep_characters"] or pieces.parents else set())
    while True:
        kept = _chosen(counts, needed, pieces.parents, params)
        lost = unspelled(pieces, text, kept)
        if not lost:
            return sorted(kept)
        needed |= lost


def _chosen(counts: Ids, needed: set[int], parents: Mapping[int, tuple[int, int]], params: Params) -> set[int]:
    order = np.argsort(-counts, kind="stable").tolist()
    if params["criterion"] != "keep":
        wanted = [piece for piece in order if counts[piece]][: _wanted(counts, params)]
        return set().union(needed, *(family(piece, parents) for piece in wanted))
    number = math.ceil(float(params["keep"]) * len(counts) - 1e-6)
    if len(needed) > number:
        raise TrialError(
            f"keep is {float(params['keep']):.3g}, {number} of {len(counts)} pieces, and {len(needed)} must stay "
            f"to spell all text: expected at least {len(needed) / len(counts):.3g}"
        )
    return fill(order, needed, parents, number)


def _wanted(counts: Ids, params: Params) -> int:
    """How many of the most frequent pieces cover the text, or occur often enough."""
    if params["criterion"] == "min_count":
        return int((counts >= int(params["min_count"])).sum())
    covered = np.cumsum(np.sort(counts)[::-1])
    return int(np.searchsorted(covered, float(params["coverage"]) * covered[-1] * (1 - 1e-12))) + 1


def fill(order: Sequence[int], needed: set[int], parents: Mapping[int, tuple[int, int]], number: int) -> set[int]:
    """Exactly ``number`` pieces: the needed ones, then the first in order whose families still find room.

    What found none at first does later, when its parents have come in by themselves; at the latest one by one.
    """
    kept = set(needed)
    while len(kept) < number:
        for piece in order:
            new = family(piece, parents) - kept
            if len(kept) + len(new) <= number:
                kept |= new
            if len(kept) == number:
                break
    return kept


def family(piece: int, parents: Mapping[int, tuple[int, int]]) -> set[int]:
    """A piece and all that it is merged from, down to single bytes."""
    found, open_ones = set[int](), [piece]
    while open_ones:
        found.add(one := open_ones.pop())
        open_ones += [parent for parent in parents.get(one, ()) if parent not in found]
    return found


def unspelled(pieces: Pieces, text: Ids, kept: set[int]) -> set[int]:
    """All pieces of those words of the text that the kept pieces no longer spell; never any for bytes."""
    if pieces.kind != "WordPiece":
        return set()
    names = {number: piece for piece, number in pieces.ids.items()}
    model = _word_piece(pieces, kept)
    unknown = pieces.model["unk_token"]
    lost: set[int] = set()
    for word in changed_words(pieces, text, kept):
        spelling = "".join([names[word[0]], *(names[piece].removeprefix(_prefix(pieces)) for piece in word[1:])])
        if any(token.value == unknown for token in model.tokenize(spelling)):
            lost.update(word)
    return lost


def changed_words(pieces: Pieces, text: Ids, kept: set[int]) -> set[tuple[int, ...]]:
    """The distinct words, as their pieces, of which a piece is gone."""
    size = int(text.max()) + 1
    within, gone = np.zeros(size, dtype=bool), np.ones(size, dtype=bool)
    within[[i for piece, i in pieces.ids.items() if i < size and piece.startswith(_prefix(pieces))]] = True
    gone[[i for i in kept if i < size]] = False
    starts = np.flatnonzero(~within[text])
    touched = np.unique(np.searchsorted(starts, np.flatnonzero(gone[text]), side="right") - 1)
    ends = np.append(starts, len(text))
    return {tuple(text[ends[word] : ends[word + 1]].tolist()) for word in touched}


def _prefix(pieces: Pieces) -> str:
    return str(pieces.model["continuing_subword_prefix"])


def _word_piece(pieces: Pieces, kept: set[int]) -> Any:
    """The tokenizer's model, which segments one word, with only the kept pieces."""
    from tokenizers.models import WordPiece

    vocabulary = {piece: number for piece, number in pieces.ids.items() if number in kept}
    return WordPiece(
        vocabulary,
        unk_token=pieces.model["unk_token"],
        max_input_chars_per_word=pieces.model["max_input_chars_per_word"],
        continuing_subword_prefix=_prefix(pieces),
    )

"""More examples than a study has: the training texts with other words in some places, answered by the teacher.

A word of one piece gives way to one that a masked language model expects there, a word of several to one whose
embedding is near theirs. Owns which words may go and what comes for them. Trains nothing, and keeps nothing on
disk: examples are made as they are drawn, others each time.

Source: Jiao et al. 2020, TinyBERT, algorithm 1 (data augmentation); there with GloVe vectors for words of several
pieces.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from compress_search import Batch, Candidate, Context, Dim, Params, Subject, TrialError
from compress_search.encoders import Crf, Pieces, crf_of, embeddings, inputs
from compress_search.losses import IGNORED

from .masked_text import MASKED_LM

CHOICES, PROBABILITY = 15, 0.4
"""The paper's K, words to choose from, and p_t, the probability of a word to be replaced."""
COMMON = 0.2
"""The part of the texts from which on a word that stands in so many says nothing of any, as "the" does."""
SAMPLE = 1000
"""Texts in which common words are counted."""
TEXTS = 8
"""Texts that the language model reads at a time: its logits are over a vocabulary."""
CONTINUATION = "##"
WORDPIECE = "a WordPiece tokenizer, whose pieces tell where words begin"
"""What a dimension needs that is only there with such a tokenizer."""

NO_MODEL = f"augmentation needs {MASKED_LM}"
NO_TAG = "augmentation replaces words outside entities, and no tag is O"


@dataclass(frozen=True)
class Words:
    """What a WordPiece tokenizer's ids stand for, (V,) bool each, on the CPU.

    ``begins``: letters with which a word begins; ``goes_on``: a piece within a word; ``letters``: letters alone.
    """

    begins: Tensor
    goes_on: Tensor
    letters: Tensor

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Words:
        """Those of a tokenizer.

        Raises:
            TrialError: it is no WordPiece.
        """
        pieces = Pieces(tokenizer)
        if pieces.kind != "WordPiece":
            raise TrialError(
                f"words can be replaced where WordPiece spells them, and the tokenizer is {pieces.kind}"
            )
        begins, goes_on, letters = torch.zeros(3, len(tokenizer), dtype=torch.bool)
        for piece, number in pieces.ids.items():
            goes_on[number] = inner = piece.startswith(CONTINUATION)
            letters[number] = piece.removeprefix(CONTINUATION).isalpha() and number not in pieces.special
            begins[number] = letters[number] and not inner
        return cls(begins, goes_on, letters)

    def without(self, common: Tensor) -> Words:
        """The same words but for these, (V,) bool, which are neither replaced nor put anywhere."""
        return Words(self.begins & ~common, self.goes_on, self.letters)


def common_words(batches: Iterable[Batch], size: int) -> Tensor:
    """(V,) whether a piece stands in more than a certain part of the texts."""
    counts, texts = torch.zeros(size), 0
    for batch in batches:
        for ids, mask in zip(batch["input_ids"].cpu(), batch["attention_mask"].cpu(), strict=True):
            counts[ids[mask.bool()].unique()] += 1
            texts += 1
    return counts > COMMON * max(texts, 1)


@dataclass(frozen=True)
class Augmenter:
    """Replaces words of batches.

    ``outside`` is the label of the words that may go, of token tasks: no entity changes. ``unchanged`` is the
    part of the texts that stay as they are.
    """

    words: Words
    model: nn.Module
    table: Tensor
    mask: int
    padding: int
    generator: torch.Generator
    outside: int | None = None
    unchanged: float = 0.0

    def __call__(self, batch: Batch) -> Batch:
        """The batch with other words, without ``index``; labels of tokens go with their words."""
        plain = {name: tensor for name, tensor in batch.items() if name != "index"}
        cpu = {name: tensor.cpu() for name, tensor in plain.items()}
        ids, numbers = cpu["input_ids"], self._numbered(cpu)
        chosen = self._chosen(cpu, numbers)
        if not chosen.any():
            return plain
        firsts = chosen & ~self.words.goes_on[ids]
        lone = firsts & (_per_word(chosen, numbers) == 1)
        new = ids.clone()
        new[lone] = self._expected(batch, chosen, lone)
        spelt = firsts & ~lone
        if spelt.any():
            words = [ids[row, numbers[row] == numbers[row, column]] for row, column in spelt.nonzero().tolist()]
            new[spelt] = self._similar(words)
        kept = cpu["attention_mask"].bool() & (firsts | ~chosen)
        packed = _packed({**cpu, "input_ids": new}, kept, self.padding)
        return {name: tensor.to(batch["input_ids"].device) for name, tensor in packed.items()}

    def _numbered(self, batch: Batch) -> Tensor:
        """(B, S) which word, special tokens and punctuation counted too, each token belongs to."""
        return (~self.words.goes_on[batch["input_ids"]]).cumsum(1)

    def _chosen(self, batch: Batch, numbers: Tensor) -> Tensor:
        """(B, S) whether a token belongs to a word that is to go."""
        ids, first = batch["input_ids"], ~self.words.goes_on[batch["input_ids"]]
        wrong = ~self.words.letters[ids] | (first & ~self.words.begins[ids]) | ~batch["attention_mask"].bool()
        if self.outside is not None:
            wrong |= first & (batch["labels"] != self.outside)
        draws = torch.rand(ids.shape[0], ids.shape[1] + 1, generator=self.generator) < PROBABILITY
        changed = torch.rand(len(ids), 1, generator=self.generator) >= self.unchanged
        return (_per_word(wrong, numbers) == 0) & draws.gather(1, numbers) & changed

    def _expected(self, batch: Batch, chosen: Tensor, lone: Tensor) -> Tensor:
        """(n,) for each lone token an id that the language model expects there, all chosen ones being hidden."""
        holes = torch.where(chosen, self.mask, batch["input_ids"].cpu())
        found = []
        for start in range(0, len(holes), TEXTS):
            rows = slice(start, start + TEXTS)
            with torch.no_grad():
                logits = self.model(**self._shown(holes[rows], batch, rows)).logits
            at = lone[rows].nonzero(as_tuple=True)
            found.append(logits[at][:, : len(self.words.begins)].float().cpu())
        return self._one_of_best(torch.cat(found))

    def _shown(self, holes: Tensor, batch: Batch, rows: slice) -> Batch:
        """Texts with holes, each with itself as a second segment behind, where the model reads that much."""
        texts, lengths = batch["input_ids"][rows].cpu(), batch["attention_mask"][rows].sum(1).tolist()
        # two positions are taken by padding in some families
        twice = 2 * max(lengths) - 1 <= cast(Any, self.model.config).max_position_embeddings - 2
        shown, segments = [], []
        for hole, text, length in zip(holes, texts, lengths, strict=True):
            behind = text[1:length] if twice else text[:0]
            shown.append(torch.cat([hole[:length], behind]))
            segments.append(torch.cat([torch.zeros_like(text[:length]), torch.ones_like(behind)]))
        made = {
            "input_ids": pad_sequence(shown, True, self.padding),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in shown], True, 0),
            "token_type_ids": pad_sequence(segments, True, 0),
        }
        return {name: made[name].to(batch["input_ids"].device) for name in inputs(self.model)}

    def _similar(self, words: Sequence[Tensor]) -> Tensor:
        """(n,) for each word, its pieces, the id of one of those nearest to their mean embedding, by cosine."""
        means = torch.stack([self.table[pieces].mean(0) for pieces in words])
        return self._one_of_best(means @ self._directions.T)

    @cached_property
    def _directions(self) -> Tensor:
        """(V, H) embeddings of length 1."""
        return F.normalize(self.table, dim=-1)

    def _one_of_best(self, scores: Tensor) -> Tensor:
        """(…) one of the words with the highest scores (…, V), each with the same probability."""
        choices = min(CHOICES, int(self.words.begins.sum()))
        best = scores.masked_fill(~self.words.begins, -torch.inf).topk(choices).indices
        picks = torch.randint(choices, (*best.shape[:-1], 1), generator=self.generator)
        return best.gather(-1, picks).squeeze(-1)


def _per_word(marked: Tensor, numbers: Tensor) -> Tensor:
    """(B, S) how many tokens of each token's word are marked."""
    counts = torch.zeros(numbers.shape[0], numbers.shape[1] + 1, dtype=torch.long)
    return counts.scatter_add(1, numbers, marked.long()).gather(1, numbers)


def _packed(batch: Batch, kept: Tensor, padding: int) -> Batch:
    """The batch with only the tokens that are kept, (B, S), moved together."""
    fill = {"input_ids": padding, "labels": IGNORED}
    return {
        name: tensor
        if tensor.shape != kept.shape
        else pad_sequence([row[keep] for row, keep in zip(tensor, kept, strict=True)], True, fill.get(name, 0))
        for name, tensor in batch.items()
    }


def answered(batch: Batch, logits: Tensor, crf: Crf | None = None) -> Batch:
    """The batch with the teacher's answers, by its logits (…, C), as labels: a class, or for C = 1 the number.

    Of token tasks where there were labels before; its best path where it has a CRF.
    """
    if logits.shape[-1] == 1:
        return {**batch, "labels": logits.squeeze(-1)}
    if crf is not None:
        return {**batch, "labels": crf.viterbi(logits, batch["labels"] != IGNORED)}
    answers = logits.argmax(-1)
    if answers.ndim == 2:
        answers = answers.masked_fill(batch["labels"] == IGNORED, IGNORED)
    return {**batch, "labels": answers}


def augmentation_space(
    teacher: Subject, *, usual: bool, when: Mapping[str, tuple[str | bool, ...]] | None = None
) -> dict[str, Dim]:
    """``augment``: other words in the examples; ``variants`` of each for one that stays as it is.

    Args:
        teacher: whose tokenizer has to spell words; with another there is nothing to choose.
        usual: whether words are replaced unless a study says otherwise, where they can be.
        when: when ``augment`` says something.
    """
    if not _spells_words(teacher):
        return {}
    there = usual and words_stay(teacher) is None
    return {
        "augment": Dim.flag(there, when=when, expert=not there),
        "variants": Dim.integer(1, 30, 10, when={"augment": (True,)}, expert=True),
    }


def augmentation_missing(teacher: Subject) -> dict[str, str]:
    """What :func:`augmentation_space` would need, for ``Method.missing``."""
    return {} if _spells_words(teacher) else dict.fromkeys(("augment", "variants"), WORDPIECE)


def augmentation_faults(subject: Subject, params: Params) -> dict[str, str]:
    """Why words cannot be replaced that are to be, for ``Method.faults``."""
    reason = words_stay(subject) if params.get("augment") else None
    return {"augment": f"true, and {reason}"} if reason else {}


def _spells_words(teacher: Subject) -> bool:
    kinds = {trait for trait in teacher.traits if trait.startswith("tokenizer:")}
    return kinds <= {"tokenizer:WordPiece"}


def words_stay(subject: Subject) -> str | None:
    """Why no words of a study's examples can be replaced; None where they can."""
    if "masked-lm" not in subject.traits:
        return NO_MODEL
    return NO_TAG if "all-tagged" in subject.traits else None


def augmenter(candidate: Candidate, context: Context, variants: int) -> Augmenter:
    """What replaces words of the study's training texts, by its masked language model.

    Args:
        candidate: its tokenizer cut the texts, and its labels are those of the task.
        context: lends the language model and the texts.
        variants: changed ones for each text that stays as it is.

    Raises:
        TrialError: there is no language model, no mask, no WordPiece, or of a token task no tag O.
    """
    model, tokenizer, network = context.masked_lm(), candidate.tokenizer, cast(Any, candidate.network)
    if model is None:
        raise TrialError(NO_MODEL)
    if tokenizer.mask_token_id is None:
        raise TrialError("augmentation needs a mask token, and the tokenizer has none")
    outside = None
    if candidate.subject.task == "token-classification":
        outside = network.config.label2id.get("O")
        if outside is None:
            raise TrialError(NO_TAG)
    table = cast(Tensor, cast(Any, embeddings(context.teacher)).word_embeddings.weight).detach().float().cpu()
    common = common_words(context.calibration(SAMPLE), len(tokenizer))
    return Augmenter(
        Words.of(tokenizer).without(common),
        model,
        table[: len(tokenizer)],
        tokenizer.mask_token_id,
        cast(int, tokenizer.pad_token_id),
        torch.Generator().manual_seed(context.seed),
        outside,
        1 / (variants + 1),
    )


def augmented(augment: Augmenter, context: Context, *, labels: bool) -> Iterator[Batch]:
    """Endless batches of changed training texts; with ``labels`` they bear the teacher's answers as such."""
    crf = crf_of(context.teacher)
    for batch in map(augment, context.training_batches()):
        yield answered(batch, context.teacher_logits(batch), crf) if labels else batch

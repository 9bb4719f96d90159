"""Vocabulary pruning: what stays is read as before, what is gone is spelled anew; the tokenizer loads anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compress_search_plugins.vocabulary_pruning import VocabularyPruning, choose, family, fill
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.implementations import BertWordPieceTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast, RobertaTokenizer

from compress_search import Candidate, Subject, TrialError
from compress_search.encoders import Pieces, describe, keep_pieces, keep_tokens, kept_ids, load, save, subject_of
from compress_search.space import defaults, narrow
from compress_search.testing import tiny_candidate, tiny_context
from tests import tiny

METHOD = VocabularyPruning()
TEXTS = [
    "the film was good",
    "a lovely story",
    "hopperman was here",
    "the actors and some awful film",
    "zigzag was 7",
]
WORDS = [text for row in tiny.tiny_rows(size=40) for text in [row["text"]]]


def word_piece() -> Any:
    return tiny.tiny_tokenizer()


def byte_bpe() -> Any:
    """A byte-level BPE of RoBERTa's form, learned from the tiny texts and from words that are not in them."""
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learned.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=360, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    learned.train_from_iterator([*WORDS, *[" ".join(tiny.PEOPLE + tiny.PLACES)] * 40], trainer)
    vocabulary = {**learned.get_vocab(), "<mask>": learned.get_vocab_size()}
    merges = [
        tuple(pair)
        for pair in Pieces(PreTrainedTokenizerFast(tokenizer_object=learned, pad_token="<pad>")).model["merges"]
    ]
    return RobertaTokenizer(vocab=vocabulary, merges=merges)


KINDS = {"WordPiece": word_piece, "ByteLevelBPE": byte_bpe}


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    return {kind: make() for kind, make in KINDS.items()}


def ids_of(tokenizer: Any, texts: list[str]) -> np.ndarray[Any, Any]:
    return np.concatenate([np.array(tokenizer(text)["input_ids"]) for text in texts])


def candidate_with(tokenizer: Any, family: str = "bert") -> Candidate:
    network = tiny.tiny_network(family=family, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    return Candidate(network, tokenizer, subject_of(network, "text-classification"))


class Text:
    """A context whose training text is given."""

    def __init__(self, tokenizer: Any, texts: list[str]) -> None:
        self.tokenizer, self.texts, self.examples = tokenizer, texts, len(texts)

    def calibration(self, examples: int, batch_size: int = 32) -> Iterator[dict[str, torch.Tensor]]:
        assert examples == self.examples
        for start in range(0, examples, batch_size):
            part = self.texts[start : start + batch_size]
            yield dict(self.tokenizer(part, padding=True, return_tensors="pt"))


def pruned(candidate: Candidate, texts: list[str], **params: Any) -> Candidate:
    space = {
        name: narrow(dim, params[name]) if name in params else dim
        for name, dim in METHOD.search_space(candidate.subject).items()
    }
    chosen = METHOD.effective(candidate.subject, defaults(space))
    context: Any = Text(candidate.tokenizer, texts)
    return METHOD.apply(candidate, chosen, context)


def logits(candidate: Candidate, text: str) -> torch.Tensor:
    batch = candidate.tokenizer([text], return_tensors="pt")
    with torch.no_grad():
        found: torch.Tensor = candidate.network(**batch).logits
    return found


# --- what the design asks for ---


@pytest.mark.parametrize(
    ("kind", "family"), [("WordPiece", "bert"), ("WordPiece", "distilbert"), ("ByteLevelBPE", "roberta")]
)
def test_with_full_coverage_tokens_and_logits_of_all_texts_are_what_they_were(tokenizers, kind, family):
    tokenizer = tiny.tiny_tokenizer(family) if kind == "WordPiece" else tokenizers[kind]
    before = candidate_with(tokenizer, family)
    after = pruned(before, WORDS, criterion="coverage", coverage=1.0)
    assert len(after.tokenizer) < len(before.tokenizer)
    for text in WORDS:
        assert after.tokenizer.tokenize(text) == before.tokenizer.tokenize(text)
        torch.testing.assert_close(logits(after, text), logits(before, text), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_the_number_kept_and_every_kept_piece_keeps_its_vector(tokenizers, kind):
    before = candidate_with(tokenizers[kind], "roberta" if kind == "ByteLevelBPE" else "bert")
    params = METHOD.effective(before.subject, {"criterion": "keep", "keep": 0.9, "keep_characters": True})
    after = pruned(before, WORDS, keep=0.9)
    assert after.subject == METHOD.after(before.subject, params)
    assert after.subject.without("lossy") == subject_of(after.network, "text-classification")
    assert after.subject.vocabulary == len(after.tokenizer) == -(-9 * len(before.tokenizer) // 10)
    kept = kept_ids(before.tokenizer, after.tokenizer)
    assert kept == sorted(kept), "new ids are in the old order"
    old, new = (c.network.get_input_embeddings().weight for c in (before, after))
    assert torch.equal(new, old[kept])


@pytest.mark.parametrize("kind", KINDS)
def test_every_kept_id_round_trips_and_special_pieces_keep_their_meaning(tokenizers, kind):
    before = tokenizers[kind]
    pieces = Pieces(before)
    kept = sorted(pieces.reserved | pieces.characters)
    after = keep_pieces(before, kept)
    assert [after.convert_tokens_to_ids(after.convert_ids_to_tokens(i)) for i in range(len(kept))] == [
        *range(len(kept))
    ]
    for name in ("pad", "cls", "sep", "mask", "unk"):
        token = getattr(before, f"{name}_token")
        assert getattr(after, f"{name}_token") == token
        assert after.convert_ids_to_tokens(getattr(after, f"{name}_token_id")) == token
    assert special_pieces(after) == special_pieces(before)


def special_pieces(tokenizer: Any) -> list[str]:
    """Those that the tokenizer puts around a pair of texts."""
    ids = tokenizer("good film", "bad story")["input_ids"]
    return [tokenizer.convert_ids_to_tokens(i) for i in ids if i in tokenizer.all_special_ids]


@pytest.mark.parametrize("kind", KINDS)
def test_the_unknown_rate_on_the_training_text_does_not_rise(tokenizers, kind):
    texts = [*WORDS, "zigzag hopperman", "1 ünknown"]
    before = candidate_with(tokenizers[kind], "roberta" if kind == "ByteLevelBPE" else "bert")
    for params in (
        {"keep": METHOD.search_space(before.subject)["keep"].distribution.low},
        {"criterion": "min_count", "min_count": 20},
    ):
        for keep_characters in (True, False):
            try:
                after = pruned(before, texts, keep_characters=keep_characters, **params)
            except TrialError:
                assert "keep" in params, "only an exact number can be too small"
                continue
            unknown = [(ids_of(c.tokenizer, texts) == c.tokenizer.unk_token_id).sum() for c in (before, after)]
            assert unknown[1] <= unknown[0]


@settings(max_examples=40, deadline=None)
@given(text=st.text(max_size=40), kind=st.sampled_from(list(KINDS)))
def test_unseen_text_never_crashes(text: str, kind: str) -> None:
    after = small(kind)
    batch = after.tokenizer([text], return_tensors="pt", truncation=True, max_length=32)
    assert int(batch["input_ids"].max()) < after.subject.vocabulary
    if kind == "ByteLevelBPE":
        assert after.tokenizer.unk_token_id not in batch["input_ids"], "bytes spell everything"
    with torch.no_grad():
        assert after.network(**batch).logits.isfinite().all()


SMALL: dict[str, Candidate] = {}


def small(kind: str) -> Candidate:
    if kind not in SMALL:
        model = candidate_with(KINDS[kind](), "roberta" if kind == "ByteLevelBPE" else "bert")
        SMALL[kind] = pruned(model, WORDS, keep=0.85)
    return SMALL[kind]


def test_a_dropped_word_is_spelled_in_the_pieces_that_are_left(tokenizers):
    pieces = Pieces(tokenizers["WordPiece"])
    after = keep_pieces(
        tokenizers["WordPiece"], sorted({*pieces.reserved, *pieces.characters, pieces.ids["hopper"]})
    )
    assert after.tokenize("hopperman good") == ["hopper", "##m", "##a", "##n", "g", "##o", "##o", "##d"]


def test_a_word_whose_letters_are_no_pieces_keeps_its_own(tokenizers):
    before = tokenizers["WordPiece"]
    letterless = keep_pieces(
        before, sorted({*Pieces(before).reserved, *(i for p, i in Pieces(before).ids.items() if len(p) > 3)})
    )
    text = ids_of(letterless, ["good film", "superb"])
    params = {"criterion": "min_count", "min_count": 20, "keep_characters": True}
    kept = choose(Pieces(letterless), text, len(letterless), params)
    names = letterless.convert_ids_to_tokens(kept)
    assert {"good", "film", "superb"} <= set(names)
    assert "awful" not in names


def test_the_result_loads_as_files_of_every_kind(tokenizers, tmp_path: Path):
    after = small("WordPiece")
    save(after.network, after.tokenizer, tmp_path)
    network, tokenizer = load(tmp_path)
    expected = [after.tokenizer(text)["input_ids"] for text in TEXTS]
    assert [tokenizer(text)["input_ids"] for text in TEXTS] == expected
    assert torch.equal(network.get_input_embeddings().weight, after.network.get_input_embeddings().weight)
    assert describe(network)["config"]["vocab_size"] == after.subject.vocabulary
    raw = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert [raw.encode(text).ids for text in TEXTS] == expected
    (listing,) = after.tokenizer.backend_tokenizer.model.save(str(tmp_path))
    assert Path(listing).name == "vocab.txt"
    plain = BertWordPieceTokenizer(listing)
    assert [plain.encode(text).ids for text in TEXTS] == expected


def test_a_byte_level_tokenizer_loads_as_files_too(tokenizers, tmp_path: Path):
    after = small("ByteLevelBPE")
    save(after.network, after.tokenizer, tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    raw = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in TEXTS:
        assert again(text)["input_ids"] == after.tokenizer(text)["input_ids"] == raw.encode(text).ids


# --- which pieces stay ---


def test_a_merged_piece_brings_all_that_it_is_merged_from():
    parents = {10: (8, 9), 8: (1, 2), 9: (8, 3)}
    assert family(10, parents) == {10, 8, 9, 1, 2, 3}
    assert family(4, parents) == {4}


@given(st.data())
def test_filling_gives_the_exact_number_and_leaves_no_orphan(data):
    base = data.draw(st.integers(2, 6))
    size = data.draw(st.integers(base, 25))
    parents = {i: (data.draw(st.integers(0, i - 1)), data.draw(st.integers(0, i - 1))) for i in range(base, size)}
    number = data.draw(st.integers(base, size))
    order = data.draw(st.permutations(range(size)))
    kept = fill(order, set(range(base)), parents, number)
    assert len(kept) == number
    assert all(set(parents.get(piece, ())) <= kept for piece in kept)


def test_coverage_keeps_the_fewest_that_cover_and_min_count_what_occurs_so_often(tokenizers):
    pieces = Pieces(tokenizers["WordPiece"])
    free = set(pieces.ids.values()) - pieces.reserved - pieces.characters
    frequent, second, rare = sorted(free)[:3]
    text = np.array([frequent] * 90 + [second] * 9 + [rare])

    def extra(**params: Any) -> set[int]:
        kept = choose(pieces, text, 86, {"keep_characters": True, **params})
        return set(kept) & free

    assert extra(criterion="coverage", coverage=0.9) == {frequent}
    assert extra(criterion="coverage", coverage=0.95) == {frequent, second}
    assert extra(criterion="coverage", coverage=1.0) == {frequent, second, rare}
    assert extra(criterion="min_count", min_count=9) == {frequent, second}


@pytest.mark.parametrize("counted", [False, True])
def test_text_without_labels_is_counted_on_request(monkeypatch, counted: bool) -> None:
    candidate = tiny_candidate()
    context, pieces = tiny_context(candidate), Pieces(candidate.tokenizer)
    context.examples = 2
    seen = {int(i) for batch in context.calibration(context.examples) for i in batch["input_ids"].unique()}
    rare = max(set(pieces.ids.values()) - seen - pieces.reserved - pieces.characters)
    ones = torch.ones(1, 3, dtype=torch.long)
    texts = [{"input_ids": rare * ones, "attention_mask": ones}]
    monkeypatch.setattr(context, "unlabelled", lambda size, once: iter(texts) if once else pytest.fail("endless"))
    subject = candidate.subject.having("unlabelled")
    assert "unlabelled_text" in METHOD.search_space(subject)
    params = {"criterion": "min_count", "min_count": 1, "keep_characters": True, "unlabelled_text": counted}
    result = METHOD.apply(candidate.replace(subject=subject), params, context)
    piece = candidate.tokenizer.convert_ids_to_tokens(rare)
    assert (piece in result.tokenizer.get_vocab()) is counted


# --- what is refused ---


def test_keeping_less_than_it_takes_to_spell_is_one_line(tokenizers):
    pieces = Pieces(tokenizers["WordPiece"])
    with pytest.raises(TrialError, match=r"keep is 0\.3, 26 of 86 pieces, and 57 must stay .* at least 0\.663"):
        choose(pieces, np.array([5]), 86, {"criterion": "keep", "keep": 0.3, "keep_characters": True})


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (models.Unigram([("<pad>", 0.0), ("a", -1.0)]), "Unigram"),
        (models.WordLevel({"<pad>": 0, "a": 1}, unk_token="<pad>"), "whole words only"),
        (models.BPE({"<pad>": 0, "a": 1}, []), "does not spell in bytes"),
    ],
)
def test_a_tokenizer_that_cannot_be_pruned_is_refused_with_the_reason(model, reason):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), pad_token="<pad>")
    candidate = tiny_candidate().replace(tokenizer=tokenizer)
    params = defaults(METHOD.search_space(candidate.subject))
    with pytest.raises(TrialError, match=reason):
        METHOD.apply(candidate, params, tiny_context(tiny_candidate()))
    with pytest.raises(ValueError, match=reason):
        keep_pieces(tokenizer, [0, 1])
    told = candidate.subject.having(f"tokenizer:{Pieces(tokenizer).kind}")
    assert reason in str(METHOD.unsupported(told)), "the engine tells before anything is trained"


def test_a_special_piece_cannot_go_and_the_padding_cannot_move(tokenizers):
    with pytest.raises(ValueError, match="special pieces must stay"):
        keep_pieces(tokenizers["WordPiece"], [0, 1, 2, 3, 10])
    network = tiny.tiny_network(family="roberta", pad_token_id=1)
    with pytest.raises(ValueError, match="padding's number 1 must stay"):
        keep_tokens(network, [1, 2, 3])


def test_the_smallest_part_follows_from_what_the_tokenizer_needs_to_spell():
    known = Subject("bert", "text-classification", 12, 12, 64, 768, 3072, 30522, 512, 2, 2)
    chinese = known.having(vocabulary=21128, alphabet=15000)
    lows = [METHOD.search_space(subject)["keep"].distribution.low for subject in (known, chinese)]
    assert lows == [0.1, 0.75]
    assert "single characters" in str(METHOD.unsupported(chinese.having(alphabet=21000)))


def test_to_keep_all_is_no_step():
    subject = Subject("bert", "text-classification", 6, 12, 32, 384, 1536, 30522, 512, 2, 4)
    params = defaults(METHOD.search_space(subject))
    assert METHOD.changes_nothing(subject, {**params, "keep": 1.0})
    assert not METHOD.changes_nothing(subject, {**params, "keep": 0.95})


def test_the_number_is_closed_form_for_keep_and_an_upper_bound_for_coverage():
    subject = Subject("bert", "text-classification", 6, 12, 32, 384, 1536, 30522, 512, 2, 4)
    after = METHOD.after(subject, {"criterion": "keep", "keep": 8000 / 30522, "keep_characters": True})
    assert after.vocabulary == 8000
    assert subject.parameters - after.parameters == 22522 * 384
    assert subject.megabytes - after.megabytes == pytest.approx(34.59, abs=0.01)
    bound = METHOD.after(subject, {"criterion": "coverage", "coverage": 0.999, "keep_characters": True})
    assert bound == subject.having("lossy", "data-sized")
    assert METHOD.after(subject, {"criterion": "keep", "keep": 1.0, "keep_characters": True}) == subject

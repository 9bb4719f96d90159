"""Examples with other words in them: which words go, what comes for them, and what stays as it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compress_search_plugins.distillation.augmentation import (
    CHOICES,
    PROBABILITY,
    Augmenter,
    Words,
    answered,
    augmented,
    augmenter,
    common_words,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import MaskedLMOutput

from compress_search import TrialError
from compress_search.encoders import Crf
from compress_search.testing import tiny_batches, tiny_candidate, tiny_context
from compress_search.testing.tiny import WORDS


def made(task="text-classification", variants=10**9, seed=0):
    candidate = tiny_candidate("bert", task)
    context = tiny_context(candidate, seed=seed)
    return candidate, context, augmenter(candidate, context, variants)


def spelled(candidate, *texts):
    """A batch of texts as the candidate's tokenizer cuts them."""
    batch = candidate.tokenizer(list(texts), padding=True, return_tensors="pt").data
    return {**batch, "labels": torch.zeros(len(texts), dtype=torch.long), "index": torch.arange(len(texts))}


def read(candidate, batch):
    """The pieces of every text."""
    return [
        candidate.tokenizer.convert_ids_to_tokens(ids[mask.bool()].tolist())
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


class Echo(nn.Module):
    """A language model that remembers what it was shown, and always expects the same pieces most."""

    def __init__(self, config, expected):
        super().__init__()
        self.config, self.expected, self.seen = config, expected, []

    def forward(self, input_ids, attention_mask, token_type_ids):
        self.seen.append((input_ids, attention_mask, token_type_ids))
        logits = torch.zeros(*input_ids.shape, self.config.vocab_size)
        logits[..., self.expected] = 9.0
        return MaskedLMOutput(logits=logits)


class TestWords:
    def test_letters_that_begin_a_word_and_no_special_piece(self):
        tokenizer = tiny_candidate().tokenizer
        words = Words.of(tokenizer)
        of = tokenizer.get_vocab()
        assert words.begins[of["ba"]]
        assert not words.begins[of["##b"]]
        assert words.letters[of["##b"]]
        assert words.goes_on[of["##b"]]
        assert not words.letters[tokenizer.all_special_ids].any()

    def test_common_words_are_those_of_a_fifth_of_the_texts(self):
        candidate = tiny_candidate()
        batch = spelled(candidate, "ba ba de", "ba fi", "ba go", "ba ka", "ba la")
        common = common_words([batch], len(candidate.tokenizer))
        of = candidate.tokenizer.get_vocab()
        assert common[of["ba"]]
        assert not common[of["de"]]

    def test_other_tokenizers_are_refused(self):
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        unigram = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("<pad>", 0.0), ("a", -1.0)])))
        unigram.pad_token = "<pad>"
        with pytest.raises(TrialError, match="where WordPiece spells them, and the tokenizer is Unigram"):
            Words.of(unigram)


class TestReplacing:
    def test_a_word_gives_way_to_one_that_the_language_model_expects(self):
        candidate, _, augment = made()
        expected = WORDS[-CHOICES:]
        echo = Echo(augment.model.config, candidate.tokenizer.convert_tokens_to_ids(list(expected)))
        batch = spelled(candidate, "ba de fi go", "ka la me")
        before, found = read(candidate, batch), set()
        for _ in range(50):
            for old, new in zip(before, read(candidate, replace(augment, model=echo)(batch)), strict=True):
                found |= {b for a, b in zip(old, new, strict=True) if a != b}
        assert found == set(expected)

    def test_the_language_model_sees_the_text_with_holes_and_behind_it_the_text(self):
        candidate, _, augment = made()
        echo = Echo(augment.model.config, [10])
        batch = spelled(candidate, "ba de fi go", "ka la")
        replace(augment, model=echo)(batch)
        [(ids, mask, segments)] = echo.seen
        for row, length in enumerate([6, 4]):
            first, second = ids[row, :length], ids[row, length : 2 * length - 1]
            assert torch.equal(second, batch["input_ids"][row, 1:length])
            holes = first == candidate.tokenizer.mask_token_id
            assert torch.equal(first[~holes], batch["input_ids"][row, :length][~holes])
            assert segments[row, :length].sum() == 0
            assert segments[row, length : 2 * length - 1].all()
            assert mask[row].sum() == 2 * length - 1

    def test_a_text_that_does_not_fit_twice_is_shown_once(self):
        candidate, _, augment = made()
        echo = Echo(augment.model.config, [10])
        batch = spelled(candidate, " ".join(["ba"] * 24))
        replace(augment, model=echo, words=Words.of(candidate.tokenizer))(batch)
        assert echo.seen[0][0].shape == (1, 26)

    def test_a_word_of_several_pieces_gives_way_to_one_near_it(self):
        candidate, _, augment = made()
        batch = spelled(candidate, "bade fi", "ba de")
        pieces = read(candidate, batch)[0][1:-2]
        assert pieces == ["ba", "##d", "##e"]
        ids = torch.tensor(candidate.tokenizer.convert_tokens_to_ids(pieces))
        mean = augment.table[ids].mean(0)
        nearness = F.cosine_similarity(augment.table, mean[None], dim=-1)
        nearest = nearness.masked_fill(~augment.words.begins, -9).topk(CHOICES).indices.tolist()
        near = set(candidate.tokenizer.convert_ids_to_tokens(nearest))
        replaced = 0
        for _ in range(30):
            found = augment(batch)
            row = read(candidate, found)[0]
            assert found["input_ids"].shape == found["token_type_ids"].shape == found["attention_mask"].shape
            if row[1:4] != pieces:
                replaced += 1
                assert row[1] in near
                assert len(row) == 4
        assert replaced

    def test_about_four_words_in_ten_go_and_texts_stay_whole_otherwise(self):
        candidate, _, augment = made()
        every = replace(augment, words=Words.of(candidate.tokenizer))
        batch = next(tiny_batches(candidate, batch_size=512))
        changed = (every(batch)["input_ids"] != batch["input_ids"]).sum()
        words = batch["attention_mask"].sum() - 2 * 512
        # a word may be expected in its own place
        assert changed / words == pytest.approx(PROBABILITY, abs=0.04)

    def test_punctuation_special_and_common_pieces_stay(self):
        candidate, _, augment = made()
        of = candidate.tokenizer.get_vocab()
        common = torch.zeros(len(candidate.tokenizer), dtype=torch.bool)
        common[of["ba"]] = True
        careful = replace(augment, words=Words.of(candidate.tokenizer).without(common))
        batch = spelled(candidate, "ba ! fi ba 3", "ba ba")
        for _ in range(30):
            first, second = read(candidate, careful(batch))
            assert [first[i] for i in (0, 1, 2, 4, 5, 6)] == ["[CLS]", "ba", "[UNK]", "ba", "[UNK]", "[SEP]"]
            assert second == ["[CLS]", "ba", "ba", "[SEP]"]

    def test_there_are_at_least_as_many_variants_of_a_text_as_are_asked_for(self):
        candidate, _, augment = made(variants=20)
        batch = spelled(candidate, "ba de fi go ka la me no")
        found = {tuple(read(candidate, augment(batch))[0]) for _ in range(60)}
        assert len(found) > 20
        assert tuple(read(candidate, batch)[0]) in found

    def test_one_text_in_so_many_stays_as_it_is(self):
        candidate, _, augment = made(variants=1)
        batch = next(tiny_batches(candidate, batch_size=400))
        found = augment(batch)["input_ids"]
        same = (found == batch["input_ids"]).all(1).float().mean()
        assert 0.45 < same < 0.65

    def test_the_seed_decides(self):
        rows = []
        for seed in (0, 0, 1):
            candidate, context, augment = made(seed=seed)
            rows.append(next(augmented(augment, context, labels=False))["input_ids"])
        assert torch.equal(rows[0], rows[1])
        assert rows[0].shape != rows[2].shape or not torch.equal(rows[0], rows[2])
        assert candidate.tokenizer.mask_token_id not in rows[0]


class TestEntities:
    @settings(max_examples=15, deadline=None)
    @given(st.integers(0, 1000))
    def test_entities_and_labels_stay_as_they_were(self, seed):
        candidate, _, augment = made("token-classification", seed=seed)
        batch = next(tiny_batches(candidate, batch_size=16, seed=seed))
        found = augment(batch)
        for row in range(16):
            before, after = (_tagged(candidate, each, row) for each in (batch, found))
            assert [tag for _, tag in before] == [tag for _, tag in after]
            entities = [[pair for pair in each if pair[1] > 0] for each in (before, after)]
            assert entities[0] == entities[1]

    def test_words_outside_do_change(self):
        candidate, _, augment = made("token-classification")
        batch = next(tiny_batches(candidate, batch_size=64))
        found = augment(batch)
        assert any(_tagged(candidate, batch, row) != _tagged(candidate, found, row) for row in range(64))

    def test_without_a_tag_O_nothing_may_go(self):
        candidate = tiny_candidate("bert", "token-classification")
        candidate.network.config.label2id = {"X": 0, "Y": 1, "Z": 2}
        with pytest.raises(TrialError, match="augmentation replaces words outside entities, and no tag is O"):
            augmenter(candidate, tiny_context(candidate), 10)


def _tagged(candidate, batch, row):
    """(word, label) of a text; a word is its pieces in one."""
    pairs = []
    for piece, label in zip(read(candidate, batch)[row], batch["labels"][row].tolist(), strict=False):
        if piece.startswith("##"):
            pairs[-1] = (pairs[-1][0] + piece[2:], pairs[-1][1])
        elif label != -100:
            pairs.append((piece, label))
    return pairs


class TestAnswers:
    def test_of_classes_the_most_probable(self):
        found = answered({"labels": torch.tensor([1, 1])}, torch.tensor([[2.0, 1.0], [0.0, 3.0]]))
        assert found["labels"].tolist() == [0, 1]

    def test_of_a_number_the_number(self):
        assert answered({}, torch.tensor([[0.5], [-1.0]]))["labels"].tolist() == [0.5, -1.0]

    def test_of_tokens_where_there_are_labels(self):
        logits = torch.tensor([[[2.0, 1.0], [0.0, 3.0], [0.0, 3.0]]])
        assert answered({"labels": torch.tensor([[-100, 0, 0]])}, logits)["labels"].tolist() == [[-100, 1, 1]]

    def test_of_a_chain_the_best_path(self):
        crf = Crf(2)
        with torch.no_grad():
            crf.transitions.copy_(torch.tensor([[0.0, -9.0], [0.0, 0.0]]))  # never from 0 to 1
        logits = torch.tensor([[[2.0, 1.0], [0.0, 0.5], [0.0, 3.0]]])
        labels = torch.tensor([[0, -100, 0]])
        assert answered({"labels": labels}, logits)["labels"].tolist() == [[0, -100, 1]]
        assert answered({"labels": labels}, logits, crf)["labels"].tolist() == [[1, -100, 1]]

    def test_labels_are_the_teachers_and_never_copied(self):
        _, context, augment = made()
        batch = next(augmented(augment, context, labels=True))
        assert torch.equal(batch["labels"], context.teacher_logits(batch).argmax(-1))
        assert "index" not in batch


def test_without_a_language_model_it_is_a_line():
    candidate = tiny_candidate()
    context = tiny_context(candidate)
    context.masked_lm = lambda: None
    with pytest.raises(
        TrialError, match=r"augmentation needs a masked language model: name one .* teacher\.masked_lm"
    ):
        augmenter(candidate, context, 10)


@pytest.mark.parametrize("family", ["electra", "distilbert", "roberta"])
def test_every_family_whose_tokenizer_spells_words(family):
    candidate = tiny_candidate(family)
    context = tiny_context(candidate)
    augment = augmenter(candidate, context, 10)
    assert isinstance(augment, Augmenter)
    batch = next(augmented(augment, context, labels=False))
    assert set(batch) == {*candidate.tokenizer.model_input_names, "labels"}

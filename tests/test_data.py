import pickle
import time
from itertools import islice

import numpy as np
import pytest
import torch

from compress_search import data
from compress_search.data import (
    Split,
    bucketed,
    ordered_batches,
    read,
    tokenize,
    tokenize_rows,
    tokenizer_digest,
    training_batches,
)
from compress_search.data.rows import Rows
from compress_search.study import load_study
from compress_search.tasks import IGNORED, Task
from tests import tiny

ENTITIES = Task("token-classification", tiny.TAGS, entities=True)


@pytest.fixture
def splits_of(tiny_study, tmp_path):
    """``splits_of(kind)``: the raw rows, the tokenised splits and the tokenizer of a tiny study."""

    def splits(kind="text-classification", family="bert", **sections):
        study = load_study(tiny_study(kind, family=family, **sections))
        raw, task = read(study)
        tokenizer = tiny.tiny_tokenizer(family)
        return raw, tokenize(raw, tokenizer, study, task, tmp_path / "cache"), tokenizer

    return splits


class TestTokenize:
    @pytest.mark.parametrize("family", ["bert", "distilbert"])
    @pytest.mark.parametrize("kind", ["text-classification", "pairs", "text-regression"])
    def test_a_batch_is_what_the_tokenizer_pads(self, splits_of, kind, family):
        raw, splits, tokenizer = splits_of(kind, family)
        rows = [5, 0, 17]
        some = raw.train.take(rows)
        expected = tokenizer(some.texts, some.pairs, padding=True, return_tensors="pt")
        batch = splits["train"].batch(rows)
        assert set(batch) == {*tokenizer.model_input_names, "labels", "index"}
        for name, tensor in expected.items():
            assert torch.equal(batch[name], tensor), name
        assert batch["labels"].tolist() == pytest.approx(some.labels)
        assert batch["labels"].dtype == (torch.float32 if kind == "text-regression" else torch.int64)
        assert batch["index"].tolist() == rows

    def test_a_words_first_piece_carries_its_tag(self, tmp_path):
        rows = Rows([["ada", "hopperman", "sees", "oslo"]], None, [[1, 2, 3, 0]])
        tokenizer = tiny.tiny_tokenizer()
        split = tokenize_rows(rows, tokenizer, 32, ENTITIES, tmp_path)
        batch = split.batch([0])
        pieces = tokenizer.convert_ids_to_tokens(batch["input_ids"][0])
        assert pieces == ["[CLS]", "ada", "hopper", "##man", "s", "##e", "##e", "##s", "oslo", "[SEP]"]
        none = IGNORED
        assert batch["labels"][0].tolist() == [none, 1, 2, none, 3, none, none, none, 0, none]
        assert [row.tolist() for row in split.labels] == [[1, 2, 3, 0]]

    def test_neighbouring_words_of_one_tag_both_count(self, tmp_path):
        rows = Rows([["ada", "ada"]], None, [[1, 1]])
        split = tokenize_rows(rows, tiny.tiny_tokenizer(), 32, ENTITIES, tmp_path)
        assert split.batch([0])["labels"][0].tolist() == [IGNORED, 1, 1, IGNORED]

    def test_a_word_of_which_nothing_is_left_is_not_scored(self, tmp_path):
        rows = Rows([["ada", "\u200b", "oslo"]], None, [[1, 3, 0]])
        split = tokenize_rows(rows, tiny.tiny_tokenizer(), 32, ENTITIES, tmp_path)
        assert split.batch([0])["labels"][0].tolist() == [IGNORED, 1, 0, IGNORED]

    def test_padding_has_no_label(self, splits_of):
        _, splits, _ = splits_of("token-classification")
        batch = splits["train"].batch(np.argsort(splits["train"].lengths)[[0, -1]])
        padding = batch["attention_mask"] == 0
        assert padding.any()
        assert (batch["labels"][padding] == IGNORED).all()

    @pytest.mark.parametrize("kind", ["text-classification", "pairs", "token-classification"])
    def test_long_examples_are_cut(self, splits_of, kind):
        raw, splits, tokenizer = splits_of(kind, data={"max_length": 6})
        assert splits["train"].lengths.max() == 6
        batch = splits["train"].batch(range(len(splits["train"])))
        assert {*batch["input_ids"][:, 0].tolist()} == {tokenizer.cls_token_id}
        if kind == "token-classification":
            first = splits["train"].labels[0].tolist()
            assert first == raw.train.labels[0][: len(first)]
            assert len(first) < len(raw.train.labels[0])

    def test_every_split_there_is(self, splits_of):
        _, splits, _ = splits_of(data={"test": None})
        assert {name: len(split) for name, split in splits.items()} == {"train": 96, "validation": 32}

    def test_blocks_do_not_show(self, tmp_path):
        task = Task("text-classification", ("a", "b"))
        rows = Rows([f"the film {'was ' * (i % 5)}good" for i in range(2500)], None, [i % 2 for i in range(2500)])
        tokenizer = tiny.tiny_tokenizer()
        split = tokenize_rows(rows, tokenizer, 32, task, tmp_path)
        assert split.lengths.tolist() == [len(ids) for ids in tokenizer(list(rows.texts)).input_ids]
        assert split.labels.tolist() == list(rows.labels)


class TestCache:
    def test_the_second_call_does_not_tokenise(self, splits_of, monkeypatch):
        _, first, _ = splits_of("token-classification")
        monkeypatch.setattr(data, "_encode", lambda *_: pytest.fail("tokenised again"))
        _, again, _ = splits_of("token-classification")
        assert again["train"].path == first["train"].path

    def test_whatever_decides_the_result_changes_its_place(self, tmp_path):
        rows = Rows(["the film"], None, [0])
        task, tokenizer = Task("text-classification", ("a", "b")), tiny.tiny_tokenizer()

        def place(rows=rows, tokenizer=tokenizer, length=32, task=task):
            return tokenize_rows(rows, tokenizer, length, task, tmp_path).path

        other = tiny.tiny_tokenizer("distilbert")
        places = [
            place(),
            place(rows=Rows(["the story"], None, [0])),
            place(tokenizer=other),
            place(length=16),
            place(task=Task("text-classification", ("b", "a"))),
        ]
        assert len(set(places)) == len(places)
        assert place() == places[0]

    def test_a_call_does_not_change_a_tokenizers_digest(self):
        tokenizer = tiny.tiny_tokenizer()
        before = tokenizer_digest(tokenizer)
        tokenizer(["the film", "a"], truncation=True, max_length=3, padding=True)
        assert tokenizer_digest(tokenizer) == before

    def test_a_split_travels_as_a_path(self, splits_of):
        _, splits, _ = splits_of()
        content = pickle.dumps(splits["train"])
        assert len(content) < 500
        again = pickle.loads(content)
        assert torch.equal(again.batch([3, 1])["input_ids"], splits["train"].batch([3, 1])["input_ids"])

    def test_nothing_can_write_through_a_split(self, splits_of):
        _, splits, _ = splits_of()
        before = splits["train"].batch([0])
        before["input_ids"].zero_()
        before["labels"].fill_(7)
        after = Split.open(splits["train"].path).batch([0])
        assert after["input_ids"][0, 0] != 0
        assert after["labels"].item() in (0, 1)


class TestBatches:
    def test_every_row_once_an_epoch(self, splits_of):
        split = splits_of()[1]["train"]
        batches = training_batches(split, 10, seed=0)
        for _ in range(2):
            epoch = [batch["index"].tolist() for batch in islice(batches, 10)]
            assert sorted(row for rows in epoch for row in rows) == list(range(96))
            assert sorted(map(len, epoch)) == [6] + [10] * 9

    def test_epochs_differ_and_a_seed_repeats(self, splits_of):
        split = splits_of()[1]["train"]

        def order(seed):
            return [batch["index"].tolist() for batch in islice(training_batches(split, 16, seed), 12)]

        assert order(3) == order(3)
        assert order(3) != order(4)
        assert order(3)[:6] != order(3)[6:]

    def test_buckets_spare_padding(self):
        generator = np.random.default_rng(0)
        lengths = generator.integers(5, 65, size=5000)

        def padded(batches):
            return sum(len(rows) * lengths[rows].max() for rows in batches) / lengths.sum() - 1

        shuffled = np.split(generator.permutation(5000), range(32, 5000, 32))
        assert padded(bucketed(lengths, 32, generator)) < 0.03 < 0.5 < padded(shuffled)

    def test_batches_do_not_come_by_length(self):
        lengths = np.arange(3200)
        firsts = [rows[0] for rows in bucketed(lengths, 32, np.random.default_rng(0))]
        assert abs(np.corrcoef(firsts, np.arange(100))[0, 1]) < 0.3

    def test_ordered_batches_hold_every_row_once_by_length(self, splits_of):
        split = splits_of("token-classification")[1]["validation"]
        batches = list(ordered_batches(split, 10))
        rows = np.concatenate([batch["index"] for batch in batches])
        assert sorted(rows) == list(range(32))
        assert (np.diff(split.lengths[rows]) >= 0).all()

    def test_a_batch_takes_no_time(self, tmp_path):
        rows = Rows(["the film was good " * (1 + i % 10) for i in range(1000)], None, [i % 2 for i in range(1000)])
        split = tokenize_rows(rows, tiny.tiny_tokenizer(), 64, Task("text-classification", ("a", "b")), tmp_path)
        picks = np.random.default_rng(0).integers(1000, size=(100, 32))
        seconds = []
        for pick in picks:
            started = time.perf_counter()
            split.batch(pick)
            seconds.append(time.perf_counter() - started)
        # 0.1 ms on a quiet core
        assert np.median(seconds) < 2e-3


@pytest.mark.parametrize("name", ["wikigold", "iflytek_few"])
def test_real_data(shared, tiny_study, tmp_path, name):
    from transformers import AutoTokenizer

    folder = shared / "data" / name
    task = "token-classification" if name == "wikigold" else "text-classification"
    files = {"train": "train", "validation": "dev", "test": "test"}
    paths = {split: str(folder / f"{file}.jsonl") for split, file in files.items()}
    study = load_study(tiny_study(task, data={**paths, "max_length": 64}))
    raw, found = read(study)
    assert found.outputs == {"wikigold": 9, "iflytek_few": 119}[name]
    assert found.primary == {"wikigold": "f1", "iflytek_few": "accuracy"}[name]
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "all-minilm-l6-v2")
    split = tokenize_rows(raw.validation, tokenizer, 64, found, tmp_path / "cache")
    assert len(split) == {"wikigold": 203, "iflytek_few": 572}[name]

import subprocess
import sys

import pytest

from compress_search.data.rows import Rows
from compress_search.errors import StudyError
from compress_search.study import load_study
from compress_search.tasks import Task
from compress_search.teacher.scratch import (
    SPECIAL,
    build_tokenizer,
    new_config,
    read_vocabulary,
    texts_of,
    train_wordpiece,
)
from tests import tiny

TASK = Task("text-classification", ("negative", "positive"))


def corpus(size=300):
    return [row["text"] for row in tiny.tiny_rows(size=size)]


class TestTrainWordpiece:
    def test_frequent_words_become_pieces(self):
        pieces = train_wordpiece(corpus(), 120)
        assert pieces[:5] == list(SPECIAL)
        assert {"film", "good", "awful"} <= set(pieces)
        assert len(pieces) == len(set(pieces)) <= 120

    def test_any_word_of_the_text_can_be_spelt(self):
        tokenizer = build_tokenizer(train_wordpiece(corpus(), 60), 32)
        for text in corpus(50):
            assert tokenizer.unk_token_id not in tokenizer(text).input_ids
            assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text

    @pytest.mark.slow
    def test_every_process_finds_the_same_pieces(self):
        """The library's own trainer does not: it breaks ties in the order of a hash map, seeded anew each run."""
        code = (
            "import random, hashlib; from compress_search.teacher.scratch import train_wordpiece;"
            "rng = random.Random(0);"
            "words = [''.join(rng.choices('abcdefghij', k=rng.randint(2, 7))) for _ in range(2000)];"
            "texts = [' '.join(rng.choices(words, k=10)) for _ in range(1000)];"
            "print(hashlib.sha256(repr(train_wordpiece(texts, 600)).encode()).hexdigest())"
        )
        runs = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
        found = {run.communicate()[0].strip() for run in runs}
        assert [len(digest) for digest in found] == [64]

    def test_the_most_frequent_characters_come_first_where_room_is_short(self):
        pieces = train_wordpiece(["学 学 学 习 习 的", "学 习 很 多"], 5 + 2)
        assert pieces == [*SPECIAL, "习", "学"]

    def test_characters_that_never_continue_a_word_take_no_second_piece(self):
        assert train_wordpiece(["学习"], 50) == [*SPECIAL, "习", "学"]


class TestVocabularyFile:
    def test_it_is_read_as_it_is(self, tmp_path):
        path = tmp_path / "vocab.txt"
        path.write_text("\n".join([*SPECIAL, "film", "##s"]) + "\n")
        assert read_vocabulary(path) == [*SPECIAL, "film", "##s"]

    def test_a_piece_may_be_what_unicode_calls_a_line_end(self, tmp_path):
        path = tmp_path / "vocab.txt"
        path.write_text("\n".join([*SPECIAL, "\u2028", "film"]) + "\n", encoding="utf-8")
        assert read_vocabulary(path) == [*SPECIAL, "\u2028", "film"]

    def test_padding_is_where_the_file_has_it(self, tiny_study, tmp_path):
        (tmp_path / "vocab.txt").write_text("\n".join(["film", *SPECIAL]))
        path = tiny_study(teacher={"model": None, "architecture": {"vocabulary": "vocab.txt"}, "fine_tune": {}})
        assert new_config(load_study(path), TASK).pad_token_id == 1

    @pytest.mark.parametrize(("name", "size"), [("uncased", 30522), ("chinese", 21128)])
    def test_published_vocabularies(self, shared, name, size):
        pieces = read_vocabulary(shared / "data" / "vocab" / f"bert-base-{name}-vocab.txt")
        assert len(pieces) == size
        assert build_tokenizer(pieces, 16).do_lower_case

    @pytest.mark.parametrize(
        ("pieces", "message"), [(["film"], "lacks"), ([*SPECIAL, "film", "film"], "holds 'film' twice")]
    )
    def test_it_must_be_a_vocabulary(self, tiny_study, tmp_path, pieces, message):
        (tmp_path / "vocab.txt").write_text("\n".join(pieces))
        path = tiny_study(teacher={"model": None, "architecture": {"vocabulary": "vocab.txt"}, "fine_tune": {}})
        with pytest.raises(StudyError, match=message) as caught:
            new_config(load_study(path), TASK)
        assert caught.value.key == "teacher.architecture.vocabulary"

    def test_capitals_in_it_keep_capitals_in_the_text(self):
        cased, uncased = build_tokenizer([*SPECIAL, "Film", "film"], 8), build_tokenizer([*SPECIAL, "film"], 8)
        assert cased.tokenize("Film film") == ["Film", "film"]
        assert uncased.tokenize("Film film") == ["film", "film"]


def test_the_configuration_is_the_studys(tiny_study):
    shape = {"layers": 3, "hidden": 24, "heads": 2, "intermediate": 40, "vocabulary": 321}
    path = tiny_study(teacher={"model": None, "architecture": shape, "fine_tune": {}}, data={"max_length": 20})
    config = new_config(load_study(path), TASK)
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (3, 24, 2)
    assert (config.intermediate_size, config.vocab_size, config.max_position_embeddings) == (40, 321, 20)
    assert config.id2label == {0: "negative", 1: "positive"}


def test_texts_of_every_kind_of_rows():
    assert list(texts_of(Rows(["a b", "c"], ["d", "e"], [0, 1]))) == ["a b", "c", "d", "e"]
    assert list(texts_of(Rows([["a", "b"], ["c"]], None, [[0, 1], [0]]))) == ["a b", "c"]

"""A study's unlabelled text: read and cut like the rest, without labels, and a trait that says it is there."""

import numpy as np
import pytest

from compress_search import StudyError
from compress_search.data import read, tokenize, training_batches, without_labels
from compress_search.driver import prepare
from compress_search.study import load_study
from tests import tiny


def write(study_file, name, rows):
    tiny.write_jsonl(study_file.parent / "data" / name, rows)
    return f"data/{name}"


def with_text(tiny_study, kind, *files):
    path = tiny_study(kind)
    names = [write(path, f"more{number}.jsonl", rows) for number, rows in enumerate(files)]
    return load_study(path, [f"data.unlabeled={names if len(names) > 1 else names[0]}"])


ROWS = {
    "text-classification": [{"text": "good film"}, {"text": "bad"}],
    "text-regression": [{"text": "good film"}, {"text": "bad"}],
    "pairs": [{"text": "good film", "text_pair": "bad"}],
    "token-classification": [{"tokens": ["anna", "film"]}],
}


@pytest.mark.parametrize("kind", list(ROWS))
def test_it_is_read_and_cut_as_the_training_text(tiny_study, tmp_path, kind):
    study = with_text(tiny_study, kind, ROWS[kind])
    raw, task = read(study)
    assert len(raw.unlabelled) == len(ROWS[kind])
    split = tokenize(raw, tiny.tiny_tokenizer(), study, task, tmp_path)["unlabelled"]
    batch = next(without_labels(training_batches(split, 8, seed=0)))
    assert set(batch) == {"input_ids", "token_type_ids", "attention_mask"}
    assert len(batch["input_ids"]) == len(ROWS[kind])


def test_several_files_follow_one_another(tiny_study):
    study = with_text(tiny_study, "text-classification", [{"text": "good"}], [{"text": "bad", "label": "x"}])
    raw, _ = read(study)
    assert raw.unlabelled.texts == ["good", "bad"]
    assert "unlabelled" in raw.splits()


def test_batches_are_endless_and_in_another_order_each_time(tiny_study, tmp_path):
    study = with_text(tiny_study, "text-classification", [{"text": word} for word in tiny.GOOD * 8])
    raw, task = read(study)
    split = tokenize(raw, tiny.tiny_tokenizer(), study, task, tmp_path)["unlabelled"]
    stream = without_labels(training_batches(split, len(split), seed=1))
    first, second = (next(stream)["input_ids"].numpy() for _ in range(2))
    assert not np.array_equal(first, second)
    again = next(without_labels(training_batches(split, len(split), seed=1)))["input_ids"].numpy()
    assert np.array_equal(first, again)


def test_without_the_key_there_is_none(tiny_study):
    study = load_study(tiny_study())
    raw, _ = read(study)
    assert study.data.unlabeled == ()
    assert raw.unlabelled is None
    assert "unlabelled" not in raw.splits()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "good"}, {"words": "bad"}], r"data.unlabeled.0: more0.jsonl:2: no column 'text'"),
        ([{"text": 3}], r"data.unlabeled.0: more0.jsonl:1: expected text, got 3"),
    ],
)
def test_what_is_wrong_with_a_row_is_one_line(tiny_study, rows, message):
    with pytest.raises(StudyError, match=message):
        read(with_text(tiny_study, "text-classification", rows))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("data/none.jsonl", "no such file: data/none.jsonl"),
        ("[]", "expected a data source or a list of them"),
        ("[data/train.jsonl, 3]", "expected a data file or a hub id, got 3"),
        ("3", "expected a data source or a list of them"),
    ],
)
def test_what_is_wrong_with_the_key_is_one_line(tiny_study, value, message):
    with pytest.raises(StudyError, match=message):
        load_study(tiny_study(), [f"data.unlabeled={value}"])


def test_it_travels_with_the_study(tiny_study):
    study = with_text(tiny_study, "text-classification", [{"text": "good"}], [{"text": "bad"}])
    assert type(study).from_dict(study.to_dict()).data.unlabeled == study.data.unlabeled


def test_a_study_without_it_keeps_its_identity(tiny_study):
    path = tiny_study()
    assert "unlabeled" not in load_study(path).identity(defaults=False)["data"]
    other = load_study(path, ["data.unlabeled=data/test.jsonl"])
    assert "unlabeled" in other.identity(defaults=False)["data"]


@pytest.mark.parametrize("there", [True, False])
def test_methods_see_by_a_trait_whether_there_is_any(tiny_study, there):
    study = load_study(tiny_study(methods=["theseus"]), ["data.unlabeled=data/test.jsonl"] if there else [])
    assert ("unlabelled" in prepare(study).plan.teacher.traits) == there

import pickle

import pytest
import torch

from compress_search.data import read, tokenize, training_batches
from compress_search.study import load_study
from compress_search.teacher import load_teacher, logits, prepare_teacher
from compress_search.teacher.ensemble import average
from compress_search.teacher.logits import TeacherLogits, teacher_logits
from compress_search.training import forward
from tests import tiny


@pytest.fixture
def prepared(tiny_study, tmp_path):
    """``prepared(kind)``: a teacher's directory, its network and the training split."""

    def prepare(kind):
        study = load_study(tiny_study(kind))
        raw, task = read(study)
        directory = prepare_teacher(study, raw, task, tmp_path / "cache")
        network, tokenizer = load_teacher(directory)
        return directory, network, tokenize(raw, tokenizer, study, task, tmp_path / "cache")["train"]

    return prepare


@pytest.mark.parametrize("kind", list(tiny.ROWS))
def test_a_batch_is_what_the_teacher_says(prepared, tmp_path, kind):
    directory, network, split = prepared(kind)
    cache = teacher_logits(directory, split, tmp_path / "cache", batch_size=10)
    batches = training_batches(split, 16, seed=3)
    for _ in range(4):
        batch = next(batches)
        found = cache.batch(batch["index"], batch["input_ids"].shape[1])
        with torch.no_grad():
            expected = forward(network, batch)
        assert found.shape == expected.shape
        assert found.dtype == torch.float32
        if split.token_labels:
            real = batch["attention_mask"].bool()
            assert not found[~real].any()
            found, expected = found[real], expected[real]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["text-classification", "token-classification"])
def test_the_second_call_runs_no_teacher(prepared, tmp_path, kind, monkeypatch):
    directory, _, split = prepared(kind)
    first = teacher_logits(directory, split, tmp_path / "cache")
    monkeypatch.setattr(logits, "load_teacher", lambda *_: pytest.fail("the teacher was run again"))
    again = teacher_logits(directory, split, tmp_path / "cache")
    index = torch.tensor([5, 0, 9])
    assert torch.equal(first.batch(index, 40), again.batch(index, 40))


def test_another_split_has_a_cache_of_its_own(prepared, tiny_study, tmp_path):
    directory, _, split = prepared("text-classification")
    study = load_study(tiny_study(data={"max_length": 8}))
    raw, task = read(study)
    other = tokenize(raw, tiny.tiny_tokenizer(), study, task, tmp_path / "cache")["train"]
    paths = {teacher_logits(directory, rows, tmp_path / "cache").path for rows in (split, other)}
    assert len(paths) == 2


def test_it_travels_as_a_path(prepared, tmp_path):
    directory, _, split = prepared("text-classification")
    cache = teacher_logits(directory, split, tmp_path / "cache")
    content = pickle.dumps(cache)
    assert len(content) < 500
    index = torch.tensor([1, 2])
    assert torch.equal(pickle.loads(content).batch(index, 9), cache.batch(index, 9))


def test_nothing_can_write_through_it(prepared, tmp_path):
    directory, _, split = prepared("text-classification")
    cache = teacher_logits(directory, split, tmp_path / "cache")
    before = cache.batch(torch.tensor([1]), 9).clone()
    cache.batch(torch.tensor([1]), 9).zero_()
    assert torch.equal(cache.batch(torch.tensor([1]), 9), before)


@pytest.mark.parametrize("how", ["logits", "probabilities"])
@pytest.mark.parametrize("kind", ["text-classification", "token-classification"])
def test_several_teachers_say_their_average_on_every_batch(prepared, tmp_path, kind, how):
    directory, network, split = prepared(kind)
    further = tiny.tiny_teacher(tmp_path / "further", kind, "distilbert", layers=3)
    other, _ = load_teacher(further)
    ask = TeacherLogits(network, [directory, further], split, tmp_path / "cache", how)
    batch = next(training_batches(split, 16, seed=3))
    real = batch["attention_mask"].bool() if split.token_labels else slice(None)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = average([forward(network, batch), forward(other, inputs)], how)[real]
    torch.testing.assert_close(ask(batch)[real], expected, atol=1e-5, rtol=0)
    unknown = {name: value for name, value in batch.items() if name not in ("index", "labels")}
    torch.testing.assert_close(ask(unknown)[real], expected, atol=1e-5, rtol=0)


def test_an_ensemble_of_one_reads_that_teachers_logits_to_the_bit(prepared, tmp_path):
    directory, network, split = prepared("text-classification")
    cache = teacher_logits(directory, split, tmp_path / "cache")
    ask = TeacherLogits(network, [directory], split, tmp_path / "cache")
    batch = next(training_batches(split, 16, seed=3))
    assert torch.equal(ask(batch), cache.batch(batch["index"], batch["input_ids"].shape[1]))

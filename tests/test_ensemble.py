"""Several teachers: what is averaged, and which ones are refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_search.data import read
from compress_search.errors import StudyError
from compress_search.study import load_study
from compress_search.teacher import ensemble, prepare_ensemble, prepare_teacher, teacher_subject
from tests import tiny


def logits(count: int, seed: int = 0) -> list[torch.Tensor]:
    return list(torch.randn(count, 6, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


@pytest.mark.parametrize("how", ["logits", "probabilities"])
def test_an_ensemble_of_one_is_that_teacher_to_the_bit(how):
    [alone] = logits(1)
    assert torch.equal(ensemble.average([alone], how), alone)


@settings(deadline=None)
@given(st.integers(2, 5), st.integers(0, 100))
def test_logits_or_probabilities_are_averaged(count, seed):
    all_of_them = logits(count, seed)
    torch.testing.assert_close(ensemble.average(all_of_them), sum(all_of_them) / count)
    expected = sum(each.softmax(-1) for each in all_of_them) / count
    torch.testing.assert_close(ensemble.average(all_of_them, "probabilities").softmax(-1), expected)


@pytest.mark.parametrize("how", ["logits", "probabilities"])
def test_teachers_that_agree_are_one(how):
    [alone] = logits(1)
    torch.testing.assert_close(ensemble.average([alone, alone], how), alone, msg="squared differences see shifts")


@pytest.fixture
def other(tmp_path):
    """``other(**changes)``: a further teacher with other weights beside the study."""

    def make(kind="text-classification", family="bert", **changes):
        tiny.tiny_teacher(tmp_path / "other", kind, family, **{"layers": 3, **changes})
        return {"ensemble": ["other"]}

    return make


def prepared(path, cache):
    study = load_study(path)
    raw, task = read(study)
    first = prepare_teacher(study, raw, task, cache)
    return prepare_ensemble(study, first, raw, task, cache), first


def test_the_first_teacher_comes_first_and_each_is_kept_once(tiny_study, other, tmp_path):
    path = tiny_study(teacher=other())
    paths, first = prepared(path, tmp_path / "cache")
    assert paths[0] == first
    assert len(set(paths)) == 2
    assert prepared(path, tmp_path / "cache")[0] == paths


def test_without_further_teachers_there_is_one(tiny_study, tmp_path):
    paths, first = prepared(tiny_study(), tmp_path / "cache")
    assert paths == [first]


def test_other_families_may_join(tiny_study, other, tmp_path):
    assert len(prepared(tiny_study(teacher=other(family="distilbert")), tmp_path / "cache")[0]) == 2


def test_a_directory_that_is_missing_is_refused_where_it_stands(tiny_study):
    with pytest.raises(StudyError, match="no such directory: nowhere") as caught:
        load_study(tiny_study(teacher={"ensemble": ["teacher", "nowhere/"]}))
    assert caught.value.key == "teacher.ensemble.1"


@pytest.mark.parametrize("value", ["other", [3]])
def test_what_is_no_list_of_models_is_refused(tiny_study, value):
    with pytest.raises(StudyError, match="expected a"):
        load_study(tiny_study(teacher={"ensemble": value}))


def test_a_teacher_of_another_task_is_refused_before_anything_runs(tiny_study, other):
    study = load_study(tiny_study(teacher=other("pos")))
    with pytest.raises(StudyError, match="no head for text-classification") as caught:
        teacher_subject(study, read(study)[1])
    assert caught.value.key == "teacher.ensemble.0"


def test_a_teacher_that_reads_other_pieces_is_refused(tiny_study, other, tmp_path):
    path = tiny_study(teacher=other())
    vocabulary = {piece: i for i, piece in enumerate(reversed(tiny.tiny_vocabulary()))}
    from transformers import BertTokenizer

    BertTokenizer(vocab=vocabulary, model_max_length=64).save_pretrained(tmp_path / "other")
    with pytest.raises(StudyError, match="its vocabulary is not the first teacher's") as caught:
        prepared(path, tmp_path / "cache")
    assert caught.value.key == "teacher.ensemble.0"


def test_numbers_have_no_probabilities_to_average(tiny_study):
    study = load_study(tiny_study("text-regression", teacher={"average": "probabilities"}))
    with pytest.raises(StudyError, match="has no probabilities") as caught:
        teacher_subject(study, read(study)[1])
    assert caught.value.key == "teacher.average"


def test_a_study_with_several_teachers_travels_to_workers(tiny_study, other):
    study = load_study(tiny_study(teacher=other()))
    assert type(study).from_dict(study.to_dict()).teacher == study.teacher

"""The study's masked language model: found, checked before any work, and lent to methods as it is."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import AutoModelForMaskedLM

from compress_search import StudyError
from compress_search.driver import prepare
from compress_search.encoders import keep_pieces
from compress_search.pipeline import run_recipe
from compress_search.recipe import Recipe, Step
from compress_search.runtimes import load_runner
from compress_search.space import defaults
from compress_search.study import load_study
from compress_search.teacher.reading import cut
from compress_search.teacher.scratch import build_tokenizer
from compress_search.workbench import Workbench
from tests import tiny


def language_model(folder, family="bert", **changes):
    torch.manual_seed(3)
    network = AutoModelForMaskedLM.from_config(tiny.tiny_config(family=family, **changes))
    network.save_pretrained(folder)
    tiny.tiny_tokenizer(family).save_pretrained(folder)
    return network.eval()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPRESS_SEARCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def with_model(tiny_study, tmp_path):
    """``with_model(family)``: a study with a language model beside its teacher, and that model."""

    def make(family="bert", **changes):
        path = tiny_study(family=family, methods=["tinybert"])
        network = language_model(tmp_path / "language_model", family, **changes)
        return load_study(path, ["teacher.masked_lm=language_model"]), network

    return make


def inputs(batch):
    return {name: tensor for name, tensor in batch.items() if name not in ("labels", "index")}


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_methods_get_the_model_as_it_is_and_frozen(with_model, family):
    study, original = with_model(family, layers=3)
    prepared = prepare(study)
    assert "masked-lm" in prepared.plan.teacher.traits
    bench = Workbench(prepared.brief)
    lent = bench.materials.masked_lm()
    assert lent is bench.materials.masked_lm()
    assert not lent.training
    assert not any(parameter.requires_grad for parameter in lent.parameters())
    batch = inputs(bench.materials.train.batch([0, 1]))
    with torch.no_grad():
        torch.testing.assert_close(lent(**batch).logits, original(**batch).logits, atol=1e-5, rtol=0)


def test_without_the_key_there_is_none(tiny_study):
    prepared = prepare(load_study(tiny_study(methods=["tinybert"])))
    assert "masked-lm" not in prepared.plan.teacher.traits
    assert Workbench(prepared.brief).materials.masked_lm() is None


def test_its_content_is_part_of_what_artefacts_are_made_of(with_model, tmp_path):
    study, _ = with_model()
    recipe = Recipe((Step.of("tinybert", {}),))
    before, teacher = (Workbench(prepare(study).brief).artifact(each, 0) for each in (recipe, Recipe()))
    language_model(tmp_path / "language_model", layers=1)
    bench = Workbench(prepare(study).brief)
    assert bench.artifact(recipe, 0) != before
    assert bench.artifact(Recipe(), 0) == teacher


def test_pieces_that_are_gone_are_gone_from_its_scores():
    torch.manual_seed(0)
    network = AutoModelForMaskedLM.from_config(tiny.tiny_config()).eval().requires_grad_(False)
    size = network.config.vocab_size
    kept = [*range(20), *range(30, size)]
    reader = cut(network, kept)
    ids = torch.tensor([[2, 8, 40, 3]])
    renumbered = torch.tensor([[kept.index(i) for i in ids[0].tolist()]])
    expected = network(input_ids=ids).logits[..., kept]
    torch.testing.assert_close(reader(input_ids=renumbered).logits, expected)
    assert network(input_ids=ids).logits.shape[-1] == size


def refused(study):
    with pytest.raises(StudyError) as caught:
        prepare(study)
    assert not study.output.exists()
    return str(caught.value)


def test_another_vocabulary_is_refused_before_any_work(with_model, tmp_path):
    study, _ = with_model()
    tokenizer = tiny.tiny_tokenizer()
    keep_pieces(tokenizer, range(len(tokenizer) - 1)).save_pretrained(tmp_path / "language_model")
    assert "language_model: its vocabulary is not the teacher's" in refused(study)


def test_another_family_is_refused_before_any_work(with_model, tmp_path):
    study, _ = with_model()
    config = tmp_path / "language_model" / "config.json"
    config.write_text(config.read_text().replace('"model_type": "bert"', '"model_type": "gpt2"'))
    assert "teacher.masked_lm: models of the family 'gpt2' are not supported" in refused(study)


@pytest.mark.parametrize("path", ["ensemble", "masked_lm"])
def test_a_vocabulary_to_be_trained_is_compared_before_its_teacher_is(path, tiny_study, tmp_path, monkeypatch):
    """Of a trained vocabulary only the size is known before."""
    pieces = [*tiny.tiny_vocabulary(), *(f"word{number}" for number in range(40))][:100]
    make = tiny.tiny_teacher if path == "ensemble" else language_model
    make(tmp_path / "other", vocab_size=100)
    build_tokenizer(pieces, 64).save_pretrained(tmp_path / "other")
    architecture = {"layers": 2, "hidden": 8, "heads": 2, "vocabulary": 100}
    other = ["other"] if path == "ensemble" else "other"
    teacher = {"model": None, "architecture": architecture, "fine_tune": {"epochs": 1}, path: other}
    study = load_study(tiny_study(methods=["tinybert"], teacher=teacher))
    prepared = prepare(study)
    monkeypatch.setattr("compress_search.teacher.scratch.train_wordpiece", lambda *_: [*pieces[:-1], "another"])
    monkeypatch.setattr("compress_search.teacher.fit", lambda *_, **__: pytest.fail("the teacher was trained"))
    with pytest.raises(StudyError, match=rf"teacher\.{path}.*other: its vocabulary is not"):
        _ = Workbench(prepared.brief).materials


def test_what_is_unlike_the_teacher_is_known_before_any_work(with_model):
    study, _ = with_model(layers=3, hidden_size=16)
    traits = {trait for trait in prepare(study).plan.teacher.traits if trait.startswith("masked-lm:")}
    assert traits == {"masked-lm:layers=3", "masked-lm:hidden=16", "masked-lm:embedding_size=16"}


def test_a_missing_directory_is_refused_when_the_study_is_read(tiny_study):
    with pytest.raises(StudyError, match=r"teacher.masked_lm.*no such directory: ./nowhere"):
        load_study(tiny_study(), ["teacher.masked_lm=./nowhere"])


def test_a_model_without_the_head_is_refused(tiny_study, tmp_path):
    path = tiny_study(methods=["tinybert"])
    tiny.tiny_teacher(tmp_path / "other")
    config = tmp_path / "other" / "config.json"
    config.write_text(re.sub(r'"architectures": \[.*?\],', "", config.read_text(), flags=re.DOTALL))  # older files
    prepared = prepare(load_study(path, ["teacher.masked_lm=other"]))
    with pytest.raises(
        StudyError, match=r"teacher\.masked_lm: expected a masked language model, and the weights lack"
    ):
        Workbench(prepared.brief).materials.masked_lm()


@pytest.mark.parametrize(("kind", "there"), [("pairs", True), ("text-classification", False)])
def test_methods_are_told_whether_examples_are_pairs(tiny_study, kind, there):
    assert ("pairs" in prepare(load_study(tiny_study(kind, methods=["tinybert"]))).plan.teacher.traits) == there


@pytest.mark.parametrize(
    ("kind", "method", "params"),
    [
        ("text-classification", "tinybert", {"augment": True, "variants": 2, "width": 0.5}),
        ("token-classification", "tinybert", {"augment": True, "variants": 2, "hard_weight": 0.2}),
        ("pairs", "distilbert", {}),
        ("text-regression", "distilbert", {}),
        ("token-classification", "distilbert", {}),
    ],
)
def test_students_learn_from_it_in_a_trial_with_fewer_pieces(tiny_study, tmp_path, kind, method, params):
    path = tiny_study(kind, methods=["vocabulary_pruning", method])
    text = tiny.write_jsonl(path.parent / "data" / "more.jsonl", tiny.tiny_rows(kind, 40, seed=9))
    language_model(tmp_path / "language_model")
    study = load_study(path, ["teacher.masked_lm=language_model", f"data.unlabeled={text}"])
    prepared = prepare(study)
    bench = Workbench(prepared.brief)
    space, subject = prepared.plan.spaces[method], prepared.plan.teacher
    settled = prepared.plan.methods[method].effective(subject, {**defaults(space), **params})
    pruning = defaults(prepared.plan.spaces["vocabulary_pruning"])
    recipe = Recipe((Step.of("vocabulary_pruning", pruning), Step.of(method, settled)))
    candidate, budget = run_recipe(recipe, bench.registry, bench.materials, seed=1, scratch=tmp_path)
    assert budget.done >= bench.materials.steps
    assert candidate.subject.vocabulary < subject.vocabulary
    assert candidate.subject.parameters == sum(p.numel() for p in candidate.network.parameters())
    assert candidate.subject.token_types == (1 if method == "distilbert" and kind != "pairs" else 2)
    directory = tmp_path / "artifact"
    bench.lower(candidate, directory)
    split = bench.as_read(directory, "validation")
    assert load_runner(directory, threads=1)(split.arrays(range(3))).shape[0] == 3

"""The small pretrained network that students may start from: found, checked before any work, trained in trials."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compress_search_plugins.distillation.starts import checkpoint_fault, checkpoint_subject
from compress_search_plugins.layer_match import LayerMatch
from compress_search_plugins.minilm import MiniLM
from compress_search_plugins.plain_student import PlainStudent
from compress_search_plugins.tinybert import TinyBert
from transformers import AutoModelForMaskedLM

from compress_search import Method, StudyError, Subject
from compress_search.crf import crf_of
from compress_search.driver import prepare
from compress_search.encoders import backbone, keep_pieces, layers, subject_of
from compress_search.pipeline import run_recipe
from compress_search.recipe import Recipe, Step
from compress_search.space import defaults, narrow
from compress_search.study import load_study
from compress_search.testing import tiny_candidate, tiny_context
from compress_search.workbench import Workbench
from tests import tiny

METHODS: list[Method] = [TinyBert(), LayerMatch(), MiniLM(), PlainStudent()]
NAMES = ["tinybert", "layer_match", "minilm", "plain_student"]
BERT = Subject("bert", "text-classification", 12, 12, 64, 768, 3072, 30522, 512, 2, 2)


def small(folder: Path, family: str = "bert", layers: int = 1, **changes: Any) -> dict[str, torch.Tensor]:
    """A language model, as such are published, and the weights of its encoder."""
    torch.manual_seed(3)
    network: Any = AutoModelForMaskedLM.from_config(tiny.tiny_config(family=family, layers=layers, **changes))
    network.save_pretrained(folder)
    tiny.tiny_tokenizer(family).save_pretrained(folder)
    return dict(backbone(network).state_dict())


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_SEARCH_CACHE", str(tmp_path / "cache"))


def named(path: Path, **changes: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    weights = small(path.parent / "small", **changes)
    return load_study(path, ["teacher.student_start=small"]), weights


def settled(method: Method, subject: Subject, **written: Any) -> dict[str, Any]:
    """The parameters of a study that writes these values, as they will be used."""
    space = method.search_space(subject)
    fixed = {name: narrow(dim, written[name]) if name in written else dim for name, dim in space.items()}
    return dict(method.effective(subject, defaults(fixed)))


@pytest.mark.parametrize("kind", ["text-classification", "token-classification"])
def test_methods_get_its_encoder_under_a_head_that_is_the_same_each_time(
    tiny_study: Callable[..., Path], kind: str
) -> None:
    study, weights = named(tiny_study(kind, methods=["tinybert"]))
    prepared = prepare(study)
    assert {"student-start", "student-start:layers=1"} <= prepared.plan.teacher.traits
    bench = Workbench(prepared.brief)
    first, second = (bench.materials.student_start() for _ in range(2))
    assert first is not None
    assert second is not None
    assert first is not second
    assert len(layers(first)) == 1
    ours = backbone(first).state_dict()
    assert all(torch.equal(ours[name], value) for name, value in weights.items() if "pooler" not in name)
    again = second.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in first.state_dict().items())
    assert all(parameter.requires_grad for parameter in first.parameters())


def test_without_the_key_there_is_none_and_the_choice_says_what_it_needs(
    tiny_study: Callable[..., Path],
) -> None:
    path = tiny_study(methods=["tinybert"])
    assert Workbench(prepare(load_study(path)).brief).materials.student_start() is None
    for method in NAMES:
        own = tiny_study(methods={method: {"start": "checkpoint"}})
        with pytest.raises(StudyError, match=rf"methods\.{method}\.start: .*name one under teacher\.student_start"):
            prepare(load_study(own))


def test_its_content_is_part_of_what_artefacts_are_made_of(tiny_study: Callable[..., Path]) -> None:
    study, _ = named(tiny_study(methods=["tinybert"]))
    recipe = Recipe((Step.of("tinybert", {}),))
    before = Workbench(prepare(study).brief).artifact(recipe, 0)
    small(study.output.parent / "small", intermediate_size=48)
    assert Workbench(prepare(study).brief).artifact(recipe, 0) != before


# what is refused before any work


def refused(study: Any) -> str:
    with pytest.raises(StudyError) as caught:
        prepare(study)
    assert not study.output.exists()
    return str(caught.value)


def test_another_vocabulary_is(tiny_study: Callable[..., Path], tmp_path: Path) -> None:
    study, _ = named(tiny_study(methods=["tinybert"]))
    tokenizer = tiny.tiny_tokenizer()
    keep_pieces(tokenizer, range(len(tokenizer) - 1)).save_pretrained(tmp_path / "small")
    assert "teacher.student_start: " in refused(study)
    assert "small: its vocabulary is not the teacher's" in refused(study)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "distilbert"}, "unlike the teacher: family distilbert and not bert"),
        ({"type_vocab_size": 1}, "unlike the teacher: token_types 1 and not 2"),
        ({"layers": 2}, "with 2 layers and .* is no smaller than the teacher"),
        ({"layers": 3, "hidden_size": 8, "intermediate_size": 8}, "with 3 layers and .* no smaller"),
    ],
)
def test_one_that_is_no_student_is(tiny_study: Callable[..., Path], changes: dict[str, Any], message: str) -> None:
    for method in NAMES:
        path = tiny_study(methods={method: {"start": "checkpoint"}})
        study, _ = named(path, **changes)
        with pytest.raises(StudyError, match=rf"methods\.{method}\.start: checkpoint, and .*{message}"):
            prepare(study)


def test_one_that_cannot_be_compared_with_the_teacher_is() -> None:
    heads = BERT.having("student-start", "student-start:layers=6", "student-start:heads=8")
    for method, wishes, instead in (
        (TinyBert(), {}, "use layer_match, with attention_mse_sum"),
        (LayerMatch(), {}, "write matches, with attention_mse_sum, attention_ce_mean or relation_kl:<heads>"),
        (MiniLM(), {"version": "v1"}, "use version: v2"),
        (MiniLM(), {"relations": "qk+vv"}, "leave out qk, or choose other relation_heads"),
    ):
        fault = method.faults(heads, settled(method, heads, start="checkpoint", **wishes))
        loss = "relation_kl_rows" if isinstance(method, MiniLM) else "attention_mse"
        assert fault == {"start": f"checkpoint, and {loss} cannot compare 8 heads with 12: {instead}"}
    assert MiniLM().faults(heads, settled(MiniLM(), heads, start="checkpoint")) == {}
    narrow_one = BERT.having("student-start", "student-start:layers=6", "student-start:hidden=384")
    fault = TinyBert().faults(narrow_one, settled(TinyBert(), narrow_one, start="checkpoint", projection="none"))
    assert fault["start"] == "checkpoint, 384 wide and the teacher 768: choose a projection"
    fault = TinyBert().faults(narrow_one, settled(TinyBert(), narrow_one, start="checkpoint", custom_map="3, 6"))
    assert "of 6 layers, and custom_map lists 2" in fault["start"]


# the student


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_shapes_are_the_networks_own_whatever_layers_and_width_would_be(method: Method) -> None:
    given = tiny_candidate()
    candidate = given.replace(subject=given.subject.having("student-start", "student-start:layers=2"))
    params = settled(method, candidate.subject, start="checkpoint")
    assert not {"layers", "width", "init", "assistant"} & params.keys()
    assert method.effective(candidate.subject, params) == params
    assert method.faults(candidate.subject, params) == {}
    dry, trained = (method.apply(candidate, params, tiny_context(candidate, dry=d)) for d in (True, False))
    start: Any = tiny_context(candidate).student_start()
    assert all(torch.equal(value, start.state_dict()[name]) for name, value in dry.network.state_dict().items())
    assert dry.subject == trained.subject == method.after(candidate.subject, params)
    assert shapes(trained.subject) == subject_of(trained.network, "text-classification")
    assert trained.subject.parameters == sum(p.numel() for p in trained.network.parameters())


def shapes(subject: Subject) -> Subject:
    return subject.without("lossy", *(trait for trait in subject.traits if trait.startswith("student-start")))


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_a_study_that_says_nothing_of_it_is_what_it_was(method: Method) -> None:
    there = BERT.having("student-start", "student-start:layers=3")
    before, now = (settled(method, subject) for subject in (BERT, there))
    assert {name: value for name, value in now.items() if name != "start"} == {
        name: value for name, value in before.items() if name != "start"
    }
    assert method.after(there, now).layers == method.after(BERT, before).layers


def test_a_general_tinybert_has_its_published_shape() -> None:
    published = {"layers": 4, "hidden": 312, "intermediate": 1200, "embedding_size": 312}
    subject = BERT.having("student-start", *(f"student-start:{name}={size}" for name, size in published.items()))
    assert checkpoint_fault(subject) is None
    assert checkpoint_subject(subject).head_dim == 26
    student = TinyBert().after(subject, settled(TinyBert(), subject, start="checkpoint"))
    # 14,350,248 without a head
    assert student.parameters == 14_350_248 + 312 * 2 + 2


@pytest.mark.parametrize("kind", ["text-classification", "token-classification"])
@pytest.mark.parametrize("method", NAMES)
def test_students_start_from_it_in_a_trial_with_fewer_pieces(
    tiny_study: Callable[..., Path], tmp_path: Path, kind: str, method: str
) -> None:
    shape = {"hidden_size": 16, "intermediate_size": 24}
    study, _ = named(tiny_study(kind, methods=["vocabulary_pruning", method]), **shape)
    prepared = prepare(study)
    bench, subject = Workbench(prepared.brief), prepared.plan.teacher
    pruning = defaults(prepared.plan.spaces["vocabulary_pruning"])
    fewer = prepared.plan.methods["vocabulary_pruning"].after(subject, pruning)
    params = settled(prepared.plan.methods[method], fewer, start="checkpoint")
    recipe = Recipe((Step.of("vocabulary_pruning", pruning), Step.of(method, params)))
    candidate, budget = run_recipe(recipe, bench.registry, bench.materials, seed=1, scratch=tmp_path)
    assert budget.done >= bench.materials.steps
    found = subject_of(candidate.network, subject.task)
    assert (found.layers, found.hidden, found.intermediate) == (1, 16, 24)
    assert found.vocabulary < subject.vocabulary
    assert candidate.subject.parameters == found.parameters


def test_a_taggers_student_gets_a_crf_where_its_teacher_has_one(tiny_study: Callable[..., Path]) -> None:
    fine_tune = {"epochs": 0.1, "batch_size": 16, "crf": True}
    teacher = {"model": "teacher", "fine_tune": fine_tune}
    study, _ = named(tiny_study("token-classification", methods=["plain_student"], teacher=teacher))
    start = Workbench(prepare(study).brief).materials.student_start()
    assert start is not None
    crf = crf_of(start)
    assert crf is not None
    assert not any(parameter.any() for parameter in crf.parameters())


def test_a_start_that_knows_the_language_learns_faster_than_none() -> None:
    given = tiny_candidate()
    context: Any = tiny_context(given, steps=60)
    taught = PlainStudent().apply(given, settled(PlainStudent(), given.subject, layers=2), context)
    candidate = given.replace(subject=given.subject.having("student-start", "student-start:layers=2"))
    losses = []
    for wishes in ({"start": "checkpoint"}, {"start": "random", "layers": 2}):
        context = tiny_context(candidate, steps=30)
        context.student_start = lambda: taught.copy().network
        result = TinyBert().apply(candidate, settled(TinyBert(), candidate.subject, **wishes), context)
        losses.append(TinyBert().evaluate(result, context)["soft"])
    assert losses[0] < losses[1]

"""What the engine lends methods inside a trial: the teacher's outputs from disk, and unlabelled text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compress_search import TrialError
from compress_search.driver import prepare
from compress_search.encoders import read_features
from compress_search.pipeline import Budget, StepContext, extra_metrics, run_recipe
from compress_search.recipe import Recipe, Step
from compress_search.study import load_study
from compress_search.teacher.outputs import TeacherOutputs
from compress_search.teacher.room import make_room
from compress_search.workbench import Workbench
from tests import tiny

NAMES = ["hidden.1", "scores.1"]


@pytest.fixture
def bench(
    tiny_study: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Any, Workbench]]:
    """``bench(section__key=value)``: the plan of a study of two methods, and a worker's belongings."""
    monkeypatch.setenv("COMPRESS_SEARCH_CACHE", str(tmp_path / "cache"))

    def make(**changes: Any) -> tuple[Any, Workbench]:
        path = tiny_study(methods={"layer_match": {"phases": "two_phase"}, "minilm": {}})
        study = load_study(path, [f"{key.replace('__', '.')}={value}" for key, value in changes.items()])
        prepared = prepare(study)
        return prepared.plan, Workbench(prepared.brief)

    return make


def context_of(bench: Workbench, scratch: Path) -> StepContext:
    return StepContext(bench.materials, Budget(4, lambda *_: True), 4, seed=1, scratch=scratch, dry=False)


def test_outputs_are_the_teachers_and_come_from_disk_for_training_rows(bench: Any, tmp_path: Path) -> None:
    _, workbench = bench()
    context = context_of(workbench, tmp_path)
    batch = next(iter(context.calibration(8, 8)))
    found = context.teacher_outputs(batch, NAMES)
    with torch.no_grad():
        expected = read_features(context.teacher, batch, NAMES)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(found["hidden.1"][real], expected["hidden.1"][real], atol=1e-5, rtol=1e-5)
    assert not found["hidden.1"].requires_grad
    assert workbench.materials.outputs.directory.is_relative_to(workbench.cache)
    made = {path.name for path in workbench.materials.outputs.directory.iterdir() if path.is_dir()}
    assert made == {"hidden.1", "key.1", "query.1"}


@pytest.mark.parametrize("rows", [True, False], ids=["training rows", "other text"])
def test_logits_are_those_of_all_teachers_and_states_the_firsts(bench: Any, tmp_path: Path, rows: bool) -> None:
    tiny.tiny_teacher(tmp_path / "other", layers=3)
    _, workbench = bench(teacher__ensemble="[other]")
    context = context_of(workbench, tmp_path)
    batch = next(iter(context.calibration(8, 8)))
    batch = batch if rows else {name: tensor for name, tensor in batch.items() if name != "index"}
    found = context.teacher_outputs(batch, ["logits", "hidden.1"])
    with torch.no_grad():
        alone = read_features(context.teacher, batch, ["logits", "hidden.1"])
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(found["hidden.1"][real], alone["hidden.1"][real], atol=1e-5, rtol=1e-5)
    assert torch.equal(found["logits"], context.teacher_logits(batch))
    assert not torch.allclose(found["logits"], alone["logits"], atol=1e-3)
    assert torch.equal(context.teacher_outputs(batch, ["logits"])["logits"], found["logits"])


def test_a_trials_outputs_give_way_once_it_has_ended(bench: Any, tmp_path: Path) -> None:
    plan, workbench = bench()
    (recipe, _), outputs = plan.at_defaults({"layer_match"}), workbench.materials.outputs
    run_recipe(recipe, plan.methods, workbench.materials, seed=1, scratch=tmp_path)
    (first, *_) = (path for path in outputs.directory.iterdir() if path.is_dir())
    other = TeacherOutputs(outputs.teacher, "other", outputs.split, workbench.cache, limit=1)
    assert make_room(other.directory, 1, 1, ())
    assert not first.exists()


def test_a_study_may_forbid_the_disk(bench: Any, tmp_path: Path) -> None:
    _, workbench = bench(training__teacher_cache_gb=0)
    context = context_of(workbench, tmp_path)
    context.teacher_outputs(next(iter(context.calibration(8, 8))), NAMES)
    assert not workbench.materials.outputs.directory.exists()


def test_logits_of_a_changed_text_are_its_own(bench: Any, tmp_path: Path) -> None:
    _, workbench = bench()
    context = context_of(workbench, tmp_path)
    batch = next(iter(context.calibration(8, 8)))
    original = context.teacher_logits(batch)
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][0, 1] += 1
    found = context.teacher_logits(changed)
    assert (found[0] - original[0]).abs().max() > 1e-6
    torch.testing.assert_close(found[1:], original[1:], atol=1e-5, rtol=1e-5)


def test_unlabelled_text_is_lent_where_there_is_some(bench: Any, tmp_path: Path) -> None:
    _, workbench = bench(data__unlabeled="data/test.jsonl")
    batches = context_of(workbench, tmp_path).unlabelled(6)
    first = next(batches)
    assert set(first) == {"input_ids", "token_type_ids", "attention_mask"}
    assert len(first["input_ids"]) == 6
    again = next(context_of(workbench, tmp_path).unlabelled(6))
    assert torch.equal(first["input_ids"], again["input_ids"])
    once = context_of(workbench, tmp_path).unlabelled(6, once=True)
    assert sum(len(batch["input_ids"]) for batch in once) == len(workbench.splits["unlabelled"])


def test_without_it_the_error_names_the_key(bench: Any, tmp_path: Path) -> None:
    _, workbench = bench()
    with pytest.raises(TrialError, match=r"data\.unlabeled"):
        context_of(workbench, tmp_path).unlabelled(6)


@pytest.mark.parametrize("method", ["layer_match", "minilm"])
def test_a_trial_is_the_same_with_and_without_the_disk(bench: Any, tmp_path: Path, method: str) -> None:
    weights = []
    for limit in (4, 0):
        plan, workbench = bench(training__teacher_cache_gb=limit)
        recipe, _ = plan.at_defaults({method})
        recipe = Recipe(tuple(step for step in recipe.steps if step.method == method))
        candidate, budget = run_recipe(recipe, plan.methods, workbench.materials, seed=3, scratch=tmp_path)
        assert budget.done == workbench.materials.steps
        weights.append(torch.cat([p.detach().flatten() for p in candidate.network.parameters()]))
        metrics = extra_metrics(recipe, plan.methods, candidate, context_of(workbench, tmp_path))
        assert f"{method}.soft" in metrics
    torch.testing.assert_close(weights[0], weights[1], atol=1e-4, rtol=1e-3)


def test_unlabelled_text_is_trained_on_in_a_trial(bench: Any, tmp_path: Path) -> None:
    plan, workbench = bench(data__unlabeled="data/test.jsonl")
    recipe, _ = plan.at_defaults({"layer_match"})
    (step,) = recipe.steps
    candidates = [
        run_recipe(
            Recipe((Step.of("layer_match", {**step.params, "unlabelled_text": text}),)),
            plan.methods,
            workbench.materials,
            seed=3,
            scratch=tmp_path,
        )[0]
        for text in (False, True)
    ]
    tables = [next(candidate.network.parameters()) for candidate in candidates]
    assert not torch.equal(tables[0], tables[1])

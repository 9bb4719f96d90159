"""Structured pruning within a budget: what is spent, what goes altogether, and what cannot be reached."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compress_search_plugins.pruning.pruner import CRITERIA
from compress_search_plugins.structured_pruning import StructuredPruning

from compress_search import Candidate, TrialError
from compress_search.encoders import subject_of
from compress_search.runtimes import load_runner
from compress_search.runtimes.lowering import lower
from compress_search.testing import TinyContext, tiny_batches, tiny_candidate, tiny_context
from tests.pruning import FAMILIES, inputs, layer_shapes, logits, parameters, recorded

METHOD = StructuredPruning()
UNTRAINED = {"recover": "none"}


@pytest.mark.parametrize(
    ("criterion", "scope"), [*((name, "global") for name in CRITERIA), ("taylor", "per_layer")]
)
@pytest.mark.parametrize("budget", ["macs", "latency"])
def test_a_budget_is_kept_and_used(criterion: str, scope: str, budget: str) -> None:
    candidate = tiny_candidate()
    params = parameters(
        candidate.subject, budget=budget, target=0.6, criterion=criterion, scope=scope, ffn_multiple=8
    )
    context = tiny_context(candidate, steps=8)
    result = METHOD.apply(candidate, params, context)
    assert result.subject == METHOD.after(candidate.subject, params)
    cost = context.layer_latency(candidate.subject)
    if budget == "macs":
        lengths = [int(n) for b in context.calibration(512) for n in b["attention_mask"].sum(1)]
        length = round(sum(lengths) / len(lengths))
        cost = lambda k, f: length * (4 * k * 8 * 32 + 2 * f * 32) + 2 * length**2 * k * 8  # noqa: E731
    spent, cap = sum(cost(*shape) for shape in layer_shapes(result)), 0.6 * 4 * cost(4, 64)
    assert spent <= cap * (1 + 1e-9)
    rows = 4 if scope == "per_layer" else 1
    assert spent + rows * cost(0, 8) - rows * cost(0, 0) > cap


def test_latency_is_a_part_of_the_teachers_whatever_came_before() -> None:
    teacher = tiny_candidate(layers=4)
    half = tiny_candidate(layers=2)
    params = parameters(half.subject, budget="latency", target=0.5, recover="none")
    same = METHOD.apply(half, params, tiny_context(teacher))
    assert layer_shapes(same) == layer_shapes(half)
    smaller = METHOD.apply(half, params, tiny_context(half))
    assert sum(heads for heads, _ in layer_shapes(smaller)) + sum(f for _, f in layer_shapes(smaller)) < 2 * 68


def test_a_latency_that_no_shape_reaches_is_refused_with_the_least(monkeypatch: pytest.MonkeyPatch) -> None:
    candidate = tiny_candidate()
    params = parameters(candidate.subject, budget="latency", target=0.55, recover="kd")
    context = tiny_context(candidate)
    calls = recorded(context)
    # on this machine a layer takes a millisecond before it computes anything
    monkeypatch.setattr(
        context, "layer_latency", lambda subject: lambda heads, neurons: 1 + 1e-3 * (heads + neurons)
    )
    with pytest.raises(TrialError, match=r"target is 0.55 of the milliseconds .* no less than 0.9\d+"):
        METHOD.apply(candidate, params, context)
    assert calls == []


@pytest.mark.parametrize("budget", ["macs", "latency"])
def test_a_dry_run_under_a_budget_has_equal_layers_within_it(budget: str) -> None:
    candidate = tiny_candidate()
    params = parameters(candidate.subject, budget=budget, target=0.6, ffn_multiple=8)
    context = tiny_context(candidate, dry=True)
    shapes = layer_shapes(METHOD.apply(candidate, params, context))
    assert len(set(shapes)) == 1
    cost = context.layer_latency(candidate.subject)
    assert sum(cost(*shape) for shape in shapes) <= 0.62 * 4 * cost(4, 64)


@pytest.mark.parametrize("family", FAMILIES)
def test_attentions_go_as_a_whole_where_they_cost_most_before_their_first_head(family: str, tmp_path: Path) -> None:
    """On small models a first head takes nearly as long as all of them; what is left is saved, exported and run."""
    candidate = tiny_candidate(family)
    context = slow_to_start(tiny_context(candidate))
    how = {"budget": "latency", "target": 0.5, "ffn_multiple": 8, "criterion": "fisher", "calib_examples": 256}
    params = parameters(candidate.subject, **how, **UNTRAINED)
    result = METHOD.apply(candidate, params, context)
    shapes, cost = layer_shapes(result), context.layer_latency(candidate.subject)
    gone = [heads for heads, _ in shapes].count(0)
    assert 1 <= gone <= 3
    assert sum(cost(*shape) for shape in shapes) <= 0.5 * 4 * cost(4, 64) * (1 + 1e-9)
    kept = METHOD.apply(candidate, {**params, "target": 0.85, "whole_blocks": False}, context)
    assert all(heads > 0 and neurons > 0 for heads, neurons in layer_shapes(kept))
    measured = subject_of(result.network, candidate.subject.task)
    assert measured.parameters == sum(p.numel() for p in result.network.parameters())
    lower(result, tmp_path / "artifact", context.task)
    given = inputs(candidate)
    found = load_runner(tmp_path / "artifact", threads=1)({name: t.numpy() for name, t in given.items()})
    np.testing.assert_allclose(found, logits(result.network, given).numpy(), atol=1e-4)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("recover", ["rescale", "kd"])
def test_whole_blocks_go_by_every_criterion_and_what_is_left_recovers(criterion: str, recover: str) -> None:
    candidate = tiny_candidate(layers=2)
    context = slow_to_start(tiny_context(candidate, steps=8))
    how = {"budget": "latency", "target": 0.42, "ffn_multiple": 8, "criterion": criterion, "recover": recover}
    result = METHOD.apply(candidate, parameters(candidate.subject, **how), context)
    cost = context.layer_latency(candidate.subject)
    assert sum(cost(*shape) for shape in layer_shapes(result)) <= 0.84 * cost(4, 64)
    assert min(heads for heads, _ in layer_shapes(result)) == 0
    assert logits(result.network, inputs(candidate)).isfinite().all()


def slow_to_start(context: TinyContext) -> TinyContext:
    """On a machine on which attention takes three milliseconds before its first head, and one for each."""

    def latency(subject: Any) -> Any:
        return lambda heads, neurons: 0.1 + 3 * (heads > 0) + heads + neurons / 32

    context.layer_latency = latency  # type: ignore[method-assign]
    return context


def test_a_smaller_target_never_takes_longer_nor_more_arithmetic() -> None:
    candidate = tiny_candidate()
    for budget, context in (("macs", tiny_context(candidate)), ("latency", slow_to_start(tiny_context(candidate)))):
        spent = []
        for target in (1.0, 0.7, 0.4):
            how = {"budget": budget, "target": target, "criterion": "magnitude", "ffn_multiple": 8}
            result = METHOD.apply(candidate, parameters(candidate.subject, **how, **UNTRAINED), context)
            cost = context.layer_latency(candidate.subject)
            macs = subject_of(result.network, candidate.subject.task).macs(10)
            spent.append(macs if budget == "macs" else sum(cost(*shape) for shape in layer_shapes(result)))
        assert all(more > less for more, less in pairwise(spent)), budget


def test_a_share_of_the_arithmetic_that_nothing_is_small_enough_for_is_a_fault_and_is_not_proposed() -> None:
    candidate = tiny_candidate(layers=2)
    space = METHOD.search_space(candidate.subject)
    low = space["target"].distribution.low  # type: ignore[attr-defined]
    params = parameters(candidate.subject, budget="macs", target=low)
    assert METHOD.faults(candidate.subject, params) == {}, "all that is in the space can be had by itself"
    network = METHOD.apply(candidate, params | UNTRAINED, tiny_context(candidate)).network
    assert subject_of(network, candidate.subject.task).macs(10) <= low * candidate.subject.macs(10)
    assert METHOD.faults(candidate.subject, params | {"target": 0.04, "budget": "latency"}) == {}, "not known here"
    for changes in ({"target": low - 0.01}, {"whole_blocks": False}, {"min_heads": 4}, {"ffn_multiple": 64}):
        (fault,) = METHOD.faults(candidate.subject, params | changes).values()
        assert re.match(r"0\.\d+ of the multiply-accumulates, and .* has 0\.\d+: expected at least that", fault)
        least = float(fault.partition(" has ")[2].partition(":")[0])
        assert METHOD.faults(candidate.subject, params | changes | {"target": least}) == {}


# Does it work


@pytest.fixture(scope="module")
def trained() -> Candidate:
    """A network that has learned the tiny task with room to spare."""
    candidate = tiny_candidate(layers=2, intermediate=128)
    tiny_context(candidate, steps=150, batch_size=16).fit(candidate.network, learning_rate=2e-3)
    return candidate


def distance(candidate: Candidate, teacher: Candidate) -> float:
    """How far the outputs lie from the teacher's, on other texts than those it was fitted on."""
    batches = list(tiny_batches(teacher, batch_size=64, seed=99, examples=256))
    pairs = [({k: b[k] for k in teacher.tokenizer.model_input_names}) for b in batches]
    return float(sum((logits(candidate.network, p) - logits(teacher.network, p)).square().mean() for p in pairs))


def test_without_retraining_fisher_beats_chance_and_scales_make_up_for_much(trained: Candidate) -> None:
    context = tiny_context(trained)
    context.examples = 512  # what scales are fitted to

    def error(criterion: str, recover: str, seed: int = 0) -> float:
        how = {"budget": "macs", "target": 0.35, "ffn_multiple": 8, "criterion": criterion, "recover": recover}
        context.seed = seed
        return distance(METHOD.apply(trained, parameters(trained.subject, **how), context), trained)

    chance = sum(error("random", "none", seed) for seed in range(3)) / 3
    assert error("fisher", "none") < 0.7 * chance
    criteria = ("fisher", "taylor", "random")
    left, scaled = (sum(error(criterion, recover) for criterion in criteria) for recover in ("none", "rescale"))
    assert scaled < 0.9 * left

"""Born-again networks: where generations start, whom they learn from, and what they may spend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compress_search_plugins.born_again import BornAgain
from compress_search_plugins.distillation.starts import started_anew
from torch import nn

from compress_search import Candidate, StudyError, TrialError
from compress_search.driver import prepare
from compress_search.encoders import prune_neurons
from compress_search.space import active, defaults
from compress_search.study import load_study
from compress_search.testing import TinyContext, tiny_batches, tiny_candidate, tiny_context
from compress_search.training import forward

TASKS = ("text-classification", "text-regression", "token-classification")


def parameters(candidate: Candidate, **changes: Any) -> dict[str, Any]:
    space = BornAgain().search_space(candidate.subject)
    params = defaults(space) | changes
    return {name: value for name, value in params.items() if active(space[name], params)}


def recorded(context: TinyContext) -> list[dict[str, Any]]:
    """The calls of the context's fit, each with the state in which its network came."""
    calls, fit = [], context.fit

    def recording(network: nn.Module, **options: Any) -> None:
        start = {name: value.clone() for name, value in network.state_dict().items()}
        fit(network, **options)
        calls.append({**options, "network": network, "start": start})

    context.fit = recording  # type: ignore[method-assign]
    return calls


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return all(torch.equal(value, right[name]) for name, value in left.items())


@pytest.mark.parametrize("task", TASKS)
def test_every_generation_starts_where_the_teacher_started_and_has_its_shape(task: str) -> None:
    candidate = tiny_candidate("bert", task, layers=2)
    context = tiny_context(candidate)
    calls = recorded(context)
    result = BornAgain().apply(candidate, parameters(candidate, generations=3), context)
    start = context.untrained()
    assert start is not None
    assert all(same(call["start"], start.state_dict()) for call in calls)
    assert [call["share"] for call in calls] == pytest.approx([1 / 3] * 3)
    assert context.fits == [2, 2, 2]
    assert result.subject == candidate.subject
    assert result.network is calls[-1]["network"]
    assert all(p.requires_grad for p in result.network.parameters())


@pytest.mark.parametrize("average", [False, True])
def test_a_generation_learns_from_the_one_before_or_from_all(average: bool) -> None:
    candidate = tiny_candidate(layers=2)
    context = tiny_context(candidate)
    calls = recorded(context)
    BornAgain().apply(candidate, parameters(candidate, generations=3, alpha=1.0, average=average), context)
    batch = next(tiny_batches(candidate))
    said = [context.teacher_logits(batch), *(forward(call["network"], batch).detach() for call in calls[:2])]
    for generation, call in enumerate(calls):
        known = said[: generation + 1]
        echo = _Echo(torch.stack(known).mean(0) if average else known[-1])
        assert call["loss"](echo, batch).item() == pytest.approx(0, abs=1e-6)
        assert call["loss"](_Echo(-echo.logits), batch).item() > 1e-3


class _Echo(nn.Module):
    """A network that says the same whatever it is asked."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, **_: torch.Tensor) -> _Echo:
        return self


def test_elders_neither_learn_nor_drop_out() -> None:
    candidate = tiny_candidate(layers=2)
    context = tiny_context(candidate)
    calls = recorded(context)
    BornAgain().apply(candidate, parameters(candidate, generations=2, alpha=1.0), context)
    elder = calls[0]["network"]
    assert not any(module.training for module in elder.modules())
    assert not any(p.requires_grad or p.grad is not None for p in elder.parameters())


def test_what_an_earlier_step_cut_stays_cut() -> None:
    candidate = tiny_candidate(layers=2)
    prune_neurons(candidate.network, {0: range(16)})
    start = tiny_candidate(layers=2, seed=5).network
    network = started_anew(candidate, start)
    own, fresh, result = candidate.network.state_dict(), start.state_dict(), network.state_dict()
    for name, value in result.items():
        assert torch.equal(value, fresh[name] if fresh[name].shape == own[name].shape else own[name])
    assert any(fresh[name].shape != own[name].shape for name in own)


def test_without_a_known_start_it_is_the_network_itself() -> None:
    candidate = tiny_candidate(layers=2)
    network = started_anew(candidate, None)
    assert network is not candidate.network
    assert same(network.state_dict(), candidate.network.state_dict())


def test_one_generation_has_nothing_to_average() -> None:
    subject = tiny_candidate(layers=2).subject
    params = parameters(tiny_candidate(layers=2), average=True)
    assert BornAgain().effective(subject, params | {"generations": 1})["average"] is False
    assert BornAgain().effective(subject, params | {"generations": 2})["average"] is True


def test_a_generation_comes_near_its_teacher() -> None:
    candidate = tiny_candidate(layers=2)
    context = tiny_context(candidate, steps=60, batch_size=16)
    batch = next(tiny_batches(candidate, batch_size=128, seed=9))
    result = BornAgain().apply(candidate, parameters(candidate, alpha=1.0, learning_rate=5e-3), context)
    start = context.untrained()
    assert start is not None
    with torch.no_grad():
        truth = forward(context.teacher, batch)
        before, after = ((forward(network, batch) - truth).square().mean() for network in (start, result.network))
    assert after < 0.5 * before


def test_where_the_teacher_came_trained_nothing_is_born_again(tiny_study) -> None:
    with pytest.raises(StudyError, match="born_again: cannot be used in this study: the teacher came trained, so"):
        prepare(load_study(tiny_study(methods={"born_again": {}})))
    trained = {"fine_tune": {"epochs": 1, "learning_rate": 1e-3, "batch_size": 8}}
    plan = prepare(load_study(tiny_study(methods={"born_again": {"use": True}}, teacher=trained))).plan
    assert [step.method for step in plan.at_defaults({"born_again"})[0].steps] == ["born_again"]


def test_an_engine_that_lends_no_start_is_told_so_before_any_training() -> None:
    candidate = tiny_candidate(layers=2)
    context = tiny_context(candidate)
    context.untrained = lambda: None  # type: ignore[method-assign]
    with pytest.raises(TrialError, match="the teacher came trained"):
        BornAgain().apply(candidate, parameters(candidate), context)
    assert context.fits == []

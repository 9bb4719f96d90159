"""The control: bottom layers of the right start, trained on the labels alone unless told otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compress_search_plugins.distillation.students import cut_student
from compress_search_plugins.plain_student import PlainStudent

from compress_search import Candidate, StudyError, TrialError
from compress_search.driver import prepare
from compress_search.encoders import layers, subject_of
from compress_search.losses import kl, mse_logits
from compress_search.space import defaults
from compress_search.study import load_study
from compress_search.tasks import IGNORED
from compress_search.testing import tiny_batches, tiny_candidate, tiny_context
from compress_search.training import forward


def parameters(candidate: Candidate, **changes: Any) -> dict[str, Any]:
    return defaults(PlainStudent().search_space(candidate.subject)) | changes


@pytest.mark.parametrize("start", ["trained", "untrained"])
@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_it_starts_as_the_bottom_layers_of_the_named_network(family: str, start: str) -> None:
    candidate = tiny_candidate(family)
    context = tiny_context(candidate, dry=True)
    params = parameters(candidate, layers=3, start=start)
    result = PlainStudent().apply(candidate, params, context)
    source = candidate.network if start == "trained" else context.untrained()
    assert source is not None
    expected = source.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in result.network.state_dict().items())
    assert len(layers(result.network)) == 3
    assert result.subject.without("lossy") == subject_of(result.network, candidate.subject.task)
    assert sum(p.numel() for p in result.network.parameters()) == result.subject.parameters


@pytest.mark.parametrize("start", ["trained", "untrained"])
def test_a_narrower_one_keeps_the_channels_that_every_narrow_student_keeps(start: str) -> None:
    candidate = tiny_candidate()
    context = tiny_context(candidate, dry=True)
    params = PlainStudent().effective(candidate.subject, parameters(candidate, layers=2, width=0.5, start=start))
    result = PlainStudent().apply(candidate, params, context)
    source = candidate if start == "trained" else candidate.replace(network=context.untrained())
    expected = cut_student(source, range(2), 0.5).network.state_dict()
    found = result.network.state_dict()
    assert all(torch.equal(found.pop(name), value) for name, value in expected.items())
    assert not found
    assert result.subject == PlainStudent().after(candidate.subject, params)
    assert result.subject.hidden == candidate.subject.hidden / 2
    assert sum(p.numel() for p in result.network.parameters()) == result.subject.parameters


@pytest.mark.parametrize("task", ["text-classification", "text-regression", "token-classification"])
def test_its_loss_is_the_tasks_own_unless_it_is_to_hear_the_teacher(task: str) -> None:
    candidate = tiny_candidate("bert", task)
    context = tiny_context(candidate)
    asked: list[dict[str, Any]] = []
    context.fit = lambda network, **options: asked.append(options | {"network": network})  # type: ignore[method-assign]
    for alpha in (0.0, 1.0):
        PlainStudent().apply(candidate, parameters(candidate, alpha=alpha), context)
    batch = next(tiny_batches(candidate))
    plain, taught = asked
    assert plain["loss"](plain["network"], batch) == context.task_loss(plain["network"], batch)
    said, heard = forward(taught["network"], batch), context.teacher_logits(batch)
    mask = batch["labels"] != IGNORED if task == "token-classification" else None
    soft = mse_logits(said, heard) if task == "text-regression" else kl(said, heard, 2.0, mask)
    torch.testing.assert_close(taught["loss"](taught["network"], batch), soft)


@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_how_soft_the_teachers_word_is_can_be_chosen(temperature: float) -> None:
    candidate = tiny_candidate()
    context = tiny_context(candidate)
    asked: list[dict[str, Any]] = []
    context.fit = lambda network, **options: asked.append(options | {"network": network})  # type: ignore[method-assign]
    PlainStudent().apply(candidate, parameters(candidate, alpha=1.0, temperature=temperature), context)
    batch, network = next(tiny_batches(candidate)), asked[0]["network"]
    soft = kl(forward(network, batch), context.teacher_logits(batch), temperature)
    torch.testing.assert_close(asked[0]["loss"](network, batch), soft)


def test_a_temperature_that_nobody_feels_is_no_part_of_a_recipe() -> None:
    candidate = tiny_candidate()
    settled = [PlainStudent().effective(candidate.subject, parameters(candidate, alpha=a)) for a in (0.0, 0.5)]
    assert ["temperature" in params for params in settled] == [False, True]


def test_no_more_layers_than_there_are() -> None:
    candidate = tiny_candidate(layers=2)
    assert PlainStudent().effective(candidate.subject, parameters(candidate, layers=4))["layers"] == 2


@pytest.mark.parametrize(("trait", "reason"), [("shared", "share weights"), ("non-uniform", "differ in shape")])
def test_what_is_no_plain_network_is_refused(trait: str, reason: str) -> None:
    subject = tiny_candidate(layers=2).subject
    assert PlainStudent().unsupported(subject) is None
    assert reason in (PlainStudent().unsupported(subject.having(trait)) or "")


def test_a_control_from_an_untrained_start_is_refused_where_nobody_knows_that(tiny_study) -> None:
    path = tiny_study(methods={"plain_student": {"start": "untrained"}})
    with pytest.raises(StudyError, match=r"plain_student\.start: untrained, and the teacher came trained"):
        prepare(load_study(path))
    plan = prepare(load_study(tiny_study(methods={"plain_student": {"use": True}}))).plan
    assert plan.at_defaults({"plain_student"})[0].steps[0].params["start"] == "trained"


def test_nor_does_it_start_as_the_trained_one_in_its_place() -> None:
    candidate = tiny_candidate(layers=2)
    context = tiny_context(candidate)
    context.untrained = lambda: None  # type: ignore[method-assign]
    with pytest.raises(TrialError, match="the teacher came trained"):
        PlainStudent().apply(candidate, parameters(candidate, start="untrained"), context)
    assert context.fits == []

"""A parameter that a method says it uses is used: another value trains another network.

Every dimension of every method that makes a student or trains one is changed alone, in the first setting in which
it is active and in those that name it. What the method itself calls the same recipe is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from compress_search_plugins.bilstm import BiLstm
from compress_search_plugins.born_again import BornAgain
from compress_search_plugins.distilbert import DistilBert
from compress_search_plugins.distill import Distill
from compress_search_plugins.layer_match import LayerMatch
from compress_search_plugins.minilm import MiniLM
from compress_search_plugins.plain_student import PlainStudent
from compress_search_plugins.shortcut import Shortcut
from compress_search_plugins.theseus import Theseus
from compress_search_plugins.tinybert import TinyBert
from optuna.distributions import CategoricalDistribution

from compress_search import Candidate, Dim, Method, Params
from compress_search.encoders import attach_crf, subject_of
from compress_search.space import Value, defaults, narrow
from compress_search.testing import tiny_candidate, tiny_context

TOKENS, TEXTS, NUMBERS = "token-classification", "text-classification", "text-regression"
MATCHES = "[{teacher_layer: 4, student_layer: 2, loss: mae}, {teacher_layer: 2, student_layer: 1}]"
SPOKEN = "[{feature: logits, loss: kd_kl, phase: general}, {teacher_layer: 2, student_layer: 1, phase: 1}]"

CASES: Mapping[str, tuple[Method, str, Mapping[str, Value]]] = {
    "theseus": (Theseus(), TEXTS, {"block_size": 2, "full_replacement_at": 0.2}),
    "theseus, single gates": (Theseus(), TEXTS, {"sample_granularity": "example", "redraw_empty": False}),
    "theseus, constant": (Theseus(), TEXTS, {"schedule": "constant", "mixing": "uniform"}),
    "theseus, custom": (Theseus(), TEXTS, {"partition": "custom", "cut_after_1": True, "mixing": "deterministic"}),
    "theseus, crf": (Theseus(), "crf", {"kd_in_stage2": True, "full_replacement_at": 0.2}),
    "tinybert": (TinyBert(), TEXTS, {"width": 0.5, "augment": False}),
    "tinybert, projections": (TinyBert(), TEXTS, {"projection": "per_layer", "augment": False}),
    "tinybert, other words": (TinyBert(), TEXTS, {"augment": True, "hard_weight": 0.3}),
    "tinybert, crf": (TinyBert(), "crf", {"general_fraction": 0.3, "augment": False}),
    "distilbert": (DistilBert(), TEXTS, {"second_alpha": 0.3}),
    "distilbert, on the task": (DistilBert(), TEXTS, {"general": False, "unlabelled_text": True}),
    "distilbert, crf": (DistilBert(), "crf", {"general": False, "unlabelled_text": True}),
    "minilm": (MiniLM(), TEXTS, {"width": 0.5, "augment": True}),
    "minilm, version 1": (MiniLM(), TEXTS, {"version": "v1", "unlabelled_text": True}),
    "minilm, crf": (MiniLM(), "crf", {}),
    "layer_match": (LayerMatch(), TEXTS, {"width": 0.5, "features": "embedding+hidden+attention"}),
    "layer_match, jointly": (LayerMatch(), TEXTS, {"layers": 3, "layer_dropout": 0.5}),
    "layer_match, in general": (LayerMatch(), TEXTS, {"general": "masked_text", "matches": SPOKEN}),
    "layer_match, written": (LayerMatch(), "crf", {"matches": MATCHES, "phases": "two_phase"}),
    "distill": (Distill(), TEXTS, {"annealing": "linear", "transfer": 0.3}),
    "distill, scheduled": (Distill(), TEXTS, {"temperature_scheduler": "flsw"}),
    "distill, crf": (Distill(), "crf", {"crf_target": "emission"}),
    "distill, further tasks": (Distill(), NUMBERS, {"by_turns": 0.5}),
    "born_again": (BornAgain(), TEXTS, {"generations": 2, "annealing": "linear"}),
    "born_again, scheduled": (BornAgain(), TOKENS, {"temperature_scheduler": "cwsm"}),
    "plain_student": (PlainStudent(), TEXTS, {"alpha": 0.5}),
    "plain_student, crf": (PlainStudent(), "crf", {"alpha": 0.5}),
    "bilstm": (BiLstm(), TEXTS, {}),
    "shortcut": (Shortcut(), TEXTS, {"init": "spread"}),
    "shortcut, crf": (Shortcut(), "crf", {"init": "last"}),
}
"""Method, task or "crf" for tags with one, and what a study would fix."""
LIMITED = "there are 64 texts"
ALIKE: Mapping[str, Mapping[str, str]] = {
    "shortcut": {"calib_examples: 256": LIMITED, "calib_examples: 4096": LIMITED},
}
"""By case the other values that change nothing here, and why."""


def made(task: str) -> Candidate:
    """A tiny teacher of a study that has everything a method may ask for."""
    candidate = tiny_candidate("bert", TOKENS if task == "crf" else task)
    network: Any = candidate.network
    if task == "crf":
        network.config.crf = True
        attach_crf(network)
        for number, parameter in enumerate(network.crf.parameters()):
            generator = torch.Generator().manual_seed(number)
            parameter.data = torch.randn(parameter.shape, generator=generator)
    subject = subject_of(network, candidate.subject.task)
    return candidate.replace(subject=subject.having("unlabelled", "masked-lm", "auxiliary", "lossy"))


def recipe(method: Method, candidate: Candidate, wishes: Mapping[str, Value]) -> Params:
    space = method.search_space(candidate.subject)
    narrowed = {name: narrow(dim, wishes[name]) if name in wishes else dim for name, dim in space.items()}
    return method.effective(candidate.subject, defaults(narrowed))


def others(dim: Dim, value: Value) -> Iterator[Value]:
    """Other values of a dimension: two choices, or that end of a range which is farther away."""
    if dim.form:
        yield dim.form
    elif isinstance(dim.distribution, CategoricalDistribution):
        choices = [choice for choice in dim.distribution.choices if choice != value]
        yield from dict.fromkeys(choices[:1] + choices[-1:])
    else:
        low, high = dim.distribution.low, dim.distribution.high  # type: ignore[attr-defined]
        yield high if value - low < high - value else low  # type: ignore[operator]


def weights(method: Method, candidate: Candidate, params: Params) -> list[torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student = method.apply(candidate, params, tiny_context(candidate, steps=5))
    return [tensor.clone() for tensor in student.network.state_dict().values()]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def changed_before(name: str) -> set[str]:
    """The dimensions that are active in an earlier case of the method."""
    method, found = CASES[name][0], set[str]()
    for other, (another, task, wishes) in CASES.items():
        if other == name:
            break
        if type(another) is type(method):
            found |= recipe(another, made(task), wishes).keys()
    return found


@pytest.mark.parametrize("name", CASES)
def test_another_value_trains_another_network(name: str) -> None:
    method, task, wishes = CASES[name]
    candidate = made(task)
    space, params = method.search_space(candidate.subject), recipe(method, candidate, wishes)
    assert wishes.keys() <= params.keys()
    known, before, ignored = changed_before(name), weights(method, candidate, params), []
    for dimension in params.keys() - (known - wishes.keys()):
        for value in others(space[dimension], params[dimension]):
            changed = recipe(method, candidate, {**wishes, dimension: value})
            if changed == params or method.faults(candidate.subject, changed):
                continue
            if same(before, weights(method, candidate, changed)):
                ignored.append(f"{dimension}: {value}")
    assert sorted(ignored) == sorted(ALIKE.get(name, ()))

"""The checks of the plugin contract, each a function that raises when a method breaks it.

The docstring of a check is the rule; the registry :data:`CHECKS` holds them in the order they run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy

import numpy as np
import torch
from torch import Tensor, nn

from compress_search.candidate import Candidate, Subject
from compress_search.encoders import bake, describe, shape_key, subject_of
from compress_search.method import Stage
from compress_search.runtimes import load_runner
from compress_search.runtimes.lowering import default_engine, lower
from compress_search.space import Params, Space, in_order
from compress_search.testing.rehearsal import Application, Rehearsal, require
from compress_search.testing.tiny import tiny_batches, tiny_context
from compress_search.training import forward

Check = Callable[[Rehearsal], None]

CHECKS: dict[str, Check] = {}

EXACT, APPROXIMATE = 1e-4, 0.15
"""How far a reloaded model's outputs may lie from the network's, relative to their norm: for 32-bit weights
without a lowering, and for 8 bits or more. Below 8 bits only equal outputs at each reload are asked for."""


def check(function: Check) -> Check:
    """Register a function as a check under its own name."""
    CHECKS[function.__name__] = function
    return function


@check
def declares_its_stage(rehearsal: Rehearsal) -> None:
    """``stage`` is a class attribute of type Stage."""
    stage = getattr(type(rehearsal.method), "stage", None)
    require(isinstance(stage, Stage), f"stage is {stage!r}, expected a member of compress_search.Stage")


@check
def unsupported_gives_reasons(rehearsal: Rehearsal) -> None:
    """``unsupported`` returns None or a sentence, the same one each time, and accepts some tiny model."""
    for model in rehearsal.models:
        for subject in (model.subject, model.subject.having("shared"), model.subject.having("non-uniform")):
            first, second = (rehearsal.method.unsupported(subject) for _ in range(2))
            require(first == second, f"unsupported is not repeatable: {first!r}, then {second!r}")
            require(first is None or (isinstance(first, str) and bool(first)), f"unsupported returned {first!r}")


@check
def search_space_is_pure(rehearsal: Rehearsal) -> None:
    """``search_space`` gives the same for the same model, whoever asks and whatever was asked before."""
    method = rehearsal.method
    spaces = [dict(method.search_space(subject)) for subject in rehearsal.subjects]
    for subject, space in zip(reversed(rehearsal.subjects), reversed(spaces), strict=True):
        for other in (method, type(method)()):
            require(
                list(other.search_space(subject).items()) == list(space.items()),
                f"search_space differs from call to call for {_name(subject)}",
            )


@check
def defaults_lie_inside(rehearsal: Rehearsal) -> None:
    """Every default is a value of its dimension."""
    for subject, space in _spaces(rehearsal):
        for name, dim in space.items():
            require(
                dim.contains(dim.default),
                f"{name}: the default {dim.default!r} is not {dim.describe()} ({_name(subject)})",
            )


@check
def conditions_name_dimensions(rehearsal: Rehearsal) -> None:
    """``when`` refers to dimensions of the same space, in no circle, and to values they can have."""
    for _, space in _spaces(rehearsal):
        try:
            in_order(space)
        except ValueError as error:
            require(False, str(error))
        for name, dim in space.items():
            for other, values in dim.when.items():
                possible = any(space[other].contains(value) for value in values)
                require(possible, f"{name} can never be active: {other} is never one of {list(values)}")


@check
def effective_is_idempotent(rehearsal: Rehearsal) -> None:
    """``effective`` changes nothing when asked twice, stays inside the space and leaves its argument alone."""
    for subject, space in _spaces(rehearsal):
        for params in rehearsal.drawn(space):
            asked = dict(params)
            once = dict(rehearsal.method.effective(subject, asked))
            twice = dict(rehearsal.method.effective(subject, once))
            require(asked == params, f"effective changed its argument {params}")
            require(once == twice, f"effective({params}) is {once}, and then {twice}")
            _inside(space, once)


@check
def faults_name_dimensions(rehearsal: Rehearsal) -> None:
    """``faults`` finds none with the defaults, and gives reasons by dimension, the same ones each time."""
    method = rehearsal.method
    for subject, space in _spaces(rehearsal):
        for number, params in enumerate(rehearsal.drawn(space)):
            settled = method.effective(subject, params)
            first, second = (dict(method.faults(subject, settled)) for _ in range(2))
            require(first == second, f"faults is not repeatable: {first}, then {second}")
            require(bool(number) or not first, f"the defaults have faults: {first} ({_name(subject)})")
            for name, fault in first.items():
                require(name in space, f"faults names {name!r}, which is no dimension")
                require(isinstance(fault, str) and bool(fault), f"faults gives {fault!r} as a reason for {name}")


@check
def missing_dimensions_are_missing(rehearsal: Rehearsal) -> None:
    """``missing`` says what dimensions, and choices of others, need that are not in the space, and no others."""
    for subject, space in _spaces(rehearsal):
        for name, need in rehearsal.method.missing(subject).items():
            require(not _there(space, name), f"missing names {name!r}, which is there ({_name(subject)})")
            require(isinstance(need, str) and bool(need), f"missing gives {need!r} as what {name} needs")


def _there(space: Space, name: str) -> bool:
    """Whether a dimension, or with ``dimension: choice`` this choice of it, is in the space."""
    dim, _, choice = name.partition(": ")
    return dim in space and (not choice or choice in map(str, getattr(space[dim].distribution, "choices", ())))


@check
def drawn_parameters_apply(rehearsal: Rehearsal) -> None:
    """Defaults and random parameters give a network with finite outputs of the teacher's shape."""
    for application in rehearsal.applications:
        logits = _logits(application.result)
        expected = _logits(application.given).shape
        # a tokenizer of its own may spell a text in more tokens
        require(
            (logits.dim(), len(logits), logits.shape[-1]) == (len(expected), expected[0], expected[-1]),
            f"{application.title}: outputs have shape {tuple(logits.shape)}, expected {tuple(expected)}",
        )
        require(bool(logits.isfinite().all()), f"{application.title}: outputs are not finite")


@check
def leaves_the_others_alone(rehearsal: Rehearsal) -> None:
    """``apply`` changes neither its argument nor the teacher: it owns its copy."""
    for application in rehearsal.applications:
        changed = application.changed()
        require(not changed, f"{application.title}: apply changed {' and '.join(changed)}")


@check
def nothing_is_changed_where_it_says_so(rehearsal: Rehearsal) -> None:
    """Where ``changes_nothing``, ``apply`` leaves weights, subject, file-level steps and runtime as they were."""
    for application in rehearsal.applications:
        given, result = application.given, application.result
        if not rehearsal.method.changes_nothing(given.subject, application.params):
            continue
        engine = {"engine": default_engine(given.subject)}
        runs = [{**engine, **candidate.runtime} for candidate in (given, result)]
        before, after = _state(given), _state(result)
        weights = before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
        same = weights and runs[0] == runs[1] and given.lowering == result.lowering
        require(same and given.subject == result.subject, f"{application.title}: it changes something")


@check
def leaves_what_after_says(rehearsal: Rehearsal) -> None:
    """The subject is what ``after`` promised, but for ranks if it says "estimated"; the network has its shapes."""
    for application in rehearsal.applications:
        promised = rehearsal.method.after(application.given.subject, application.params)
        found = application.result.subject
        different = _differences(found, promised, "after promised")
        require(found.keeps(promised), f"{application.title}: {different}")
        measured = subject_of(application.result.network, promised.task, promised.device)
        _same_shapes(application, measured, found)


@check
def trains_as_declared(rehearsal: Rehearsal) -> None:
    """It trains when ``trains`` says so, only through ``context.fit``, and within its budget."""
    for application in rehearsal.applications:
        declared, fits = rehearsal.method.trains(application.params), application.context.fits
        require(not application.stray_steps, f"{application.title}: it trains outside context.fit")
        require(
            declared == bool(fits), f"{application.title}: trains is {declared}, and fit was called {len(fits)}×"
        )
        # every call rounds its share to whole steps
        allowed = application.context.steps + len(fits)
        require(sum(fits) <= allowed, f"{application.title}: the shares of its calls of fit add up to more than 1")


@check
def survives_later_training(rehearsal: Rehearsal) -> None:
    """Shapes, shared weights and zeros are still there after a later step has trained the network."""
    if rehearsal.method.stage >= Stage.PRECISION:
        return  # nothing trains after these
    for application in rehearsal.applications:
        network = application.result.network
        before = _baked(network)
        with _trained_on(application.result):
            after, changed = _baked(network), application.changed()
        require(
            shape_key(describe(after)) == shape_key(describe(before)),
            f"{application.title}: later training changes its shapes",
        )
        now = dict(after.named_parameters())
        revived = [name for name, mask in _zeros(before).items() if bool((now[name][mask] != 0).any())]
        require(not revived, f"{application.title}: later training revives the zeros of {', '.join(revived[:3])}")
        require(not changed, f"{application.title}: later training of its result changes {' and '.join(changed)}")


@contextmanager
def _trained_on(candidate: Candidate) -> Iterator[None]:
    """The candidate after some training; afterwards it has its weights again, for the checks that come then."""
    network = candidate.network
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    try:
        tiny_context(candidate, seed=1).fit(network, learning_rate=0.01)
        yield
    finally:
        for name, tensor in network.state_dict().items():
            if name in weights and tensor.shape == weights[name].shape:
                tensor.copy_(weights[name])


@check
def same_seed_same_weights(rehearsal: Rehearsal) -> None:
    """The same seed gives bit for bit the same weights."""
    for application in rehearsal.at_defaults:
        first, second = (_state(each.result) for each in (application, rehearsal.again(application)))
        equal = first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
        require(equal, f"{application.title}: two runs with the same seed differ")


@check
def dry_run_has_the_shapes(rehearsal: Rehearsal) -> None:
    """A dry run takes no optimizer step, and its shapes are those of the real run (unless "non-uniform")."""
    for application in rehearsal.at_defaults:
        dry = rehearsal.again(application, dry=True)
        require(not dry.stray_steps, f"{application.title}: it trains though context.dry is set")
        if "non-uniform" in application.result.subject.traits:
            continue
        shapes = [shape_key(describe(_baked(each.result.network))) for each in (dry, application)]
        require(shapes[0] == shapes[1], f"{application.title}: a dry run leaves other shapes than a real one")


@check
def saves_and_reloads(rehearsal: Rehearsal) -> None:
    """The lowered artefact loads, and computes what the network does (within tolerance below 32 bits)."""
    for application in rehearsal.at_defaults:
        candidate = application.result.replace(network=_baked(application.result.network))
        directory = application.context.scratch / "artifact"
        lower(candidate, directory, application.context.task)
        batch = {name: tensor.numpy() for name, tensor in next(tiny_batches(candidate, seed=99)).items()}
        first, second = (load_runner(directory, threads=1)(batch) for _ in range(2))
        require(np.array_equal(first, second), f"{application.title}: two reloads differ")
        expected = _logits(candidate).numpy()
        distance = float(np.linalg.norm(first - expected) / np.linalg.norm(expected))
        allowed = _tolerance(candidate)
        require(
            math.isfinite(distance) and distance <= allowed,
            f"{application.title}: reloaded outputs are {distance:.2g} away, allowed are {allowed:g}",
        )


@check
def evaluate_gives_numbers(rehearsal: Rehearsal) -> None:
    """``evaluate`` returns finite numbers by name and leaves the network as it is."""
    for application in rehearsal.at_defaults:
        candidate = application.result.copy()
        before = _state(candidate)
        metrics = rehearsal.method.evaluate(candidate, application.context)
        for name, value in metrics.items():
            number = isinstance(value, int | float) and math.isfinite(value)
            require(isinstance(name, str) and number, f"evaluate returned {name!r}: {value!r}")
        same = all(torch.equal(tensor, before[name]) for name, tensor in candidate.network.state_dict().items())
        require(same, f"{application.title}: evaluate changed the network")


def _spaces(rehearsal: Rehearsal) -> list[tuple[Subject, Space]]:
    return [(subject, rehearsal.method.search_space(subject)) for subject in rehearsal.subjects]


def _inside(space: Space, params: Params) -> None:
    for name, value in params.items():
        require(name in space, f"effective returned {name!r}, which is no dimension")
        require(
            space[name].contains(value),
            f"effective returned {name} = {value!r}, expected {space[name].describe()}",
        )


def _name(subject: Subject) -> str:
    return f"{subject.family}, {subject.task}, {', '.join(sorted(subject.traits)) or 'no traits'}"


def _differences(found: Subject, promised: Subject, word: str) -> str:
    ours, theirs = found.to_dict(), promised.to_dict()
    return "; ".join(f"{key} is {ours[key]}, {word} {theirs[key]}" for key in ours if ours[key] != theirs[key])


def _same_shapes(application: Application, measured: Subject, promised: Subject) -> None:
    fields = ["layers", "head_dim", "hidden", "positions", "token_types", "labels", "pooler"]
    fields += ["ranks", "word_rank", "attention_sets", "ffn_sets", "norm_sets"]
    if "data-sized" not in promised.traits:
        fields.append("vocabulary")
    if "non-uniform" not in promised.traits:
        fields += ["heads", "intermediate"]
        uneven = "non-uniform" in measured.traits
        require(not uneven, f"{application.title}: its layers differ in shape, and after does not say so")
    for field in fields:
        found, expected = getattr(measured, field), getattr(promised, field)
        require(found == expected, f"{application.title}: {field} is {found}, after promised {expected}")


def _logits(candidate: Candidate) -> Tensor:
    """Outputs for a fixed batch, read by the candidate's own tokenizer."""
    with torch.no_grad():
        return forward(candidate.network, next(tiny_batches(candidate, seed=99))).float()


def _baked(network: nn.Module) -> nn.Module:
    baked = deepcopy(network)
    bake(baked)
    return baked


def _zeros(network: nn.Module) -> dict[str, Tensor]:
    """Where the matrices with at least one zero in a hundred weights have their zeros."""
    masks = {name: parameter == 0 for name, parameter in network.named_parameters() if parameter.dim() > 1}
    return {name: mask for name, mask in masks.items() if mask.float().mean() >= 0.01}


def _state(candidate: Candidate) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in candidate.network.state_dict().items()}


def _tolerance(candidate: Candidate) -> float:
    lowest = min(candidate.subject.bits, candidate.subject.embedding_bits)
    if lowest < 8:
        return math.inf
    return EXACT if lowest == 32 and not candidate.lowering else APPROXIMATE

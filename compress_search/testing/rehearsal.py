"""A method tried on tiny models: applied once for each of a few parameter sets, and what could be observed.

Owns the choice of models and parameters, and the observing. Knows nothing of what is right or wrong.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import islice
from typing import Any, cast

import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from compress_search.candidate import Candidate, Subject
from compress_search.encoders import prune_heads, prune_neurons, subject_of
from compress_search.method import Method
from compress_search.runtimes.probe import kernels
from compress_search.space import Dim, Params, Space, Value, active, defaults, fix_experts, in_order
from compress_search.testing.tiny import TinyContext, tiny_candidate, tiny_context

MODELS = (
    ("bert", "text-classification"),
    ("bert", "token-classification"),
    ("distilbert", "text-classification"),
)
DRAWS = 50
"""Random parameters that are drawn at most for such as have no fault."""
SUBJECTS = (
    Subject("bert", "text-classification", 12, 12, 64, 768, 3072, 30522, 512, 2, 2),
    Subject("bert", "token-classification", 6, 12, 32, 384, 1536, 30522, 512, 2, 9, pooler=False),
    Subject("distilbert", "text-classification", 6, 12, 64, 768, 3072, 30522, 512, 0, 4),
    Subject("roberta", "text-regression", 12, 12, 64, 768, 3072, 50265, 514, 1, 1),
)
"""Shapes of well-known models, which a space can be built for without any weights."""


class ContractBroken(AssertionError):
    """A method does not keep the plugin contract; the text is one line."""


def require(condition: bool, message: str) -> None:
    """Raise ContractBroken with the message unless the condition holds."""
    if not condition:
        raise ContractBroken(message)


@cache
def _tiny(family: str, task: str, *, uneven: bool = False) -> Candidate:
    """Made once a process; only copies of it are worked on. It knows this machine's kernels, as a teacher does."""
    model = tiny_candidate(family, task)
    if uneven:  # as an earlier step may leave it
        prune_heads(model.network, {0: (0, 2), 3: (1, 2, 3)})
        prune_neurons(model.network, {1: range(16), 2: range(48)})
        model = model.replace(subject=subject_of(model.network, task).having("lossy"))
    return model.replace(subject=model.subject.having(*(f"kernel:{name}" for name in kernels())))


def draw(space: Space, rng: random.Random) -> dict[str, Value]:
    """Active parameters drawn at random, ends of the ranges included."""
    params: dict[str, Value] = {}
    for name, dim in in_order(space):
        if active(dim, params):
            params[name] = _draw(dim, rng)
    return params


def _draw(dim: Dim, rng: random.Random) -> Value:
    distribution = dim.distribution
    if isinstance(distribution, CategoricalDistribution):
        return cast(Value, rng.choice(distribution.choices))
    if isinstance(distribution, IntDistribution):
        return rng.randrange(distribution.low, distribution.high + 1, distribution.step)
    assert isinstance(distribution, FloatDistribution)
    if distribution.log:
        span = math.log(distribution.high / distribution.low)
        return min(distribution.high, distribution.low * math.exp(span * rng.random()))
    return rng.uniform(distribution.low, distribution.high)


def fingerprint(network: nn.Module) -> str:
    """SHA-256 of every tensor in a network's state."""
    found = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        if isinstance(tensor, torch.Tensor):
            found.update(name.encode() + tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@dataclass(frozen=True)
class Application:
    """One ``apply``: what went in, what came out, and what happened on the way."""

    model: Candidate
    """The tiny model, as it was; ``given`` is the copy of it that ``apply`` was called with."""
    given: Candidate
    params: Params
    context: TinyContext
    result: Candidate
    untouched: Mapping[str, str]
    """Name -> fingerprint, before ``apply``, of the networks it must leave alone."""
    stray_steps: int
    """Optimizer steps taken outside ``context.fit``."""

    @property
    def title(self) -> str:
        """Where this was, for messages."""
        return f"{self.given.subject.family}, {self.given.subject.task}, {dict(self.params)}"

    def changed(self) -> list[str]:
        """Names of the networks that ``apply``, or whatever followed, should have left alone and did not."""
        now = {"its argument": self.given.network, "the teacher": self.context.teacher}
        return [name for name, network in now.items() if fingerprint(network) != self.untouched[name]]


def apply(method: Method, model: Candidate, params: Params, *, dry: bool = False) -> Application:
    """Apply the method to a copy of the model and watch."""
    given = model.copy()
    context = tiny_context(given, dry=dry)
    untouched = {"its argument": fingerprint(given.network), "the teacher": fingerprint(context.teacher)}
    with torch.random.fork_rng(devices=[]), _count_steps(context) as stray:
        torch.manual_seed(context.seed)
        result = method.apply(given, params, context)
    require(isinstance(result, Candidate), f"apply returned {result!r}, expected a Candidate")
    result.network.eval()
    return Application(model, given, params, context, result, untouched, len(stray))


@contextmanager
def _count_steps(context: TinyContext) -> Iterator[list[None]]:
    """Yields a list that grows by one for each optimizer step outside ``context.fit``."""
    stray: list[None] = []

    def watch(*_: Any) -> None:
        if not context.training:
            stray.append(None)

    handle = register_optimizer_step_post_hook(watch)
    try:
        yield stray
    finally:
        handle.remove()


class Rehearsal:
    """A method, the tiny models it supports, and its applications to them, each made once."""

    def __init__(self, method: Method) -> None:
        self.method = method

    @cached_property
    def subjects(self) -> list[Subject]:
        """Descriptions of models the method accepts: well-known ones, timed and not, and the tiny ones."""
        known = [subject.having(*traits) for subject in SUBJECTS for traits in ((), ("timed", "kernel:int8"))]
        return [*filter(None, map(self._accepted, known)), *(model.subject for model in self.models)]

    @cached_property
    def models(self) -> list[Candidate]:
        """Tiny models the method accepts; the last one's layers differ in shape.

        Raises:
            ContractBroken: there is none.
        """
        found, reasons = [], []
        for model in (*(_tiny(*names) for names in MODELS), _tiny(*MODELS[0], uneven=True)):
            if subject := self._accepted(model.subject):
                found.append(model.replace(subject=subject))
            else:
                kind = f"{model.subject.family}, {model.subject.task}"
                reasons.append(f"{kind}: {self.method.unsupported(model.subject)}")
        require(bool(found), f"supports none of the tiny models ({'; '.join(reasons)})")
        return found

    def _accepted(self, subject: Subject) -> Subject | None:
        """The subject as the method takes it: as it is, as a lossy step leaves it, or where the size counts."""
        states = (subject, subject.having("lossy"), subject.having("sized"))
        return next((state for state in states if self.method.unsupported(state) is None), None)

    @cached_property
    def settings(self) -> list[tuple[Candidate, Params]]:
        """Each model with effective parameters: the defaults, random ones, and random ones of experts."""
        found = []
        for model in self.models:
            space = self.method.search_space(model.subject)
            for kind in self.kinds(space):
                settled = (self.method.effective(model.subject, kind()) for _ in range(DRAWS))
                faultless = (params for params in settled if not self.method.faults(model.subject, params))
                found += [(model, params) for params in islice(faultless, 1)]
        return found

    @staticmethod
    def kinds(space: Space) -> list[Callable[[], dict[str, Value]]]:
        """What gives the defaults, random parameters, and random ones with expert dimensions free."""
        rng = random.Random(0)
        return [partial(defaults, space), partial(draw, fix_experts(space), rng), partial(draw, space, rng)]

    def drawn(self, space: Space) -> list[dict[str, Value]]:
        """One of each kind."""
        return [kind() for kind in self.kinds(space)]

    @cached_property
    def applications(self) -> list[Application]:
        """One for each setting."""
        return [apply(self.method, model, params) for model, params in self.settings]

    @cached_property
    def at_defaults(self) -> list[Application]:
        """The first application to each model."""
        return list({id(found.model): found for found in reversed(self.applications)}.values())

    def again(self, application: Application, *, dry: bool = False) -> Application:
        """The same once more, on a fresh copy."""
        return apply(self.method, application.model, application.params, dry=dry)

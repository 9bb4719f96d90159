"""The identity of a trial: ordered steps with their effective parameters, as plain hashable data.

Owns order, exclusivity, rounding to effective values and the hashes. Knows nothing of Optuna or of weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compress_search.candidate import Subject
from compress_search.errors import TrialError
from compress_search.method import Method, Stage
from compress_search.space import Params, Value


def digest(data: Any) -> str:
    """SHA-256 of plain data in canonical JSON, as 64 hex digits."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Step:
    """One method with its parameters, sorted by name."""

    method: str
    items: tuple[tuple[str, Value], ...] = ()

    @classmethod
    def of(cls, method: str, params: Params) -> Step:
        """A step from a mapping of parameters."""
        return cls(method, tuple(sorted(params.items())))

    @property
    def params(self) -> dict[str, Value]:
        """The parameters as a mapping."""
        return dict(self.items)

    def __str__(self) -> str:
        inside = ", ".join(
            f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value}" for name, value in self.items
        )
        return f"{self.method}({inside})"


@dataclass(frozen=True)
class Recipe:
    """Steps in the order they apply. The empty recipe is the teacher."""

    steps: tuple[Step, ...] = ()

    @property
    def key(self) -> str:
        """The identity: equal for recipes that do the same."""
        return self.prefix_hash(len(self.steps))

    def prefix_hash(self, length: int) -> str:
        """Identity of the first ``length`` steps."""
        return digest([[step.method, step.params] for step in self.steps[:length]])

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the methods, in order."""
        return tuple(step.method for step in self.steps)

    def only(self, shown: Collection[tuple[str, str]]) -> Recipe:
        """The steps with only those parameters, as (method, name), for display; no recipe to run."""
        return Recipe(
            tuple(
                Step(step.method, tuple(item for item in step.items if (step.method, item[0]) in shown))
                for step in self.steps
            )
        )

    def to_list(self) -> list[dict[str, Any]]:
        """Plain data: ``[{"method": …, "params": {…}}, …]``."""
        return [{"method": step.method, "params": step.params} for step in self.steps]

    @classmethod
    def from_list(cls, data: Sequence[Mapping[str, Any]]) -> Recipe:
        """The inverse of :meth:`to_list`."""
        return cls(tuple(Step.of(step["method"], step["params"]) for step in data))

    def __str__(self) -> str:
        return " + ".join(map(str, self.steps)) or "teacher"


def settle(recipe: Recipe, methods: Mapping[str, Method], teacher: Subject) -> tuple[Recipe, Subject]:
    """The recipe in order with effective parameters, and the subject it leaves; steps that change nothing go.

    Raises:
        TrialError: a method twice, two steps of an exclusive stage, or a step that cannot follow or has a fault.
    """
    subject, steps = teacher, []
    for step in in_stage_order(recipe, methods):
        method = methods[step.method]
        if reason := method.unsupported(subject):
            raise TrialError(reason, method=step.method)
        params = method.effective(subject, step.params)
        for name, fault in method.faults(subject, params).items():
            raise TrialError(f"{name}: {fault}", method=step.method)
        if method.changes_nothing(subject, params):
            continue
        subject = method.after(subject, params)
        steps.append(Step.of(step.method, params))
    return Recipe(tuple(steps)), subject


def in_stage_order(recipe: Recipe, methods: Mapping[str, Method]) -> list[Step]:
    """The steps sorted by stage, then by name.

    Raises:
        TrialError: a method twice, or two steps of an exclusive stage.
    """
    taken: dict[Stage | str, str] = {}
    for step in recipe.steps:
        stage = methods[step.method].stage
        place = stage if stage.exclusive else step.method
        if place in taken:
            raise TrialError(
                f"a recipe holds one {stage.name.lower()} step of this kind, and has {taken[place]!r} already",
                method=step.method,
            )
        taken[place] = step.method
    return sorted(recipe.steps, key=lambda step: (methods[step.method].stage, step.method))

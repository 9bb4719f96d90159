"""Plain records that cross process boundaries: what a worker is told, what it reports, what it returns.

Owns their shapes and their JSON. Knows nothing of how they come about or where they are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from typing import Any, Literal

from compress_search.recipe import Recipe

State = Literal["complete", "stopped", "failed", "infeasible", "duplicate", "running", "waiting"]
FINISHED: tuple[State, ...] = ("complete", "stopped", "failed", "infeasible")


@dataclass(frozen=True)
class Assignment:
    """One attempt at one trial, handed to a worker.

    ``reference`` holds the teacher's metrics, frozen for the study once its first trial measured them. ``study``
    tells the study from others of the same name, begun anew in the same place.
    """

    number: int
    attempt: int
    recipe: Recipe
    seed: int
    baseline: str | None = None
    reference: Mapping[str, float] = field(default_factory=dict)
    study: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "recipe": self.recipe.to_list()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Assignment:
        """The inverse of :meth:`to_dict`."""
        return cls(**{**data, "recipe": Recipe.from_list(data["recipe"])})


def rung_fraction(index: int) -> Fraction:
    """The part of a trial's planned optimizer steps after which it reaches a rung: 1/9, 1/3, 5/9, 19/27, …

    From the second one on, each leaves two thirds of what the one before it left.
    """
    return 1 - Fraction(2, 3) ** index if index else Fraction(1, 9)


@dataclass(frozen=True)
class Rung:
    """A trial's metrics at a fraction of its training budget, and its seconds by phase so far.

    ``index`` counts the rungs from 0 and so says what fraction that is, the same one for every trial; see
    :func:`rung_fraction`.
    """

    number: int
    attempt: int
    index: int
    metrics: Mapping[str, float]
    seconds: Mapping[str, float] = field(default_factory=dict)


Report = Callable[[Rung], bool]
"""Sends a rung to the search; False asks the trial to stop."""


@dataclass(frozen=True)
class Failure:
    """Why a trial ended without a result. ``kind``: error, oom, timeout, nan or died."""

    kind: str
    message: str
    traceback: str = ""


@dataclass(frozen=True)
class Result:
    """The end of one attempt.

    ``metrics`` are the measured values (units in their names), ``intervals`` their 95 % intervals where there
    are any, ``measurements`` the raw samples and protocol, ``artifact`` the directory relative to the output.
    ``provisional`` says that the metrics come from the shapes-first pass.
    """

    number: int
    attempt: int
    state: State
    metrics: Mapping[str, float] = field(default_factory=dict)
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    measurements: Mapping[str, Any] = field(default_factory=dict)
    artifact: str | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    failure: Failure | None = None
    environment: Mapping[str, Any] = field(default_factory=dict)
    provisional: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Result:
        """The inverse of :meth:`to_dict`."""
        failure = Failure(**data["failure"]) if data.get("failure") else None
        intervals = {name: (float(low), float(high)) for name, (low, high) in data.get("intervals", {}).items()}
        return cls(**{**data, "failure": failure, "intervals": intervals})

"""Search dimensions: what one parameter of a method may be, how a study narrows it, how Optuna suggests it.

Owns the meaning of a dimension (range, default, condition). Knows nothing of methods, studies or models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import BaseTrial

Value = bool | int | float | str
Params = Mapping[str, Value]
Narrowing = Value | Sequence[Value] | Mapping[str, float]
"""What a study may write for a dimension: a scalar fixes it, a list gives the choices, {low, high} a range."""


@dataclass(frozen=True)
class Dim:
    """One searchable parameter of a method.

    ``when`` maps names of other dimensions of the same method to the values under which this one is active;
    ``expert`` dimensions stay at their default unless a study names them, and only the ``usual`` values, where
    there are any, are searched unless it does.
    """

    distribution: BaseDistribution
    default: Value
    when: Mapping[str, Collection[Value]] = field(default_factory=dict)
    expert: bool = False
    usual: tuple[Value, ...] = ()
    check: Callable[[str], object] | None = field(default=None, compare=False, repr=False)
    form: str = field(default="", compare=False, repr=False)

    @classmethod
    def real(
        cls,
        low: float,
        high: float,
        default: float,
        *,
        log: bool = False,
        step: float | None = None,
        when: Mapping[str, Collection[Value]] | None = None,
        expert: bool = False,
        usual: Sequence[float] = (),
    ) -> Dim:
        """A float in [low, high], both ends included; the default is among the usual ones, where there are any."""
        return cls(FloatDistribution(low, high, log=log, step=step), default, when or {}, expert, tuple(usual))

    @classmethod
    def integer(
        cls,
        low: int,
        high: int,
        default: int,
        *,
        log: bool = False,
        step: int = 1,
        when: Mapping[str, Collection[Value]] | None = None,
        expert: bool = False,
    ) -> Dim:
        """An integer in [low, high], both ends included."""
        return cls(IntDistribution(low, high, log=log, step=step), default, when or {}, expert)

    @classmethod
    def choice(
        cls,
        options: Sequence[Value],
        default: Value,
        *,
        when: Mapping[str, Collection[Value]] | None = None,
        expert: bool = False,
        usual: Sequence[Value] = (),
    ) -> Dim:
        """One of a few named options; the default is among the usual ones."""
        return cls(CategoricalDistribution(tuple(options)), default, when or {}, expert, tuple(usual))

    @classmethod
    def text(
        cls,
        check: Callable[[str], object],
        default: str = "",
        *,
        when: Mapping[str, Collection[Value]] | None = None,
        form: str = "",
    ) -> Dim:
        """Text that a study writes; there is nothing to search. ``check`` raises ValueError for what is wrong.

        ``form`` is an example, for whoever wrote something else.
        """
        return cls(CategoricalDistribution((default,)), default, when or {}, expert=True, check=check, form=form)

    @classmethod
    def flag(
        cls,
        default: bool,
        *,
        when: Mapping[str, Collection[Value]] | None = None,
        expert: bool = False,
    ) -> Dim:
        """True or false."""
        return cls(CategoricalDistribution((False, True)), default, when or {}, expert)

    @property
    def fixed(self) -> bool:
        """Whether the distribution holds a single value."""
        return bool(self.distribution.single())

    def contains(self, value: Value) -> bool:
        """Whether the value lies in the dimension, type included (``True`` is no 1, ``1.5`` no integer)."""
        if self.check:
            return isinstance(value, str)
        if isinstance(self.distribution, CategoricalDistribution):
            return any(type(value) is type(choice) and value == choice for choice in self.distribution.choices)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return False
        if isinstance(self.distribution, IntDistribution) and value != int(value):
            return False
        # steps are for sampling only: a user may fix a value between two of them
        distribution: Any = self.distribution
        return bool(distribution.low <= value <= distribution.high)

    def describe(self) -> str:
        """The allowed values in words, as error messages and ``plan`` print them."""
        distribution: Any = self.distribution
        if self.check:
            return f'text, as "{self.form}"' if self.form else "text"
        if isinstance(distribution, CategoricalDistribution):
            return "one of " + ", ".join(str(choice) for choice in distribution.choices)
        kind = "an integer" if isinstance(distribution, IntDistribution) else "a number"
        return f"{kind} from {distribution.low:g} to {distribution.high:g}" + (" (log)" if distribution.log else "")


Space = Mapping[str, Dim]


def active(dim: Dim, params: Params) -> bool:
    """Whether the dimension's condition holds under the values chosen so far."""
    return all(name in params and params[name] in allowed for name, allowed in dim.when.items())


def unmet(space: Space, name: str) -> str | None:
    """What a dimension waits for that no value in the space fulfils, as ``other: one or another``; None if nothing.

    A dimension it depends on may itself wait for a third; that is named then.
    """
    for other, allowed in space[name].when.items():
        if deeper := unmet(space, other):
            return deeper
        if not any(space[other].contains(value) for value in allowed):
            words = [str(value).lower() if isinstance(value, bool) else str(value) for value in allowed]
            return f"{other}: {' or '.join(words)}"
    return None


def in_order(space: Space) -> list[tuple[str, Dim]]:
    """Dimensions with every condition's subject before its dependants; ties keep the declared order.

    Raises:
        ValueError: a condition names an unknown dimension or the conditions form a cycle.
    """
    for name, dim in space.items():
        for other in dim.when:
            if other not in space:
                raise ValueError(f"dimension {name!r} depends on {other!r}, which does not exist")
    ordered: dict[str, Dim] = {}
    while len(ordered) < len(space):
        ready = [n for n, d in space.items() if n not in ordered and all(o in ordered for o in d.when)]
        if not ready:
            raise ValueError(f"conditions form a cycle among {sorted(set(space) - set(ordered))}")
        ordered.update((name, space[name]) for name in ready)
    return list(ordered.items())


def narrow(dim: Dim, to: Narrowing) -> Dim:
    """The dimension restricted to what a study wrote; a restricted dimension is no longer expert.

    Raises:
        ValueError: the restriction is empty, of the wrong type or leaves the dimension's own range.
    """
    if isinstance(to, Mapping):
        return _narrow_range(dim, to)
    if isinstance(to, Sequence) and not isinstance(to, str):
        return _narrow_choices(dim, list(to))
    return _narrow_choices(dim, [to])


def _narrow_choices(dim: Dim, values: list[Value]) -> Dim:
    if not values:
        raise ValueError(f"expected {dim.describe()}, got an empty list")
    for value in values:
        if not dim.contains(value):
            raise ValueError(f"{value!r} is outside the space: expected {dim.describe()}")
        if dim.check:
            dim.check(str(value))
    if isinstance(dim.distribution, IntDistribution):
        values = [int(value) for value in values]
    if isinstance(dim.distribution, FloatDistribution):
        values = [float(value) for value in values]
    values = list(dict.fromkeys(values))
    default = dim.default if dim.default in values else values[0]
    return replace(
        dim, distribution=CategoricalDistribution(tuple(values)), default=default, expert=False, usual=()
    )


def _narrow_range(dim: Dim, bounds: Mapping[str, float]) -> Dim:
    if isinstance(dim.distribution, CategoricalDistribution):
        raise ValueError(f"a range does not fit here: expected {dim.describe()}")
    if set(bounds) != {"low", "high"}:
        raise ValueError(f"a range is written {{low: …, high: …}}, got {dict(bounds)!r}")
    low, high = bounds["low"], bounds["high"]
    for bound in (low, high):
        if not dim.contains(bound):
            raise ValueError(f"{bound!r} is outside the space: expected {dim.describe()}")
    if low > high:
        raise ValueError(f"the range is empty: low {low:g} is above high {high:g}")
    default = min(max(float(dim.default), low), high)
    if isinstance(dim.distribution, IntDistribution):
        # a step only makes sense when it still divides the narrowed range
        step = dim.distribution.step if (high - low) % dim.distribution.step == 0 else 1
        default = low + (default - low) // step * step  # one of the values that the steps lead to
        return replace(
            dim,
            distribution=IntDistribution(int(low), int(high), log=dim.distribution.log, step=step),
            default=int(default),
            expert=False,
        )
    assert isinstance(dim.distribution, FloatDistribution)
    distribution = FloatDistribution(low, high, log=dim.distribution.log)
    return replace(dim, distribution=distribution, default=default, expert=False, usual=())


def fix_experts(space: Space) -> dict[str, Dim]:
    """The space with every expert dimension fixed at its default, and the others at their usual values."""

    def fixed(dim: Dim) -> Dim:
        options = (dim.default,) if dim.expert else dim.usual
        return replace(dim, distribution=CategoricalDistribution(options)) if options else dim

    return {name: fixed(dim) for name, dim in space.items()}


def suggest(trial: BaseTrial, prefix: str, space: Space) -> dict[str, Value]:
    """Active parameters of one method, suggested define-by-run under the names ``<prefix>.<dimension>``.

    Dimensions with a single value are not shown to the sampler.
    """
    params: dict[str, Value] = {}
    for name, dim in in_order(space):
        if active(dim, params):
            params[name] = dim.default if dim.fixed else _ask(trial, f"{prefix}.{name}", dim.distribution)
    return params


def _ask(trial: BaseTrial, name: str, distribution: BaseDistribution) -> Value:
    if isinstance(distribution, CategoricalDistribution):
        choice: Any = trial.suggest_categorical(name, distribution.choices)
        return choice  # type: ignore[no-any-return]
    if isinstance(distribution, IntDistribution):
        return trial.suggest_int(
            name, distribution.low, distribution.high, step=distribution.step, log=distribution.log
        )
    assert isinstance(distribution, FloatDistribution)
    return trial.suggest_float(
        name, distribution.low, distribution.high, step=distribution.step, log=distribution.log
    )


def defaults(space: Space) -> dict[str, Value]:
    """Active parameters with every dimension at its default."""
    params: dict[str, Value] = {}
    for name, dim in in_order(space):
        if active(dim, params):
            params[name] = dim.default
    return params

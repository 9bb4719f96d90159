"""A method's space under the words of a study: narrowed, with defaults that can be applied, and no word in vain.

Owns what is wrong with values a study writes, each in one line. Knows nothing of recipes or of other methods.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, combinations, islice
from typing import Any

from optuna.distributions import CategoricalDistribution, IntDistribution

from compress_search.candidate import Subject
from compress_search.errors import PluginError
from compress_search.method import Method
from compress_search.space import Dim, Params, Space, Value, defaults, fix_experts, in_order, narrow, unmet
from compress_search.study import Study

MOST_VARIED, MOST_TRIED = 3, 20_000
"""Dimensions that are varied at a time in the search for fitting values, and how many sets of them."""


def asked(name: str, method: Method, hook: str, *arguments: Any) -> Any:
    """What a method's pure hook says; one that raises breaks the contract, whatever the recipe."""
    try:
        return getattr(method, hook)(*arguments)
    except Exception as error:
        raise PluginError(
            f"{hook} must not raise, and raised {type(error).__name__}: {error}", entry_point=name
        ) from error


def space_of(name: str, method: Method, teacher: Subject) -> Space:
    """A method's dimensions for a teacher.

    Raises:
        PluginError: the hook raises, or a condition is on no dimension, or on each other's.
    """
    space: Space = asked(name, method, "search_space", teacher)
    try:
        in_order(space)
    except ValueError as error:
        raise PluginError(f"search_space: {error}", entry_point=name) from error
    return space


def narrowed(study: Study, name: str, method: Method, teacher: Subject, to: Mapping[str, Any]) -> dict[str, Dim]:
    """The method's space under the study's words; one learning rate for all unless a method has its own."""
    space = space_of(name, method, teacher)
    found = dict(space)
    wishes = {dim: (f"methods.{name}.{dim}", value) for dim, value in to.items() if dim != "use"}
    if "learning_rate" in space:
        wishes.setdefault("learning_rate", ("training.learning_rate", study.training.learning_rate))
    for dim, (key, value) in wishes.items():
        if dim not in space:
            missing = asked(name, method, "missing", teacher)
            shown = value if isinstance(value, str) else json.dumps(value)
            whole = [f"{shown} needs {missing[dim]}"] if dim in missing else []
            needs = [*_needs(missing, dim, value), *whole, f"unknown dimension{closest(dim, space)}"]
            raise study.error(key, needs[0])
        try:
            found[dim] = narrow(space[dim], value)
        except ValueError as error:
            needs = _needs(asked(name, method, "missing", teacher), dim, value)
            raise study.error(key, "; ".join([str(error), *needs])) from error
    found = fix_experts(found)
    for dim in to:
        if dim != "use" and (need := unmet(found, dim)):
            raise study.error(f"methods.{name}.{dim}", f"has no effect: it needs {need}")
    return _faultless(study, name, method, teacher, found)


def _needs(missing: Mapping[str, str], dim: str, value: Any) -> list[str]:
    """What the first choice of a study would need that the space lacks, where its method says so."""
    values = value if isinstance(value, list) else [value]
    return [f"{choice} needs {missing[f'{dim}: {choice}']}" for choice in values if f"{dim}: {choice}" in missing][
        :1
    ]


def _faultless(study: Study, name: str, method: Method, teacher: Subject, space: dict[str, Dim]) -> dict[str, Dim]:
    """The space with defaults that can be applied to the teacher: as few others as possible where they cannot be.

    A fault of a value that the study fixed is not mended by others under which the value means nothing.

    Raises:
        StudyError: a study that names its methods leaves none.
    """

    def ask(hook: str, *arguments: Any) -> Any:
        return asked(name, method, hook, teacher, *arguments)

    def settled(space: Mapping[str, Dim]) -> Params:
        return ask("effective", defaults(space))  # type: ignore[no-any-return]

    def mends(near: Mapping[str, Dim]) -> bool:
        params = settled(near)
        return not ask("faults", params) and fixed <= params.keys()

    if ask("unsupported"):  # what comes before it decides
        return space

    found = dict(ask("faults", settled(space)))
    if not found:
        return space
    named = () if study.methods == "all" else study.methods[name]
    fixed = {dim for dim in found if dim in named and space[dim].fixed}
    if close := next(filter(mends, islice(_neighbours(space), MOST_TRIED)), None):
        return close
    if study.methods == "all":
        return space
    dim, fault = next(iter(found.items()))
    raise study.error(f"{study.method_key(name)}.{dim}", fault)


def idle(
    named: Iterable[str], name: str, method: Method, teacher: Subject, space: Space, subjects: Sequence[Subject]
) -> dict[str, str]:
    """Of the dimensions that a study names those for which no proposal makes anything of its words, and why.

    Args:
        named: the dimensions.
        name: the method's.
        method: itself.
        teacher: what the space is made from.
        space: the narrowed one, of which proposals are.
        subjects: what the method may be applied to.
    """
    whole = method.search_space(teacher)
    switches_first = sorted(space.items(), key=lambda item: not isinstance(item[1].default, bool))
    wide = {other: replace(whole[other], default=dim.default) for other, dim in switches_first}
    settles = [partial(asked, name, method, "effective", subject) for subject in subjects]
    found = {}
    for dim in named:
        if any(next(_counting(dim, space, whole[dim], settle), None) for settle in settles):
            continue
        near = next(_counting(dim, {**wide, dim: space[dim]}, whole[dim], settles[0]), None)
        found[dim] = "has no effect" + (f": it needs {_changes(wide, near, dim)}" if near else " on such a model")
    return found


def _counting(dim: str, space: Space, whole: Dim, settle: Callable[[Params], Params]) -> Iterator[Space]:
    """The space, or those with other defaults, under whose defaults a dimension counts.

    It does if its value is kept, or if with another value something else would come of it.
    """

    def settled(near: Space, value: Value) -> Params:
        return settle(defaults({**near, dim: replace(near[dim], default=value)}))

    for near in islice(chain([space], _neighbours(space, _ends)), MOST_TRIED):
        value = near[dim].default
        if dim not in defaults(near):
            continue
        params = settled(near, value)
        if params.get(dim) == value or any(settled(near, other) != params for other in _ends(whole)):
            yield near


def _changes(space: Space, near: Space, dim: str) -> str:
    """The defaults in which another space differs, but for one dimension's, as ``other: value``."""
    changed = {name: other.default for name, other in near.items() if name != dim and other != space[name]}
    words = (str(value).lower() if isinstance(value, bool) else str(value) for value in changed.values())
    return " and ".join(f"{name}: {word}" for name, word in zip(changed, words, strict=True))


def _neighbours(space: Space, values: Callable[[Dim], Sequence[Value]] | None = None) -> Iterator[dict[str, Dim]]:
    """The space with other defaults of a few dimensions, of as few as possible first; by default reals stay."""
    others = [
        (name, replace(dim, default=value))
        for name, dim in space.items()
        for value in (values or _values)(dim)
        if value != dim.default
    ]
    for count in range(1, MOST_VARIED + 1):
        for changes in combinations(others, count):
            if len(dict(changes)) == count:
                yield {**space, **dict(changes)}


def _values(dim: Dim) -> Sequence[Value]:
    distribution = dim.distribution
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices  # type: ignore[return-value]  # what a Dim was made of
    if isinstance(distribution, IntDistribution):
        return range(distribution.low, distribution.high + 1, distribution.step)
    return ()


def _ends(dim: Dim) -> Sequence[Value]:
    """All values of a choice, the ends of a range."""
    if isinstance(dim.distribution, CategoricalDistribution):
        return _values(dim)
    distribution: Any = dim.distribution
    return distribution.low, distribution.high


def closest(name: str, known: Iterable[str]) -> str:
    """What was meant by a name that is not known, or all that are."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f' (did you mean "{close[0]}"?)' if close else f"; there are: {', '.join(sorted(known))}"

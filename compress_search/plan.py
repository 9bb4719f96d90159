"""From a study and the installed methods to the space of recipes a search may propose.

Owns which methods take part, how a study narrows their dimensions, and the walk over the stages that turns
suggested values into a legal recipe. Knows nothing of trials that ran, of storage or of weights.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations, islice
from typing import Any

from optuna.distributions import CategoricalDistribution, IntDistribution, distribution_to_json
from optuna.trial import BaseTrial

from compress_search.candidate import Subject
from compress_search.errors import PluginError
from compress_search.method import Method, Stage
from compress_search.recipe import Recipe, Step, digest
from compress_search.registry import Registry
from compress_search.space import Dim, Params, Value, defaults, fix_experts, narrow, suggest, unmet
from compress_search.study import Study

NONE = "none"
MAX_STARTING_POINTS = 6
MOST_VARIED, MOST_TRIED = 3, 20_000
"""Dimensions that are varied at a time in the search for defaults without a fault, and how many sets of them."""


@dataclass(frozen=True)
class Slot:
    """One decision about which method to use: ``options`` are method names and, unless forced, ``"none"`` first.

    An exclusive stage's slot offers its options; any other method has a slot of its own, a yes or no.
    """

    name: str
    options: tuple[str, ...]
    exclusive: bool

    @property
    def choices(self) -> tuple[str, ...] | tuple[bool, bool]:
        """What a sampler sees; in the order of the options."""
        return self.options if self.exclusive else (False, True)

    @property
    def forced(self) -> bool:
        """Whether there is nothing to decide."""
        return len(self.options) == 1


@dataclass(frozen=True)
class Plan:
    """The searchable space of recipes of one study; the same for the study's whole life."""

    study: Study
    registry: Registry
    teacher: Subject
    spaces: Mapping[str, Mapping[str, Dim]]
    slots: tuple[Slot, ...]

    @cached_property
    def methods(self) -> dict[str, Method]:
        """The methods that take part, by name."""
        return {name: self.registry[name] for name in self.spaces}

    @cached_property
    def space_hash(self) -> str:
        """Identity of the space: equal hashes mean that a sampler can go on learning."""
        return digest(self.outline())

    def outline(self) -> dict[str, Any]:
        """The space as plain data, for the identity and for a readable difference between two of them."""
        return {
            "slots": {slot.name: list(slot.options) for slot in self.slots},
            "dims": {
                f"{method}.{name}": [distribution_to_json(dim.distribution), dim.default, _conditions(dim)]
                for method, space in self.spaces.items()
                for name, dim in space.items()
            },
        }

    @property
    def dimensions(self) -> int:
        """How many decisions a sampler can make at most."""
        searched = sum(not dim.fixed for space in self.spaces.values() for dim in space.values())
        return searched + sum(not slot.forced for slot in self.slots)

    def propose(self, trial: BaseTrial) -> Recipe:
        """A legal recipe with effective parameters, suggested define-by-run."""

        def choose(slot: Slot) -> str:
            if slot.forced:
                return slot.options[0]
            choice = trial.suggest_categorical(slot.name, slot.choices)
            return slot.options[slot.choices.index(choice)]

        return self._walk(choose, lambda name: suggest(trial, name, self.spaces[name]))

    def starting_points(self) -> list[dict[str, Value]]:
        """Optuna parameters of recipes known to work well: each method at its defaults with what follows it.

        A student or a structural step alone with recovery and precision, then all of them together.
        """
        points, seen = [], {Recipe().key}
        for wanted in self._starting_sets():
            recipe, point = self.at_defaults(wanted)
            if recipe.key not in seen:
                seen.add(recipe.key)
                points.append(point)
        return points[:MAX_STARTING_POINTS]

    def _starting_sets(self) -> Iterator[set[str]]:
        by_stage = {
            stage: [name for name, method in self.methods.items() if method.stage == stage] for stage in Stage
        }
        finish = {name for stage in (Stage.RECOVERY, Stage.PRECISION) for name in by_stage[stage][:1]}
        lossy = [name for name, method in self.methods.items() if method.stage < Stage.RECOVERY]
        yield {name for name in finish if self.methods[name].stage is Stage.PRECISION}
        for name in lossy:
            yield {name} | finish
        yield set(by_stage[Stage.STUDENT][:1]) | set(by_stage[Stage.STRUCTURE]) | finish

    def at_defaults(self, wanted: Iterable[str]) -> tuple[Recipe, dict[str, Value]]:
        """The recipe of these methods (and the forced ones) at their defaults, and the Optuna parameters of it."""
        wanted, point = set(wanted), dict[str, Value]()

        def choose(slot: Slot) -> str:
            choice = next((name for name in slot.options if name in wanted), slot.options[0])
            if not slot.forced:
                point[slot.name] = slot.choices[slot.options.index(choice)]
            return choice

        def at_default(name: str) -> Params:
            params = defaults(self.spaces[name])
            point.update({f"{name}.{k}": v for k, v in params.items() if not self.spaces[name][k].fixed})
            return params

        return self._walk(choose, at_default), point

    def _walk(self, choose: Callable[[Slot], str], parameters: Callable[[str], Params]) -> Recipe:
        """Visit the slots in stage order; a chosen step that cannot follow, or has a fault, is left out."""
        subject, steps = self.teacher, []
        for slot in self.slots:
            candidates = [name for name in slot.options if name != NONE]
            if all(self._hook(name, "unsupported", subject) for name in candidates):
                continue
            name = choose(slot)
            if name == NONE or self._hook(name, "unsupported", subject):
                continue
            params = self._hook(name, "effective", subject, parameters(name))
            if self._hook(name, "faults", subject, params) or self._hook(name, "changes_nothing", subject, params):
                continue
            subject = self._hook(name, "after", subject, params)
            steps.append(Step.of(name, params))
        return Recipe(tuple(steps))

    def _hook(self, name: str, hook: str, *arguments: Any) -> Any:
        return _asked(name, self.methods[name], hook, *arguments)


def _asked(name: str, method: Method, hook: str, *arguments: Any) -> Any:
    """What a method's pure hook says; one that raises breaks the contract, whatever the recipe."""
    try:
        return getattr(method, hook)(*arguments)
    except Exception as error:
        raise PluginError(
            f"{hook} must not raise, and raised {type(error).__name__}: {error}", entry_point=name
        ) from error


def make_plan(study: Study, registry: Registry, teacher: Subject) -> Plan:
    """The plan of a study.

    Raises:
        StudyError: an unknown method or dimension, a value outside a method's space or without any effect, values
            that cannot go together, a method that can never apply to this teacher, or two forced methods of one
            exclusive stage.
        PluginError: a method the study names cannot be loaded.
    """
    wanted = _wanted(study, registry)
    spaces = {
        name: _narrowed(study, name, registry[name], teacher, narrowing)
        for name, narrowing in sorted(wanted.items(), key=lambda item: (registry[item[0]].stage, item[0]))
    }
    plan = Plan(study, registry, teacher, spaces, _slots(study, registry, list(spaces), wanted))
    if study.methods != "all":
        _check_reachable(plan)
    return plan


def _wanted(study: Study, registry: Registry) -> dict[str, Mapping[str, Any]]:
    if study.methods == "all":
        return {name: {} for name in registry if registry.unavailable(name) is None}
    for name in study.methods:
        if name not in registry:
            raise study.error(study.method_key(name), f"unknown method {name}{_hint(name, registry)}")
    return dict(study.methods)


def _narrowed(study: Study, name: str, method: Method, teacher: Subject, to: Mapping[str, Any]) -> dict[str, Dim]:
    """The method's space under the study's words; one learning rate for all unless a method has its own."""
    space = method.search_space(teacher)
    narrowed = dict(space)
    wishes = {dim: (f"methods.{name}.{dim}", value) for dim, value in to.items() if dim != "use"}
    if "learning_rate" in space:
        wishes.setdefault("learning_rate", ("training.learning_rate", study.training.learning_rate))
    for dim, (key, value) in wishes.items():
        if dim not in space:
            need = method.missing(teacher).get(dim)
            raise study.error(key, f"needs {need}" if need else f"unknown dimension{_hint(dim, space)}")
        try:
            narrowed[dim] = narrow(space[dim], value)
        except ValueError as error:
            needs = _needs(method.missing(teacher), dim, value)
            raise study.error(key, "; ".join([str(error), *needs])) from error
    narrowed = fix_experts(narrowed)
    for dim in to:
        if dim != "use" and (need := unmet(narrowed, dim)):
            raise study.error(f"methods.{name}.{dim}", f"has no effect: it needs {need}")
    return _faultless(study, name, method, teacher, narrowed)


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
        return _asked(name, method, hook, teacher, *arguments)

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


def _neighbours(space: Mapping[str, Dim]) -> Iterator[dict[str, Dim]]:
    """The space with other defaults of a few dimensions, of as few as possible first; real numbers stay."""
    others = [
        (name, replace(dim, default=value))
        for name, dim in space.items()
        for value in _values(dim)
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


def _slots(
    study: Study, registry: Registry, names: list[str], wanted: Mapping[str, Mapping[str, Any]]
) -> tuple[Slot, ...]:
    """One slot a method, or one a stage where the stage admits a single step."""
    slots: dict[tuple[str, bool], list[str]] = {}
    for name in names:
        stage = registry[name].stage
        slot = stage.name.lower() if stage.exclusive else f"{name}.use"
        slots.setdefault((slot, stage.exclusive), []).append(name)
    made = []
    for (slot, exclusive), members in slots.items():
        forced = [name for name in members if wanted[name].get("use") is True]
        if len(forced) > 1:
            message = f"only one {slot} method can be forced, and {forced[0]!r} is already"
            raise study.error(f"methods.{forced[1]}.use", message)
        allowed = [name for name in members if wanted[name].get("use") is not False]
        if forced or allowed:
            made.append(Slot(slot, tuple(forced or [NONE, *allowed]), exclusive))
    return tuple(made)


def _check_reachable(plan: Plan) -> None:
    """Refuse a named method that fits neither the teacher nor what the steps before it leave."""
    for name, method in plan.methods.items():
        before = [other for other, m in plan.methods.items() if m.stage < method.stage]
        subjects = [plan.teacher]
        for kept in (before, *([other] for other in before)):
            subjects.append(_after(plan, kept))
        reasons = [method.unsupported(subject) for subject in subjects]
        if all(reasons):
            raise plan.study.error(plan.study.method_key(name), f"cannot be used in this study: {reasons[0]}")


def _after(plan: Plan, names: Iterable[str]) -> Subject:
    recipe, _ = plan.at_defaults(names)
    subject = plan.teacher
    for step in recipe.steps:
        subject = plan.methods[step.method].after(subject, step.params)
    return subject


def _conditions(dim: Dim) -> dict[str, list[Value]]:
    return {name: sorted(allowed, key=str) for name, allowed in dim.when.items()}


def _hint(name: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f' (did you mean "{close[0]}"?)' if close else f"; there are: {', '.join(sorted(known))}"

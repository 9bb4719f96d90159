"""From a study and the installed methods to the space of recipes a search may propose.

Owns which methods take part, and the walk over the stages that turns suggested values into a legal recipe. Knows
nothing of trials that ran, of storage or of weights; :mod:`.narrowing` makes of a study's words a method's space.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from optuna.distributions import distribution_to_json
from optuna.trial import BaseTrial

from compress_search.candidate import Subject
from compress_search.method import Method, Stage
from compress_search.narrowing import asked, closest, idle, narrowed
from compress_search.recipe import Recipe, Step, digest
from compress_search.registry import Registry
from compress_search.space import Dim, Params, Value, defaults, suggest
from compress_search.study import Study

NONE = "none"
MAX_STARTING_POINTS = 6


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
        return asked(name, self.methods[name], hook, *arguments)


def make_plan(study: Study, registry: Registry, teacher: Subject) -> Plan:
    """The plan of a study.

    Raises:
        StudyError: an unknown method or dimension, a value outside a method's space or without any effect, values
            that cannot go together, a method that can never apply to this teacher, two forced methods of one
            exclusive stage, or an aim that only some recipes have a number for.
        PluginError: a method the study names cannot be loaded.
    """
    wanted = _wanted(study, registry)
    spaces = {
        name: narrowed(study, name, registry[name], teacher, narrowing)
        for name, narrowing in sorted(wanted.items(), key=lambda item: (registry[item[0]].stage, item[0]))
    }
    plan = Plan(study, registry, teacher, spaces, _slots(study, registry, list(spaces), wanted))
    if study.methods != "all":
        _check_reachable(plan, wanted)
    _check_aims(plan)
    return plan


def _wanted(study: Study, registry: Registry) -> dict[str, Mapping[str, Any]]:
    if study.methods == "all":
        return {name: {} for name in registry if registry.unavailable(name) is None}
    for name in study.methods:
        if name not in registry:
            raise study.error(study.method_key(name), f"unknown method {name}{closest(name, registry)}")
    return dict(study.methods)


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


def _check_reachable(plan: Plan, wanted: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse a named method that fits neither the teacher nor what steps before it leave, and values in vain."""
    for name, method in plan.methods.items():
        subjects = list(_subjects(plan, name))
        fitting = [subject for subject in subjects if method.unsupported(subject) is None]
        if not fitting:
            reason = method.unsupported(subjects[0])
            raise plan.study.error(plan.study.method_key(name), f"cannot be used in this study: {reason}")
        named = [dim for dim in wanted[name] if dim != "use"]
        for dim, fault in idle(named, name, method, plan.teacher, plan.spaces[name], fitting).items():
            raise plan.study.error(f"methods.{name}.{dim}", fault)


def _check_aims(plan: Plan) -> None:
    """Refuse a method's metric as an aim where recipes without the method would have no number for it."""
    forced = {slot.options[0] for slot in plan.slots if slot.forced}
    for key, metric in plan.study.aims():
        method, dot, _ = metric.partition(".")
        if dot and method not in forced:
            message = f"recipes without {method} have no {metric}: expected methods.{method} to be {{use: true}}"
            raise plan.study.error(key, message)


def _subjects(plan: Plan, name: str) -> Iterator[Subject]:
    """What a method may find: the teacher, and what all methods before it leave, or one of them, at defaults."""
    stage = plan.methods[name].stage
    before = [other for other, method in plan.methods.items() if method.stage < stage]
    yield plan.teacher
    for kept in (before, *([other] for other in before)):
        yield _before(plan, stage, kept)


def _before(plan: Plan, stage: Stage, names: Iterable[str]) -> Subject:
    """What these methods, and those that a study has in every recipe, leave for a stage."""
    recipe, _ = plan.at_defaults(names)
    subject = plan.teacher
    for step in recipe.steps:
        if plan.methods[step.method].stage < stage:
            subject = plan.methods[step.method].after(subject, step.params)
    return subject


def _conditions(dim: Dim) -> dict[str, list[Value]]:
    return {name: sorted(allowed, key=str) for name, allowed in dim.when.items()}

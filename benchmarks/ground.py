"""A study's materials, on which recipes named by hand are carried out. Shared by the benchmarks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress_search.candidate import Candidate
from compress_search.driver import prepare
from compress_search.pipeline import run_recipe
from compress_search.plan import make_plan
from compress_search.recipe import Recipe
from compress_search.study import load_study
from compress_search.training import evaluate
from compress_search.workbench import Workbench

Methods = Mapping[str, Mapping[str, Any]]
"""Methods with exact parameters; what is left out stays at its default."""


class Ground:
    """One study file with its teacher and its data, made ready once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.prepared = prepare(load_study(path))
        self.bench = Workbench(self.prepared.brief)
        self.materials = self.bench.materials

    def recipe(self, methods: Methods) -> Recipe:
        """The recipe of these methods with these parameters.

        Raises:
            StudyError: a method or a parameter is unknown, or a value lies outside its space.
        """
        if not methods:
            return Recipe()
        exactly = json.dumps({name: {"use": True, **params} for name, params in methods.items()})
        study = load_study(self.path, [f"methods={exactly}"])
        study = study.model_copy(update={"objectives": self.prepared.study.objectives})
        plan = make_plan(study, self.bench.registry, self.prepared.plan.teacher)
        recipe, _ = plan.at_defaults(methods)
        assert set(recipe.methods) == set(methods), f"left out as impossible: {set(methods) - set(recipe.methods)}"
        return recipe

    def apply(self, recipe: Recipe, scratch: Path, *, seed: int = 0, dry: bool = False) -> tuple[Candidate, int]:
        """The candidate and the optimizer steps it took."""
        candidate, budget = run_recipe(
            recipe, self.bench.registry, self.materials, seed=seed, scratch=scratch, dry=dry
        )
        return candidate, budget.done

    def scores(self, network: Any) -> tuple[float, float]:
        """(validation, test) by the task's primary metric."""
        task, found = self.materials.task, []
        for split in (self.materials.validation, self.bench.split("test")):
            assert split is not None, "the study names test data"
            found.append(task.score(*evaluate(network, split, task))[task.primary])
        return found[0], found[1]

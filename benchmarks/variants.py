"""What is each variant of a method worth? One student of each, scene by scene: the figures of docs/systems.

``python -m benchmarks.variants SHARED [--scenes "few labels;…"] [--groups theseus,…] [--quick]``

A recipe that is in ``results/variants.jsonl`` is not run again, so an interrupted run goes on where it was. SHARED
is a folder with ``data/<set>/*.jsonl`` and ``models/all-minilm-l6-v2``.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import click
import optuna

from benchmarks import tables
from benchmarks.distillation_quality import BATCH, listed
from benchmarks.ground import Ground, Methods
from benchmarks.recipes import RATE
from benchmarks.scenes import SCENES, Scene, open_scene
from compress_search.candidate import Candidate

RECORDS = tables.RESULTS / "variants.jsonl"
TEACHER: Methods = {}
"""The recipe without a method."""


@dataclass(frozen=True)
class Made:
    """One candidate: by which recipe, what it scored (primary metric, 0 to 1), its size, its time, and where."""

    scene: str
    methods: Methods
    steps: int
    validation: float
    test: float
    megabytes: float
    seconds: float
    machine: str


def stored() -> list[Made]:
    """What earlier runs found."""
    if not RECORDS.exists():
        return []
    return [Made(**json.loads(line)) for line in RECORDS.read_text(encoding="utf-8").splitlines()]


class Stage:
    """A scene that is set when the first recipe is to be carried out there."""

    def __init__(self, name: str, shared: Path, steps: int, folder: Path) -> None:
        self.name, self.shared, self.steps, self.folder = name, shared, steps, folder / name.replace(" ", "-")
        self.scene: Scene = SCENES[name]
        self.known = [made for made in stored() if (made.scene, made.steps) == (name, steps)]

    @cached_property
    def ground(self) -> Ground:
        """The scene's study, ready."""
        return open_scene(self.scene, self.folder, self.shared, self.steps)

    def made(self, methods: Methods) -> Made:
        """The recipe's candidate, made and scored unless it is kept from earlier."""
        return self.kept(methods) or self._keep(self._make(methods))

    def kept(self, methods: Methods) -> Made | None:
        """What an earlier run found of the recipe."""
        return next((made for made in self.known if made.methods == methods), None)

    def _make(self, methods: Methods) -> Made:
        ground = self.ground
        started = time.perf_counter()
        candidate, _ = ground.apply(ground.recipe(methods), self.folder / "scratch")
        seconds = time.perf_counter() - started
        own_reading = candidate.subject.vocabulary != ground.materials.teacher.subject.vocabulary
        as_file = own_reading or candidate.lowering
        scores = self._deployed(candidate) if as_file else ground.scores(candidate.network)
        return Made(self.name, methods, self.steps, *scores, candidate.subject.megabytes, seconds, tables.machine())

    def _deployed(self, candidate: Candidate) -> tuple[float, float]:
        """Validation and test score of a candidate whose numbers, or whose tokens, only its file has."""
        artifact, metric = self.folder / f"artifact-{time.monotonic_ns()}", self.ground.materials.task.primary
        self.ground.bench.lower(candidate, artifact)
        parts = ("validation", "test")
        validation, test = (self.ground.bench.score(artifact, part, as_deployed=True) for part in parts)
        return validation.metrics[metric], test.metrics[metric]

    def _keep(self, made: Made) -> Made:
        self.known.append(made)
        RECORDS.parent.mkdir(exist_ok=True)
        with RECORDS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(made)) + "\n")
        return made

    def close(self) -> None:
        """End the bench, if there is one."""
        if "ground" in self.__dict__:
            self.ground.bench.close()


def rows(stage: Stage) -> Iterator[list[object]]:
    """The table's rows, in the order of the scene's recipes."""
    if teacher := stage.kept(TEACHER):
        yield row("teacher", "", teacher)
    for group, variants in stage.scene.groups.items():
        for variant, methods in variants.items():
            if made := stage.kept(methods):
                yield row(group, variant, made)


def row(group: str, variant: str, made: Made) -> list[object]:
    """Scores in points, MB and seconds."""
    scores = [f"{100 * score:.1f}" for score in (made.validation, made.test)]
    return [group, variant, *scores, f"{made.megabytes:.1f}", f"{made.seconds:.0f}" if made.methods else ""]


def report(shared: Path, steps: int) -> Path:
    """Write what is known of all scenes."""
    told = (
        f"One candidate of each kind, about {steps} optimizer steps of {BATCH} examples, learning rate {RATE:g} "
        "(recurrent students 3e-3), one seed; float32 unless it is said: primary metric in points, closed-form "
        "size, seconds to make. Read differences beside the standard error of a score, about half a point on "
        "banking77's and 1.6 on wikigold's test set, and about as much again between seeds. Recipes: "
        "`benchmarks/recipes.py`, scenes: `benchmarks/scenes.py`."
    )
    header, parts = ["method", "variant", "validation", "test", "MB", "seconds"], [told]
    for name, scene in SCENES.items():
        stage = Stage(name, shared, steps, Path())
        machines = "; ".join(dict.fromkeys(made.machine for made in stage.known))
        if found := list(rows(stage)):
            parts += [f"## {name.capitalize()}", f"{scene.told} Machine: {machines}.", tables.table(header, found)]
    title = "What the variants of the methods are worth"
    return tables.write("variants", title, parts, "named with each table")


@click.command()
@click.argument("shared", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--scenes", default=";".join(SCENES), help="Names with semicolons between them; all when not given.")
@click.option("--groups", help="Groups of recipes, with commas between them; all when not given.")
@click.option("--steps", default=200, show_default=True, help="Optimizer steps of one candidate.")
@click.option("--quick", is_flag=True, help="20 steps.")
def main(shared: Path, scenes: str, groups: str | None, steps: int, quick: bool) -> None:
    """Make what is missing and write benchmarks/results/variants.md."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    shared, steps = shared.resolve(), 20 if quick else steps
    with tempfile.TemporaryDirectory() as folder:
        for name in scenes.split(";"):
            stage = Stage(name.strip(), shared, steps, Path(folder))
            stage.made(TEACHER)
            for group, variants in stage.scene.groups.items():
                for variant, methods in variants.items() if not groups or group in listed(groups) else ():
                    made = stage.made(methods)
                    click.echo(
                        f"{name}, {group}, {variant}: {made.validation:.3f} {made.test:.3f} {made.seconds:.0f} s"
                    )
            stage.close()
    click.echo(report(shared, steps))


if __name__ == "__main__":
    main()

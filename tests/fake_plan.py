"""A plan over three tiny methods, and a search over it with a worker that needs no model."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

from compress_search.candidate import Candidate, Subject
from compress_search.errors import StudyError
from compress_search.method import Context, Method, Stage
from compress_search.plan import NONE, Plan, Slot
from compress_search.records import Assignment, Failure, Result
from compress_search.search import Search
from compress_search.space import Dim, Params
from compress_search.storage import Store
from compress_search.study.goals import parse_constraint

TEACHER = Subject("bert", "text-classification", 6, 4, 8, 32, 128, 100, 64, 2, 2)


class _Shapeless(Method):
    def apply(self, candidate: Candidate, params: Params, context: Context) -> Candidate:
        raise AssertionError("the search never applies a method")


class Student(_Shapeless):
    stage = Stage.STUDENT

    def search_space(self, teacher: Subject) -> Mapping[str, Dim]:
        return {"layers": Dim.integer(1, 4, 2)}

    def after(self, subject: Subject, params: Params) -> Subject:
        return replace(subject, layers=int(params["layers"]))


class Prune(_Shapeless):
    stage = Stage.STRUCTURE

    def search_space(self, teacher: Subject) -> Mapping[str, Dim]:
        return {"ratio": Dim.real(0.0, 0.9, 0.5)}

    def effective(self, subject: Subject, params: Params) -> Params:
        return {"ratio": round(float(params["ratio"]), 1)}


class Quantize(_Shapeless):
    stage = Stage.PRECISION

    def search_space(self, teacher: Subject) -> Mapping[str, Dim]:
        return {"bits": Dim.choice((8, 4), 8)}


METHODS: dict[str, Method] = {"prune": Prune(), "quantize": Quantize(), "student": Student()}


def fake_study(folder: Path, **changes: Any) -> Any:
    """What the search asks of a study; ``search`` and ``constraints`` are merged, other keys replaced."""
    search = {
        "trials": 8,
        "hours": None,
        "sampler": "random",
        "early_stop": "moasha",
        "seed": 0,
        "concurrency": 1,
        "retries": 2,
    } | changes.pop("search", {})
    definition = {
        "name": "fake",
        "data": {"train": str(folder / "data" / "train.jsonl")},
        "training": {"epochs": 3.0},
        "search": search,
        "constraints": changes.pop("constraints", {}),
        "artifacts": {"keep_gb": 5.0},
        "output": str(folder / "runs"),
    } | changes

    directions = {"accuracy": "maximize", "latency_ms": "minimize"}

    def identity(*, defaults: bool = True) -> dict[str, Any]:
        fixed = {key: definition[key] for key in ("data", "training", "constraints")}
        return {**fixed, "search": {"seed": search["seed"]}, "objectives": dict(directions)}

    def error(key: str, message: str) -> StudyError:
        return StudyError(message, file="study.yaml", line=1, key=key)

    return SimpleNamespace(
        name=definition["name"],
        search=SimpleNamespace(**search),
        directions=directions,
        constraints={
            name: parse_constraint(name, bound, "text-classification")
            for name, bound in definition["constraints"].items()
        },
        artifacts=SimpleNamespace(**definition["artifacts"]),
        measure=SimpleNamespace(batch_size=1),
        output=folder / "runs",
        to_dict=lambda: definition,
        identity=identity,
        error=error,
    )


def fake_plan(folder: Path, methods: tuple[str, ...] = ("prune", "quantize", "student"), **changes: Any) -> Plan:
    """The plan of such a study."""
    spaces = {name: METHODS[name].search_space(TEACHER) for name in methods}
    names = {"student": "student", "prune": "prune.use", "quantize": "precision"}
    slots = tuple(
        Slot(names[name], (NONE, name), name != "prune")
        for name in ("student", "prune", "quantize")
        if name in methods
    )
    return Plan(fake_study(folder, **changes), METHODS, TEACHER, spaces, slots)  # type: ignore[arg-type]


def url_of(folder: Path) -> str:
    """An SQLite database in a folder."""
    return f"sqlite:///{folder / 'study.db'}"


@cache
def _empty_database() -> bytes:
    """A database with its tables; creating one takes longer than most tests."""
    with TemporaryDirectory() as folder:
        Store(url_of(Path(folder))).create()
        with closing(sqlite3.connect(Path(folder, "study.db"))) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return Path(folder, "study.db").read_bytes()


def fake_store(folder: Path, url: str | None = None, **options: Any) -> Store:
    """A created database; what is there already is left."""
    store = Store(url or url_of(folder), **options)
    if url is None and not (folder / "study.db").exists():
        (folder / "study.db").write_bytes(_empty_database())
    elif url is not None:
        store.create()
    return store


def fake_search(folder: Path, url: str | None = None, **changes: Any) -> Search:
    """A search in a created database; ``options`` go to Search.open, ``store`` options to the store."""
    options, store = changes.pop("options", {}), fake_store(folder, url, **changes.pop("store", {}))
    return Search.open(fake_plan(folder, **changes), store, **options)


def metrics_of(assignment: Assignment) -> dict[str, float]:
    """A front to be found: the smaller, the faster and the less accurate."""
    size = 1.0
    for step in assignment.recipe.steps:
        size *= {
            "student": lambda p: p["layers"] / 6,
            "prune": lambda p: 1 - p["ratio"],
            "quantize": lambda p: p["bits"] / 32,
        }[step.method](step.params)
    return {"accuracy": 0.9 - 0.3 * (1 - size) ** 3, "latency_ms": 1 + 100 * size, "size_mb": 100 * size}


def measured(assignment: Assignment, **metrics: float) -> Result:
    """A complete result."""
    found = metrics_of(assignment) | metrics
    return Result(assignment.number, assignment.attempt, "complete", metrics=found, seconds={"total": 1.0})


def run(search: Search, limit: int = 10_000) -> list[Assignment]:
    """Run a search to its end, one trial at a time; what was handed out."""
    handed = []
    while not search.done and len(handed) < limit:
        assignment = search.next()
        if assignment is None:
            break
        handed.append(assignment)
        search.finish(measured(assignment))
    return handed


FAILURE = Failure("error", "ValueError: no such layer\nmore", "Traceback …")
DEATH = Failure("died", "the worker process died")


def failed(assignment: Assignment, failure: Failure = FAILURE) -> Result:
    """A result of a recipe that raised."""
    return Result(assignment.number, assignment.attempt, "failed", failure=failure)


def given(assignment: Assignment | None) -> Assignment:
    """The assignment, which there must be."""
    assert assignment is not None
    return assignment


def start(search: Search, count: int) -> list[Assignment]:
    """So many assignments at once."""
    return [given(search.next()) for _ in range(count)]


def after_teacher(search: Search) -> Search:
    """The search with its teacher measured."""
    search.finish(measured(given(search.next())))
    return search


def states(search: Search) -> list[str]:
    """Every trial's state in the database."""
    return [row.state for row in search.store.trials(search.name)]


def nothing(number: int) -> None:
    """No worker left a result behind."""

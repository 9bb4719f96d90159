"""A made-up study in the shape the database gives it, for the tests of everything that reports."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from typing import Any

import optuna

from compress_search.recipe import Recipe
from compress_search.records import Assignment, Failure, Result
from compress_search.report import Entry, Facts, Report, build_report
from compress_search.storage import Store
from compress_search.study import Study

TEACHER = {"accuracy": 0.884, "macro_f1": 0.883, "latency_ms": 24.0, "speedup": 1.0, "size_mb": 91.2}


def facts(**changes: Any) -> Facts:
    values: dict[str, Any] = {
        "study": "sst2-minilm",
        "task": "text-classification",
        "objectives": {"accuracy": "maximize", "latency_ms": "minimize"},
        "constraints": {"accuracy_drop": "<= 0.03"},
        "reference_point": {"accuracy": 0.51, "latency_ms": 26.4},
        "environment": {"python": "3.11", "cpu": {"model": "some cpu", "cores": 2}, "gpus": []},
        "settings": {"name": "sst2-minilm", "search": {"trials": 40}},
    }
    return Facts(**{**values, **changes})


def entry(number: int, accuracy: float = 0.87, latency_ms: float = 8.0, **changes: Any) -> Entry:
    """A complete trial of a three-step recipe; ``changes`` override any field."""
    metrics = {
        "accuracy": accuracy,
        "accuracy_drop": TEACHER["accuracy"] - accuracy,
        "latency_ms": latency_ms,
        "speedup": TEACHER["latency_ms"] / latency_ms,
        "size_mb": 30 * latency_ms / TEACHER["latency_ms"] + 10,
    }
    values: dict[str, Any] = {
        "number": number,
        "state": "complete",
        "recipe": [
            {"method": "theseus", "params": {"block_size": 2, "schedule": "linear"}},
            {"method": "structured_pruning", "params": {"ffn_ratio": 0.5, "head_ratio": 0.25}},
            {"method": "quantization", "params": {"weight_bits": 8}},
        ],
        "metrics": metrics,
        "intervals": {
            "accuracy": (accuracy - 0.011, accuracy + 0.011),
            "accuracy_drop": (TEACHER["accuracy"] - accuracy - 0.005, TEACHER["accuracy"] - accuracy + 0.005),
            "latency_ms": (0.97 * latency_ms, 1.03 * latency_ms),
        },
        "seconds": 61.0,
    }
    return Entry(**{**values, **changes})


def teacher() -> Entry:
    return entry(0, metrics={**TEACHER, "accuracy_drop": 0.0}, recipe=[], baseline="teacher", intervals={})


def baseline() -> Entry:
    recipe = [{"method": "quantization", "params": {"weight_bits": 8}}]
    return entry(1, 0.881, 9.1, recipe=recipe, baseline="teacher_int8")


def entries(size: int = 40, seed: int = 0) -> list[Entry]:
    """Teacher, int8 baseline and trials of every state, on a curve with noise."""
    rng, made = random.Random(seed), [teacher(), baseline()]
    for number in range(2, size):
        latency = rng.uniform(1.5, 22)
        accuracy = 0.885 - 0.35 / (latency + 1.5) + rng.gauss(0, 0.01)
        state = rng.choices(["complete", "stopped", "failed", "infeasible", "duplicate"], [6, 2, 1, 1, 0.5])[0]
        trial = entry(number, round(accuracy, 4), round(latency, 3), state=state)
        if state == "failed":
            error = "oom: distill: out of memory" if number % 2 else "nan: the loss is not finite"
            trial = trial.model_copy(update={"metrics": {}, "intervals": {}, "error": error})
        made.append(trial)
    made.append(entry(size, 0.874, 7.9, test={"accuracy": 0.871}, marks=["noisy"]))
    made.append(entry(size + 1, 0.873, 7.8, test={"accuracy": 0.869}))
    return made


def sample(**changes: Any) -> Report:
    return build_report(facts(**changes), entries())


def fill(store: Store, study: Study, rows: Iterable[Entry], reference: Mapping[str, float] = TEACHER) -> None:
    """Write entries into a study's database the way the search would, numbers in order."""
    store.create()
    store.begin(
        study.name,
        definition=study.to_dict(),
        identity={"objectives": dict(study.directions)},
        space_hash="",
        subject={},
        environment={"python": "3.11"},
        reference={"metrics": reference, "constant": {"accuracy": 0.51}},
        seconds=600.0,
    )
    told = store.optuna_study(study.name, study.directions)
    for row in rows:
        trial = told.ask()
        recipe = Recipe(row.steps)
        store.begin_attempt(study.name, Assignment(trial.number, 0, recipe, 7, row.baseline))
        if row.state == "running":
            continue
        failure = Failure("error", row.error, f"Traceback\n{row.error}") if row.error else None
        measurements = {"latency": {"noisy": "noisy" in row.marks, "ratio": 0.3, "samples": {"ms": [1.0] * 9}}}
        store.write_result(
            study.name,
            Result(
                trial.number,
                0,
                row.state,
                row.metrics,
                row.intervals,
                measurements,
                artifact=f"artifacts/{trial.number}" if row.state == "complete" else None,
                seconds={"total": row.seconds or 0.0},
                failure=failure,
            ),
        )
        told.tell(trial, state=optuna.trial.TrialState.FAIL)
        if row.test:
            store.write_measurement(study.name, trial.number, "final", {"test": {"metrics": row.test}})

"""A study's report from its database rows alone.

Owns what each row, and what the study froze, means to the document. Knows nothing of what follows from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from optuna.distributions import json_to_distribution

from compress_search import pareto
from compress_search.report import Entry, Facts, Report, build_report
from compress_search.study import goals

if TYPE_CHECKING:
    from compress_search.storage import Store
    from compress_search.storage.stored import TrialRow


def read_report(store: Store, name: str) -> Report:
    """The document of a study from its database.

    Raises:
        StorageError: there is no database, or no study of this name in it.
    """
    return build_report(read_facts(store, name), read_entries(store, name))


def read_facts(store: Store, name: str) -> Facts:
    """What is stored of a study."""
    info = store.study(name)
    definition = info.definition
    # the teacher's machine is the one that measured; the driver's may be another, that of a cluster's head
    measured = (row.environment for row in store.trials(name) if row.recipe is not None and not row.recipe.steps)
    environment = next(filter(None, measured), info.environment)
    return Facts(
        study=name,
        task=definition["task"],
        objectives=info.identity["objectives"],
        constraints=definition.get("constraints") or {},
        reference_point=reference_point(info.identity["objectives"], definition["task"], info.reference),
        searched=searched(info.identity.get("space", {})),
        kernels=kernels(info.subject),
        environment=dict(environment),
        seconds=info.seconds,
        settings=dict(definition),
    )


def reference_point(
    objectives: Mapping[str, pareto.Direction], task: goals.TaskName, reference: Mapping[str, Any]
) -> dict[str, float]:
    """The worst corner worth counting, from what the study froze: the teacher's metrics and a constant's scores.

    1.1 times the teacher for what is minimised, a teacher 1.1 times worse for speeds, and for scores those of
    always answering the same. An objective of which nothing is known yet is left out.
    """
    teacher, constant = reference.get("metrics", {}), reference.get("constant", {})
    worse = {
        name: value * 1.1 if objectives[name] == "minimize" else value / 1.1
        for name, value in teacher.items()
        if name in objectives and name not in goals.METRICS[task]
    }
    scores = {name: value for name, value in constant.items() if name in objectives}
    return {**worse, **scores}


def searched(space: Mapping[str, Any]) -> list[str]:
    """``method.dimension`` of every dimension that can take more than one value in a plan's outline."""
    dims = space.get("dims", {})
    return [name for name, (distribution, *_) in dims.items() if not json_to_distribution(distribution).single()]


def kernels(subject: Mapping[str, Any]) -> list[str]:
    """Names of the kernels that the study found to be real where it was begun."""
    mark = "kernel:"
    return sorted(trait.removeprefix(mark) for trait in subject.get("traits", ()) if trait.startswith(mark))


def read_entries(store: Store, name: str) -> list[Entry]:
    """The stored trials of a study."""
    measurements = store.measurements(name)
    return [entry_of(row, measurements.get(row.number, {})) for row in store.trials(name)]


def entry_of(row: TrialRow, measurements: Mapping[str, Any]) -> Entry:
    """A stored trial with its measurements as an entry of the document."""
    marks = {
        "noisy": latency_of(row, measurements).get("noisy"),
        "simulated": measurements.get("simulated"),
        "provisional": row.provisional,
    }
    return Entry.model_validate(
        {
            "number": row.number,
            "state": row.state,
            "recipe": row.recipe.to_list() if row.recipe else [],
            "metrics": row.metrics,
            "intervals": row.intervals,
            "test": _final(measurements.get("final")),
            "seconds": row.seconds.get("total"),
            "attempts": row.attempts,
            "error": f"{row.error.kind}: {row.error.message}" if row.error else None,
            "baseline": row.baseline,
            "engine": measurements.get("runtime", {}).get("engine"),
            "marks": [mark for mark, holds in marks.items() if holds],
        }
    )


def latency_of(row: TrialRow, measurements: Mapping[str, Any]) -> Mapping[str, Any]:
    """The measurement that a trial's latency is from: the last, but the teacher's first is the study's unit."""
    last = measurements.get("final", {}).get("latency") if row.recipe and row.recipe.steps else None
    found: Mapping[str, Any] = last or measurements.get("latency") or {}
    return found


def _final(final: Mapping[str, Any] | None) -> dict[str, float] | None:
    """Scores on the test split, of what was measured at the end."""
    return dict((final or {}).get("test", {}).get("metrics", {})) or None

"""The end of a study: its front measured once more, scored on test data, and the artefacts that are kept.

Owns what counts as the front while a study runs, and the rule that the second measurement of it stands. Knows
nothing of locks, signals or how the search went.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from compress_search.errors import CompressSearchError
from compress_search.executor import Executor
from compress_search.measure import Latency
from compress_search.measure.costs import costs_of
from compress_search.pareto import front
from compress_search.storage import Store, TrialRow
from compress_search.study import Study


def feasible(study: Study, metrics: Mapping[str, float]) -> bool:
    """Whether the metrics meet every constraint."""
    limits = study.constraints.values()
    return all(limit.metric in metrics and limit.violation(metrics[limit.metric]) <= 0 for limit in limits)


def front_of(study: Study, rows: list[TrialRow]) -> list[TrialRow]:
    """The complete and feasible trials that none other dominates."""
    there = [row for row in rows if row.state == "complete" and feasible(study, row.metrics)]
    names = list(study.directions)
    there = [row for row in there if all(name in row.metrics for name in names)]
    if not there:
        return []
    points = [[row.metrics[name] for name in names] for row in there]
    return [there[index] for index in front(points, list(study.directions.values()))]


def _finalists(study: Study, rows: list[TrialRow]) -> dict[int, TrialRow]:
    """The front and the baselines, by number."""
    competing = [*front_of(study, rows), *(row for row in rows if row.baseline and row.state == "complete")]
    return {row.number: row for row in competing}


def measured_once(study: Study, store: Store) -> dict[int, TrialRow]:
    """The finalists that have not been measured again yet."""
    again = store.measurements(study.name, kind="final")
    return {n: row for n, row in _finalists(study, store.trials(study.name)).items() if n not in again}


def finalize(study: Study, executor: Executor, store: Store) -> None:
    """Measure the front and the baselines again, score them on test, and tidy the artefacts up.

    The best of many noisy numbers is too good to be true: what the second measurement says counts from then on.
    A model that it puts on the front is measured again in its turn, until every member has been.

    Raises:
        CompressSearchError: a member cannot be measured any more; what the others came to is kept.
    """
    lost: dict[int, str] = {}
    while members := {n: row for n, row in measured_once(study, store).items() if row.artifact and n not in lost}:
        artifacts = {number: row.artifact for number, row in members.items()}
        for number, data in executor.call("finalize", artifacts).items():
            row = members[number]
            if "error" in data:
                lost[number] = data["error"]
                continue
            if row.recipe and row.recipe.steps:  # the teacher's own latency is the study's frozen unit
                # the scale is that of the study's teacher, whose latency the first measurement was multiplied by
                scale = row.metrics["latency_ms"] * row.metrics["speedup"], study.measure.batch_size
                found = costs_of(Latency.from_dict(data["latency"]), *scale)
                store.correct(study.name, number, row.attempts - 1, *found)
            store.write_measurement(study.name, number, "final", data, attempt=row.attempts - 1)
    kept = [row.artifact for row in _finalists(study, store.trials(study.name)).values() if row.artifact]
    keep_artifacts(study.output / "artifacts", {Path(name).name for name in kept}, study.artifacts.keep_gb * 1e9)
    if lost:
        number, fault = next(iter(lost.items()))
        rest = f" ({len(lost)} trials of the front are in this state)" if len(lost) > 1 else ""
        raise CompressSearchError(f"trial {number} cannot be measured a second time: {fault}{rest}")


def keep_artifacts(folder: Path, members: set[str], limit: float) -> None:
    """Delete the oldest artefacts that are no ``members`` until the others fit into ``limit`` bytes."""
    folders = [path for path in folder.glob("*") if path.is_dir()]  # of none where nothing was ever tried
    for path in folders:
        if path.name.startswith("."):  # half made or half deleted, by a process that was killed
            shutil.rmtree(path)
    others = [path for path in folders if not path.name.startswith(".") and path.name not in members]
    sizes = {path: sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for path in others}
    for path in sorted(others, key=lambda path: path.stat().st_mtime):
        if sum(sizes.values()) <= limit:
            break
        # whoever looks for an artefact finds the whole of it or nothing
        shutil.rmtree(path.rename(path.with_name(f".{path.name}.gone")))
        del sizes[path]

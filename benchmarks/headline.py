"""The fastest model that keeps 99 % and 97 % of the teacher's score, and the smallest: one search a study.

``python -m benchmarks.headline [STUDY…]``

Runs each study to its end, or resumes it, and reads the answer off its trials. Speed is against the fp32 teacher on
ONNX Runtime, as the study measured it, and in eager torch, measured here. Which trials qualify is decided on
validation data, and the test score is shown beside it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import click
import optuna

from benchmarks import tables
from benchmarks.ground import Ground
from compress_search import driver
from compress_search.finish import feasible
from compress_search.runtimes import lower
from compress_search.storage import Store, TrialRow
from compress_search.study import Study, load_study

KEPT = (0.99, 0.97)
"""Shares of the teacher's score."""
STUDIES = (Path("studies/headline_sst2.yaml"), Path("studies/headline_wikigold.yaml"))


def keeping(rows: Iterable[TrialRow], metric: str, score: float) -> list[TrialRow]:
    """The measured students that score at least so much on validation data."""
    return [row for row in rows if row.state == "complete" and row.recipe and row.metrics.get(metric, 0) >= score]


def chosen(rows: Sequence[TrialRow], metric: str, teacher: TrialRow) -> list[tuple[str, TrialRow]]:
    """The question and its answer, where there is one."""
    found = []
    for kept in KEPT:
        there = [
            row for row in keeping(rows, metric, kept * teacher.metrics[metric]) if row.number != teacher.number
        ]
        if there:
            found.append((f"fastest at {kept:.0%}", min(there, key=lambda row: row.metrics["latency_ms"])))
            found.append((f"smallest at {kept:.0%}", min(there, key=lambda row: row.metrics["size_mb"])))
    return found


def eager_ratio(ground: Ground, directory: Path, folder: Path) -> str:
    """Speed-up over the teacher in eager torch, with its 95 % interval."""
    reference = folder / "eager"
    if not reference.exists():
        teacher = ground.materials.teacher.replace(runtime={"engine": "torch"})
        lower(teacher, reference, ground.materials.task)
    found = ground.bench.latency(directory, reference=reference, repeats=100, seed=0)
    return f"{1 / found.ratio:.1f} ({1 / found.high:.1f} … {1 / found.low:.1f})"


def answers(study: Study, path: Path) -> str:
    """The table of one finished study."""
    store = Store(study.storage)
    rows = store.trials(study.name)
    teacher = next(row for row in rows if row.baseline == "teacher")
    again = store.measurements(study.name, kind="final")
    ground, lines = Ground(path), []
    metric = ground.materials.task.primary
    with tempfile.TemporaryDirectory() as folder:
        for question, row in [("teacher", teacher), *chosen(rows, metric, teacher)]:
            low, high = row.intervals.get("speedup", (float("nan"),) * 2)
            test = again.get(row.number, {}).get("final", {}).get("test", {}).get("metrics", {}).get(metric)
            assert row.artifact is not None, "a complete trial has an artefact"
            directory = study.output / row.artifact
            eager = eager_ratio(ground, directory, Path(folder)) if directory.exists() else "not kept"
            scores = [
                f"{100 * row.metrics[metric]:.1f}",
                f"{100 * test:.1f}" if test is not None else "not on the front",
            ]
            speed = [f"{row.metrics['speedup']:.2f} ({low:.2f} … {high:.2f})", eager]
            size = [f"{row.metrics['size_mb']:.1f}", f"{teacher.metrics['size_mb'] / row.metrics['size_mb']:.1f}"]
            lines.append([question, row.number, *scores, *speed, *size, row.recipe if row.recipe else ""])
    ground.bench.close()
    header = [
        "",
        "trial",
        f"{metric} validation",
        "test",
        "× ONNX Runtime fp32",
        "× torch eager",
        "MB",
        "× smaller",
        "recipe",
    ]
    count = sum(row.state == "complete" and feasible(study, row.metrics) for row in rows)
    minutes = store.study(study.name).seconds / 60
    told = f"{len(rows)} trials, {count} complete and within the constraints, {minutes:.0f} minutes."
    return f"{told}\n\n{tables.table(header, lines)}"


@click.command()
@click.argument("studies", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--executor", type=click.Choice(["ray", "local"]), default="ray", show_default=True)
def main(studies: Sequence[Path], executor: driver.ExecutorName) -> None:
    """Search and write benchmarks/results/headline.md."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    parts = []
    for path in studies or STUDIES:
        study = load_study(path)
        driver.run(study, executor=executor, on_event=lambda event: click.echo(str(event)[:200]))
        parts += [f"## {study.name}", answers(study, path)]
        click.echo(parts[-1])
    click.echo(tables.write("headline", "The fastest and the smallest that keep the score", parts))


if __name__ == "__main__":
    main()

"""The fastest model that keeps 99 % and 97 % of the teacher's score, and the smallest: one search a study.

``python -m benchmarks.headline [STUDY…]``

Runs each study to its end, or resumes it, and reads the answer off its trials. Speed is against the fp32 teacher on
ONNX Runtime, as the study measured it, and in eager torch, measured here. Which trials qualify is decided on
validation data, and the test score is shown beside it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import click
import optuna

from benchmarks import tables
from benchmarks.ground import Ground
from compress_search import driver
from compress_search.finish import feasible
from compress_search.report.reading import searched
from compress_search.runtimes.lowering import lower
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


class Finished:
    """A study that has ended: what it stored, and its artefacts."""

    def __init__(self, study: Study, path: Path) -> None:
        self.study, self.ground = study, Ground(path)
        self.metric = self.ground.materials.task.primary
        store = Store(study.storage)
        self.info, self.rows = store.study(study.name), store.trials(study.name)
        self.again = store.measurements(study.name, kind="final")
        self.teacher = next(row for row in self.rows if row.baseline == "teacher")
        names = (name.partition(".") for name in searched(self.info.identity["space"]))
        self.shown = {(method, key) for method, _, key in names}

    def summary(self) -> str:
        """What it took."""
        searched = [row for row in self.rows if not row.baseline and row.state != "duplicate"]
        count = sum(row.state == "complete" and feasible(self.study, row.metrics) for row in searched)
        minutes = f"{self.info.seconds / 60:.0f} minutes"
        return f"{len(searched)} trials, {count} complete and within the constraints, {minutes}."

    def answer(self, question: str, row: TrialRow, eager: str) -> list[object]:
        """A row of the table."""
        low, high = row.intervals.get("speedup", (float("nan"),) * 2)
        final = self.again.get(row.number, {}).get("final", {})
        test = final.get("test", {}).get("metrics", {}).get(self.metric)
        return [
            question,
            row.number,
            f"{100 * row.metrics[self.metric]:.1f}",
            f"{100 * test:.1f}" if test is not None else "not on the front",
            f"{row.metrics['speedup']:.2f} ({low:.2f} … {high:.2f})",
            eager,
            f"{row.metrics['size_mb']:.1f}",
            f"{self.teacher.metrics['size_mb'] / row.metrics['size_mb']:.1f}",
            row.recipe.only(self.shown) if row.recipe and row.recipe.steps else "",
        ]

    def eager_ratio(self, row: TrialRow, reference: Path) -> str:
        """Speed-up over an artefact of the teacher, with its 95 % interval."""
        assert row.artifact is not None, "a complete trial has an artefact"
        directory = self.study.output / row.artifact
        if not directory.exists():
            return "not kept"
        found = self.ground.bench.latency(directory, reference=reference, repeats=100, seed=0)
        return f"{1 / found.ratio:.1f} ({1 / found.high:.1f} … {1 / found.low:.1f})"

    def answers(self) -> Iterator[list[object]]:
        """The teacher's row, then one a question."""
        materials = self.ground.materials
        with tempfile.TemporaryDirectory() as folder:
            reference = Path(folder) / "eager"
            lower(materials.teacher.replace(runtime={"engine": "torch"}), reference, materials.task)
            for question, row in [("teacher", self.teacher), *chosen(self.rows, self.metric, self.teacher)]:
                yield self.answer(question, row, self.eager_ratio(row, reference))
        self.ground.bench.close()

    def table(self) -> str:
        """All of it."""
        scores = [f"{self.metric} validation", "test"]
        header = ["", "trial", *scores, "× ONNX Runtime fp32", "× torch eager", "MB", "× smaller", "recipe"]
        return f"{self.summary()}\n\n{tables.table(header, self.answers())}"


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
        parts += [f"## {study.name}", Finished(study, path).table()]
        click.echo(parts[-1])
    click.echo(tables.write("headline", "The fastest and the smallest that keep the score", parts))


if __name__ == "__main__":
    main()

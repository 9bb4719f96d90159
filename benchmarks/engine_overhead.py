"""What the engine costs: per trial that does nothing, per proposal, and as a share of a finished study.

``python -m benchmarks.engine_overhead [--trials 100] [--sizes 10,100,1000] [STUDY]``
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import click
import optuna
import yaml

from benchmarks import tables
from benchmarks.noop import NoopWorker, no_reason
from compress_search.candidate import Subject
from compress_search.executor import Executor, LocalExecutor
from compress_search.plan import Plan, make_plan
from compress_search.registry import Registry
from compress_search.search import Search
from compress_search.search.asktell import AskTell
from compress_search.search.samplers import make_sampler
from compress_search.storage import Store
from compress_search.study import Study, load_study

TEACHER = Subject("bert", "text-classification", 6, 12, 32, 384, 1536, 30522, 512, 2, 2).having(
    "timed", "kernel:int8"
)
SAMPLERS = ("random", "tpe", "gp", "nsga2")
GP_LIMIT = 300
"""Beyond as many trials ``sampler: auto`` proposes by TPE, since a Gaussian process takes too long."""

PHASES = ("teacher", "dry", "apply", "fit", "lower", "score", "measure")


def small_study(folder: Path, trials: int, sampler: str) -> Study:
    """A study whose data and teacher are never looked at."""
    for name in ("train", "validation"):
        (folder / f"{name}.jsonl").write_text('{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n')
    (folder / "teacher").mkdir()
    (folder / "teacher" / "config.json").write_text('{"model_type": "bert"}')
    content = {
        "task": "text-classification",
        "teacher": {"model": "teacher"},
        "data": {"train": "train.jsonl", "validation": "validation.jsonl"},
        "methods": ["theseus", "structured_pruning", "distill", "quantization"],
        "search": {"trials": trials, "sampler": sampler},
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(content))
    return load_study(path)


def noop_seconds(kind: str, trials: int) -> tuple[float, float]:
    """(seconds a trial, seconds to start) of a search whose trials do nothing."""
    with tempfile.TemporaryDirectory() as name:
        study = small_study(Path(name), trials, "random")
        plan = make_plan(study, Registry(), TEACHER)
        store = Store(study.storage)
        store.create()
        with store.lock(study.name):
            search = Clocked.open(plan, store)
            started = time.perf_counter()
            executor = make_executor(kind, study)
            try:
                executor.run(search)
            finally:
                executor.close()
        first, last = search.finished[1], search.finished[-1]
        return (last - first) / (len(search.finished) - 2), first - started


class Clocked(Search):
    """A search that notes when each trial finished."""

    finished: list[float]

    def finish(self, *args: object, **kwargs: object) -> None:
        """Forward and note the time."""
        super().finish(*args, **kwargs)  # type: ignore[arg-type]
        self.finished = [*getattr(self, "finished", []), time.perf_counter()]


def make_executor(kind: str, study: Study) -> Executor:
    """The executor by name, with workers that do nothing."""
    if kind == "local":
        return LocalExecutor(NoopWorker, None, no_reason)
    from compress_search.ray_executor import RayExecutor

    return RayExecutor(NoopWorker, None, no_reason, study)


def ask_seconds(plan: Plan, sampler: str, size: int, repeats: int = 5) -> float:
    """Median seconds of a proposal after ``size`` finished trials, storage included."""
    with tempfile.TemporaryDirectory() as name:
        store = Store(f"sqlite:///{name}/study.db")
        store.create()
        study = store.optuna_study("asked", plan.study.directions)
        study.add_trials(list(random_trials(plan, size)))
        asked, times = AskTell(study, store.patiently), []
        for repeat in range(repeats):
            started = time.perf_counter()
            trial = asked.ask(make_sampler(sampler, repeat, size))
            plan.propose(trial)
            times.append(time.perf_counter() - started)
            asked.tell(trial.number, optuna.trial.TrialState.COMPLETE, [0.5, 1.0])
        return statistics.median(times)


def random_trials(plan: Plan, size: int) -> Iterator[optuna.trial.FrozenTrial]:
    """Finished trials of random recipes with values a sampler can learn from."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(size):
        trial = study.ask()
        recipe = plan.propose(trial)
        values = [int(recipe.key[:4], 16) / 65536, 1 / (1 + len(recipe.steps))]
        yield optuna.trial.create_trial(params=trial.params, distributions=trial.distributions, values=values)


def share_of(path: Path) -> tuple[str, list[list[object]]]:
    """How the workers' time in a finished study divides, as rows of phase, seconds of all workers and share.

    A worker without a trial waits where no trial can be had: while the teacher is measured, which all are compared
    with, and once the last trial has begun. What is left is the engine's: starting, proposing, writing, telling.
    """
    study = load_study(path)
    store = Store(study.storage)
    workers = study.search.concurrency
    whole = workers * store.study(study.name).seconds
    rows = [row for row in store.trials(study.name) if row.seconds]
    spent = {phase: sum(row.seconds.get(phase, 0.0) for row in rows) for phase in PHASES}
    spans = {row.number: (row.started, row.ended) for row in rows if row.started and row.ended}
    teacher = next(spans[row.number] for row in rows if row.baseline == "teacher")
    spent["no trial to be had: the teacher runs"] = (workers - 1) * (teacher[1] - teacher[0]).total_seconds()
    begun = max(start for start, _ in spans.values())
    free = sorted((max(end, begun) for _, end in spans.values()), reverse=True)[:workers]
    spent["no trial to be had: the last ones run"] = sum((free[0] - since).total_seconds() for since in free)
    spent["engine: everything else"] = whole - sum(spent.values())
    return study.name, [[what, f"{seconds:.1f}", f"{seconds / whole:.1%}"] for what, seconds in spent.items()]


@click.command()
@click.argument("study", required=False, type=click.Path(exists=True, path_type=Path))
@click.option("--trials", default=100, show_default=True, help="No-op trials per executor.")
@click.option("--sizes", default="10,100,1000", show_default=True, help="Finished trials before a proposal.")
def main(study: Path | None, trials: int, sizes: str) -> None:
    """Measure and write benchmarks/results/engine_overhead.md."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    noop = [[kind, trials, *(f"{1000 * t:.0f}" for t in noop_seconds(kind, trials))] for kind in ("local", "ray")]
    parts = ["## Trials that do nothing, random sampler, SQLite"]
    parts.append(tables.table(["executor", "trials", "ms a trial", "ms until the first result"], noop))
    with tempfile.TemporaryDirectory() as name:
        plan = make_plan(small_study(Path(name), trials, "auto"), Registry(), TEACHER)
        rows = [
            [sampler, *(_ask_cell(plan, sampler, int(size)) for size in sizes.split(","))] for sampler in SAMPLERS
        ]
    parts.append(f"## Median ms of one proposal ({plan.dimensions} dimensions) after so many finished trials")
    parts.append(tables.table(["sampler", *sizes.split(",")], rows))
    if study:
        title, shares = share_of(study)
        parts.append(f"## Where the time of {title} went")
        parts.append(tables.table(["what the workers did", "seconds, all workers", "share"], shares))
    click.echo(tables.write("engine_overhead", "What the engine costs", parts))


def _ask_cell(plan: Plan, sampler: str, size: int) -> str:
    if sampler == "gp" and size > GP_LIMIT:
        return f"not used beyond {GP_LIMIT}"
    return f"{1000 * ask_seconds(plan, sampler, size):.0f}"


if __name__ == "__main__":
    main()

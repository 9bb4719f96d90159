"""Smaller in minutes: what is lost by pruning with rescaling and int8, without a single training step?

``python -m benchmarks.no_training STUDY``

Fisher information decides which heads and neurons go within a budget of multiply-accumulates, least squares make up
for them, ONNX Runtime's dynamic int8 comes last (Kwon et al. 2022, A Fast Post-Training Pruning Framework for
Transformers). STUDY gives the teacher and the data; its trained trials, where it was run, are shown beside.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import click
import optuna

from benchmarks import tables
from benchmarks.ground import Ground, Methods
from compress_search.finish import front_of
from compress_search.storage import Store
from compress_search.study import load_study

TARGETS = (0.8, 0.7, 0.6, 0.5, 0.4)
"""Parts of the teacher's multiply-accumulates in heads and neurons that stay."""


def pruned(target: float, recover: str) -> Methods:
    """Pruning within a budget and int8, nothing trained."""
    pruning = {"budget": "macs", "target": target, "criterion": "fisher", "recover": recover}
    return {"structured_pruning": pruning, "quantization": {"weight_bits": 8, "scheme": "dynamic_int8"}}


def rows(ground: Ground, folder: Path) -> Iterator[list[object]]:
    """One row a recipe: scores as deployed, latency against the fp32 teacher, seconds to make it."""
    recipes: dict[str, Methods] = {"int8": {"quantization": {"weight_bits": 8, "scheme": "dynamic_int8"}}}
    for target in TARGETS:
        for recover in ("none", "rescale"):
            recipes[f"{target:.0%} of the MACs, {recover}, int8"] = pruned(target, recover)
    for number, (name, methods) in enumerate(recipes.items()):
        started, directory = time.perf_counter(), folder / f"artifact-{number}"
        candidate, steps = ground.apply(ground.recipe(methods), folder / "scratch")
        assert steps == 0, "nothing is trained"
        ground.bench.lower(candidate, directory)
        seconds = time.perf_counter() - started
        metric = ground.materials.task.primary
        scores = [ground.bench.score(directory, split, as_deployed=True) for split in ("validation", "test")]
        latency = ground.bench.latency(directory, repeats=100, seed=0)
        speed = f"{1 / latency.ratio:.2f} ({1 / latency.high:.2f} … {1 / latency.low:.2f})"
        row = [name, *(f"{100 * score.metrics[metric]:.1f}" for score in scores), speed, f"{seconds:.0f}"]
        click.echo(" | ".join(row))
        yield [*row]


def trained(path: Path) -> Iterator[list[object]]:
    """The front of the study itself, where it was run."""
    study = load_study(path)
    store = Store(study.storage)
    if not store.exists or store.find(study.name) is None:
        return
    again = store.measurements(study.name, kind="final")
    metric = next(iter(study.directions))
    for row in front_of(study, store.trials(study.name)):
        test = again.get(row.number, {}).get("final", {}).get("test", {}).get("metrics", {}).get(metric)
        low, high = row.intervals["speedup"]
        speed = f"{row.metrics['speedup']:.2f} ({low:.2f} … {high:.2f})"
        scores = [f"{100 * row.metrics[metric]:.1f}", "" if test is None else f"{100 * test:.1f}"]
        yield [f"trial {row.number}", *scores, speed, f"{row.seconds.get('total', 0):.0f}"]


@click.command()
@click.argument("study", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(study: Path) -> None:
    """Measure and write benchmarks/results/no_training.md."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    header = ["", "validation", "test", "× ONNX Runtime fp32", "seconds to make"]
    with tempfile.TemporaryDirectory() as folder:
        ground = Ground(study.resolve())
        lines = list(rows(ground, Path(folder)))
        ground.bench.close()
    parts = ["Without training:", tables.table(header, lines)]
    if others := list(trained(study)):
        parts += ["The front of the study, whose trials train:", tables.table(header, others)]
    click.echo(tables.write("no_training", f"Compressed in minutes: {load_study(study).name}", parts))


if __name__ == "__main__":
    main()

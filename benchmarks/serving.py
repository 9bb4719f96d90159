"""What do threads, cuts and buckets do to the time of texts of unlike lengths?

``python -m benchmarks.serving SHARED [--repeats 100]``

SST-2's development text, one sentence at a time; every artefact beside the fp32 network on one thread at each
text's own length. Weights take no part, so nothing is trained. Needs two cores, and nothing else on them. SHARED is
a folder with ``data/sst2/*.jsonl`` and ``models/all-minilm-l6-v2``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import click
import optuna
import yaml

from benchmarks import tables
from benchmarks.distillation_quality import study_of
from benchmarks.ground import Ground, Methods

INT8: Methods = {"quantization": {}}
SERVED: Mapping[str, Methods] = {
    "as it comes": {},
    "two threads": {"runtimes": {"threads": 2}},
    "cut to the length of 95 % of the training texts": {"runtimes": {"coverage": 0.95}},
    "padded to four widths": {"runtimes": {"buckets": 4}},
    "padded to one width": {"runtimes": {"buckets": 1}},
    "int8": INT8,
    "int8, two threads": {**INT8, "runtimes": {"threads": 2}},
    "int8, padded to four widths": {**INT8, "runtimes": {"buckets": 4}},
}
HEADER = ["network", "× fp32 on one thread", "widths"]


def open_ground(folder: Path, shared: Path) -> Ground:
    """SST-2's study for two threads, with a teacher that is hardly trained."""
    content = study_of(folder, shared, "sst2", 1, ["accuracy", "latency_ms"])
    content["teacher"]["fine_tune"]["epochs"] = 0.01
    content["cluster"] = {"cpus_per_trial": 2}
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return Ground(path)


def rows(ground: Ground, folder: Path, repeats: int) -> Iterator[list[object]]:
    """One row a way to serve; told as they come."""
    for number, (name, methods) in enumerate(SERVED.items()):
        candidate, _ = ground.apply(ground.recipe(methods), folder / "scratch", dry=True)
        artifact = folder / f"artifact-{number}"
        ground.bench.lower(candidate, artifact)
        found = ground.bench.latency(artifact, repeats=repeats, seed=0)
        noisy = " (noisy)" if found.noisy else ""
        widths = ", ".join(map(str, candidate.runtime.get("buckets") or ())) or "its own"
        row: list[object] = [name, f"{found.ratio:.3f} ({found.low:.3f} … {found.high:.3f}){noisy}", widths]
        click.echo(" | ".join(map(str, row)))
        yield row


@click.command()
@click.argument("shared", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--repeats", default=100, show_default=True, help="Interleaved rounds of one comparison.")
def main(shared: Path, repeats: int) -> None:
    """Measure and write benchmarks/results/serving.md."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        ground = open_ground(Path(folder), shared.resolve())
        told = (
            f"6 layers × 384 on ONNX Runtime, SST-2's development sentences one at a time, {repeats} interleaved "
            "rounds; medians of ratios with 95 % intervals, below 1 is faster."
        )
        table = tables.table(HEADER, rows(ground, Path(folder), repeats))
        ground.bench.close()
    click.echo(
        tables.write("serving", "What threads, cuts and buckets do to texts of unlike lengths", [told, table])
    )


if __name__ == "__main__":
    main()

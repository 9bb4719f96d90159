"""Which way of making half or a third of the layers learn from the teacher is worth having, on five data sets?

``python -m benchmarks.distillation_quality SHARED [--quick] [--sets sst2,…] [--methods kd,…] [--seeds 0,1,2]``

Every method gets the same number of optimizer steps; phases are shares of it. A cell (data set, depth, method,
seed) that is in ``results/distillation_quality.jsonl`` is not run again, so an interrupted run goes on where it
was; what is in the file, of the same number of steps, is what the table shows. SHARED is a folder with
``data/<set>/*.jsonl`` and ``models/all-minilm-l6-v2``.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import click
import numpy as np
import optuna
import yaml
from scipy import stats

from benchmarks import tables
from benchmarks.ground import Ground

RECORDS = tables.RESULTS / "distillation_quality.jsonl"
LAYERS = 6
"""Of every teacher here."""
SHAPES = {"half": (3, 1.0), "third": (2, 1.0), "half, half as wide": (3, 0.5)}
"""(layers, width as a part of the teacher's); a narrow student is for the methods that can make one."""
BASELINES = ("truncated", "kd")
"""What the others are compared with: fine-tuning the lower layers on the labels, and on labels and soft targets."""

PRETRAINED = {"model": "models/all-minilm-l6-v2"}
CHINESE = {
    "architecture": {
        "family": "bert",
        "layers": LAYERS,
        "hidden": 192,
        "heads": 6,
        "intermediate": 768,
        "vocabulary": "data/vocab/bert-base-chinese-vocab.txt",
    }
}
SETS: Mapping[str, Mapping[str, Any]] = {
    "sst2": {
        "task": "text-classification",
        "teacher": {**PRETRAINED, "fine_tune": {"epochs": 2, "learning_rate": 5e-5}},
        "max_length": 64,
    },
    "banking77": {
        "task": "text-classification",
        "teacher": {**PRETRAINED, "fine_tune": {"epochs": 4, "learning_rate": 2e-4}},
        "max_length": 48,
    },
    "wikigold": {
        "task": "token-classification",
        "teacher": {**PRETRAINED, "fine_tune": {"epochs": 8, "learning_rate": 1e-4, "batch_size": 16}},
        "max_length": 96,
    },
    "cluener": {
        "task": "token-classification",
        "teacher": {**CHINESE, "fine_tune": {"epochs": 4, "learning_rate": 5e-4}},
        "max_length": 64,
    },
    "stsb": {
        "task": "text-regression",
        "teacher": {**PRETRAINED, "fine_tune": {"epochs": 3, "learning_rate": 5e-5}},
        "max_length": 96,
    },
}


def arms(layers: int, width: float = 1.0) -> dict[str, dict[str, Any]]:
    """The methods section of each way to make a student of so many layers and that width."""
    if width < 1:
        return {name: {name: {"layers": layers, "width": width}} for name in ("tinybert", "minilm", "layer_match")}
    theseus = {"block_size": LAYERS // layers}
    return {
        "truncated": {"plain_student": {"layers": layers, "alpha": 0.0}},
        "kd": {"plain_student": {"layers": layers, "alpha": 0.5}},
        "theseus": {"theseus": theseus},
        "theseus + kd": {"theseus": {**theseus, "kd_in_stage2": True}},
        "tinybert": {"tinybert": {"layers": layers}},
        "distilbert": {"distilbert": {"layers": layers}},
        "minilm": {"minilm": {"layers": layers}},
        "layer_match": {"layer_match": {"layers": layers}},
    }


@dataclass(frozen=True)
class Cell:
    """One student: where it was trained, how, and what it scored (primary metric, 0 to 1)."""

    set: str
    depth: str
    method: str
    seed: int
    steps: int
    validation: float
    test: float
    seconds: float


def write_study(folder: Path, shared: Path, name: str, steps: int, learning_rate: float) -> Path:
    """The data set's study, with a budget of about ``steps`` of 32 examples for a trial."""
    facts = SETS[name]
    teacher = json.loads(json.dumps(facts["teacher"]))
    if "model" in teacher:
        teacher["model"] = str(shared / teacher["model"])
    else:
        teacher["architecture"]["vocabulary"] = str(shared / teacher["architecture"]["vocabulary"])
    data = {part: shared / "data" / name / f"{file}.jsonl" for part, file in FILES.items()}
    with data["train"].open(encoding="utf-8") as lines:
        rows = sum(1 for _ in lines)
    content = {
        "name": f"quality-{name}",
        "task": facts["task"],
        "teacher": teacher,
        "data": {**{part: str(path) for part, path in data.items()}, "max_length": facts["max_length"]},
        "methods": ["quantization"],
        "training": {
            "epochs": steps * BATCH / rows,
            "batch_size": BATCH,
            "learning_rate": learning_rate,
            "precision": "bf16",
        },
        "output": str(folder / name),
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


FILES = {"train": "train", "validation": "dev", "test": "test"}
BATCH = 32


def student(ground: Ground, name: str, depth: str, method: str, seed: int, scratch: Path) -> Cell:
    """Train one student and score it."""
    layers, width = SHAPES[depth]
    recipe = ground.recipe(arms(layers, width)[method])
    started = time.perf_counter()
    candidate, steps = ground.apply(recipe, scratch, seed=seed)
    seconds = time.perf_counter() - started
    assert candidate.subject.layers == layers, recipe
    assert steps == ground.materials.steps, "every method trains for as many steps"
    return Cell(name, depth, method, seed, steps, *ground.scores(candidate.network), seconds)


def stored() -> list[Cell]:
    """What earlier runs found."""
    if not RECORDS.exists():
        return []
    return [Cell(**json.loads(line)) for line in RECORDS.read_text(encoding="utf-8").splitlines()]


def keep(cell: Cell) -> None:
    """Add a cell to the file."""
    RECORDS.parent.mkdir(exist_ok=True)
    with RECORDS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(cell)) + "\n")


def interval(values: Sequence[float]) -> str:
    """Mean in points with the half-width of its 95 % t interval over seeds."""
    mean = 100 * float(np.mean(values))
    if len(values) < 2:
        return f"{mean:.1f}"
    half = 100 * stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)
    return f"{mean:.1f} ± {half:.1f}"


def difference(cells: Mapping[tuple[str, int], Cell], method: str, other: str) -> str:
    """The paired difference of test scores over the seeds that both were run at."""
    seeds = sorted(
        {seed for name, seed in cells if name == method} & {seed for name, seed in cells if name == other}
    )
    if method == other or not seeds:
        return ""
    return interval([cells[method, seed].test - cells[other, seed].test for seed in seeds])


def rows_of(cells: Sequence[Cell]) -> Iterator[list[object]]:
    """The table's rows, by data set, depth and method."""
    for name in SETS:
        for depth in ("-", *SHAPES):
            found = {(cell.method, cell.seed): cell for cell in cells if (cell.set, cell.depth) == (name, depth)}
            for method in dict.fromkeys(method for method, _ in found):
                mine = [cell for (other, _), cell in found.items() if other == method]
                row: list[object] = [name, depth, method, len(mine)]
                row += [interval([cell.validation for cell in mine]), interval([cell.test for cell in mine])]
                row += [difference(found, method, baseline) for baseline in BASELINES]
                yield [*row, f"{np.median([cell.seconds for cell in mine]):.0f}"]


def report(cells: Sequence[Cell], steps: int) -> Path:
    """Write the table."""
    header = ["set", "layers", "method", "seeds", "validation", "test", "over truncated", "over kd", "s"]
    told = (
        f"{steps} optimizer steps of {BATCH} examples a student, phases included, in bfloat16; primary metric "
        "of the task in points: mean over seeds with the 95 % t interval of the mean, and paired differences "
        "on the test set. `truncated`: the lower layers fine-tuned on the labels; `kd`: the same with soft "
        "targets (α = 0.5, τ = 2)."
    )
    table = tables.table(header, rows_of([cell for cell in cells if cell.steps in (0, steps)]))
    return tables.write("distillation_quality", "What the ways of distillation are worth", [told, table])


@click.command()
@click.argument("shared", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--sets", default=",".join(SETS), show_default=True)
@click.option("--methods", default=",".join(arms(3)), show_default=True)
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--steps", default=200, show_default=True, help="Optimizer steps of one student.")
@click.option("--learning-rate", default=3e-4, show_default=True)
@click.option("--quick", is_flag=True, help="One data set, half depth, one seed, 20 steps.")
def main(shared: Path, sets: str, methods: str, seeds: str, steps: int, learning_rate: float, quick: bool) -> None:
    """Train what is missing and write benchmarks/results/distillation_quality.md."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    depths = list(SHAPES)
    if quick:
        sets, depths, seeds, steps = sets.split(",")[0], depths[:1], seeds.split(",")[0], 20
    have = {(cell.set, cell.depth, cell.method, cell.seed, cell.steps) for cell in stored()}
    with tempfile.TemporaryDirectory() as folder:
        for name in sets.split(","):
            wanted = list(product(map(int, seeds.split(",")), depths, methods.split(",")))
            ground = Ground(write_study(Path(folder), shared.resolve(), name, steps, learning_rate))
            budget = ground.materials.steps
            if (name, "-", "teacher", 0, 0) not in have:
                teacher = ground.scores(ground.materials.teacher.network)
                keep(Cell(name, "-", "teacher", 0, 0, *teacher, 0.0))
            for seed, depth, method in wanted:
                if method in arms(*SHAPES[depth]) and (name, depth, method, seed, budget) not in have:
                    cell = student(ground, name, depth, method, seed, Path(folder))
                    keep(cell)
                    click.echo(json.dumps(asdict(cell)))
            click.echo(report(stored(), budget))


if __name__ == "__main__":
    main()

"""Which way of making half or a third of the layers learn from the teacher is worth having, on five data sets?

``python -m benchmarks.distillation_quality SHARED [--quick] [--sets sst2,…] [--depths half,…] [--seeds 0,1,2]``

Every method gets the same number of optimizer steps; phases are shares of it. A cell (data set, depth, method,
seed) that is in ``results/distillation_quality.jsonl`` is not run again, so an interrupted run goes on where it
was; what is in the file, of the same number of steps and in the same precision, is what the table shows: bfloat16
where the machine has kernels for it, else float32. SHARED is a folder with
``data/<set>/*.jsonl`` and ``models/all-minilm-l6-v2``.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
RATES = {"theseus": (3e-4, 1e-3), "": (1e-4, 3e-4)}
"""Of which each method takes, on each set, that whose student of half depth and the first seed validates best.

Theseus trains a layer in part of its steps alone and halves its rate for the rest: it has the higher pair."""
STARTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "theseus": ("last of block", {"successor_init": "last_of_block"}),
    "distilbert": ("first", {"init_layers": "first"}),
    "minilm": ("first", {"init": "first"}),
    # beside labels and logits, so that nothing is learnt before the task
    "layer_match": (
        "first",
        {"init": "first", "strategy": "last", "features": "hidden", "hidden_weight": 0.1},
    ),
}
"""The other layers of their teacher that these can begin as, by name, and what has them do so.

Chosen as the rate is. By their papers Theseus begins as the first layers, as the baselines do, the others as layers
from all the depth."""
SHAPES = {"half": (3, 1.0), "third": (2, 1.0), "half and half as wide": (3, 0.5)}
"""(layers, width as a part of the teacher's); a narrow student is for the methods that can make one."""
ONE_WIDTH = ("theseus", "distilbert", "shortcut")
"""Methods whose students are as wide as their teacher."""
PRECISIONS = {"bf16": "in bfloat16", "fp32": "in float32"}
BASELINES = ("truncated", "truncated teacher", "kd")
"""What the others are compared with: fine-tuning on the labels the lower layers of what the teacher was made from,
which is the literature's control, or those of the teacher itself; and the latter with soft targets."""

Setting = tuple[float, str]
"""Learning rate, and the start of :data:`STARTS`, or "" for the method's own."""

Runs = tuple[int, str]
"""Steps and precision: students are compared with those of their own."""
MAIN: Runs = (200, "bf16")
"""The runs that the page is of; others have pages of their own."""
FOUND: Mapping[Runs, str] = {
    MAIN: """
At half depth Theseus is above the fine-tuned lower layers of the pretrained network on all five sets. It is
above those of the teacher on stsb, and on banking77 where its successors begin as the last layers of their
blocks and not, as the paper has it, as just these lower layers. At a third it is above the former on banking77,
cluener and stsb, and level on sst2 and wikigold. On cluener `truncated` students have random layers, for its
teacher was made on the spot.

On sentences some method is above plain distillation, on sst2 within the noise. On tags none is by more than a
few tenths of a point, and three things keep them from it. Spread layers: a DistilBERT of the first ones has 5
to 11 points more. Steps without the task: where half of them go to inner layers first, too few are left; with
800 steps and one seed TinyBERT and MiniLM come to 71.9 and 71.8 on wikigold, plain distillation to 75.1, the
teacher's own score. And inner states at the weight of the task: with those of the top layers alone, at a tenth
of it, `layer_match` of the first layers is level with plain distillation, as it is with the top layer's states
alone or with how alike they are from token to token; attention maps beside the task cost it 11.5 points
(wikigold, one seed, float32: `variants.md`). The intervals are over seeds alone: on wikigold at half depth a
DistilBERT is 1.3 points above plain distillation on 203 validation sentences and 0.6 below on 422 of the test
set, which is to say that these do not tell the two apart. Nor is there much to gain: plain distillation is 0.6
below the teacher.

At half the width no method pays in 200 steps: a network of half of its channels is broken, and what mends it
soonest is the task itself; the teacher's answers help no more than its labels do, and inner states less. On
stsb no student of a third of the layers or half the width learns more than a beginning.

`shortcut` came later: distillation_quality_200_fp32.md compares it with plain distillation, in float32 and on
another machine. It is above it on wikigold, where none of these is. Of both pages together some method is above
plain distillation on every set and at either depth in the mean of three seeds, far above on banking77 and stsb, by
half a point on sst2, by one or two on wikigold and by a tenth to three tenths on cluener: these within or at the
intervals' ends.
""",
    (200, "fp32"): """
Plain distillation and `shortcut` alone, on a machine without kernels for bfloat16. `shortcut` is far above plain
distillation on stsb and banking77, the more so at a third of the layers; on wikigold by a point at half and nearly
two at a third, within the intervals; level on cluener, and on sst2 above by as little at half as below at a third.
Where it gains most it has other layers: at half depth a linear map makes up best for the missing ones from the
first two and the last one on stsb, from the first and the last two on banking77. On wikigold it has the same three
as plain distillation, and a head that reads them from the first step on. Its students of half of wikigold's layers
are level with their teacher. The intervals are over three seeds; one standard error of wikigold's test set is 1.6.
""",
}
"""What the tables show."""

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
        "teacher": {**CHINESE, "fine_tune": {"epochs": 12, "learning_rate": 5e-4}},
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
    shape = {"layers": layers, "width": width}
    found: dict[str, dict[str, Any]] = {
        "truncated": {"plain_student": {**shape, "start": "untrained"}},
        "truncated teacher": {"plain_student": shape},
        "kd": {"plain_student": {**shape, "alpha": 0.5}},
        "theseus": {"theseus": {"block_size": LAYERS // layers}},
        "tinybert": {"tinybert": shape},
        "distilbert": {"distilbert": {"layers": layers}},
        "minilm": {"minilm": shape},
        "layer_match": {"layer_match": shape},
        "shortcut": {"shortcut": {"layers": layers}},
    }
    return {name: arm for name, arm in found.items() if width == 1 or name not in ONE_WIDTH}


@dataclass(frozen=True)
class Cell:
    """One student: where it was trained, how, and what it scored (primary metric, 0 to 1)."""

    set: str
    depth: str
    method: str
    learning_rate: float
    seed: int
    steps: int
    validation: float
    test: float
    seconds: float
    start: str = ""
    precision: str = "bf16"
    """Of training: what ``auto`` came to on its machine."""
    machine: str = "AMD EPYC, 2 cores, Python 3.11.7"
    """Where it was trained; the default is that of the records which do not say."""


def write_study(folder: Path, shared: Path, name: str, steps: int, objectives: Sequence[str] = ()) -> Path:
    """The data set's study, with a budget of about ``steps`` of 32 examples for a trial."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(study_of(folder, shared, name, steps, objectives)), encoding="utf-8")
    return path


def study_of(folder: Path, shared: Path, name: str, steps: int, objectives: Sequence[str] = ()) -> dict[str, Any]:
    """What :func:`write_study` writes."""
    facts = SETS[name]
    teacher = json.loads(json.dumps(facts["teacher"]))
    if "model" in teacher:
        teacher["model"] = str(shared / teacher["model"])
    else:
        teacher["architecture"]["vocabulary"] = str(shared / teacher["architecture"]["vocabulary"])
    data = {part: shared / "data" / name / f"{file}.jsonl" for part, file in FILES.items()}
    with data["train"].open(encoding="utf-8") as lines:
        rows = sum(1 for _ in lines)
    return {
        "name": f"quality-{name}",
        "task": facts["task"],
        "teacher": teacher,
        "data": {**{part: str(path) for part, path in data.items()}, "max_length": facts["max_length"]},
        "methods": ["quantization"],
        "training": {"epochs": steps * BATCH / rows, "batch_size": BATCH, "precision": "auto"},
        "output": str(folder / name),
        **({"objectives": list(objectives)} if objectives else {}),
    }


TEACHER = "teacher"
FILES = {"train": "train", "validation": "dev", "test": "test"}
BATCH = 32


class Students:
    """The students of one data set: those that are kept, and what it takes to train another."""

    def __init__(self, name: str, ground: Ground, scratch: Path) -> None:
        self.name, self.ground, self.scratch = name, ground, scratch
        self.steps, self.precision = ground.materials.steps, ground.materials.training.computes_in
        self.kept = [cell for cell in stored() if (cell.set, cell.precision) == (name, self.precision)]
        if not any(cell.method == TEACHER for cell in self.kept):
            scores = ground.scores(ground.materials.teacher.network)
            self._keep(Cell(name, "-", TEACHER, 0.0, 0, 0, *scores, 0.0, "", self.precision, tables.machine()))

    def trained(self, depth: str, method: str, setting: Setting, seed: int) -> Cell:
        """The student, trained unless it is kept from earlier."""
        wanted = (depth, method, setting, seed, self.steps)
        for cell in self.kept:
            if (cell.depth, cell.method, (cell.learning_rate, cell.start), cell.seed, cell.steps) == wanted:
                return cell
        return self._keep(self._train(depth, method, setting, seed))

    def _train(self, depth: str, method: str, setting: Setting, seed: int) -> Cell:
        [(name, params)] = arms(*SHAPES[depth])[method].items()
        learning_rate, start = setting
        chosen = {**params, **(STARTS[method][1] if start else {}), "learning_rate": learning_rate}
        recipe = self.ground.recipe({name: chosen})
        started = time.perf_counter()
        candidate, steps = self.ground.apply(recipe, self.scratch, seed=seed)
        seconds = time.perf_counter() - started
        assert candidate.subject.layers == SHAPES[depth][0], recipe
        assert steps == self.steps, "every method trains for as many steps"
        scores = self.ground.scores(candidate.network)
        how = (start, self.precision, tables.machine())
        return Cell(self.name, depth, method, learning_rate, seed, steps, *scores, seconds, *how)

    def _keep(self, cell: Cell) -> Cell:
        self.kept.append(cell)
        RECORDS.parent.mkdir(exist_ok=True)
        with RECORDS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(cell)) + "\n")
        click.echo(json.dumps(asdict(cell)))
        return cell

    def setting(self, method: str, seed: int) -> Setting:
        """The rate and the start that are best on validation at half depth and this seed."""
        starts = ("", STARTS[method][0]) if method in STARTS else ("",)
        settings = product(RATES.get(method, RATES[""]), starts)
        return best_setting(self.trained("half", method, setting, seed) for setting in settings)


def best_setting(cells: Iterable[Cell]) -> Setting:
    """That of these students which validates best."""
    best = max(cells, key=lambda cell: cell.validation)
    return best.learning_rate, best.start


def stored() -> list[Cell]:
    """What earlier runs found."""
    if not RECORDS.exists():
        return []
    return [Cell(**json.loads(line)) for line in RECORDS.read_text(encoding="utf-8").splitlines()]


def at_best_settings(cells: Sequence[Cell]) -> list[Cell]:
    """Without the students of settings that their method does not take on their set."""
    first: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        if cell.depth == "half":
            first.setdefault((cell.set, cell.method), []).append(cell)
    best = {key: best_setting(cell for cell in tried if cell.seed == tried[0].seed) for key, tried in first.items()}
    taken = [(cell, (cell.learning_rate, cell.start)) for cell in cells]
    return [cell for cell, setting in taken if setting == best.get((cell.set, cell.method), setting)]


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
                told = ", ".join([f"{mine[0].learning_rate:g}", *filter(None, [mine[0].start])])
                row: list[object] = [name, depth, method, told, len(mine)]
                row += [interval([cell.validation for cell in mine]), interval([cell.test for cell in mine])]
                yield row + [difference(found, method, baseline) for baseline in BASELINES]


def report(steps: int, precision: str) -> Path:
    """Write the table of what was trained for about so many steps, in this precision."""
    alike = [cell for cell in stored() if cell.precision == precision]
    cells = [cell for cell in alike if abs(cell.steps - steps) <= 10 or not cell.steps]
    header = ["set", "layers", "method", "setting", "seeds", "validation", "test"]
    told = (
        f"About {steps} optimizer steps of {BATCH} examples a student, phases included, {PRECISIONS[precision]}; "
        "primary metric of the task in points: mean over seeds with the 95 % t interval of the mean, and paired "
        "differences on the test set. `truncated`: the lower layers of what the teacher was made from, fine-tuned "
        "on the labels; `truncated teacher`: those of the teacher; `kd`: the latter with soft targets (α = 0.5, "
        "τ = 2). Each method takes, on each set, that of two learning rates which validates best at half depth "
        "and the first seed: 1e-4 and 3e-4, for Theseus 3e-4 and 1e-3. `distilbert`, `minilm` and `layer_match` "
        "choose in the same way between layers from all the teacher's depth, with which their papers begin, and "
        "its `first` layers, as which the baselines begin (`layer_match` then with the top layers' states alone, "
        "at a tenth of their weight, beside labels and logits); Theseus between the first layers and the `last of` "
        "each `block`. Narrow students have those channels of the layers' that matter most. "
        "`shortcut` finds its layers, and its head's map, on 1,024 texts, or 256 of words."
    )
    rows = rows_of(at_best_settings(cells))
    table = tables.table([*header, *(f"over {baseline}" for baseline in BASELINES)], rows)
    told_of = FOUND.get((steps, precision), "").strip()
    found = [paragraph.replace("\n", " ") for paragraph in told_of.split("\n\n")]
    parts = [told, table, *(["## What pays, and what does not", *found] if told_of else [])]
    name = "distillation_quality" + ("" if (steps, precision) == MAIN else f"_{steps}_{precision}")
    machines = "; ".join(dict.fromkeys(cell.machine for cell in cells))
    return tables.write(name, "What the ways of distillation are worth", parts, machines)


def listed(value: str) -> list[str]:
    """Words between commas."""
    return [word.strip() for word in value.split(",")]


@click.command()
@click.argument("shared", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--sets", default=",".join(SETS), show_default=True)
@click.option("--depths", default=",".join(SHAPES), show_default=True)
@click.option("--methods", default=",".join(arms(3)), show_default=True)
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--steps", default=200, show_default=True, help="Optimizer steps of one student.")
@click.option("--quick", is_flag=True, help="One data set, half depth, one seed, 20 steps.")
def main(shared: Path, sets: str, depths: str, methods: str, seeds: str, steps: int, quick: bool) -> None:
    """Train what is missing and write benchmarks/results/distillation_quality.md."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if quick:
        sets, depths, seeds, steps = listed(sets)[0], "half", listed(seeds)[0], 20
    numbers = [int(seed) for seed in listed(seeds)]
    with tempfile.TemporaryDirectory() as folder:
        for name in listed(sets):
            ground = Ground(write_study(Path(folder), shared.resolve(), name, steps))
            students = Students(name, ground, Path(folder))
            for depth, seed, method in product(listed(depths), numbers, listed(methods)):
                if method in arms(*SHAPES[depth]):
                    students.trained(depth, method, students.setting(method, numbers[0]), seed)
            click.echo(report(steps, students.precision))


if __name__ == "__main__":
    main()

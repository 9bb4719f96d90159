"""What is each variant of a method worth? One student of each on one data set: the figures of docs/systems.

``python -m benchmarks.variants SHARED [--set banking77] [--groups theseus,…] [--quick]``

A recipe that is in ``results/variants.jsonl`` is not run again, so an interrupted run goes on where it was. SHARED
is a folder with ``data/<set>/*.jsonl`` and ``models/all-minilm-l6-v2``.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import optuna

from benchmarks import tables
from benchmarks.distillation_quality import BATCH, listed, write_study
from benchmarks.ground import Ground, Methods
from compress_search.candidate import Candidate

RECORDS = tables.RESULTS / "variants.jsonl"
RATE = 3e-4
"""The learning rate of all training here."""
MEANS = {"convert_init": "average", "tie_warmup": 0.0}
DRAWN = {"convert_init": "average", "tie_warmup": 0.5}
HALVED = {"head_ratio": 0.5, "ffn_ratio": 0.5, "learning_rate": RATE}


def half(method: str, **params: Any) -> Methods:
    """A student of half the teacher's six layers."""
    return {method: {"layers": 3, "learning_rate": RATE, **params}}


def theseus(**params: Any) -> Methods:
    """A successor of half the layers, unless the blocks are others."""
    return {"theseus": {"block_size": 2, "learning_rate": RATE, **params}}


def again(**params: Any) -> Methods:
    """A student of the teacher's own shape that begins where the teacher did."""
    return {"born_again": {"learning_rate": RATE, **params}}


def pruned(**params: Any) -> Methods:
    """Heads and neurons within half of the multiply-accumulates."""
    return {"structured_pruning": {"budget": "macs", "target": 0.5, "learning_rate": RATE, **params}}


def sparse(**params: Any) -> Methods:
    """Zeros by magnitude or movement, or in a pattern."""
    return {"unstructured_pruning": {"learning_rate": RATE, **params}}


def shared(**params: Any) -> Methods:
    """One set of weights for all layers, unless there are groups."""
    return {"sharing": {"learning_rate": RATE, **params}}


def factored(**params: Any) -> Methods:
    """All linear maps as products, not trained."""
    return {"low_rank": {"targets": "all", "rank_multiple": 1, **params}}


def rounded(bits: int, **params: Any) -> Methods:
    """Weights of so many bits, embeddings of 8."""
    return {"quantization": {"weight_bits": bits, "embedding_bits": 8, **params}}


def trained(bits: int, **params: Any) -> Methods:
    """The same with rounded weights in training, which codebooks have anyway."""
    asked = {} if bits == 1 or "codebook" in params else {"qat": True}
    return rounded(bits, learning_rate=RATE, **asked, **params)


VARIANTS: Mapping[str, Mapping[str, Methods]] = {
    "baselines": {
        "lower layers, labels": half("plain_student"),
        "lower layers, labels and soft targets": half("plain_student", alpha=0.5),
        "lower layers of the pretrained network, labels": half("plain_student", start="untrained"),
        "all layers of the pretrained network, labels": half("plain_student", start="untrained", layers=6),
    },
    "theseus": {
        "linear": theseus(schedule="linear"),
        "constant 0.5": theseus(schedule="constant"),
        "uniform mixture": theseus(mixing="uniform"),
        "deterministic mixture": theseus(mixing="deterministic"),
        "half of the steps in stage 1": theseus(stage1_fraction=0.5),
        "last layer of each block": theseus(successor_init="last_of_block"),
        "replaced embeddings": theseus(replace_embeddings=True),
        "the teacher's own size": theseus(block_size=1),
    },
    "tinybert": {
        "uniform map": half("tinybert"),
        "top map": half("tinybert", layer_map="top"),
        "bottom map": half("tinybert", layer_map="bottom"),
        "layers 1, 4, 6": {"tinybert": {"custom_map": "1, 4, 6", "learning_rate": RATE}},
        "random start": half("tinybert", start="random"),
        "attention probabilities": half("tinybert", attention_target="probabilities"),
        "half as wide": half("tinybert", width=0.5),
        "half as wide, a projection for each layer": half("tinybert", width=0.5, projection="per_layer"),
        "312 of 768 as wide": half("tinybert", width=0.40625),
    },
    "distilbert": {
        "answers and labels at the end": half("distilbert"),
        "labels alone at the end": half("distilbert", second_distillation=False),
        "token types kept": half("distilbert", drop_token_type=False),
    },
    "minilm": {
        "version 1": half("minilm", version="v1"),
        "version 2": half("minilm", version="v2"),
        "half as wide": half("minilm", width=0.5, assistant="never"),
        "half as wide, with an assistant": half("minilm", width=0.5, assistant="always"),
        "all layers, half as wide": half("minilm", layers=6, width=0.5, assistant="never"),
    },
    "layer_match": {
        "uniform": half("layer_match", strategy="uniform"),
        "patient (skip, pkd)": half("layer_match", strategy="skip", features="hidden", hidden_loss="pkd"),
        "last": half("layer_match", strategy="last"),
        "learned alignment": half("layer_match", strategy="learned_align"),
        "earth mover's": half("layer_match", strategy="emd"),
        "mirrored Theseus": half("layer_match", strategy="mirror_theseus"),
        "matches and answers at once": half("layer_match", phases="joint"),
    },
    "born_again": {
        "one generation": again(),
        "two generations": again(generations=2),
        "annealing": again(annealing="linear"),
        "temperatures by FLSW": again(temperature_scheduler="flsw"),
        "temperatures by CWSM": again(temperature_scheduler="cwsm"),
        "probability shift": again(probability_shift=True),
    },
    "bilstm": {
        "LSTM": {"bilstm": {"cell": "lstm", "learning_rate": 3e-3}},
        "GRU": {"bilstm": {"cell": "gru", "learning_rate": 3e-3}},
    },
    "structured_pruning": {
        **{name: pruned(criterion=name) for name in ("random", "magnitude", "taylor", "fisher", "movement", "l0")},
        **{f"fisher, {name}": pruned(criterion="fisher", schedule=name) for name in ("one_shot", "iterative")},
        **{
            f"{name}, half of heads and neurons": {"structured_pruning": {"criterion": name, **HALVED}}
            for name in ("taylor", "fisher")
        },
        "fisher, rescaled, not trained": {
            "structured_pruning": {"budget": "macs", "target": 0.5, "criterion": "fisher", "recover": "rescale"}
        },
    },
    "unstructured_pruning": {
        **{
            f"{name}, 10 % stay": sparse(sparsity=0.9, method=name)
            for name in ("magnitude", "movement", "soft_movement")
        },
        "one_shot, 10 % stay": {"unstructured_pruning": {"sparsity": 0.9, "method": "one_shot"}},
        "magnitude, 2:4": sparse(pattern="2:4"),
        "magnitude, blocks of 32 × 32, half stay": sparse(pattern="block_32x32", sparsity=0.5),
    },
    "sharing": {
        "all, the first layer's": shared(convert_init="first"),
        "all, the best layer's": shared(convert_init="best_of"),
        "all, means of aligned layers": shared(**MEANS),
        "all, means": shared(**MEANS, align=False),
        "all, means they are drawn to": shared(**DRAWN),
        "all, means they are drawn to, not aligned": shared(**DRAWN, align=False),
        "all, in two groups, drawn": shared(**DRAWN, groups=2),
        "attention, drawn": shared(**DRAWN, mode="attention"),
        "ffn, drawn": shared(**DRAWN, mode="ffn"),
        "attention, the first layer's": shared(convert_init="first", mode="attention"),
        "ffn, the first layer's": shared(convert_init="first", mode="ffn"),
    },
    "factorization": {
        **{
            f"{name}, half of the ranks": factored(decomposition=name, rank_ratio=0.5)
            for name in ("svd", "activation_aware", "fisher_weighted")
        },
        **{f"activation_aware, energy {part}": factored(rank_mode="energy", energy=part) for part in (0.9, 0.98)},
        "embeddings of 128, svd": {"embedding_factorization": {"embedding_init": "svd", "learning_rate": RATE}},
        "embeddings of 128, weighted": {
            "embedding_factorization": {"embedding_init": "weighted_svd", "learning_rate": RATE}
        },
        "half of the vocabulary": {"vocabulary_pruning": {"keep": 0.5}},
    },
    "quantization": {
        "8 bits": rounded(8),
        "4 bits": rounded(4),
        "4 bits, with zero points": rounded(4, symmetric=False),
        "4 bits, eight maps in 8": rounded(4, high_precision_layers=8),
        "4 bits, FFN down in float32": rounded(4, exclude_ffn_down=True),
        "2 bits": rounded(2, codebook="uniform"),
        "2 bits, with zero points": rounded(2, codebook="uniform", symmetric=False),
        "4 bits, trained": trained(4),
        "ternary, trained on answers alone": trained(2, codebook="ternary", qat_features="none"),
        "ternary, last hidden states too": trained(2, codebook="ternary", qat_features="last_hidden"),
        "ternary, two stages": trained(2, codebook="ternary", qat_features="two_stage"),
        "binary, two stages": trained(1, qat_features="two_stage"),
    },
}


@dataclass(frozen=True)
class Made:
    """One candidate: by which recipe, what it scored (primary metric, 0 to 1), its size and the time it took."""

    set: str
    methods: Methods
    steps: int
    validation: float
    test: float
    megabytes: float
    seconds: float


def stored() -> list[Made]:
    """What earlier runs found."""
    if not RECORDS.exists():
        return []
    return [Made(**json.loads(line)) for line in RECORDS.read_text(encoding="utf-8").splitlines()]


def make(ground: Ground, name: str, methods: Methods, steps: int, folder: Path) -> Made:
    """Carry the recipe out, score it, and keep what came of it."""
    started = time.perf_counter()
    candidate, _ = ground.apply(ground.recipe(methods), folder / "scratch")
    seconds = time.perf_counter() - started
    own_reading = candidate.subject.vocabulary != ground.materials.teacher.subject.vocabulary
    as_file = own_reading or candidate.lowering
    scores = _deployed(ground, candidate, folder) if as_file else ground.scores(candidate.network)
    made = Made(name, methods, steps, *scores, candidate.subject.megabytes, seconds)
    RECORDS.parent.mkdir(exist_ok=True)
    with RECORDS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(made)) + "\n")
    return made


def _deployed(ground: Ground, candidate: Candidate, folder: Path) -> tuple[float, float]:
    """Validation and test score of a candidate whose numbers, or whose tokens, only its file has."""
    artifact, metric = folder / f"artifact-{time.monotonic_ns()}", ground.materials.task.primary
    ground.bench.lower(candidate, artifact)
    validation, test = (ground.bench.score(artifact, part, as_deployed=True) for part in ("validation", "test"))
    return validation.metrics[metric], test.metrics[metric]


def rows(found: list[Made], name: str, steps: int) -> Iterator[list[object]]:
    """The table's rows, in the order of :data:`VARIANTS`."""
    for group, variants in VARIANTS.items():
        for variant, methods in variants.items():
            for made in found:
                if (made.set, made.steps, made.methods) == (name, steps, methods):
                    scores = [f"{100 * score:.1f}" for score in (made.validation, made.test)]
                    yield [group, variant, *scores, f"{made.megabytes:.1f}", f"{made.seconds:.0f}"]


@click.command()
@click.argument("shared", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--set", "name", type=click.Choice(("banking77", "sst2")), default="banking77", show_default=True)
@click.option("--groups", default=",".join(VARIANTS), show_default=True)
@click.option("--steps", default=200, show_default=True, help="Optimizer steps of one candidate.")
@click.option("--quick", is_flag=True, help="20 steps.")
def main(shared: Path, name: str, groups: str, steps: int, quick: bool) -> None:
    """Make what is missing and write benchmarks/results/variants.md."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    steps = 20 if quick else steps
    with tempfile.TemporaryDirectory() as folder:
        ground = Ground(write_study(Path(folder), shared.resolve(), name, steps, ["accuracy", "size_mb"]))
        known = [(made.set, made.steps, made.methods) for made in stored()]
        for group in listed(groups):
            for variant, methods in VARIANTS[group].items():
                if (name, steps, methods) not in known:
                    made = make(ground, name, methods, steps, Path(folder))
                    click.echo(f"{group}, {variant}: {made.validation:.3f} {made.test:.3f} {made.seconds:.0f} s")
        teacher = ground.scores(ground.materials.teacher.network)
        size = ground.materials.teacher.subject.megabytes
        ground.bench.close()
    told = (
        f"One candidate of each kind on {name}, about {steps} optimizer steps of {BATCH} examples, learning rate "
        f"{RATE:g} (recurrent students 3e-3), bfloat16, one seed: primary metric in points, closed-form size, "
        "seconds to make. Read differences beside the standard error of a score, about half a point on these test "
        "sets of thousands, and about as much again between seeds. Recipes: `benchmarks/variants.py`, which has "
        "more than were run here."
    )
    header = ["method", "variant", "validation", "test", "MB", "seconds"]
    first = ["teacher", "", *(f"{100 * score:.1f}" for score in teacher), f"{size:.1f}", ""]
    page = [told, tables.table(header, [first, *rows(stored(), name, steps)])]
    click.echo(tables.write("variants", "What the variants of the methods are worth", page))


if __name__ == "__main__":
    main()

"""What each knob alone, and combinations of them, do to bytes and latency of a 6 × 384 encoder.

``python -m benchmarks.knobs SHARED [--repeats 100] [--only name,…]``

Shapes decide, not weights, so nothing is trained. Every artefact is timed in the bench process at 64 tokens, batch
1, one thread, interleaved with the same encoder in fp32: once on ONNX Runtime and once in eager torch.
SHARED is a folder with ``models/all-minilm-l6-v2``.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import optuna
import yaml

from benchmarks import tables
from benchmarks.ground import Ground, Methods
from compress_search.errors import StudyError, TrialError
from compress_search.runtimes import size_mb
from compress_search.runtimes.lowering import lower

LENGTH = 64
LAYERS = {"head_ratio": 0.0, "ffn_ratio": 0.0, "layer_ratio": 0.0, "recover": "none"}
INT8: Methods = {"quantization": {}}
HALF_LAYERS: Methods = {"structured_pruning": {**LAYERS, "layer_ratio": 0.5}}
HALF_FFN: Methods = {"structured_pruning": {**LAYERS, "ffn_ratio": 0.5}}
QUARTER_FFN: Methods = {"structured_pruning": {**LAYERS, "ffn_ratio": 0.75}}
HALF_HEADS: Methods = {"structured_pruning": {**LAYERS, "head_ratio": 0.5}}
HALF_BOTH: Methods = {"structured_pruning": {**LAYERS, "head_ratio": 0.5, "ffn_ratio": 0.5}}
SHARED_ALL: Methods = {"sharing": {"mode": "all"}}
SHARED_ATTENTION: Methods = {"sharing": {"mode": "attention"}}
NARROW_EMBEDDING: Methods = {"embedding_factorization": {"embedding_size": 128}}
SMALL_VOCABULARY: Methods = {"vocabulary_pruning": {}}


def bits(weight_bits: int, **more: Any) -> Methods:
    """Rounded to so many bits."""
    return {"quantization": {"weight_bits": weight_bits, **more}}


ALONE: Mapping[str, Methods] = {
    "fp32": {},
    "dynamic int8": INT8,
    "static int8": bits(8, scheme="static_int8"),
    "weight-only 8 bits": bits(8, scheme="weight_only"),
    "weight-only 4 bits": bits(4),
    "weight-only 2 bits": bits(2),
    "bfloat16": bits(16),
    "3 of 6 layers": HALF_LAYERS,
    "theseus, 2 of 6 layers": {"theseus": {"block_size": 3}},
    "heads 6 of 12": HALF_HEADS,
    "FFN 768": HALF_FFN,
    "FFN 384": QUARTER_FFN,
    "heads 6 + FFN 768": HALF_BOTH,
    "hidden width 288": {"structured_pruning": {**LAYERS, "hidden_ratio": 0.25}},
    "all layers shared": SHARED_ALL,
    "FFN shared": {"sharing": {"mode": "ffn"}},
    "attention shared": SHARED_ATTENTION,
    "embedding E = 128": NARROW_EMBEDDING,
    "low-rank FFN": {"low_rank": {}},
    "vocabulary pruned": SMALL_VOCABULARY,
    "80 % unstructured zeros": {"unstructured_pruning": {"sparsity": 0.8}},
    "2:4 zeros": {"unstructured_pruning": {"pattern": "2:4"}},
    "inputs cut to 32 tokens": {"runtimes": {"max_length": LENGTH // 2}},
    "torch eager": {"runtimes": {"engine": "torch"}},
    "torch.compile": {"runtimes": {"engine": "compile"}},
}
SIMULATED: Mapping[str, Methods] = {
    "ternary": bits(2, codebook="ternary"),
    "binary": bits(1),
    "ternary, 8-bit activations": bits(2, codebook="ternary", activation_bits=8),
}
"""Small on disk, expanded when loaded: a study in which time counts does not offer them, so none is timed."""

TOGETHER: Mapping[str, Methods] = {
    "3 layers + int8": {**HALF_LAYERS, **INT8},
    "2 layers + int8": {"theseus": {"block_size": 3}, **INT8},
    "heads 6 + int8": {**HALF_HEADS, **INT8},
    "FFN 768 + int8": {**HALF_FFN, **INT8},
    "FFN 384 + int8": {**QUARTER_FFN, **INT8},
    "heads 6 + FFN 768 + int8": {**HALF_BOTH, **INT8},
    "all shared + int8": {**SHARED_ALL, **INT8},
    "E = 128 + int8": {**NARROW_EMBEDDING, **INT8},
    "low-rank FFN + int8": {"low_rank": {}, **INT8},
    "all shared + E = 128 + int8": {**SHARED_ALL, **NARROW_EMBEDDING, **INT8},
    "3 layers + heads 6 + FFN 768 + int8": {"theseus": {"block_size": 2}, **HALF_BOTH, **INT8},
    "vocabulary + 3 layers + E = 128 + int8": {
        **SMALL_VOCABULARY,
        "theseus": {"block_size": 2},
        **NARROW_EMBEDDING,
        **INT8,
    },
}

EARLIER: Mapping[str, float] = {
    "fp32": 1.00,
    "dynamic int8": 0.48,
    "3 of 6 layers": 0.52,
    "heads 6 of 12": 0.83,
    "FFN 768": 0.70,
    "FFN 384": 0.57,
    "heads 6 + FFN 768": 0.54,
    "all layers shared": 0.89,
    "embedding E = 128": 1.00,
    "80 % unstructured zeros": 0.99,
    "torch eager": 2.06,
    "3 layers + int8": 0.25,
    "heads 6 + int8": 0.41,
    "FFN 768 + int8": 0.39,
    "FFN 384 + int8": 0.34,
    "heads 6 + FFN 768 + int8": 0.31,
    "all shared + int8": 0.44,
    "E = 128 + int8": 0.48,
}
"""Ratios to fp32 on ONNX Runtime of an earlier series with hand-made networks, on another AMD EPYC of two cores."""

EARLIER_TOLD = (
    "`earlier`: of hand-made networks of these shapes, without this project, on another AMD EPYC of two cores."
)

EXPLAINED = """Shared layers are still run one by one, word tables are still looked up row by row, and no kernel
here is faster for zeros: these knobs are for bytes. Weight-only formats expand the weights for every product,
and at 64 tokens a product waits for arithmetic and not for memory. Static int8 rounds each map's input and
expands its output as dynamic int8 does, so that what it saves, finding the ranges, is little. Half the tokens
leave what a layer costs once per call. torch's matrix products take about twice ONNX Runtime's time on this
processor, and compiling them changes what lies between them alone."""


def write_study(folder: Path, shared: Path, objectives: Sequence[str]) -> Path:
    """A study whose every example has 64 tokens and whose teacher is hardly trained."""
    text = "of all the films made this year it is the one that we will remember " * (LENGTH // 15 + 1)
    for name, rows in {"train": 64, "validation": 32}.items():
        lines = (json.dumps({"text": text, "label": row % 4}) for row in range(rows))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    content = {
        "name": "knobs",
        "task": "text-classification",
        "teacher": {"model": str(shared / "models/all-minilm-l6-v2"), "fine_tune": {"epochs": 1}},
        "data": {"train": "train.jsonl", "validation": "validation.jsonl", "max_length": LENGTH},
        "objectives": list(objectives),
        "methods": ["quantization"],
        "output": "run",
    }
    path = folder / f"{'-'.join(objectives)}.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


class Stand:
    """Where artefacts are made and timed, beside the encoder itself on both runtimes."""

    def __init__(self, folder: Path, shared: Path, repeats: int) -> None:
        self.folder, self.repeats = folder, repeats
        sized = Ground(write_study(folder, shared, ["accuracy", "size_mb"]))
        self.ground = Ground(write_study(folder, shared, ["accuracy", "latency_ms", "size_mb"]))
        self.grounds = {True: self.ground, False: sized}
        teacher, task = self.ground.materials.teacher, self.ground.materials.task
        self.references = {"onnxruntime": folder / "reference-onnx", "torch": folder / "reference-torch"}
        for engine, directory in self.references.items():
            lower(teacher.replace(runtime={"engine": engine}), directory, task)

    def row(self, name: str, methods: Methods, *, timed: bool) -> list[object]:
        """Bytes and, where time counts, the two ratios of one combination."""
        ground, directory = (
            self.grounds[timed],
            self.folder / f"artifact-{name}".replace(" ", "-").replace(":", "-"),
        )
        try:
            recipe = ground.recipe(methods)
            candidate, _ = ground.apply(recipe, self.folder / "scratch", dry=True)
            lower(candidate, directory, ground.materials.task)
        except (TrialError, StudyError) as error:
            return [name, "not here", str(error).splitlines()[0].rpartition("; ")[2], "", "", ""]
        assert candidate.simulated != timed, "what is simulated is not timed"
        ratios = [self.ratio(directory, reference) if timed else "" for reference in self.references.values()]
        sizes = [f"{size_mb(directory):.1f}", f"{candidate.subject.megabytes:.1f}"]
        return [name, *sizes, *ratios, EARLIER.get(name, "")]

    def ratio(self, directory: Path, reference: Path) -> str:
        """Latency against a reference, with its 95 % interval."""
        found = self.ground.bench.latency(directory, reference=reference, repeats=self.repeats, seed=0)
        noisy = " (noisy)" if found.noisy else ""
        return f"{found.ratio:.3f} ({found.low:.3f} … {found.high:.3f}){noisy}"


def rows(stand: Stand, wanted: Mapping[str, Methods], *, timed: bool) -> Iterator[list[object]]:
    """One row a combination; told as they come, since each takes a while."""
    for name, methods in wanted.items():
        row = stand.row(name, methods, timed=timed)
        click.echo(" | ".join(map(str, row)))
        yield row


def selected(knobs: Mapping[str, Methods], only: str | None) -> dict[str, Any]:
    """The combinations asked for."""
    return {name: methods for name, methods in knobs.items() if only is None or name in only.split(",")}


@click.command()
@click.argument("shared", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--repeats", default=100, show_default=True, help="Interleaved rounds of one comparison.")
@click.option("--only", help="Names of combinations, by comma; all of them when not given.")
def main(shared: Path, repeats: int, only: str | None) -> None:
    """Measure and write benchmarks/results/knobs.md."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    header = [
        "knob",
        "MB",
        "MB in closed form",
        "× ONNX Runtime fp32",
        "× torch eager fp32",
        "earlier, × ONNX Runtime",
    ]
    told = f"{LENGTH} tokens, batch 1, 1 thread; ratios below 1 are faster. {repeats} interleaved rounds."
    parts = [f"6 layers × 384, 12 heads, FFN 1536, {told} {EARLIER_TOLD}"]
    with tempfile.TemporaryDirectory() as folder:
        stand = Stand(Path(folder), shared.resolve(), repeats)
        for title, knobs in (("Each alone", ALONE), ("Simulated", SIMULATED), ("Together", TOGETHER)):
            if wanted := selected(knobs, only):
                found = rows(stand, wanted, timed=knobs is not SIMULATED)
                parts += [f"## {title}", tables.table(header, found)]
        parts += ["## What does not pay in time", EXPLAINED.replace("\n", " ")]
        for ground in stand.grounds.values():
            ground.bench.close()
    click.echo(tables.write("knobs", "What each knob does to bytes and latency", parts))


if __name__ == "__main__":
    main()

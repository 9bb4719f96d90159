"""Artefacts: directories that hold a candidate as it is deployed, and running what is in them.

Owns the directory's layout and its record, and which of its files an engine loads; lowering.py writes them. Knows
nothing of scores or clocks. Imports torch and transformers, which take seconds, for artefacts that need them:
whoever runs an ONNX file needs neither.

    artifact.json    engine and its options, the task, the inputs (:class:`Artifact`)
    weights/         manifest, safetensors and tokenizer, as encoders.save writes them
    model.onnx       what ONNX Runtime runs; absent where torch runs the weights themselves
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from compress_search.errors import ExportError
from compress_search.runtimes.engines import ONNX, Bucketed, OnnxRunner, Runner, load_torch

if TYPE_CHECKING:
    from compress_search.crf import Crf

MODEL, WEIGHTS = "model.onnx", "weights"
"""The file that ONNX Runtime runs; the folder of what torch runs, and of what the file was exported from."""

_FORMAT = 1
_RECORD = "artifact.json"


@dataclass(frozen=True)
class Artifact:
    """What ``artifact.json`` says. ``runtime`` holds the engine and its options, ``task`` the task's plain data.

    ``simulated`` marks arithmetic without a kernel on this machine: its running time means nothing. ``pad`` is
    the padding token. ``crf`` holds a CRF's plain data: runners give emissions, and whoever wants labels decodes
    them.
    """

    runtime: Mapping[str, Any]
    task: Mapping[str, Any]
    inputs: tuple[str, ...]
    simulated: bool = False
    pad: int = 0
    crf: Mapping[str, Any] | None = None

    @property
    def engine(self) -> str:
        """``onnxruntime``, ``torch`` or ``compile``."""
        return cast(str, self.runtime["engine"])

    @property
    def max_length(self) -> int | None:
        """Tokens that inputs are cut to before they come here, where that is less than the study's own limit."""
        return cast("int | None", self.runtime.get("max_length"))

    @property
    def buckets(self) -> tuple[int, ...]:
        """Widths that inputs are padded to, ascending; none where they run at their own."""
        return tuple(self.runtime.get("buckets", ()))

    @property
    def files(self) -> tuple[str, ...]:
        """Paths, relative to the artefact, of what the engine loads."""
        if self.engine == ONNX:
            return (MODEL,)
        from compress_search.encoders import manifest

        return (f"{WEIGHTS}/{manifest.WEIGHTS}",)

    def decoder(self) -> Crf | None:
        """The CRF that turns logits into labels, if there is one."""
        if not self.crf:
            return None
        from compress_search.crf import Crf

        return Crf.from_dict(self.crf)

    @classmethod
    def read(cls, directory: Path) -> Artifact:
        """The record of an artefact directory.

        Raises:
            ExportError: there is none, or it was written by another version.
        """
        path = directory / _RECORD
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise ExportError(f"{path}: expected the record of an artefact: {error}") from error
        if data.pop("format", None) != _FORMAT:
            raise ExportError(f"{path}: expected format {_FORMAT}")
        return cls(**{**data, "inputs": tuple(data["inputs"])})

    def write(self, directory: Path) -> None:
        """The inverse of :meth:`read`."""
        text = json.dumps({"format": _FORMAT, **asdict(self)}, indent=1, sort_keys=True)
        (directory / _RECORD).write_text(text, encoding="utf-8")


def size_mb(directory: Path) -> float:
    """MB of 10⁶ bytes of the files the engine loads; the tokenizer does not count."""
    return sum((directory / name).stat().st_size for name in Artifact.read(directory).files) / 1e6


def load_runner(directory: Path, threads: int, device: str = "cpu") -> Runner:
    """Load an artefact to be run as it says: on its engine, padded to its buckets.

    ``threads`` are those of an artefact that names none; for torch that setting is the whole process's.

    Raises:
        ExportError: the directory holds no artefact, or one that does not load.
    """
    artifact = Artifact.read(directory)
    threads = artifact.runtime.get("threads", threads)
    run: Runner
    if artifact.engine == ONNX:
        run = OnnxRunner(directory / MODEL, threads, device)
    else:
        run = load_torch(directory / WEIGHTS, artifact.inputs, artifact.runtime, threads, device)
    return Bucketed(run, artifact.buckets, artifact.pad) if artifact.buckets else run

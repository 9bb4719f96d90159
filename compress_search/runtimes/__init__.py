"""Lowering a candidate to files, and running what is in them.

Owns the artefact directory: its layout, its atomic creation, which of its files an engine loads, and the
engines themselves. Knows nothing of scores or clocks.

    artifact.json    engine and its options, the task, the inputs (:class:`Artifact`)
    weights/         manifest, safetensors and tokenizer, as encoders.save writes them
    model.onnx       what ONNX Runtime runs; absent where torch runs the weights themselves
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from compress_search.candidate import Candidate, Lowering, Subject
from compress_search.encoders import manifest as manifests
from compress_search.encoders import view
from compress_search.errors import ExportError, TrialError
from compress_search.runtimes.probe import describe_kernels, kernels

if TYPE_CHECKING:
    from compress_search.tasks import Task

__all__ = ["Artifact", "Runner", "default_engine", "describe_kernels", "kernels", "load_runner", "lower", "size_mb"]

ENGINES = ("onnxruntime", "torch")
ATTENTION = ("sdpa", "eager")
_FORMAT = 1
_RECORD, _MODEL, _WEIGHTS = "artifact.json", "model.onnx", "weights"


class Runner(Protocol):
    """A loaded model: int64 arrays (B, S) in, float32 logits (B, C) or (B, S, C) out."""

    def __call__(self, batch: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Takes ``input_ids``, ``attention_mask`` and, where there are any, ``token_type_ids``; ignores others."""


@dataclass(frozen=True)
class Artifact:
    """What ``artifact.json`` says. ``runtime`` holds the engine and its options, ``task`` the task's plain data.

    ``simulated`` marks arithmetic without a kernel on this machine: its running time means nothing.
    """

    runtime: Mapping[str, Any]
    task: Mapping[str, Any]
    inputs: tuple[str, ...]
    simulated: bool = False

    @property
    def engine(self) -> str:
        """``onnxruntime`` or ``torch``."""
        return cast(str, self.runtime["engine"])

    @property
    def files(self) -> tuple[str, ...]:
        """Paths, relative to the artefact, of what the engine loads."""
        return (_MODEL,) if self.engine == "onnxruntime" else (f"{_WEIGHTS}/{manifests.WEIGHTS}",)

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


def default_engine(subject: Subject) -> str:
    """The engine of a candidate that names none: ONNX Runtime on the CPU, torch elsewhere and where it must."""
    if "onnx-only" in subject.traits:
        return "onnxruntime"
    return "torch" if "torch-only" in subject.traits or subject.device != "cpu" else "onnxruntime"


def lower(candidate: Candidate, directory: Path, task: Task) -> None:
    """Write a candidate as an artefact directory, which is there whole or not at all; replaces an older one.

    The ONNX file is exported from the weights as they reload, so that nothing survives that is not on disk.

    Raises:
        TrialError: the engine is unknown, or cannot run such a candidate.
        ExportError: the network cannot be described by a manifest.
    """
    runtime = {"engine": default_engine(candidate.subject), **candidate.runtime}
    _check_runtime(candidate, runtime)
    with _whole(directory) as scratch:
        manifests.save(candidate.network, candidate.tokenizer, scratch / _WEIGHTS)
        if runtime["engine"] == "onnxruntime":
            _lower_onnx(scratch, candidate.lowering)
        inputs = view.inputs(candidate.network)
        Artifact(runtime, task.to_dict(), inputs, candidate.simulated).write(scratch)


def size_mb(directory: Path) -> float:
    """MB of 10⁶ bytes of the files the engine loads; the tokenizer does not count."""
    return sum((directory / name).stat().st_size for name in Artifact.read(directory).files) / 1e6


def load_runner(directory: Path, threads: int, device: str = "cpu") -> Runner:
    """Load an artefact to be run with so many threads; for torch that setting is the whole process's.

    Raises:
        ExportError: the directory holds no artefact, or one that does not load.
    """
    artifact = Artifact.read(directory)
    if artifact.engine == "onnxruntime":
        return OnnxRunner(directory / _MODEL, artifact.inputs, threads, device)
    return TorchRunner(directory / _WEIGHTS, artifact, threads, device)


class OnnxRunner:
    """An ONNX Runtime session with every graph optimisation."""

    def __init__(self, model: Path, inputs: Sequence[str], threads: int, device: str) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        # else idle threads go on spinning after a pass, and take the cores of whoever is timed next
        options.add_session_config_entry("session.force_spinning_stop", "1")
        wanted = ["CPUExecutionProvider"] if device == "cpu" else ["CUDAExecutionProvider", "CPUExecutionProvider"]
        providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
        if not model.is_file():
            raise ExportError(f"{model}: no such file")
        self.session = onnxruntime.InferenceSession(str(model), options, providers=providers)
        self.inputs = tuple(inputs)

    def __call__(self, batch: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Logits of one batch."""
        return cast(NDArray[np.float32], self.session.run(["logits"], _feed(self.inputs, batch))[0])


class TorchRunner:
    """The network itself in inference mode, in the dtype of its weights."""

    def __init__(self, weights: Path, artifact: Artifact, threads: int, device: str) -> None:
        import torch

        torch.set_num_threads(threads)
        network = manifests.load_network(weights)
        view.set_attention(network, artifact.runtime.get("attention", "sdpa"))
        self.network, self.inputs, self.device = network.to(device), artifact.inputs, device

    def __call__(self, batch: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Logits of one batch, on the CPU."""
        import torch

        tensors = {
            name: torch.from_numpy(value).to(self.device) for name, value in _feed(self.inputs, batch).items()
        }
        with torch.inference_mode():
            return cast(NDArray[np.float32], self.network(**tensors).logits.float().cpu().numpy())


def _feed(inputs: Sequence[str], batch: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.int64]]:
    """The engine's inputs; a tokenizer that knows no segments leaves ``token_type_ids`` to be zeros."""
    zeros = {"token_type_ids": np.zeros_like(batch["input_ids"])}
    return {name: np.ascontiguousarray({**zeros, **batch}[name], dtype=np.int64) for name in inputs}


def _check_runtime(candidate: Candidate, runtime: Mapping[str, Any]) -> None:
    engine, traits = runtime["engine"], candidate.subject.traits
    if engine not in ENGINES:
        raise TrialError(f"engine {engine!r} is unknown: expected one of {', '.join(ENGINES)}")
    if unknown := runtime.keys() - {"engine", *(("attention",) if engine == "torch" else ())}:
        raise TrialError(f"{engine} has no option {', '.join(sorted(unknown))}")
    if runtime.get("attention", "sdpa") not in ATTENTION:
        raise TrialError(f"attention {runtime['attention']!r} is unknown: expected one of {', '.join(ATTENTION)}")
    if engine == "torch" and (candidate.lowering or "onnx-only" in traits):
        raise TrialError("torch cannot run what was lowered to an ONNX file")
    if engine == "onnxruntime" and "torch-only" in traits:
        raise TrialError("ONNX Runtime cannot run this network: it is for torch only")


def _lower_onnx(directory: Path, lowering: Sequence[Lowering]) -> None:
    """Export ``weights/`` and pass the file through each function in turn; leaves only the last result."""
    from compress_search.runtimes.onnx_export import export

    work = directory / "lowering"
    work.mkdir()
    path = work / "0.onnx"
    export(manifests.load_network(directory / _WEIGHTS), path)
    for number, function in enumerate(lowering, start=1):
        function(path, work / f"{number}.onnx")
        path = work / f"{number}.onnx"
    path.replace(directory / _MODEL)
    shutil.rmtree(work)


@contextmanager
def _whole(directory: Path) -> Iterator[Path]:
    """An empty directory beside the final one, which takes its place when the block ends without an error."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)  # of a process that died
    scratch.mkdir()
    try:
        yield scratch
        if directory.exists():
            shutil.rmtree(directory)
        scratch.rename(directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)

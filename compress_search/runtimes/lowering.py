"""Lowering a candidate to the files of an artefact.

Owns which runtimes are possible and with which options, the order in which an ONNX file is made, and that an
artefact is there whole or not at all. Knows nothing of how it is run.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress_search.candidate import Candidate, Lowering, Subject
from compress_search.crf import crf_of
from compress_search.encoders import manifest as manifests
from compress_search.encoders import view
from compress_search.errors import TrialError
from compress_search.runtimes import MODEL, WEIGHTS, Artifact
from compress_search.runtimes.engines import COMPILE, ENGINES, ONNX, TORCH
from compress_search.runtimes.probe import toolchain
from compress_search.runtimes.sparse_onnx import pack as pack_sparse

if TYPE_CHECKING:
    from compress_search.tasks import Task

ATTENTION = ("sdpa", "eager")
COMMON = {"engine", "threads", "max_length", "buckets"}
"""Options of every engine: its name; threads, where not the study's; the longest input in tokens, and the widths
that inputs are padded to, ascending."""

OPTIONS: Mapping[str, set[str]] = {
    ONNX: COMMON,
    TORCH: COMMON | {"attention"},
    COMPILE: COMMON | {"attention", "freezing", "max_autotune"},
}


def default_engine(subject: Subject) -> str:
    """The engine of a candidate that names none: ONNX Runtime on the CPU, torch elsewhere and where it must."""
    if "onnx-only" in subject.traits:
        return ONNX
    return TORCH if "torch-only" in subject.traits or subject.device != "cpu" else ONNX


def lower(candidate: Candidate, directory: Path, task: Task) -> None:
    """Write a candidate as an artefact directory, which is there whole or not at all; replaces an older one.

    The ONNX file is exported from the weights as they reload, so that nothing survives that is not on disk.

    Raises:
        TrialError: the engine is unknown, or cannot run such a candidate.
        ExportError: the network cannot be described by a manifest.
    """
    runtime = {"engine": default_engine(candidate.subject), **candidate.runtime}
    check_runtime(candidate, runtime)
    with _whole(directory) as scratch:
        manifests.save(candidate.network, candidate.tokenizer, scratch / WEIGHTS)
        if runtime["engine"] == ONNX:
            _lower_onnx(scratch, candidate.lowering)
            _finish(scratch / MODEL, candidate.subject)
        inputs, pad = view.inputs(candidate.network), candidate.tokenizer.pad_token_id or 0
        crf = crf_of(candidate.network)
        plain = crf.to_dict() if crf else None
        Artifact(runtime, task.to_dict(), inputs, candidate.simulated, int(pad), plain).write(scratch)


def check_runtime(candidate: Candidate, runtime: Mapping[str, Any]) -> None:
    """Refuse a runtime that is none, or that cannot run such a candidate on this machine.

    Raises:
        TrialError: naming the option and what was expected.
    """
    engine = runtime["engine"]
    if engine not in ENGINES:
        raise TrialError(f"engine {engine!r} is unknown: expected one of {', '.join(ENGINES)}")
    if unknown := runtime.keys() - OPTIONS[engine]:
        raise TrialError(f"{engine} has no option {', '.join(sorted(unknown))}")
    if runtime.get("attention", "sdpa") not in ATTENTION:
        raise TrialError(f"attention {runtime['attention']!r} is unknown: expected one of {', '.join(ATTENTION)}")
    _check_widths(runtime.get("buckets", ()), runtime.get("max_length"))
    _check_possible(engine, candidate)


def _check_widths(buckets: Sequence[int], cap: int | None) -> None:
    if list(buckets) != sorted(set(buckets)) or any(width < 1 for width in buckets):
        raise TrialError(f"buckets are ascending widths in tokens, got {list(buckets)}")
    if cap is not None and cap < 1:
        raise TrialError(f"max_length is a number of tokens, got {cap}")


def _check_possible(engine: str, candidate: Candidate) -> None:
    traits, device = candidate.subject.traits, candidate.subject.device
    if engine != ONNX and (candidate.lowering or "onnx-only" in traits):
        raise TrialError("torch cannot run what was lowered to an ONNX file")
    if engine == ONNX and "torch-only" in traits:
        raise TrialError("ONNX Runtime cannot run this network: it is for torch only")
    if engine == ONNX and device != "cpu" and "timed" in traits and "kernel:onnx-cuda" not in traits:
        raise TrialError("ONNX Runtime has no CUDA provider here, so its time would be the CPU's")
    if engine == COMPILE and (missing := toolchain(device)):
        raise TrialError(f"torch.compile cannot run here: {missing}")


def _lower_onnx(directory: Path, lowering: Sequence[Lowering]) -> None:
    """Export ``weights/`` and pass the file through each function in turn; leaves only the last result."""
    from compress_search.runtimes.onnx_export import export

    work = directory / "lowering"
    work.mkdir()
    path = work / "0.onnx"
    export(manifests.load_network(directory / WEIGHTS), path)
    for number, function in enumerate(lowering, start=1):
        function(path, work / f"{number}.onnx")
        path = work / f"{number}.onnx"
    path.replace(directory / MODEL)
    shutil.rmtree(work)


def _finish(model: Path, subject: Subject) -> None:
    """What is left to do to a file that every method has had its way with."""
    from compress_search.runtimes.onnx_attention import fuse_attention

    if subject.device == "cpu":
        fuse_attention(model)
    if "sparse" in subject.traits:
        pack_sparse(model)


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

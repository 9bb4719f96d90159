"""What this machine can do for a study, and whether anything that every study needs is broken.

Owns which facts are looked at and which of them are needed. Knows nothing of how they are drawn; of a study it
looks only at whether its database and its cluster answer.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

import psutil

from compress_search.cache import cache_folder
from compress_search.environment import fingerprint, host_kind
from compress_search.errors import CompressSearchError

if TYPE_CHECKING:
    from compress_search.runtimes.probe import Kernel
    from compress_search.study import Study

State = Literal["ok", "absent", "broken"]

NEEDED = ("torch", "transformers", "onnx", "onnxruntime", "optuna", "ray", "sqlalchemy")
"""Packages without which no study runs; what is installed may still not load."""


@dataclass(frozen=True)
class Check:
    """One thing looked at: ``absent`` is no fault, ``broken`` is what has to be mended."""

    name: str
    state: State
    finding: str


@dataclass(frozen=True)
class Findings:
    """All that was found: versions, hardware, (device, kernel) verdicts, and checks."""

    versions: Mapping[str, str]
    machine: Mapping[str, str]
    kernels: tuple[tuple[str, Kernel], ...]
    checks: tuple[Check, ...]

    @property
    def broken(self) -> list[Check]:
        """What keeps studies from running."""
        return [check for check in self.checks if check.state == "broken"]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        kernels = [{"device": device, **asdict(kernel)} for device, kernel in self.kernels]
        checks = [asdict(check) for check in self.checks]
        return {
            "versions": dict(self.versions),
            "machine": dict(self.machine),
            "kernels": kernels,
            "checks": checks,
            "ok": not self.broken,
        }


def examine(study: Study | None = None, *, quick: bool = False) -> Findings:
    """Look at everything; some twenty seconds, as torch.compile is tried, and a few when ``quick``."""
    facts = fingerprint()
    checks = (*map(_loads, NEEDED), _cache(), *_methods(), _hub(), *(_of_study(study) if study else ()))
    loaded = not [check for check in checks[: len(NEEDED)] if check.state == "broken"]
    versions = {"python": facts["python"], **facts["packages"]}
    return Findings(versions, _machine(facts), tuple(_kernels(quick)) if loaded else (), checks)


def _machine(facts: Mapping[str, Any]) -> dict[str, str]:
    cpu, memory, disk = facts["cpu"], psutil.virtual_memory(), shutil.disk_usage(".")
    return {
        "host kind": host_kind(),
        "system": facts["platform"],
        "processor": f"{cpu['model']}, {cpu['cores']} cores usable",
        "features": ", ".join(cpu["flags"]) or "none known",
        "accelerators": ", ".join(gpu["name"] for gpu in facts["gpus"]) or "none",
        "free memory": f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB",
        "free disk here": f"{disk.free / 1e9:.1f} of {disk.total / 1e9:.1f} GB",
    }


def _kernels(quick: bool) -> Iterator[tuple[str, Kernel]]:
    """The verdicts for each device, with what compiling gains where there is time to tell."""
    import torch

    from compress_search.runtimes.probe import compiled_kernel, describe_kernels

    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for kernel in describe_kernels(device):
            measured = kernel.name == "compile" and kernel.real and not quick
            yield device, compiled_kernel(device) if measured else kernel


def _loads(package: str) -> Check:
    try:
        module = import_module(package)
    except Exception as error:  # a package that is there and does not load raises whatever its libraries do
        return Check(package, "broken", f"cannot be imported: {_line(error)}")
    return Check(package, "ok", f"loads, version {getattr(module, '__version__', 'unknown')}")


def _cache() -> Check:
    folder = cache_folder()

    def work() -> str:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            return f"can be written, {shutil.disk_usage(folder).free / 1e9:.1f} GB free"

    return _try("cache folder", work)


def _methods() -> Iterator[Check]:
    """One line for all methods that load, and one for each that does not: its studies fail, others run."""
    from compress_search.registry import Registry

    registry = Registry()
    reasons = {name: registry.unavailable(name) for name in registry}
    loaded = sorted(name for name, reason in reasons.items() if reason is None)
    yield Check("methods", "ok" if loaded else "broken", ", ".join(loaded) or "none is installed")
    for name, reason in reasons.items():
        if reason:
            yield Check(f"method {name}", "absent", reason)


def _hub() -> Check:
    from compress_search import hub

    answers = hub.reachable()
    found = "answers" if answers else "does not answer: models and data have to be files, or fetched before"
    return Check("Hugging Face hub", "ok" if answers else "absent", found)


def _of_study(study: Study) -> Iterator[Check]:
    """Whether its database can be reached; whether its cluster can, where it names one."""
    from compress_search.storage import Store

    def database() -> str:
        return "can be reached" if Store(study.storage).exists else "will be made by the first run"

    def cluster() -> str:
        from compress_search.ray_executor import connect

        connect(study)
        return f"{study.cluster.address} answers"

    yield _try("database", database)
    if study.cluster.address != "local":
        yield _try("cluster", cluster)


def _try(name: str, work: Callable[[], str]) -> Check:
    try:
        return Check(name, "ok", work())
    except (CompressSearchError, OSError) as error:
        return Check(name, "broken", _line(error))


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def require_sound(findings: Findings) -> None:
    """Stop with exit code 1 where something needed is broken.

    Raises:
        CompressSearchError: naming each.
    """
    if findings.broken:
        raise CompressSearchError(f"broken: {', '.join(check.name for check in findings.broken)}")

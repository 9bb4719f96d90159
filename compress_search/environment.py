"""The environment fingerprint: what hardware and which versions a number was measured with.

Owns which facts are recorded, and the name of a kind of host under which latencies compare. Records nothing
that names a person, a machine or a path. Imports no heavy library: versions come from installed metadata.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

PACKAGES = ("compress-search", "torch", "transformers", "onnxruntime", "onnx", "optuna", "ray", "numpy")

X86_FLAGS = {"avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx_vnni", "avx512_bf16"}
X86_TILES = {"avx512_fp16", "amx_tile", "amx_int8", "amx_bf16"}
ARM_FLAGS = {"neon", "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2"}
KERNEL_FLAGS = frozenset(X86_FLAGS | X86_TILES | ARM_FLAGS)
"""CPU features that decide which kernels a runtime picks, and with them both speed and rounding."""

_QUERY = ("nvidia-smi", "--query-gpu=name,memory.total,driver_version,compute_cap", "--format=csv,noheader,nounits")


def fingerprint() -> dict[str, Any]:
    """Versions, processor and accelerators as plain JSON data: the same for every process of a machine.

    ``memory_gb`` are 10⁹ bytes; ``cores`` are those this process may run on.
    """
    facts: dict[str, Any] = json.loads(_fingerprint())  # every caller owns its copy
    return facts


@cache
def _fingerprint() -> str:
    facts = {
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}".strip(),
        "cpu": {
            "model": cpu_model(),
            "flags": sorted(cpu_flags() & KERNEL_FLAGS),
            "cores": usable_cores(),
            "physical_cores": psutil.cpu_count(logical=False),
        },
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpus": gpus(),
    }
    return json.dumps(facts)


def host_kind(environment: Mapping[str, Any] | None = None) -> str:
    """A name for machines on which the same artefact runs equally fast, such as ``amd-epyc-2c-1f3a5b7d``.

    Covers the processor, its features and core count, the accelerators and the libraries that run the models.
    ``environment`` is a recorded fingerprint; this machine's by default.
    """
    facts = fingerprint() if environment is None else environment
    libraries = {name: facts["packages"].get(name) for name in ("torch", "onnxruntime")}
    parts = [facts["cpu"], facts["gpus"], libraries]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]
    words = "-".join("".join(c if c.isalnum() else " " for c in facts["cpu"]["model"].lower()).split()[:3])
    return f"{words}-{facts['cpu']['cores']}c-{digest}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def usable_cores() -> int:
    """Logical cores that the scheduler gives this process; fewer than the machine's under affinity masks."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_model() -> str:
    """The processor's marketing name, or the architecture where the system does not tell."""
    return _cpuinfo().get("model name") or _sysctl("machdep.cpu.brand_string") or platform.machine() or "unknown"


def cpu_flags() -> frozenset[str]:
    """Names of the processor's features in Linux's spelling; empty on other systems."""
    info = _cpuinfo()
    return frozenset((info.get("flags") or info.get("Features") or "").split())


def _cpuinfo() -> dict[str, str]:
    """The first processor's block of /proc/cpuinfo."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    lines = path.read_text().split("\n\n")[0].splitlines()
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _sysctl(key: str) -> str:
    return _output("sysctl", "-n", key).strip() if platform.system() == "Darwin" else ""


def gpus() -> list[dict[str, str]]:
    """Name, memory, driver and compute capability of each NVIDIA device, in the driver's order."""
    rows = [[field.strip() for field in line.split(",")] for line in _output(*_QUERY).splitlines()]
    names = ("name", "memory_mib", "driver", "compute_capability")
    return [dict(zip(names, row, strict=True)) for row in rows if len(row) == len(names)]


def _output(*command: str) -> str:
    """What a system tool prints; nothing where the machine has no such tool, or it does not work."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""

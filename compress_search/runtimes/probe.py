"""Which reduced-precision kernels are real on this machine: run, and hardly slower than what they stand in for.

Processor flags promise kernels that a build may not contain, and list none for kernels that are slow, so each
is timed on one small matrix product against float32 in the same engine, on one thread. Owns the probe and its
cache on disk, so that every process of a study gets the same answer. Knows nothing of methods or networks.

Two verdicts are about an engine and not about numbers: ``compile`` (there is what torch.compile needs) and
``onnx-cuda`` (ONNX Runtime's CUDA provider is there). What compiling gains depends on the network, so that a study
measures it on its own; :func:`compiled_kernel` takes some ten seconds to tell it of an example.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shlex
import shutil
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress_search.runtimes.engines import CUDA_PROVIDER, use_threads

if TYPE_CHECKING:
    import torch

TOKENS, WIDTH = 64, 768
"""The probe multiplies (TOKENS, WIDTH) by (WIDTH, WIDTH): one projection of a base model on a short text."""

_ROUNDS, _WARMUP = 15, 3
_LIMITS = {"int8": 1.05, "weight-only": 1.5, "weight-only-2": 1.5, "bf16": 1.05, "fp16": 1.05}
_VERSION = 2
"""Goes up when the same kernels can get other verdicts, so that those written down before are not read."""

_NOWHERE = {
    "ternary": "decoded to float32 when the file is loaded: smaller, never faster",
    "binary": "decoded to float32 when the file is loaded: smaller, never faster",
    "sparse": "zeros are filled in when the file is loaded: smaller, never faster",
}
"""What no engine here computes with, and why."""

Run = Callable[[], Any]


@dataclass(frozen=True)
class Kernel:
    """One kernel's verdict; ``ratio`` is its time over float32's in the same engine, None where it does not run."""

    name: str
    real: bool
    ratio: float | None
    note: str


def kernels(device: str = "cpu") -> frozenset[str]:
    """Names of what is real here: ``int8`` (MatMulInteger), and ``int8-exact`` where it does not saturate;
    ``weight-only`` and ``weight-only-2`` (MatMulNBits with 4 and 2 bits), ``bf16`` and ``fp16`` (torch), and the
    engines ``compile`` and ``onnx-cuda``.
    """
    return frozenset(kernel.name for kernel in describe_kernels(device) if kernel.real)


def describe_kernels(device: str = "cpu") -> tuple[Kernel, ...]:
    """Every kernel with its verdict, as :func:`keep_kernels` wrote it down; else measured in a second."""
    return _found(device)


@cache
def _found(device: str) -> tuple[Kernel, ...]:
    known = _read(_store(device))
    return _measure(device) if known is None else known


def keep_kernels(device: str = "cpu") -> None:
    """Write the verdicts down, so that every later process with these versions on this machine finds the same."""
    store = _store(device)
    if _read(store) is None:
        _write(store, describe_kernels(device))


def _measure(device: str) -> tuple[Kernel, ...]:
    found = [_verdict("bf16", lambda: _torch_pair(device)), _half(device)]
    if device == "cpu":
        found += [_verdict("int8", lambda: _onnx_pair(_int8_graph)), _exactness()]
        found += [_verdict("weight-only", lambda: _onnx_pair(_weight_only_graph))]
        found += [_verdict("weight-only-2", lambda: _onnx_pair(lambda: _weight_only_graph(bits=2)))]
    else:
        names = ("int8", "int8-exact", "weight-only", "weight-only-2")
        found += [Kernel(name, False, None, f"no kernel on {device}") for name in names]
        found.append(_provider())
    missing = toolchain(device)
    note = missing or "it can; what it gains depends on the network, and doctor measures an example"
    nowhere = (Kernel(name, False, None, f"no kernel: {why}") for name, why in _NOWHERE.items())
    return (*found, Kernel("compile", missing is None, None, note), *nowhere)


def toolchain(device: str = "cpu") -> str | None:
    """What torch.compile lacks here: a C++ compiler, Python's headers, or Triton on CUDA; None where it can run.

    The compiler is the one that Inductor takes: ``CXX`` where it is set.
    """
    if device != "cpu":
        return None if find_spec("triton") else "there is no Triton"
    usual = "clang++" if platform.system() == "Darwin" else "g++"
    compiler = shlex.split(os.environ.get("CXX") or usual)[0]
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler {compiler}"
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    return None if headers.is_file() else f"Python's headers are not there: {headers}"


def _provider() -> Kernel:
    import onnxruntime

    there = CUDA_PROVIDER in onnxruntime.get_available_providers()
    note = "ONNX Runtime's CUDA provider" if there else "this build of ONNX Runtime has no CUDA provider"
    return Kernel("onnx-cuda", there, None, note)


def compiled_kernel(device: str = "cpu") -> Kernel:
    """torch.compile on a feed-forward block against eager torch; compiles for some ten seconds.

    Real is what runs, as in :func:`describe_kernels`: a study offers it, and measures its own networks.
    """
    if missing := toolchain(device):
        return Kernel("compile", False, None, missing)
    found = _verdict("compile", lambda: _compiled_pair(device))
    if found.ratio is None:
        return found
    note = f"{found.ratio:.2f} of eager torch's time on an example; what it gains depends on the network"
    return replace(found, note=note)


def _compiled_pair(device: str) -> tuple[Run, Run]:
    import torch
    from torch.nn.functional import gelu, layer_norm

    x, w = torch.randn(TOKENS, WIDTH, device=device), torch.randn(WIDTH, WIDTH, device=device)

    def block() -> torch.Tensor:
        return layer_norm(x + gelu(x @ w), (WIDTH,))

    compiled = torch.compile(block, options={"freezing": device == "cpu"})
    wait: Run = torch.cuda.synchronize if device != "cpu" else (lambda: None)

    def timed(run: Run) -> Run:
        def once() -> None:
            with torch.no_grad():
                run()
                wait()

        return once

    return timed(compiled), timed(block)


def _verdict(name: str, pair: Callable[[], tuple[Run, Run]]) -> Kernel:
    try:
        with _one_thread():
            ratio = _ratio(*pair())
    except Exception as error:  # whatever an engine raises for what it cannot do: that is the question asked
        return Kernel(name, False, None, f"does not run: {_first_line(error)}")
    limit = _LIMITS.get(name, math.inf)  # an engine is real where it runs
    return Kernel(name, ratio <= limit, round(ratio, 3), f"{ratio:.2f} of float32's time, real up to {limit:.2f}")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Torch on one thread, as the probe's ONNX sessions are: with more, a busy core decides what is faster."""
    import torch

    before = torch.get_num_threads()
    use_threads(1)
    try:
        yield
    finally:
        use_threads(before)


def _ratio(kernel: Run, reference: Run) -> float:
    """Median of the paired ratios, interleaved so that a busy moment hits both."""
    ratios = []
    for number in range(_WARMUP + _ROUNDS):
        ours, theirs = _seconds(kernel), _seconds(reference)
        if number >= _WARMUP:
            ratios.append(ours / theirs)
    return statistics.median(ratios)


def _seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _torch_pair(device: str) -> tuple[Run, Run]:
    import torch

    if device != "cpu" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise RuntimeError("this device has no bfloat16")
    return _products(device, torch.bfloat16)


def _half(device: str) -> Kernel:
    """Float16, never real on a CPU: a product may be as fast as float32's, and networks take twice as long."""
    import torch

    if device == "cpu":
        return Kernel("fp16", False, None, "no kernel on a CPU: networks take longer than in float32")
    return _verdict("fp16", lambda: _products(device, torch.float16))


def _products(device: str, dtype: torch.dtype) -> tuple[Run, Run]:
    import torch
    from torch.nn.functional import linear

    x, w = torch.randn(TOKENS, WIDTH, device=device), torch.randn(WIDTH, WIDTH, device=device)
    wait: Run = torch.cuda.synchronize if device != "cpu" else (lambda: None)

    def timed(x: torch.Tensor, w: torch.Tensor) -> Run:
        return lambda: (linear(x, w), wait())

    return timed(x.to(dtype), w.to(dtype)), timed(x, w)


def _onnx_pair(graph: Callable[[], Any]) -> tuple[Run, Run]:
    x = np.random.default_rng(0).standard_normal((TOKENS, WIDTH)).astype(np.float32)
    return _session(graph(), x), _session(_float_graph(), x)


def _session(model: Any, x: np.ndarray[Any, Any]) -> Run:
    """A run of the graph on x (TOKENS, WIDTH)."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    loaded = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return lambda: loaded.run(None, {"x": x})


def _exactness() -> Kernel:
    """Whether integer products of the largest factors are exact: some processors add pairs of them in 16 bits."""
    weight = np.full((WIDTH, WIDTH), 127, np.int8)
    try:
        (found,) = _session(_int8_graph(weight), np.full((TOKENS, WIDTH), 255, np.float32))()
    except Exception as error:  # as in _verdict
        return Kernel("int8-exact", False, None, f"does not run: {_first_line(error)}")
    exact = bool(np.allclose(found, 255 * 127 * WIDTH * np.float32(0.01), rtol=1e-4))
    note = "products of 8 bits are exact" if exact else "products of 8 bits saturate: weights need 7 (reduce_range)"
    return Kernel("int8-exact", exact, None, note)


def _float_graph() -> Any:
    from onnx import helper

    weight = np.random.default_rng(1).standard_normal((WIDTH, WIDTH)).astype(np.float32)
    return _model([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": weight})


def _int8_graph(weight: np.ndarray[Any, Any] | None = None) -> Any:
    """Dynamic quantization of the activations, an integer product, and the scales multiplied back in."""
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"]),
        helper.make_node("MatMulInteger", ["xq", "wq", "xz", "wz"], ["acc"]),
        helper.make_node("Cast", ["acc"], ["accf"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["xs", "ws"], ["s"]),
        helper.make_node("Mul", ["accf", "s"], ["y"]),
    ]
    if weight is None:
        weight = np.random.default_rng(1).integers(-127, 128, (WIDTH, WIDTH)).astype(np.int8)
    scales, zeros = np.full(WIDTH, 0.01, np.float32), np.zeros(WIDTH, np.int8)
    return _model(nodes, {"wq": weight, "wz": zeros, "ws": scales})


def _weight_only_graph(bits: int = 4) -> Any:
    """Weights of so many bits in blocks of 32, packed into bytes, computed on with int8 activations."""
    from onnx import helper

    blocks = WIDTH // 32
    size: dict[str, Any] = {"K": WIDTH, "N": WIDTH, "bits": bits, "block_size": 32, "accuracy_level": 4}
    weight = np.random.default_rng(1).integers(0, 256, (WIDTH, blocks, 4 * bits)).astype(np.uint8)
    scales = np.full(WIDTH * blocks, 0.01, np.float32)
    node = helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", **size)
    return _model([node], {"w": weight, "s": scales})


def _model(nodes: list[Any], tensors: dict[str, np.ndarray[Any, Any]]) -> Any:
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        nodes,
        "probe",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [TOKENS, WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [TOKENS, WIDTH])],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def _store(device: str) -> Path:
    """The cache file of this machine, device and set of versions."""
    from importlib.metadata import version

    from compress_search.cache import cache_folder

    facts = [device, _processor(), version("torch"), version("onnxruntime"), TOKENS, WIDTH, _LIMITS, _VERSION]
    facts.append(toolchain(device))
    if device != "cpu":
        import torch

        facts.append(torch.cuda.get_device_name(device) if torch.cuda.is_available() else None)
    name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    return cache_folder() / f"kernels-{name}.json"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    # without the lines that change from moment to moment
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def _read(store: Path) -> tuple[Kernel, ...] | None:
    try:
        return tuple(Kernel(**entry) for entry in json.loads(store.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # absent, or not ours: measure again
        return None


def _write(store: Path, found: tuple[Kernel, ...]) -> None:
    unfinished = store.with_suffix(f".{os.getpid()}.tmp")
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps([asdict(kernel) for kernel in found]), encoding="utf-8")
        unfinished.replace(store)
    except OSError:  # a read-only home costs half a second per process, no more
        return

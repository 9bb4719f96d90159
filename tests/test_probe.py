"""The probe tells slow kernels from fast ones and from those that do not run; its answer is kept."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from compress_search.runtimes import probe
from compress_search.runtimes.probe import Kernel


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("COMPRESS_SEARCH_CACHE", str(tmp_path))
    probe._found.cache_clear()
    yield tmp_path
    probe._found.cache_clear()


def test_the_probe_covers_kernels_and_engines_and_is_short(cache: Path) -> None:
    probe._measure("cpu")  # the first call also imports the engines
    start = time.process_time()
    found = {kernel.name: kernel for kernel in probe._measure("cpu")}
    assert time.process_time() - start < 2
    integers = {"int8", "int8-exact", "weight-only", "weight-only-2"}
    nowhere = {"ternary", "binary", "sparse"}
    assert found.keys() == integers | nowhere | {"bf16", "fp16", "compile"}
    for name in nowhere:
        kernel = found.pop(name)
        assert not kernel.real
        assert "no kernel" in kernel.note
    assert found.pop("fp16") == Kernel(
        "fp16", False, None, "no kernel on a CPU: networks take longer than in float32"
    ), "however fast one product is"
    assert found.pop("int8-exact").ratio is None, "it is exact or not, and no faster for that"
    compiling = found.pop("compile")
    assert compiling.real == (probe.toolchain() is None)
    assert compiling.ratio is None, "what compiling gains takes too long to tell here"
    for kernel in found.values():
        assert kernel.ratio is not None, f"{kernel.name} runs on every x86 and ARM build: {kernel.note}"
        beyond = kernel.ratio - probe._LIMITS[kernel.name]
        assert kernel.real == (beyond <= 0) or abs(beyond) < 1e-3, "ratios are told in three digits"


def test_the_answer_is_the_same_for_later_processes(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = probe.describe_kernels()
    assert not list(cache.iterdir()), "asking writes nothing"
    probe.keep_kernels()
    probe._found.cache_clear()
    monkeypatch.setattr(probe, "_measure", lambda device: pytest.fail("measured twice"))
    assert probe.describe_kernels() == first
    assert probe.kernels() == {kernel.name for kernel in first if kernel.real}


def test_a_spoilt_cache_is_measured_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = (Kernel("int8", True, 0.5, "fast"),)
    monkeypatch.setattr(probe, "_measure", lambda device: known)
    probe._store("cpu").write_text('[{"name": "int8"')
    assert probe.describe_kernels() == known
    probe.keep_kernels()
    assert probe._read(probe._store("cpu")) == known


def test_an_unwritable_cache_only_costs_time(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "file").write_text("")
    monkeypatch.setenv("COMPRESS_SEARCH_CACHE", str(cache / "file" / "below"))
    known = (Kernel("int8", True, 0.5, "fast"),)
    monkeypatch.setattr(probe, "_measure", lambda device: known)
    probe.keep_kernels()
    assert probe.describe_kernels() == known


def test_a_device_that_is_not_here_has_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert probe.kernels("cuda") == frozenset()


def test_what_raises_is_not_real() -> None:
    def broken() -> None:
        raise NotImplementedError("no such operator\nat line 3")

    verdict = probe._verdict("int8", lambda: (broken, broken))
    assert verdict == Kernel("int8", False, None, "does not run: no such operator")


def test_what_raises_without_a_word_is_named() -> None:
    def broken() -> None:
        raise AssertionError

    assert probe._verdict("int8", lambda: (broken, broken)).note == "does not run: AssertionError"


@pytest.mark.parametrize(("factor", "exact"), [(1, True), (0.5, False)])
def test_saturating_products_are_found(factor: float, exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = np.full((2, 2), factor * 255 * 127 * probe.WIDTH * 0.01, np.float32)
    monkeypatch.setattr(probe, "_session", lambda model, x: lambda: [answer])
    verdict = probe._exactness()
    assert verdict.real == exact
    assert ("saturate" in verdict.note) == (not exact)


@pytest.mark.parametrize(("name", "slowdown", "real"), [("int8", 2.0, False), ("int8", 0.5, True)])
def test_slow_kernels_are_not_real(name: str, slowdown: float, real: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"ours": slowdown, "theirs": 1.0}
    monkeypatch.setattr(probe, "_seconds", lambda run: seconds[run()])
    verdict = probe._verdict(name, lambda: (lambda: "ours", lambda: "theirs"))
    assert (verdict.real, verdict.ratio) == (real, slowdown)


def test_torch_is_timed_on_one_thread_and_has_its_own_again_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)
    seen = []
    try:
        probe._verdict("bf16", lambda: (lambda: seen.append(torch.get_num_threads()), lambda: None))
        assert set(seen) == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("ratio", [0.5, 1.51])
def test_compiling_is_real_where_it_runs_whatever_an_example_gains(
    ratio: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "toolchain", lambda device="cpu": None)
    monkeypatch.setattr(probe, "_compiled_pair", lambda device: (lambda: None, lambda: None))
    monkeypatch.setattr(probe, "_ratio", lambda ours, theirs: ratio)
    found = probe.compiled_kernel()
    assert (found.real, found.ratio) == (True, ratio), "a study offers it"
    assert found.note == f"{ratio:.2f} of eager torch's time on an example; what it gains depends on the network"
    monkeypatch.setattr(probe, "_compiled_pair", lambda device: 1 / 0)
    assert not probe.compiled_kernel().real


def test_integer_kernels_are_not_offered_on_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_torch_pair", lambda device: (lambda: None, lambda: None))
    found = {kernel.name: kernel for kernel in probe._measure("cuda")}
    assert not found["int8"].real
    assert found["int8"].note == "no kernel on cuda"


def test_compiling_needs_the_compiler_that_is_named_and_pythons_headers(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    assert probe.toolchain() == "there is no C++ compiler no-such-compiler"
    assert "compile" not in {kernel.name for kernel in probe._measure("cpu") if kernel.real}
    assert probe.compiled_kernel().note == "there is no C++ compiler no-such-compiler"
    monkeypatch.setenv("CXX", "python3 -c")
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(cache))
    assert probe.toolchain() == f"Python's headers are not there: {cache}/Python.h"
    (cache / "Python.h").touch()
    assert probe.toolchain() is None


@pytest.mark.parametrize("there", [True, False])
def test_on_cuda_it_is_the_provider_and_triton_that_count(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    providers = ["CUDAExecutionProvider"] * there + ["CPUExecutionProvider"]
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: providers)
    monkeypatch.setattr(probe, "find_spec", lambda name: object() if there else None)
    monkeypatch.setattr(probe, "_torch_pair", lambda device: (lambda: None, lambda: None))
    found = {kernel.name: kernel.real for kernel in probe._measure("cuda")}
    assert (found["onnx-cuda"], found["compile"]) == (there, there)


def test_importing_the_engine_leaves_no_identifier_behind(tmp_path: Path) -> None:
    places = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    environment = {**{name: value for name, value in os.environ.items() if not name.startswith("ORT_")}, **places}
    code = "import compress_search, onnxruntime"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.slow
def test_compiling_is_measured_where_it_is_asked_for() -> None:
    kernel = probe.compiled_kernel()
    assert kernel.name == "compile"
    assert (kernel.ratio is not None) == (probe.toolchain() is None)

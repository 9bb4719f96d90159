"""The fingerprint records what numbers depend on, and nothing that names a person or a machine."""

from __future__ import annotations

import getpass
import json
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from compress_search import environment


@pytest.fixture(autouse=True)
def forget():
    environment._fingerprint.cache_clear()
    yield
    environment._fingerprint.cache_clear()


def test_it_holds_the_versions_and_the_hardware():
    facts = environment.fingerprint()
    assert facts["python"] == platform.python_version()
    assert facts["packages"]["torch"] == version("torch")
    assert set(facts["packages"]) >= {"compress-search", "transformers", "optuna", "ray", "onnxruntime"}
    assert facts["cpu"]["cores"] == environment.usable_cores() >= 1
    assert facts["memory_gb"] > 0.1


def test_it_is_plain_json_and_each_caller_has_a_copy():
    facts = environment.fingerprint()
    assert json.loads(json.dumps(facts)) == facts
    facts["packages"].clear()
    assert environment.fingerprint()["packages"]


def test_it_names_no_person_no_machine_and_no_path():
    text = json.dumps(environment.fingerprint())
    for secret in (platform.node(), str(Path.home()), sys.prefix, str(Path.cwd())):
        assert secret not in text
    if len(getpass.getuser()) > 4:
        assert getpass.getuser() not in text


def test_it_needs_no_heavy_import():
    code = (
        "import sys; from compress_search.environment import fingerprint, host_kind; fingerprint(); host_kind();"
        "print([m for m in ('torch', 'ray', 'transformers', 'optuna') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.skipif(platform.system() != "Linux", reason="only Linux lists the processor's features")
def test_flags_are_the_ones_the_kernel_lists():
    listed = Path("/proc/cpuinfo").read_text()
    flags = environment.fingerprint()["cpu"]["flags"]
    assert flags, "every processor that runs the runtimes has at least one of the known features"
    assert all(flag in listed for flag in flags)


def test_a_host_kind_is_stable_and_follows_the_hardware(monkeypatch):
    before = environment.host_kind()
    assert environment.host_kind() == before
    environment._fingerprint.cache_clear()
    monkeypatch.setattr(environment, "cpu_flags", lambda: frozenset({"avx512_vnni", "made_up_feature"}))
    without_most = environment.host_kind()
    assert without_most != before
    environment._fingerprint.cache_clear()
    monkeypatch.setattr(environment, "cpu_flags", lambda: frozenset({"avx512_vnni"}))
    assert environment.host_kind() == without_most, "features that no runtime looks at make no other kind"


def test_a_host_kind_is_a_short_file_name(monkeypatch):
    monkeypatch.setattr(environment, "cpu_model", lambda: "Intel(R) Xeon(R) CPU @ 2.20GHz / odd")
    kind = environment.host_kind()
    assert kind.startswith("intel-r-xeon-")
    assert kind.replace("-", "").isalnum()


def test_gpus_are_read_from_the_driver(monkeypatch):
    line = "NVIDIA H200, 143771, 570.86.15, 9.0\n"
    monkeypatch.setattr(environment, "_output", lambda *command: line * 2)
    first, second = environment.gpus()
    assert first == second
    assert first["name"] == "NVIDIA H200"
    assert first["compute_capability"] == "9.0"


def test_a_missing_or_broken_tool_means_no_device(monkeypatch):
    monkeypatch.setattr(environment, "_QUERY", ("no-such-tool-anywhere",))
    assert environment.gpus() == []
    monkeypatch.setattr(environment, "_QUERY", (sys.executable, "-c", "print('No devices'); raise SystemExit(6)"))
    assert environment.gpus() == []


def test_a_package_that_is_not_installed_is_left_out(monkeypatch):
    monkeypatch.setattr(environment, "PACKAGES", ("torch", "no-such-package-anywhere"))
    assert list(environment.fingerprint()["packages"]) == ["torch"]

"""The doctor tells what is broken from what is merely not there, and looks at what a study needs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from compress_search import cli, doctor, hub
from compress_search.doctor import examine, require_sound
from compress_search.errors import CompressSearchError
from compress_search.runtimes import probe
from compress_search.study import load_study


@pytest.fixture(autouse=True)
def cheap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, a hub that is away, and kernels that are known."""
    monkeypatch.setenv("COMPRESS_SEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "reachable", lambda: False)
    known = (probe.Kernel("int8", True, 0.5, ""), probe.Kernel("compile", True, None, "it can"))
    monkeypatch.setattr(probe, "describe_kernels", lambda device: known)
    return tmp_path


def state_of(found: doctor.Findings, name: str) -> str:
    return next(check.state for check in found.checks if check.name == name)


def test_the_help_says_how_slow_a_kernel_may_be_to_be_called_real() -> None:
    told = " ".join(str(cli.main.commands["doctor"].help).split())
    assert all(f"{limit:g} times" in told for limit in set(probe._LIMITS.values()))
    assert all(name in told for name in ("int8-exact", "onnx-cuda", "compile"))


def test_a_sound_machine_without_a_hub_is_sound() -> None:
    found = examine(quick=True)
    require_sound(found)
    assert state_of(found, "Hugging Face hub") == "absent"
    assert {name for name in doctor.NEEDED if state_of(found, name) == "ok"} == set(doctor.NEEDED)
    assert json.loads(json.dumps(found.to_dict()))["ok"]


def test_compiling_is_tried_unless_there_is_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = probe.Kernel("compile", True, 0.8, "0.80 of eager torch's time")
    monkeypatch.setattr(probe, "compiled_kernel", lambda device: measured)
    assert ("cpu", measured) in examine().kernels
    assert ("cpu", measured) not in examine(quick=True).kernels


def test_a_package_that_does_not_load_is_broken_and_no_kernel_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "NEEDED", ("no_such_package",))
    found = examine(quick=True)
    assert found.kernels == ()
    assert [check.name for check in found.broken] == ["no_such_package"]
    assert "ModuleNotFoundError" in found.broken[0].finding
    with pytest.raises(CompressSearchError, match="broken: no_such_package"):
        require_sound(found)


def test_a_cache_that_cannot_be_written_is_broken(cheap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cheap / "file").touch()
    monkeypatch.setenv("COMPRESS_SEARCH_CACHE", str(cheap / "file" / "below"))
    assert state_of(examine(quick=True), "cache folder") == "broken"


def test_a_study_is_asked_for_its_database(tiny_study: Callable[..., Path], cheap: Path) -> None:
    found = examine(load_study(tiny_study()), quick=True)
    assert state_of(found, "database") == "ok"
    assert "cluster" not in {check.name for check in found.checks}, "a local one is started by the run"
    away = load_study(tiny_study(storage="postgresql://127.0.0.1:9/none"))
    assert state_of(examine(away, quick=True), "database") == "broken"

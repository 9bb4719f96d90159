"""What a driver decides before and after trials run, without running any."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compress_search.driver import Prepared, _finalized, baselines, keep_artifacts, refuse_another_device
from compress_search.errors import StudyError
from compress_search.plan import Plan
from compress_search.registry import Registry
from compress_search.study import load_study
from tests.fake_plan import TEACHER, after_teacher, fake_search, given, measured

NOTHING: Any = None


def plan_on(*kernels: str) -> Plan:
    traits = ["timed", *(f"kernel:{name}" for name in kernels)]
    return Plan(NOTHING, Registry(), TEACHER.having(*traits), {}, ())


def test_the_teacher_in_int8_is_a_baseline_where_int8_is_real() -> None:
    found = dict(baselines(plan_on("int8", "weight-only", "bf16")))
    assert list(found) == ["teacher", "teacher-int8"]
    assert found["teacher-int8"].steps[0].params["weight_bits"] == 8


@pytest.mark.parametrize("kernels", [("bf16",), ()])
def test_no_other_precision_is_called_int8(kernels: tuple[str, ...]) -> None:
    assert [name for name, _ in baselines(plan_on(*kernels))] == ["teacher"]


def test_a_study_goes_on_where_it_was_begun_only(tiny_study: Callable[..., Path]) -> None:
    def prepared(gpus: int) -> Prepared:
        study = load_study(tiny_study(cluster={"gpus_per_trial": gpus}))
        return Prepared(study, Plan(study, Registry(), TEACHER, {}, ()), NOTHING, NOTHING, NOTHING)

    refuse_another_device(prepared(0))
    with pytest.raises(StudyError, match=r"cluster.gpus_per_trial: this study was begun on cpu"):
        refuse_another_device(prepared(1))


def test_a_study_is_final_once_its_front_and_its_baselines_are(tmp_path: Path) -> None:
    search = after_teacher(fake_search(tmp_path))
    first = given(search.next())
    search.finish(measured(first, accuracy=1.0, latency_ms=1.0))  # dominates the teacher
    store, study = search.store, search.plan.study
    store.write_measurement("fake", first.number, "final", {})
    assert not _finalized(store, study)
    store.write_measurement("fake", 0, "final", {})
    assert _finalized(store, study)
    store.write_measurement("fake", 0, "final", {})
    second = given(search.next())
    search.finish(measured(second, accuracy=1.1))  # what more trials add to the front is measured too
    assert not _finalized(store, study)


def test_the_oldest_artefacts_go_first_and_never_by_halves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for age, name in enumerate((".half", "member", "new", "older", "oldest")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.onnx").write_bytes(bytes(100))
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    removed: list[str] = []

    def killed_at_the_second(path: Path) -> None:
        removed.append(path.name)
        if len(removed) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        keep_artifacts(tmp_path, {"member"}, limit=150)
    assert not (tmp_path / "oldest").exists()
    monkeypatch.undo()
    keep_artifacts(tmp_path, {"member"}, limit=150)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["member", "new"]

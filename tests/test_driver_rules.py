"""What a driver decides before and after trials run, without running any."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compress_search.driver import Prepared, baselines, make_output, placed, prepare, refuse_another_device, run
from compress_search.errors import CompressSearchError, StudyError
from compress_search.finish import finalize, front_of, keep_artifacts, measured_once
from compress_search.plan import Plan
from compress_search.registry import Registry
from compress_search.search.identity import identity
from compress_search.storage import Store, schema
from compress_search.study import load_study
from tests.fake_plan import TEACHER, after_teacher, fake_search, given, measured

NOTHING: Any = None


def plan_on(*kernels: str) -> Plan:
    traits = ["timed", *(f"kernel:{name}" for name in kernels)]
    return Plan(NOTHING, Registry(), TEACHER.having(*traits), {}, ())


@pytest.mark.parametrize(
    ("written", "kernels", "precision"),
    [("auto", {"bf16"}, "bf16"), ("auto", {"int8"}, "fp32"), ("bf16", set(), "bf16"), ("fp32", {"bf16"}, "fp32")],
)
def test_the_precision_of_training_is_settled_when_a_study_begins(
    written: str, kernels: set[str], precision: str, tiny_study: Callable[..., Path]
) -> None:
    study = load_study(tiny_study(methods=["theseus"], training={"precision": written}))
    prepared = prepare(study, probe=lambda device: frozenset(kernels))
    assert prepared.brief.study["training"]["precision"] == prepared.study.training.computes_in == precision
    resumed = prepare(study, prepared.plan.teacher, probe=lambda device: pytest.fail("asked again"))
    assert identity(resumed.plan) == identity(prepared.plan)


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
        return Prepared(study, Plan(study, Registry(), TEACHER, {}, ()), NOTHING, NOTHING, {}, NOTHING)

    refuse_another_device(prepared(0))
    with pytest.raises(StudyError, match=r"cluster.gpus_per_trial: this study was begun on cpu"):
        refuse_another_device(prepared(1))


def test_what_a_worker_finds_wrong_is_told_with_its_place(tiny_study: Callable[..., Path]) -> None:
    path = tiny_study()
    line = path.read_text(encoding="utf-8").splitlines().index("  model: teacher") + 1
    with pytest.raises(StudyError) as caught, placed(load_study(path)):
        raise StudyError("the weights are damaged", key="teacher.model")
    assert str(caught.value) == f"{path}:{line}: teacher.model: the weights are damaged"
    with pytest.raises(StudyError, match=r"^rows.csv:7: no label$"), placed(load_study(path)):
        raise StudyError("no label", file="rows.csv", line=7)


def test_an_output_that_was_taken_meanwhile_is_told_with_its_place(tiny_study: Callable[..., Path]) -> None:
    study = load_study(tiny_study())
    study.output.write_text("")
    with pytest.raises(StudyError, match=r"study.yaml:\d+: output: cannot create .*/run: File exists$"):
        make_output(study)


def test_two_studies_do_not_share_a_folder(tiny_study: Callable[..., Path]) -> None:
    study = load_study(path := tiny_study())
    make_output(study)
    make_output(study)  # again, as a study that is resumed does
    before = {file: file.read_bytes() for file in study.output.iterdir()}
    other = load_study(path, ["name=another"])
    with pytest.raises(StudyError, match=rf"output: .*/run holds the study '{study.name}': expected a folder"):
        make_output(other)
    assert {file: file.read_bytes() for file in study.output.iterdir()} == before


def test_tables_of_an_older_version_are_upgraded_before_they_are_read(
    tiny_study: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Upgraded(Exception):
        pass

    def upgrade(store: Store) -> None:
        raise Upgraded

    study = load_study(tiny_study())
    Store(study.storage).create()
    assert not Store(study.storage).outdated
    (only,) = schema.revisions()
    monkeypatch.setattr(schema, "revisions", lambda: ["9999", only])
    assert Store(study.storage).outdated
    monkeypatch.setattr(Store, "create", upgrade)
    with pytest.raises(Upgraded):
        run(study, executor="local")


def test_a_study_is_final_once_its_front_and_its_baselines_are(tmp_path: Path) -> None:
    search = after_teacher(fake_search(tmp_path))
    first = given(search.next())
    search.finish(measured(first, accuracy=1.0, latency_ms=1.0))  # dominates the teacher
    store, study = search.store, search.plan.study
    store.write_measurement("fake", first.number, "final", {})
    assert measured_once(study, store)
    store.write_measurement("fake", 0, "final", {})
    assert not measured_once(study, store)
    store.write_measurement("fake", 0, "final", {})
    second = given(search.next())
    search.finish(measured(second, accuracy=1.1))  # what more trials add to the front is measured too
    assert measured_once(study, store)


class SecondLook:
    """An executor whose second measurement finds these ratios to the teacher."""

    def __init__(self, ratios: dict[int, float], gone: tuple[int, ...] = ()) -> None:
        self.ratios, self.gone, self.asked = ratios, gone, list[list[int]]()

    def call(self, job: str, artifacts: dict[int, str]) -> dict[int, dict[str, Any]]:
        self.asked.append(sorted(artifacts))
        return {
            number: {"error": f"{artifact}: no such folder"}
            if number in self.gone
            else {"latency": self.latency(self.ratios.get(number, 1.0))}
            for number, artifact in artifacts.items()
        }

    def latency(self, ratio: float) -> dict[str, Any]:
        times = dict.fromkeys(("p50_ms", "p95_ms", "reference_ms", "throughput", "control", "spread"), 1.0)
        return {**times, "ratio": ratio, "low": 0.9 * ratio, "high": 1.1 * ratio, "noisy": False}


def test_what_is_too_good_to_be_true_is_found_out_and_its_successor_measured_too(tmp_path: Path) -> None:
    search = after_teacher(fake_search(tmp_path))
    study, store = search.plan.study, search.store
    first, second = given(search.next()), given(search.next())
    for trial, latency_ms in ((first, 1.0), (second, 2.0)):  # of a teacher that takes 5 ms
        costs = {"latency_ms": latency_ms, "speedup": 5 / latency_ms, "throughput": 1000 / latency_ms}
        result = measured(trial, accuracy=1.0, **costs)
        search.finish(replace(result, artifact=f"artifacts/{trial.number}"))
        (study.output / "artifacts" / str(trial.number)).mkdir(parents=True)
    executor = SecondLook({first.number: 0.8, second.number: 0.4})
    finalize(study, executor, store)  # type: ignore[arg-type]
    assert executor.asked[0] == [first.number]  # the second was dominated, until the first was measured again
    assert [second.number] in executor.asked
    rows = {row.number: row for row in store.trials(study.name)}
    assert rows[first.number].metrics["latency_ms"] == pytest.approx(4.0)
    assert rows[first.number].intervals["speedup"] == pytest.approx((1 / 0.88, 1 / 0.72))
    assert rows[second.number].metrics["throughput"] == pytest.approx(500.0)
    assert rows[second.number].intervals["throughput"] == pytest.approx((500 / 1.1, 500 / 0.9))
    assert [row.number for row in front_of(study, list(rows.values()))] == [second.number]
    assert set(measured_once(study, store)) == {0}  # this teacher left no artefact to measure


def test_a_member_that_is_lost_costs_the_others_nothing(tmp_path: Path) -> None:
    search = after_teacher(fake_search(tmp_path))
    study, store = search.plan.study, search.store
    first, second = given(search.next()), given(search.next())
    for trial, accuracy, latency_ms in ((first, 0.9, 1.0), (second, 1.0, 2.0)):
        costs = {"latency_ms": latency_ms, "speedup": 5 / latency_ms, "throughput": 1000 / latency_ms}
        search.finish(replace(measured(trial, accuracy=accuracy, **costs), artifact=f"artifacts/{trial.number}"))
        (study.output / "artifacts" / str(trial.number)).mkdir(parents=True)
    executor = SecondLook({second.number: 0.5}, gone=(first.number,))
    for _ in range(2):
        with pytest.raises(
            CompressSearchError, match=rf"trial {first.number} cannot .*: artifacts/{first.number}: "
        ):
            finalize(study, executor, store)  # type: ignore[arg-type]
    assert executor.asked == [[first.number, second.number], [first.number]]
    rows = {row.number: row for row in store.trials(study.name)}
    assert rows[second.number].metrics["latency_ms"] == pytest.approx(5.0 * 0.5)
    executor.gone = ()
    finalize(study, executor, store)  # type: ignore[arg-type]
    assert set(measured_once(study, store)) == {0}


def test_a_study_says_how_much_is_kept_beside_its_front(tmp_path: Path) -> None:
    after_teacher(fake_search(tmp_path))
    search = fake_search(tmp_path, artifacts={"keep_gb": 0.25e-6})  # a resumed study may change it
    study, folder = search.plan.study, search.plan.study.output / "artifacts"
    for age in range(4):
        (folder / str(age)).mkdir(parents=True)
        (folder / str(age) / "model.onnx").write_bytes(bytes(100))
        os.utime(folder / str(age), (1e9 - age, 1e9 - age))
    finalize(study, SecondLook({}), search.store)  # type: ignore[arg-type]
    assert sorted(path.name for path in folder.iterdir()) == ["0", "1"]


def test_what_is_kept_is_no_part_of_what_a_study_is(tiny_study: Callable[..., Path]) -> None:
    kept, usual = load_study(tiny_study(artifacts={"keep_gb": 0})), load_study(tiny_study())
    assert (kept.artifacts.keep_gb, usual.artifacts.keep_gb) == (0, 5)
    assert kept.identity() == usual.identity()


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

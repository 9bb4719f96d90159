"""The statistics on synthetic samples, the client on a fake process, the bench on real artefacts."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress_search.errors import BenchDied, BenchError
from compress_search.measure import MEMORY_RUNS, Bench, Latency, Score, summarize
from compress_search.measure.bench import CELL_ROUNDS, TRIES, undisturbed
from compress_search.measure.process import pinned
from compress_search.tasks import Task
from tests import tiny

REPOSITORY = Path(__file__).resolve().parents[1]
PROTOCOL = {"batch_size": 1, "seed": 0, "cells": [[8, 1.0]]}
TASK = Task("text-classification", ("negative", "positive"))

times = st.floats(0.01, 100.0)


# statistics


def rounds(ratio: float, seed: int, *, size: int = 60, noise: float = 0.05, slow_rounds: float = 0.3) -> dict:
    """A candidate ``ratio`` times as slow: mixed lengths, jitter, and a machine that is 3 × slower now and then.

    A slow minute hits all of a round alike, which is what interleaving is for.
    """
    rng = np.random.default_rng(seed)
    length = rng.uniform(1.0, 10.0, size)
    machine = np.where(rng.random(size) < slow_rounds, 3.0, 1.0)
    jitter = np.exp(rng.normal(0.0, noise, (3, size)))
    base = length * machine
    return {
        "candidate_ms": (ratio * base * jitter[0]).tolist(),
        "reference_ms": (base * jitter[1]).tolist(),
        "control_ms": (base * jitter[2]).tolist(),
        "cell": [0] * size,
    }


@pytest.mark.parametrize("ratio", [0.25, 1.0, 3.0])
def test_the_ratio_is_found_on_a_machine_that_keeps_changing_speed(ratio):
    latency = summarize(rounds(ratio, seed=1), PROTOCOL)
    assert latency.ratio == pytest.approx(ratio, rel=0.05)
    assert latency.low <= latency.ratio <= latency.high
    assert latency.control == pytest.approx(1.0, abs=0.05)
    assert not latency.noisy


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    covered = [(found := summarize(rounds(0.5, seed), PROTOCOL)).low <= 0.5 <= found.high for seed in range(200)]
    assert 0.90 <= np.mean(covered) <= 0.99


def test_the_fewest_rounds_of_five_lengths_make_an_interval_too():
    """The cells take turns; jitter of 5 % is not a width of nothing."""
    size = 5 * CELL_ROUNDS
    cells = {"cell": [number % 5 for number in range(size)]}
    protocol = {**PROTOCOL, "cells": [[width, 0.2] for width in range(5)]}
    found = [summarize({**rounds(0.5, seed, size=size), **cells}, protocol) for seed in range(100)]
    assert np.mean([latency.low <= 0.5 <= latency.high for latency in found]) >= 0.90
    assert min(latency.high - latency.low for latency in found) > 0.005


def test_more_rounds_narrow_the_interval():
    few, many = (summarize(rounds(0.5, 3, size=size), PROTOCOL) for size in (20, 500))
    assert many.high - many.low < few.high - few.low


def test_times_of_slow_rounds_that_hit_one_side_only_make_it_noisy():
    samples = rounds(0.5, seed=2)
    samples["control_ms"] = [1.2 * value for value in samples["control_ms"]]
    assert summarize(samples, PROTOCOL).noisy, "the reference seems slower than itself"
    samples = rounds(0.5, seed=2)
    for index in range(0, 60, 6):
        samples["reference_ms"][index] *= 2
    latency = summarize(samples, PROTOCOL)
    assert latency.control == pytest.approx(1.0, abs=0.1), "the median does not see it"
    assert latency.noisy, "the spread does"


def test_every_figure_of_a_latency_by_hand():
    samples = {"candidate_ms": [1.0, 2.0, 3.0], "reference_ms": [2.0, 4.0, 6.0], "control_ms": [2.0, 4.0, 6.6]}
    latency = summarize({**samples, "cell": [0, 0, 0]}, {**PROTOCOL, "batch_size": 8})
    assert (latency.ratio, latency.low, latency.high) == (0.5, 0.5, 0.5)
    assert (latency.p50_ms, latency.reference_ms, latency.control) == (2.0, 4.0, 1.0)
    assert latency.p95_ms == 3.0
    assert latency.throughput == pytest.approx(1000 * 8 / 2.0)
    assert latency.spread == pytest.approx(1.0)


def test_an_expectation_over_lengths_by_hand():
    """Three in four inputs are short, where the candidate takes half the time; on long ones it gains nothing."""
    samples = {
        "candidate_ms": [1.0, 10.0, 1.0, 10.0, 3.0, 10.0],
        "reference_ms": [2.0, 10.0, 2.0, 10.0, 6.0, 10.0],  # the third round of short ones was slow for both
        "control_ms": [2.0, 10.0, 2.0, 10.0, 6.0, 10.0],
        "cell": [0, 1, 0, 1, 0, 1],
    }
    latency = summarize(samples, {**PROTOCOL, "cells": [[8, 0.75], [40, 0.25]]})
    reference, candidate = 0.75 * 2 + 0.25 * 10, 0.75 * 1 + 0.25 * 10
    assert latency.reference_ms == pytest.approx(reference)
    assert latency.ratio == pytest.approx(candidate / reference)
    assert latency.throughput == pytest.approx(1000 / candidate)
    assert (latency.control, latency.noisy) == (1.0, False)
    assert latency.p50_ms == 1.0
    assert latency.p95_ms == 10.0
    assert latency.low <= latency.ratio <= latency.high


@given(st.lists(st.tuples(times, times), min_size=1, max_size=40))
def test_an_interval_lies_within_the_data_and_is_the_seeds(pairs):
    ratios = [candidate / reference for candidate, reference in pairs]
    samples = {
        "candidate_ms": [candidate for candidate, _ in pairs],
        "reference_ms": [reference for _, reference in pairs],
        "control_ms": [reference for _, reference in pairs],
        "cell": [0] * len(pairs),
    }
    latency = summarize(samples, PROTOCOL)
    near = 1 + 1e-9
    assert min(ratios) <= latency.low * near
    assert latency.low <= latency.high <= max(ratios) * near
    assert summarize(samples, PROTOCOL) == latency, "the same seed gives the same interval"


@given(st.lists(times, min_size=2, max_size=30), st.floats(0.1, 10.0))
def test_a_uniformly_slower_machine_changes_milliseconds_and_no_ratio(values, factor):
    samples = {"candidate_ms": values, "reference_ms": values[::-1], "control_ms": values}
    slower = {name: [factor * value for value in row] for name, row in samples.items()}
    here, there = (summarize({**taken, "cell": [0] * len(values)}, PROTOCOL) for taken in (samples, slower))
    assert there.ratio == pytest.approx(here.ratio)
    assert there.p50_ms == pytest.approx(factor * here.p50_ms)
    assert there.throughput == pytest.approx(here.throughput / factor)


def test_records_survive_json():
    latency = summarize(rounds(0.5, seed=0), PROTOCOL)
    assert Latency.from_dict(json.loads(json.dumps(latency.to_dict()))) == latency
    score = Score({"accuracy": 0.9}, {"accuracy": (0.8, 1.0)}, 10, 4, 0.1)
    assert Score.from_dict(json.loads(json.dumps(score.to_dict()))) == score


# the client, on a fake process


class FakeBench(Bench):
    module = "tests.fake_bench"

    def pid(self, name: str = "fine", **options) -> int:
        return int(self.score(Path(name), Path("split"), TASK, 1, **options).metrics["pid"])


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    with FakeBench(threads=3) as bench:
        yield bench


def test_one_process_serves_many_calls_with_its_threads_pinned(fake):
    assert fake.pid() == fake.pid()
    assert fake.score(Path("fine"), Path("split"), TASK, 1).metrics["threads"] == 3


def test_a_broken_artefact_is_one_clear_error_and_costs_no_restart(fake):
    before = fake.pid()
    with pytest.raises(BenchError, match=r"broken/artifact.json: expected the record") as caught:
        fake.pid("broken")
    assert (caught.value.kind, caught.value.details) == ("error", "Traceback …")
    assert not isinstance(caught.value, BenchDied)
    assert fake.pid() == before


@pytest.mark.parametrize(
    ("name", "cause"), [("crash", "signal 9; segfault in kernel 7"), ("exit", "exit status 3")]
)
def test_a_crash_is_told_and_the_next_call_has_a_new_process(fake, name, cause):
    before = fake.pid()
    with pytest.raises(BenchDied, match=f"the bench died during score of {name}: {cause}") as caught:
        fake.pid(name)
    assert caught.value.kind == "died"
    assert fake.pid() != before


def test_a_process_that_died_between_calls_is_replaced_unseen(fake):
    before = fake.pid()
    os.kill(before, signal.SIGKILL)
    psutil.wait_procs([psutil.Process(before)], timeout=5)
    assert fake.pid() != before


def test_a_hang_ends_at_its_time_limit(fake):
    before = fake.pid()
    started = time.monotonic()
    with pytest.raises(BenchDied, match=r"score of hang took longer than 0\.2 s") as caught:
        fake.pid("hang", timeout=0.2)
    assert time.monotonic() - started < 10
    assert caught.value.kind == "timeout"
    assert not psutil.pid_exists(before)
    assert fake.pid(timeout=30) != before


def test_a_closed_bench_leaves_no_process_and_starts_again(fake):
    before = fake.pid()
    fake.close()
    assert not psutil.pid_exists(before)
    assert fake.pid() != before


def test_calls_from_several_threads_take_turns(fake):
    found = []
    callers = [threading.Thread(target=lambda: found.append(fake.pid())) for _ in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(found) == 8
    assert len(set(found)) == 1


def test_a_noisy_measurement_is_repeated_and_the_calm_one_counts(fake):
    latency = fake.latency(Path("noisy-once"), Path("reference"), Path("split"), repeats=10)
    assert (latency.ratio, latency.control, latency.noisy) == (0.5, 1.0, False)


def test_a_machine_that_stays_noisy_is_reported_as_such(fake):
    latency = fake.latency(Path("always-noisy"), Path("reference"), Path("split"), repeats=10, retries=2)
    assert latency.noisy


def test_memory_is_the_peak_above_that_of_an_empty_bench_with_the_same_modules(fake):
    before = fake.pid()
    assert fake.memory(Path("fine"), Path("split")) == pytest.approx(50.0)
    assert fake.pid() == before, "memory is measured in processes of its own"


def test_of_several_peaks_the_largest_counts(fake, tmp_path):
    assert fake.memory(tmp_path / "artifact", Path("split")) == pytest.approx(100.0)
    assert len(list(tmp_path.iterdir())) == MEMORY_RUNS, "each in a process of its own"


def test_every_numeric_library_is_pinned():
    assert {name: value for name, value in pinned(2).items() if name.endswith("THREADS")} == {
        "OMP_NUM_THREADS": "2",
        "MKL_NUM_THREADS": "2",
        "OPENBLAS_NUM_THREADS": "2",
    }


# what the bench process computes, in this process


class FakeSplit:
    """Rows of the given lengths; row i is made of the number i."""

    def __init__(self, lengths, labels) -> None:
        self.lengths, self.labels = np.array(lengths), np.array(labels)

    def __len__(self) -> int:
        return len(self.lengths)

    def arrays(self, rows) -> dict:
        rows = np.asarray(rows)
        mask = np.arange(self.lengths[rows].max()) < self.lengths[rows, None]
        ids = np.where(mask, rows[:, None], 0)
        return {"input_ids": ids, "attention_mask": mask, "labels": self.labels[rows], "index": rows}


def test_predictions_come_in_the_splits_order_from_batches_sorted_by_length():
    from compress_search.measure.bench import predict

    widths = []

    def runner(batch):
        assert set(batch) == {"input_ids", "attention_mask"}, "labels are not for the model to see"
        widths.append(batch["input_ids"].shape)
        return batch["input_ids"][:, :1] * np.array([[1.0, 2.0]])

    logits, labels = predict(runner, FakeSplit([5, 2, 9, 3], [10, 11, 12, 13]), TASK, batch_size=2)
    assert [row.tolist() for row in logits] == [[0, 0], [1, 2], [2, 4], [3, 6]]
    assert labels == [10, 11, 12, 13]
    assert widths == [(2, 3), (2, 9)]
    logits, labels = predict(
        runner, FakeSplit([5, 2, 9, 3], [10, 11, 12, 13]), TASK, batch_size=2, as_they_come=True
    )
    assert [row.tolist() for row in logits] == [[0, 0], [1, 2], [2, 4], [3, 6]]
    assert widths[2:] == [(2, 5), (2, 9)]


def test_interleaving_shuffles_the_order_and_times_each_runner():
    from compress_search.measure.bench import interleave

    now, order = [0], []

    def runner(name, milliseconds):
        def run(batch):
            order.append((name, batch))
            now[0] += int(milliseconds * 1e6)

        return run

    runners = [runner("a", 1.0), runner("b", 2.5)]
    elapsed = interleave(
        runners, ((number, number) for number in range(40)), seed=0, clock=lambda: now[0], preemptions=lambda: 0
    )
    assert elapsed.tolist() == [[1.0, 2.5]] * 40
    assert [batch for _, batch in order] == [batch for batch in range(40) for _ in range(4)]
    assert order[::2] == order[1::2], "an untimed pass goes before each timed one"
    firsts = [name for name, _ in order[::4]]
    assert 10 < firsts.count("a") < 30


@pytest.mark.parametrize(("interrupted", "passes", "expected"), [(0, 1, 1), (3, 4, 1), (99, TRIES, 10)])
def test_a_pass_that_the_scheduler_interrupted_is_timed_anew(interrupted, passes, expected):
    now, switches, timed = [0], [0], [0]

    def run(batch):
        # every second pass is a timed one; the first few of those are interrupted and take ten times as long
        timed[0] += 1
        disturbed = timed[0] % 2 == 0 and timed[0] // 2 <= interrupted
        switches[0] += disturbed
        now[0] += 10 if disturbed else 1

    assert undisturbed(run, {}, lambda: now[0], lambda: switches[0]) == expected
    assert timed[0] == 2 * passes


@pytest.fixture
def station(monkeypatch, tmp_path):
    """A bench whose artefacts are names: ``loads`` and ``passes`` tell what was loaded and which widths ran."""
    from compress_search.measure import bench

    loads, passes = [], []

    def load_runner(directory, threads, device):
        loads.append(directory.name)
        return lambda batch: passes.append((directory.name, batch["input_ids"].shape[1]))

    def read(directory):
        buckets = (4, 9) if "bucketed" in directory.name else ()
        return SimpleNamespace(buckets=buckets, max_length=5 if "cut" in directory.name else None)

    splits = {
        "whole": FakeSplit([3, 4, 5, 6, 7, 8, 9], [0] * 7),
        "cut": FakeSplit([3, 4, 5, 5, 5, 5, 5], [0] * 7),
    }
    monkeypatch.setattr(bench, "load_runner", load_runner)
    monkeypatch.setattr(bench, "involuntary_switches", lambda: 0)  # an interrupted pass would be run again
    monkeypatch.setattr(bench, "Artifact", SimpleNamespace(read=read))
    monkeypatch.setattr(bench, "Split", SimpleNamespace(open=lambda path: splits[str(path)]))
    made = bench.Station(threads=1, device="cpu")
    options = {"split": "whole", "reference_split": "whole", "batch_size": 1, "warmup": 5, "seed": 0}

    def latency(candidate, repeats=60, **changes):
        names = [str(tmp_path / name) for name in (candidate, "teacher")]
        return made.latency(*names, **{**options, "repeats": repeats, **changes})

    return SimpleNamespace(latency=latency, loads=loads, passes=passes)


def test_the_latency_operation_warms_up_and_keeps_the_reference_loaded(station):
    found = station.latency("small")
    assert {len(found["samples"][name]) for name in found["samples"]} == {60}
    assert sum(share for _, share in found["cells"]) == pytest.approx(1.0)
    assert set(found["samples"]["width"]) == {width for width, _ in found["cells"]}
    assert len(station.passes) == 3 * 2 * (5 + 60)
    station.latency("smaller")
    assert station.loads == ["small", "teacher", "teacher", "smaller"]


def test_the_lengths_are_the_same_for_every_candidate_and_cells_end_at_its_buckets(station):
    cells = {name: station.latency(name)["cells"] for name in ("plain", "bucketed", "cut")}
    assert cells["plain"] == station.latency("other")["cells"]
    shares = {name: sum(share for width, share in rows if width <= 4) for name, rows in cells.items()}
    assert shares["bucketed"] == pytest.approx(2 / 7), "those that the first bucket holds"
    longer = sum(share for width, share in cells["cut"] if width > 5)
    assert longer == pytest.approx(4 / 7)


def test_a_candidate_reads_the_same_rows_as_its_own_longest_input_leaves_them(station):
    station.latency("cut", split="cut")
    widths = {name: {width for runner, width in station.passes if runner == name} for name in ("cut", "teacher")}
    assert max(widths["cut"]) == 5
    assert max(widths["teacher"]) > 5


@pytest.mark.parametrize("candidate", ["plain", "bucketed"])
@pytest.mark.parametrize("repeats", [2, 5, 29])
def test_few_repeats_become_as_many_as_every_cells_interval_takes(station, candidate, repeats):
    found = station.latency(candidate, repeats=repeats)
    counts = np.bincount(found["samples"]["cell"], minlength=len(found["cells"]))
    assert counts.tolist() == [6] * len(found["cells"]), "2 · (1/2)⁶ < 5 %"
    assert found["cells"] == station.latency(candidate, repeats=60)["cells"]


def test_a_rewritten_artefact_is_loaded_again(monkeypatch, tmp_path):
    from compress_search.measure import bench

    monkeypatch.setattr(bench, "load_runner", lambda directory, threads, device: object())
    station, file = bench.Station(1, "cpu"), tmp_path / "artifact.json"
    file.write_text("{}")
    first = station.runner(str(tmp_path))
    assert station.runner(str(tmp_path)) is first
    os.utime(file, ns=(1, 2))
    assert station.runner(str(tmp_path)) is not first


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError(), "oom"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "oom"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "oom"),
        (ValueError("shapes differ"), "error"),
    ],
)
def test_kinds_of_failure(error, kind):
    from compress_search.measure.bench import kind_of

    assert kind_of(error) == kind


@pytest.mark.slow
def test_the_peak_is_this_processes_own_and_not_its_parents():
    code = "from compress_search.measure.bench import peak_memory; print(peak_memory())"
    alone = peak_in_a_child(code)
    ballast = np.ones(60_000_000)  # 480 MB that a child's ru_maxrss would inherit
    assert peak_in_a_child(code) == pytest.approx(alone, rel=0.1)
    assert ballast.nbytes > alone * 0.1


def peak_in_a_child(code: str) -> int:
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


# the bench process, on real artefacts


@pytest.fixture(scope="module")
def materials(tmp_path_factory):
    """Artefacts of a tiny and a much larger network, and a tokenised split."""
    from compress_search.candidate import Candidate
    from compress_search.data import tokenize_rows
    from compress_search.data.rows import Rows
    from compress_search.encoders import subject_of
    from compress_search.runtimes.lowering import lower

    folder = tmp_path_factory.mktemp("bench")
    tokenizer = tiny.tiny_tokenizer()

    def artifact(name: str, **changes) -> Path:
        network = tiny.tiny_network(**changes)
        candidate = Candidate(network, tokenizer, subject_of(network, TASK.name))
        lower(candidate, folder / name, TASK)
        return folder / name

    rows = tiny.tiny_rows(size=60)
    labels = [TASK.labels.index(row["label"]) for row in rows]
    split = tokenize_rows(Rows([row["text"] for row in rows], None, labels), tokenizer, 32, TASK, folder)
    texts = [row["text"] for row in rows]
    return SimpleNamespace(
        small=artifact("small"),
        large=artifact("large", layers=6, hidden_size=256),
        split=split.path,
        other=tokenize_rows(Rows(texts, None, [1 - label for label in labels]), tokenizer, 32, TASK, folder).path,
        half=tokenize_rows(Rows(texts[:30], None, labels[:30]), tokenizer, 32, TASK, folder).path,
        folder=folder,
    )


@pytest.fixture(scope="module")
def bench():
    with Bench() as bench:
        yield bench


def test_a_score_has_every_metric_and_does_not_depend_on_the_batch_size(bench, materials):
    one, many = (bench.score(materials.small, materials.split, TASK, size) for size in (1, 16))
    assert one.metrics == many.metrics
    assert set(one.metrics) == {"accuracy", "macro_f1"}
    low, high = one.intervals["accuracy"]
    assert low <= one.metrics["accuracy"] <= high
    assert one.examples == 60


def test_beside_a_reference_what_is_lost_has_an_interval(bench, materials):
    alone = bench.score(materials.small, materials.split, TASK, 16)
    beside = bench.score(materials.small, materials.split, TASK, 16, reference=materials.large)
    assert beside.metrics == alone.metrics
    assert set(beside.intervals) - set(alone.intervals) == {"accuracy_drop", "macro_f1_drop"}
    theirs = bench.score(materials.large, materials.split, TASK, 16).metrics["accuracy"]
    low, high = beside.intervals["accuracy_drop"]
    assert low <= theirs - beside.metrics["accuracy"] <= high
    same = bench.score(materials.small, materials.split, TASK, 16, reference=materials.small)
    assert same.intervals["accuracy_drop"] == (0.0, 0.0)


def test_a_reference_reads_its_own_split_and_is_another_once_it_is_rewritten(bench, materials, tmp_path):
    def lost(split: Path) -> tuple[float, float]:
        options = {"reference": tmp_path / "reference", "reference_split": split}
        return bench.score(materials.small, materials.split, TASK, 16, **options).intervals["accuracy_drop"]

    shutil.copytree(materials.large, tmp_path / "reference")
    bench.reference(tmp_path / "reference", materials.split, TASK)
    same, other = lost(materials.split), lost(materials.other)
    theirs = bench.score(tmp_path / "reference", materials.other, TASK, 16).metrics["accuracy"]
    ours = bench.score(materials.small, materials.split, TASK, 16).metrics["accuracy"]
    assert same != other
    assert other[0] <= theirs - ours <= other[1]
    shutil.rmtree(tmp_path / "reference")
    shutil.copytree(materials.small, tmp_path / "reference")
    for file in (tmp_path / "reference").rglob("*"):
        os.utime(file)
    assert lost(materials.split) == (0.0, 0.0)
    with pytest.raises(BenchError, match="30 examples, not the 60"):
        lost(materials.half)


def test_a_network_is_as_fast_as_itself_and_a_larger_one_is_slower(bench, materials):
    same = bench.latency(materials.small, materials.small, materials.split, repeats=40)
    slower = bench.latency(materials.large, materials.small, materials.split, repeats=20)
    assert 0.8 < same.ratio < 1.25
    assert 0.8 < same.control < 1.25
    assert slower.ratio > 1.5
    assert slower.low > 1.0
    assert slower.protocol["threads"] == 1
    rounds = len(slower.samples["candidate_ms"])
    assert rounds == len(slower.samples["width"]) == slower.protocol["repeats"] == CELL_ROUNDS * 5
    assert sum(share for _, share in slower.protocol["cells"]) == pytest.approx(1.0)


def test_garbage_on_disk_is_a_clear_error_and_the_bench_lives_on(bench, materials):
    garbage = materials.folder / "garbage"
    garbage.mkdir(exist_ok=True)
    with pytest.raises(BenchError, match=r"garbage/artifact\.json"):
        bench.score(garbage, materials.split, TASK, 1)
    (garbage / "artifact.json").write_text((materials.small / "artifact.json").read_text())
    (garbage / "model.onnx").write_bytes(b"no model at all")
    with pytest.raises(BenchError, match=r"garbage/model\.onnx") as caught:
        bench.score(garbage, materials.split, TASK, 1)
    assert "\n" not in str(caught.value)
    assert "Traceback" in caught.value.details
    assert bench.score(materials.small, materials.split, TASK, 16).examples == 60


@pytest.mark.slow
def test_a_larger_network_takes_more_memory(bench, materials):
    small, large = (bench.memory(path, materials.split) for path in (materials.small, materials.large))
    weights = (materials.large / "model.onnx").stat().st_size / 1e6
    assert 0 <= small < large
    assert weights <= large < 10 * weights


@pytest.mark.slow
def test_memory_of_onnx_files_is_told_without_torch_and_transformers(bench, materials):
    """They take seconds, in each of the processes that tell it."""
    request = {"artifact": str(materials.small), "split": str(materials.split), "batch_size": 1}
    modules = bench._ask_fresh("memory", request, None)["modules"]
    assert "onnxruntime" in modules
    assert not {"torch", "transformers"} & set(modules)


@pytest.mark.slow
def test_models_are_timed_in_a_process_that_has_every_engine_from_its_start(materials):
    with Bench() as bench:
        bench.score(materials.small, materials.split, TASK, 16)
        loaded = {Path(file.path).name for file in psutil.Process(bench._process._child.pid).memory_maps()}
    assert "libtorch_cpu.so" in loaded


def works(process: psutil.Process, patience: float) -> bool:
    """Whether it takes processor time within so many seconds; one that only waits takes next to none."""
    before, deadline = sum(process.cpu_times()[:2]), time.monotonic() + patience
    while sum(process.cpu_times()[:2]) - before < 0.2:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.slow
@pytest.mark.parametrize("busy", [True, False])
def test_a_killed_client_leaves_no_bench_behind(materials, busy):
    script = f"""
import sys, threading, time
from pathlib import Path
from compress_search.measure import Bench
from compress_search.tasks import Task
bench, split = Bench(), Path({str(materials.split)!r})
small, large = Path({str(materials.small)!r}), Path({str(materials.large)!r})
bench.latency(small, small, split, repeats=2)
print(bench._process._child.pid, flush=True)
if {busy}:
    bench.latency(large, large, split, repeats=1_000_000)
time.sleep(600)
"""
    client = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(client.stdout.readline()))
    assert works(child, patience=20 if busy else 1) is busy
    client.kill()
    client.wait()
    gone, alive = psutil.wait_procs([child], timeout=10)
    client.stdout.close()
    assert not alive
    assert gone == [child]


@pytest.mark.slow
def test_a_bench_started_by_a_thread_outlives_the_thread(materials):
    with Bench() as bench:
        starter = threading.Thread(target=bench.score, args=(materials.small, materials.split, TASK, 16))
        starter.start()
        starter.join()
        process = bench._process
        time.sleep(0.5)
        bench.score(materials.small, materials.split, TASK, 16)
        assert bench._process is process

"""What the teacher computes on the way is the same from disk as from a forward pass, and keeps to its limit."""

import errno
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock

from compress_search.data import Split, read, tokenize, training_batches
from compress_search.encoders import read_features
from compress_search.study import load_study
from compress_search.teacher import load_teacher, outputs, prepare_teacher, room
from compress_search.teacher.outputs import FILE, TeacherOutputs
from compress_search.teacher.room import hold
from tests import tiny

NAMES = ["hidden.0", "hidden.2", "query.1", "value.0", "scores.1", "probabilities.1", "values.0", "logits"]


@pytest.fixture
def prepared(tiny_study, tmp_path):
    """``prepared(kind)``: the teacher's directory, its network and the training split."""

    def prepare(kind="text-classification"):
        study = load_study(tiny_study(kind))
        raw, task = read(study)
        directory = prepare_teacher(study, raw, task, tmp_path / "cache")
        network, tokenizer = load_teacher(directory)
        return directory.name, network, tokenize(raw, tokenizer, study, task, tmp_path / "cache")["train"]

    return prepare


def kept(of):
    return sorted(path.parent.name for path in of.directory.glob(f"*/{FILE}"))


def batches(split, count=3, size=7):
    stream = training_batches(split, size, seed=3)
    return [next(stream) for _ in range(count)]


def close(found, expected, batch):
    """Equal where neither a token nor, in relations, its partner is padding."""
    real = batch["attention_mask"].bool()
    for name, tensor in expected.items():
        ours = found[name]
        assert ours.shape == tensor.shape
        if name.startswith(("query", "value.")):
            ours, tensor = (each.transpose(1, 2)[real] for each in (ours, tensor))
        elif name.startswith(("scores", "probabilities", "values")):
            pairs = (real[:, None, :, None] & real[:, None, None, :]).expand_as(tensor)
            ours, tensor = ours[pairs], tensor[pairs]
        elif name != "logits" or tensor.ndim == 3:
            ours, tensor = ours[real], tensor[real]
        torch.testing.assert_close(ours, tensor, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", list(tiny.ROWS))
def test_from_disk_as_from_a_forward_pass(prepared, tmp_path, kind):
    key, network, split = prepared(kind)
    stored = TeacherOutputs(network, key, split, tmp_path, limit=1e9)
    for batch in batches(split):
        with torch.no_grad():
            expected = read_features(network, batch, NAMES)
        close(stored(batch, NAMES), expected, batch)
    assert kept(stored) == ["hidden.0", "hidden.2", "key.1", "logits", "query.1", "value.0"]


def test_pooled_has_a_row_for_each_text(prepared, tmp_path):
    key, network, split = prepared()
    stored = TeacherOutputs(network, key, split, tmp_path, limit=1e9)
    batch = batches(split, 1)[0]
    torch.testing.assert_close(
        stored(batch, ["pooled"])["pooled"],
        read_features(network, batch, ["pooled"])["pooled"],
        atol=1e-5,
        rtol=1e-5,
    )
    assert np.load(stored.directory / "pooled" / FILE).shape == (len(split), 32)


def test_more_padding_than_the_rows_need_is_no_matter(prepared, tmp_path):
    key, network, split = prepared()
    stored = TeacherOutputs(network, key, split, tmp_path, limit=1e9)
    batch = batches(split, 1)[0]
    wide = {n: torch.nn.functional.pad(t, (0, 4)) if t.ndim == 2 else t for n, t in batch.items()}
    length = batch["input_ids"].shape[1]
    narrow, found = stored(batch, ["hidden.1"])["hidden.1"], stored(wide, ["hidden.1"])["hidden.1"]
    assert torch.equal(found[:, :length], narrow)
    assert not found[:, length:].any()


def test_the_teacher_runs_once_over_the_rows(prepared, tmp_path, monkeypatch):
    key, network, split = prepared()
    asked = ["hidden.1", "scores.0"]
    TeacherOutputs(network, key, split, tmp_path, 1e9)(batches(split, 1)[0], asked)
    monkeypatch.setattr(outputs, "read_features", lambda *_: pytest.fail("the teacher was run again"))
    again = TeacherOutputs(network, key, split, tmp_path, 1e9)
    assert set(again(batches(split, 1)[0], ["hidden.1", "query.0"])) == {"hidden.1", "query.0"}


def test_beyond_the_limit_nothing_is_written_and_the_answer_is_the_same(prepared, tmp_path):
    key, network, split = prepared()
    computed = TeacherOutputs(network, key, split, tmp_path, limit=1000)
    batch = batches(split, 1)[0]
    close(computed(batch, NAMES), read_features(network, batch, NAMES), batch)
    assert not computed.directory.exists()


def test_what_is_sooner_computed_than_read_is_not_kept(prepared, tmp_path, monkeypatch):
    key, network, split = prepared()
    lent, batch = TeacherOutputs(network, key, split, tmp_path, limit=1e9), batches(split, 1)[0]
    linear = sum(part.weight.numel() for part in network.modules() if isinstance(part, torch.nn.Linear))
    states = 32 * 4 / outputs.READING  # seconds to read a token of one layer
    monkeypatch.setattr(outputs, "ARITHMETIC", {"cpu": linear / (0.5 * states)})
    close(lent(batch, ["hidden.1"]), read_features(network, batch, ["hidden.1"]), batch)
    assert not lent.directory.exists()
    lent(batch, ["logits"])  # two numbers a text
    assert kept(lent) == ["logits"]
    monkeypatch.setattr(outputs, "ARITHMETIC", {"cpu": linear / (1.5 * states)})
    lent(batch, ["hidden.1"])
    assert kept(lent) == ["hidden.1", "logits"]
    close(lent(batch, ["hidden.1", "hidden.2"]), read_features(network, batch, ["hidden.1", "hidden.2"]), batch)
    assert kept(lent) == ["hidden.1", "logits"], "both together are not"


def test_whether_it_is_stored_does_not_depend_on_what_was_asked_before(prepared, tmp_path):
    key, network, split = prepared()
    one = int(split.offsets[-1]) * 32 * 4
    limited = TeacherOutputs(network, key, split, tmp_path, limit=2.5 * one)
    batch = batches(split, 1)[0]
    for asked in (["hidden.0", "hidden.1"], ["hidden.1", "hidden.2"], ["query.0"], ["query.0", "key.0"]):
        limited(batch, asked)
        assert set(asked) <= set(kept(limited))
        size = sum(path.stat().st_size for path in limited.directory.glob(f"*/{FILE}"))
        assert size <= limited.limit + 1000  # headers of the files
    assert kept(limited) == ["key.0", "query.0"]
    # three are more than fit together, whoever asks first
    fresh = TeacherOutputs(network, key, split, tmp_path / "fresh", limit=2.5 * one)
    for each in (limited, fresh):
        assert not each.fits(["hidden.0", "hidden.1", "hidden.2"])
        each(batch, ["hidden.0", "hidden.1", "hidden.2"])
    assert kept(limited) == ["key.0", "query.0"]
    assert not fresh.directory.exists()


def test_what_another_worker_reads_stays_and_the_rest_is_computed(prepared, tmp_path, monkeypatch):
    key, network, split = prepared()
    one = int(split.offsets[-1]) * 32 * 4
    first, second, third = (TeacherOutputs(network, key, split, tmp_path, limit=1.5 * one) for _ in range(3))
    batch, other = batches(split, 2)
    first(batch, ["hidden.1"])
    with torch.no_grad():
        expected = read_features(network, other, ["hidden.1", "hidden.2"])
    with monkeypatch.context() as patch:
        patch.setattr(outputs, "_compute", lambda *_: pytest.fail("there is no room for it"))
        close(second(other, ["hidden.2"]), {"hidden.2": expected["hidden.2"]}, other)
        patch.setattr(outputs, "read_features", lambda *_: pytest.fail("the teacher was run again"))
        for reader in (first, third):
            close(reader(other, ["hidden.1"]), {"hidden.1": expected["hidden.1"]}, other)
    for reader in (first, third):
        assert kept(first) == ["hidden.1"]
        second(batch, ["hidden.2"])
        reader.release()
    second.release()
    second(batch, ["hidden.2"])
    assert kept(first) == ["hidden.2"]
    if (maps := Path("/proc/self/maps")).exists():
        held = [line.split("/") for line in maps.read_text().splitlines() if str(first.directory) in line]
        assert {path[-2] for path in held} == {"hidden.2"}, "a deleted file that is still mapped takes its place"


def test_a_full_disk_is_an_error_and_leaves_nothing_that_looks_finished(prepared, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    key, network, split = prepared()
    stored, batch = TeacherOutputs(network, key, split, tmp_path, limit=1e9), batches(split, 1)[0]
    with monkeypatch.context() as patch:
        patch.setattr(outputs.os, "posix_fallocate", full)
        with pytest.raises(OSError, match="No space left"):
            stored(batch, ["hidden.1"])
    assert not (stored.directory / "hidden.1").exists()
    close(stored(batch, ["hidden.1"]), read_features(network, batch, ["hidden.1"]), batch)
    assert kept(stored) == ["hidden.1"]


def test_what_was_half_deleted_is_made_anew(prepared, tmp_path):
    key, network, split = prepared()
    stored, batch = TeacherOutputs(network, key, split, tmp_path, limit=1e9), batches(split, 1)[0]
    (stored.directory / "hidden.1").mkdir(parents=True)
    close(stored(batch, ["hidden.1"]), read_features(network, batch, ["hidden.1"]), batch)
    assert kept(stored) == ["hidden.1"]


def test_what_a_dead_process_left_is_made_anew(prepared, tmp_path):
    key, network, split = prepared()
    stored = TeacherOutputs(network, key, split, tmp_path, limit=1e9)
    (stored.directory / ".hidden.1").mkdir(parents=True)
    (stored.directory / ".hidden.1" / FILE).write_text("half")
    batch = batches(split, 1)[0]
    close(stored(batch, ["hidden.1"]), read_features(network, batch, ["hidden.1"]), batch)
    assert kept(stored) == ["hidden.1"]


@pytest.mark.parametrize(
    "change",
    [
        lambda batch: batch["input_ids"].__setitem__((0, 1), batch["input_ids"][0, 1] + 1),
        lambda batch: batch["attention_mask"].__setitem__((0, 1), 0),
        lambda batch: batch["token_type_ids"].__setitem__((0, 1), 1),
        lambda batch: batch.pop("index"),
        lambda batch: batch["index"].__setitem__(0, 100_000),
        lambda batch: batch["index"].__setitem__(0, -1),
    ],
    ids=["another word", "a shorter text", "another segment", "no rows", "no such row", "a negative row"],
)
def test_texts_that_are_not_the_rows_are_computed(prepared, tmp_path, change):
    key, network, split = prepared()
    stored = TeacherOutputs(network, key, split, tmp_path, limit=1e9)
    batch = {name: tensor.clone() for name, tensor in batches(split, 1)[0].items()}
    assert split.rows_of(batch).tolist() == batch["index"].tolist()
    change(batch)
    assert split.rows_of(batch) is None
    with torch.no_grad():
        expected = read_features(network, batch, ["hidden.2"])["hidden.2"]
    assert torch.equal(stored(batch, ["hidden.2"])["hidden.2"], expected)
    assert not stored.directory.exists()


def test_another_teacher_split_or_precision_has_outputs_of_its_own(prepared, tmp_path):
    key, network, split = prepared()
    shutil.copytree(split.path, tmp_path / "another")
    other = Split.open(tmp_path / "another")
    chosen = [(key, split, "fp32"), ("other", split, "fp32"), (key, other, "fp32"), (key, split, "bf16")]
    made = [TeacherOutputs(network, name, rows, tmp_path, 1e9, how).directory for name, rows, how in chosen]
    assert len(set(made)) == len(made)


def test_several_workers_share_one_pass(prepared, tmp_path, monkeypatch):
    key, network, split = prepared()
    passes, compute = [], outputs._compute

    def counted(*arguments):
        passes.append(arguments)
        compute(*arguments)

    def ask(worker):
        # a copy of the network and a view of the rows of its own, as in another process
        stored = TeacherOutputs(deepcopy(network), key, Split.open(split.path), tmp_path, limit=1e9)
        return stored(split.batch(range(8)), ["hidden.1", "scores.0"])

    monkeypatch.setattr(outputs, "_compute", counted)
    with ThreadPoolExecutor(3) as workers:
        first, *others = workers.map(ask, range(3))
    assert len(passes) == 1
    assert all(torch.equal(first[name], found[name]) for found in others for name in first)


class TestRoomOfAllStudies:
    """Two teachers of one cache, each of whose hidden states takes two thirds of the limit."""

    def two(self, prepared, tmp_path):
        key, network, split = prepared()
        limit = 1.5 * int(split.offsets[-1]) * 32 * 4
        made = [TeacherOutputs(network, name, split, tmp_path, limit) for name in (key, "another")]
        return *made, batches(split, 1)[0]

    def test_what_an_earlier_study_left_goes_first(self, prepared, tmp_path):
        earlier, later, batch = self.two(prepared, tmp_path)
        earlier(batch, ["hidden.1"])
        earlier.release()  # as when its process ends
        later(batch, ["hidden.1"])
        assert (kept(earlier), kept(later)) == ([], ["hidden.1"])
        later(batch, ["hidden.2"])
        assert kept(later) == ["hidden.2"]
        assert not list(later.directory.glob("hidden.1/*"))

    def test_what_another_study_reads_stays(self, prepared, tmp_path):
        other, own, batch = self.two(prepared, tmp_path)
        other(batch, ["hidden.1"])
        own(batch, ["hidden.1"])
        assert (kept(other), kept(own)) == (["hidden.1"], [])
        own(batch, ["logits"])
        assert (kept(other), kept(own)) == (["hidden.1"], ["logits"])

    def test_who_is_just_making_something_is_not_waited_for(self, prepared, tmp_path):
        other, own, batch = self.two(prepared, tmp_path)
        other(batch, ["hidden.1"])
        other.release()
        with FileLock(other.directory / "lock"):
            own(batch, ["hidden.1"])
        assert (kept(other), kept(own)) == (["hidden.1"], [])
        own(batch, ["hidden.1"])
        assert kept(own) == [], "a trial that was refused is not refused again at every step"
        own.release()
        own(batch, ["hidden.1"])
        assert (kept(other), kept(own)) == ([], ["hidden.1"])

    def test_nothing_goes_where_that_would_not_do(self, prepared, tmp_path):
        other, own, batch = self.two(prepared, tmp_path)
        other(batch, ["hidden.1"])
        idle = TeacherOutputs(other.teacher, "idle", other.split, tmp_path, other.limit)
        idle(batch, ["logits"])
        idle.release()
        own(batch, ["hidden.1"])
        assert (kept(other), kept(own), kept(idle)) == (["hidden.1"], [], ["logits"])

    def test_what_is_there_is_read_whatever_the_limit_is_now(self, prepared, tmp_path, monkeypatch):
        other, own, batch = self.two(prepared, tmp_path)
        own.limit *= 2
        for each in (other, own):
            each(batch, ["hidden.1"])
        again = TeacherOutputs(own.teacher, "another", own.split, tmp_path, other.limit)
        monkeypatch.setattr(outputs, "read_features", lambda *_: pytest.fail("the teacher was run again"))
        assert again(batch, ["hidden.1"]).keys() == {"hidden.1"}

    def test_what_another_process_deleted_first_frees_nothing(self, prepared, tmp_path, monkeypatch):
        earlier, later, batch = self.two(prepared, tmp_path)
        earlier(batch, ["hidden.1"])
        earlier.release()
        readers = room._readers

        def gone(feature):
            shutil.rmtree(feature, ignore_errors=True)
            return readers(feature)

        monkeypatch.setattr(room, "_readers", gone)
        assert not room.make_room(later.directory, later.limit, later.limit, ())

    def test_what_another_left_half_made_counts_and_goes(self, prepared, tmp_path):
        other, own, batch = self.two(prepared, tmp_path)
        half = other.directory / ".hidden.1" / FILE
        half.parent.mkdir(parents=True)
        half.write_bytes(bytes(int(own.limit / 1.5)))
        with FileLock(other.directory / "lock"):  # as while it is being made
            own(batch, ["hidden.1"])
        assert (half.exists(), kept(own)) == (True, [])
        own.release()
        own(batch, ["hidden.1"])
        assert (half.exists(), kept(own)) == (False, ["hidden.1"])

    def test_signs_of_processes_that_died_hold_nothing(self, prepared, tmp_path):
        other, own, batch = self.two(prepared, tmp_path)
        other(batch, ["hidden.1"])
        code = "import os, sys, filelock; sign = filelock.FileLock(sys.argv[1]); sign.acquire(); os._exit(1)"
        subprocess.run([sys.executable, "-c", code, str(other.directory / "hidden.1" / "its.reader")], check=False)
        assert len(list(other.directory.glob("hidden.1/*.reader"))) == 2
        other.release()
        own(batch, ["hidden.1"])
        assert kept(other) == []

    def test_enough_room_for_both_leaves_both(self, prepared, tmp_path):
        first, second, batch = self.two(prepared, tmp_path)
        first(batch, ["hidden.1"])
        first.release()
        second.limit *= 2
        second(batch, ["hidden.1"])
        assert (kept(first), kept(second)) == (["hidden.1"], ["hidden.1"])

    def test_a_sign_is_one_until_it_is_released(self, prepared, tmp_path):
        other, own, batch = self.two(prepared, tmp_path)
        other(batch, ["hidden.1"])
        other.release()
        sign = hold(other.directory / "hidden.1")
        own(batch, ["hidden.1"])
        assert kept(other) == ["hidden.1"]
        sign.release()
        own(batch, ["hidden.2"])
        assert kept(other) == []

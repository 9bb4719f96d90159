from concurrent.futures import ThreadPoolExecutor

import pytest

from compress_search.cache import content_addressed


def test_it_is_built_once_and_by_one(tmp_path):
    calls = []

    def build(directory):
        calls.append(directory)
        (directory / "file").write_text("whole")

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: content_addressed(tmp_path / "cache", "key", build), range(8)))
    assert len(calls) == 1
    assert set(found) == {tmp_path / "cache" / "key"}
    assert (found[0] / "file").read_text() == "whole"


def test_a_failed_build_leaves_nothing_to_be_found(tmp_path):
    def build(directory):
        (directory / "file").write_text("half")
        raise RuntimeError("no space")

    with pytest.raises(RuntimeError, match="no space"):
        content_addressed(tmp_path, "key", build)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_the_remains_of_a_dead_process_are_cleared(tmp_path):
    (tmp_path / "key.tmp").mkdir()
    (tmp_path / "key.tmp" / "half").write_text("")
    directory = content_addressed(tmp_path, "key", lambda directory: (directory / "file").touch())
    assert [path.name for path in directory.iterdir()] == ["file"]

"""The quickstart's data: prose without the answer in it, nothing shared between splits, the same every time."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "studies" / "quickstart_data.py"


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quickstart_data", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("A torch tensor, not a PyTorch one.", "A library tensor, not a library one."),
        ("Uses np.array and numpy.ndarray.", "Uses library.array and library.ndarray."),
        ("See sa.select or SQLAlchemy's docs.", "See library.select or library's docs."),
        ("A TorchScript module and its RayTask.", "A libraryScript module and its libraryTask."),
        ("Ray draws rays through an array of Gray codes.", "library draws rays through an array of Gray codes."),
        ("Passes ray_options to tf.data.", "Passes library_options to library.data."),
        ("A transformer is not named after Transformers.", "A transformer is not named after library."),
    ],
)
def test_names_of_libraries_are_masked_and_words_are_not(maker: ModuleType, text: str, masked: str) -> None:
    assert maker.mask(text) == masked


def test_only_prose_is_kept(maker: ModuleType) -> None:
    docstring = """Return the number of edges between the nodes of a graph. It counts each of them once only.

    Parameters
    ----------
    node : a node of the graph that the edges are to be counted for, which must be there

    >>> G.size()

    Args:
        node: The node that the edges are counted for, and that has to be one of the graph.

    .. note:: This is a directive and not a sentence of the kind that is looked for in this place.

    Works as :func:`~graph.degree` does in ``simple`` graphs. Takes time that is linear in the `number` of edges.
    """
    joined = " ".join(sentence for part in docstring.split("\n\n") for sentence in maker.sentences(part))
    assert joined == (
        "Return the number of edges between the nodes of a graph. It counts each of them once only. "
        "Works as graph.degree does in simple graphs. Takes time that is linear in the number of edges."
    )


def test_short_sentences_are_joined_until_they_are_long_enough(maker: ModuleType) -> None:
    short = "This is a sentence of eight short words."
    passages = list(maker.passages(" ".join([short] * 9) + "\n\n" + short))
    assert passages == [" ".join([short] * 4)] * 2


def test_docstrings_are_parsed_and_never_run(maker: ModuleType) -> None:
    source = (
        '"""Module."""\nraise SystemExit\nclass A:\n    """Class."""\n    async def f():\n        """Method."""'
    )
    assert [text for text in maker.docstrings(source) if text] == ["Module.", "Class.", "Method."]
    assert list(maker.docstrings("def (")) == []


def test_docstrings_are_found_wherever_a_definition_can_stand(maker: ModuleType) -> None:
    places = (
        "try:\n {}\nexcept E:\n {}\nelse:\n {}\nfinally:\n {}",
        "match x:\n case 1:\n  {}",
        "if x:\n {}\nelse:\n {}",
    )
    for place in (*places, "with x:\n {}", "for x in y:\n {}\nelse:\n {}"):
        found = maker.docstrings(place.replace("{}", 'def f(): "Text."'))
        assert [text for text in found if text] == ["Text."] * place.count("{}"), place


def test_files_go_whole_to_the_split_that_is_furthest_from_full(maker: ModuleType) -> None:
    rows = [maker.Row(f"{file} {number}", "x", file) for file in "abcdef" for number in range(4)]
    parts = maker.split(rows, {"train": 12, "validation": 3, "test": 4})
    files = {name: {row.file for row in part} for name, part in parts.items()}
    assert {name: len(part) for name, part in parts.items()} == {"train": 12, "validation": 3, "test": 4}
    assert not files["train"] & files["validation"]
    assert not files["train"] & files["test"]
    assert not files["validation"] & files["test"]


def test_rows_that_two_libraries_share_are_nobodys(maker: ModuleType) -> None:
    rows = [
        maker.Row("The same words.", "a", "1"),
        maker.Row("the SAME words", "b", "2"),
        maker.Row("Other", "b", "2"),
    ]
    assert maker.unshared(rows) == rows[2:]


def test_every_library_comes_with_the_package(maker: ModuleType) -> None:
    """Libraries that only developers install would leave users without a label."""
    from importlib.metadata import packages_distributions, requires

    from packaging.requirements import Requirement

    reached: set[str] = set()
    waiting = ["compress-search"]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            found = [Requirement(text) for text in requires(name) or ()]
            waiting += [r.name.lower() for r in found if r.marker is None or r.marker.evaluate({"extra": ""})]
    owners = packages_distributions()
    assert len(maker.LIBRARIES) >= 8
    for library in maker.LIBRARIES:
        assert {owner.lower() for owner in owners[library]} & reached, library


@pytest.mark.slow
def test_the_same_files_are_written_every_time(tmp_path: Path) -> None:
    """Of the libraries that are read fastest: it takes the same steps for all of them."""
    code = "import sys, quickstart_data as q; q.LIBRARIES = ('networkx', 'sklearn'); q.main(sys.argv[1:])"
    for seed in ("1", "2"):  # which give sets two orders
        environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent), "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", code, tmp_path / seed]
        subprocess.run(command, check=True, capture_output=True, env=environment)
    for split in ("train", "validation", "test"):
        first, second = ((tmp_path / seed / f"{split}.jsonl").read_bytes() for seed in ("1", "2"))
        assert first == second
        assert first.count(b"\n") > 150


@pytest.mark.slow
def test_the_written_files_keep_every_promise(maker: ModuleType, tmp_path: Path) -> None:
    subprocess.run([sys.executable, SCRIPT, tmp_path], check=True, capture_output=True)
    splits = {}
    for split in ("train", "validation", "test"):
        lines = (tmp_path / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        splits[split] = [maker.Row(**json.loads(line)) for line in lines]
    rows = [row for part in splits.values() for row in part]
    sizes = {name: len(part) for name, part in splits.items()}
    assert 5000 < sizes["train"] < 6500
    assert 850 < sizes["validation"] < 1100
    assert 1700 < sizes["test"] < 2200
    for part in splits.values():
        counts = [sum(row.label == label for row in part) for label in maker.LIBRARIES]
        assert min(counts) > max(counts) / 2
    assert len({row.key for row in rows}) == len(rows)
    owner: dict[str, str] = {}
    for name, part in splits.items():
        for row in part:
            assert owner.setdefault(row.file, name) == name
    for row in rows:
        assert maker.mask(row.text) == row.text
        assert not any(library in row.text.lower() for library in maker.LIBRARIES if len(library) > 3)

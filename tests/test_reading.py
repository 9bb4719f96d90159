"""A candidate with a tokenizer of its own is trained, scored and measured on the text as that tokenizer cuts it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compress_search.data import tokenizer_digest
from compress_search.driver import prepare
from compress_search.encoders import Pieces, keep_pieces, keep_tokens
from compress_search.errors import TrialError
from compress_search.method import Method, Stage
from compress_search.pipeline import run_recipe
from compress_search.recipe import Recipe, Step
from compress_search.runtimes.lowering import lower
from compress_search.study import load_study
from compress_search.tasks import IGNORED
from compress_search.teacher.reading import cut, matching_places
from compress_search.testing import tiny_candidate, tiny_context
from compress_search.training import forward
from compress_search.workbench import Workbench
from tests import tiny


@pytest.fixture
def bench(
    tiny_study: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Workbench]:
    """``bench(kind)``: what a worker would have made of a tiny study."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def make(kind: str = "text-classification") -> Workbench:
        return Workbench(prepare(load_study(tiny_study(kind, methods="all"))).brief)

    return make


def smallest(tokenizer: Any) -> Any:
    """The tokenizer with special pieces and single characters only."""
    pieces = Pieces(tokenizer)
    return keep_pieces(tokenizer, sorted(pieces.reserved | pieces.characters))


def text_of(tokenizer: Any, ids: Any) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True)).replace(" ", "")


def test_all_splits_hold_the_same_texts_in_the_candidates_pieces(bench: Any) -> None:
    materials = bench().materials
    tokenizer = smallest(materials.teacher.tokenizer)
    own = materials.read_by(tokenizer)
    assert materials.read_by(materials.teacher.tokenizer) is materials
    for before, after in ((materials.train, own.train), (materials.validation, own.validation)):
        assert len(before) == len(after)
        assert np.array_equal(before.labels, after.labels)
        for row in range(5):
            theirs, ours = (split.arrays([row])["input_ids"][0] for split in (before, after))
            assert ours.max() < len(tokenizer)
            assert text_of(tokenizer, ours).startswith(text_of(materials.teacher.tokenizer, theirs)[:20])
    assert own.steps == materials.steps


def test_what_teachers_said_of_whole_texts_stays_what_it_was(bench: Any) -> None:
    materials = bench().materials
    own = materials.read_by(smallest(materials.teacher.tokenizer))
    rows = [3, 0, 11]
    assert torch.equal(own.logits(own.train.batch(rows)), materials.logits(materials.train.batch(rows)))


def test_what_teachers_said_of_words_is_found_again_at_their_first_pieces(bench: Any) -> None:
    materials = bench("token-classification").materials
    own = materials.read_by(smallest(materials.teacher.tokenizer))
    rows = list(range(20))
    before, after = materials.train.batch(rows), own.train.batch(rows)
    assert after["input_ids"].shape[1] > before["input_ids"].shape[1]
    theirs, ours = materials.logits(before), own.logits(after)
    for row in rows:
        words = [
            logits[row][batch["labels"][row] != IGNORED] for logits, batch in ((theirs, before), (ours, after))
        ]
        assert len(words[1]) > 0
        assert torch.equal(words[1], words[0][: len(words[1])]), (
            "cut at the same number of tokens, some words are gone"
        )


def test_a_reading_of_a_reading_is_that_reading(bench: Any) -> None:
    materials = bench("token-classification").materials
    pieces = Pieces(materials.teacher.tokenizer)
    gone = {pieces.ids[word] for word in ("the", "film")}
    most = keep_pieces(materials.teacher.tokenizer, [i for i in range(len(pieces.ids)) if i not in gone])
    least = smallest(materials.teacher.tokenizer)
    once, twice = materials.read_by(least), materials.read_by(most).read_by(least)
    batch, again = (own.train.batch(range(20)) for own in (once, twice))
    assert torch.equal(batch["input_ids"], again["input_ids"])
    words = batch["labels"] != IGNORED
    assert torch.equal(twice.logits(again)[words], once.logits(batch)[words])


def test_teachers_read_the_candidates_pieces_and_share_all_else(bench: Any) -> None:
    materials = bench().materials
    pieces = Pieces(materials.teacher.tokenizer)
    unused = sorted(pieces.ids[word] for word in ("kyoto", "oslo"))
    kept = [i for i in range(len(pieces.ids)) if i not in unused]
    own = materials.read_by(keep_pieces(materials.teacher.tokenizer, kept))
    with torch.no_grad():
        theirs, ours = (forward(m.teacher.network, m.train.batch([0, 1, 2])) for m in (materials, own))
    torch.testing.assert_close(ours, theirs)
    shared = dict(materials.teacher.network.named_parameters())
    copied = [name for name, p in own.teacher.network.named_parameters() if p.data_ptr() != shared[name].data_ptr()]
    assert copied == ["bert.embeddings.word_embeddings.weight"]
    assert materials.teacher.network.config.vocab_size == len(kept) + 2, "the teacher itself stays whole"
    hidden = own.outputs(own.train.batch([4]), ["hidden.1"])["hidden.1"]
    torch.testing.assert_close(hidden, materials.outputs(materials.train.batch([4]), ["hidden.1"])["hidden.1"])


def test_a_tokenizer_with_pieces_of_its_own_is_one_line(bench: Any) -> None:
    materials = bench().materials
    from transformers import BertTokenizer

    stranger = BertTokenizer(vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "novel": 5})
    with pytest.raises(TrialError, match="expected only such as the teacher's has"):
        materials.read_by(stranger)


class Spy(Method):
    """Looks at what a later step is lent."""

    stage = Stage.STRUCTURE

    def __init__(self) -> None:
        self.largest: list[int] = []

    def search_space(self, teacher: Any) -> dict[str, Any]:
        return {}

    def trains(self, params: Any) -> bool:
        return True

    def apply(self, candidate: Any, params: Any, context: Any) -> Any:
        candidate = candidate.copy()
        self.largest += [int(batch["input_ids"].max()) for batch in context.calibration(32)]
        context.fit(candidate.network, on_step=lambda step, steps: None)
        with torch.no_grad():
            batch = next(context.calibration(8))
            assert forward(context.teacher, batch).shape == context.teacher_logits(batch).shape
        return candidate


def test_later_steps_train_on_the_candidates_own_pieces_and_its_artefact_is_scored_on_them(
    bench: Any, tmp_path: Path
) -> None:
    worker, spy = bench(), Spy()
    materials = worker.materials
    step = Step.of("vocabulary_pruning", {"criterion": "keep", "keep": 0.8, "keep_characters": True})
    methods = {"vocabulary_pruning": worker.registry["vocabulary_pruning"], "spy": spy}
    recipe = Recipe((step, Step.of("spy", {})))
    rungs: list[Any] = []
    candidate, _ = run_recipe(
        recipe,
        methods,
        materials,
        seed=1,
        scratch=tmp_path,
        on_rung=lambda rung, metrics: rungs.append(metrics) is None,
    )
    assert candidate.subject.vocabulary == len(candidate.tokenizer) == 69
    assert max(spy.largest) < 69
    assert len(rungs) == 2, "validation at rungs is read by the candidate's tokenizer too"
    lower(candidate, tmp_path / "artifact", materials.task)
    split = worker.as_read(tmp_path / "artifact", "validation")
    assert split.path == materials.read_by(candidate.tokenizer).validation.path
    assert split.path != materials.validation.path


def test_an_artefact_of_the_teachers_tokenizer_is_read_from_the_teachers_split(bench: Any, tmp_path: Path) -> None:
    worker = bench()
    lower(worker.materials.teacher, tmp_path / "artifact", worker.materials.task)
    assert worker.as_read(tmp_path / "artifact", "validation").path == worker.materials.validation.path


def test_the_engine_tells_methods_what_the_tokenizer_is_made_of(bench: Any) -> None:
    subject = bench().materials.teacher.subject
    assert "tokenizer:WordPiece" in subject.traits
    assert subject.alphabet == 57, "five special pieces and 26 letters at either place"


# --- the lookup of tokens ---


class Rows:
    """A split of a token task: a letter is a word's first piece, a dot a further one, a dash a special token."""

    def __init__(self, *rows: str) -> None:
        self.labelled = np.array([mark.isalpha() for row in rows for mark in row])
        self.lengths = np.array([len(row) for row in rows])
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths)])

    def __len__(self) -> int:
        return len(self.lengths)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (("-ab-",), ("-ab-",), [0, 1, 2, 3]),
        (("-ab-",), ("-a..b.-",), [0, 1, 1, 1, 2, 2, 3]),
        (("-a.b-",), ("-a..b-",), [0, 1, 2, 2, 3, 4]),
        (("-a..b-",), ("-ab-",), [0, 1, 4, 5]),
        (("-abc-",), ("-a..-",), [0, 1, 1, 1, 4]),
        (("-a..-",), ("-abc-",), [0, 1, 1, 1, 4]),
        (("-a-", "-bc-"), ("-a.-", "-b.c-"), [0, 1, 1, 2, 3, 4, 4, 5, 6]),
        (("--",), ("--",), [0, 1]),
    ],
)
def test_tokens_correspond_word_by_word(before: Any, after: Any, expected: list[int]) -> None:
    first: Any = Rows(*before)
    second: Any = Rows(*after)
    assert matching_places(first, second).tolist() == expected


def test_a_cut_network_leaves_the_whole_one_as_it_was() -> None:
    network = tiny.tiny_network()
    rows = network.get_input_embeddings().weight
    reader = cut(network, range(60))
    assert network.get_input_embeddings().weight is rows
    assert len(rows) == network.config.vocab_size == 86
    assert reader.config.vocab_size == 60
    keep_tokens(network, range(60))
    assert torch.equal(network.get_input_embeddings().weight, reader.get_input_embeddings().weight)


def test_a_language_models_matrix_stays_that_of_the_words(bench: Any) -> None:
    candidate = tiny_candidate()
    network: Any = tiny_context(candidate).masked_lm()
    assert network.get_output_embeddings().weight is network.get_input_embeddings().weight
    reader: Any = cut(network, range(60))
    assert reader.get_output_embeddings().weight is reader.get_input_embeddings().weight
    assert len(reader.get_output_embeddings().bias) == 60


def test_digests_of_readings_differ_and_survive_the_disk(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    whole = tiny.tiny_tokenizer()
    part = smallest(whole)
    part.save_pretrained(tmp_path)
    assert tokenizer_digest(part) != tokenizer_digest(whole)
    assert tokenizer_digest(AutoTokenizer.from_pretrained(tmp_path)) == tokenizer_digest(part)

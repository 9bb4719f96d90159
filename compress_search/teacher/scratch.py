"""A small encoder from nothing: its WordPiece vocabulary, its tokenizer and its configuration.

Owns what ``teacher.architecture`` means. Knows nothing of training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from transformers import BertConfig, BertTokenizer

from compress_search.crf import attach_crf
from compress_search.data.rows import Rows
from compress_search.study import Architecture, Study
from compress_search.tasks import Task
from compress_search.teacher.networks import auto_class, seeded, with_crf, with_labels

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MIN_FREQUENCY = 2
"""How often a pair must occur in the training text to become a piece."""


def texts_of(rows: Rows) -> Iterator[str]:
    """Every text of a split; the words of a token task joined by spaces."""
    for text in rows.texts:
        yield text if isinstance(text, str) else " ".join(text)
    yield from rows.pairs or ()


def train_wordpiece(texts: Sequence[str], size: int) -> list[str]:
    """At most ``size`` uncased pieces, the same ones for the same texts (Schuster and Nakajima, 2012).

    The library numbers the pieces ``##x`` in the order of a hash map and breaks ties by number, so that two runs
    differ; here all single characters are numbered before it starts.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordPiece
    from tokenizers.trainers import WordPieceTrainer

    characters = _characters(texts, size)
    untrained = BertTokenizer().backend_tokenizer
    tokenizer = Tokenizer(WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = untrained.normalizer, untrained.pre_tokenizer
    trainer = WordPieceTrainer(
        vocab_size=size,
        min_frequency=MIN_FREQUENCY,
        special_tokens=[*SPECIAL, *characters],
        limit_alphabet=0,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    vocabulary = tokenizer.get_vocab()
    return sorted(vocabulary, key=vocabulary.__getitem__)


def _characters(texts: Sequence[str], size: int) -> list[str]:
    """Single characters, then those that continue a word; the most frequent ones where not all find room."""
    backend = BertTokenizer().backend_tokenizer
    every: Counter[str] = Counter()
    inner: set[str] = set()
    for text in texts:
        for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text)):
            every.update(word)
            inner.update(word[1:])
    kept: list[str] = []
    room = size - len(SPECIAL)
    for character in sorted(every, key=lambda c: (-every[c], c)):
        room -= 1 + (character in inner)
        if room < 0:
            break
        kept.append(character)
    return sorted(kept) + sorted(f"##{c}" for c in kept if c in inner)


def read_vocabulary(path: Path) -> list[str]:
    """The pieces of a vocab.txt, one a line.

    Raises:
        ValueError: a special token is missing, or a piece is there twice.
    """
    # not splitlines(): characters that Unicode counts as line ends are pieces of their own
    pieces = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    if missing := [token for token in SPECIAL if token not in pieces]:
        raise ValueError(f"{path.name} lacks {', '.join(missing)}")
    if len(set(pieces)) != len(pieces):
        twice = next(piece for piece, count in Counter(pieces).items() if count > 1)
        raise ValueError(f"{path.name} holds {twice!r} twice")
    return pieces


def new_config(study: Study, task: Task) -> BertConfig:
    """The configuration of the study's architecture: as many positions as the longest example has tokens.

    Raises:
        StudyError: the vocabulary's file is wrong.
    """
    architecture, pieces = _architecture(study), _given(study)
    config = BertConfig(
        vocab_size=len(pieces) or cast(int, architecture.vocabulary),
        num_hidden_layers=architecture.layers,
        hidden_size=architecture.hidden,
        num_attention_heads=architecture.heads,
        intermediate_size=architecture.intermediate,
        max_position_embeddings=study.data.max_length,
        pad_token_id=(pieces or SPECIAL).index("[PAD]"),
    )
    crf = study.teacher.fine_tune is not None and study.teacher.fine_tune.crf
    return cast(BertConfig, with_crf(with_labels(config, task), crf))


def new_network(study: Study, rows: Rows, config: BertConfig, task: Task) -> tuple[Any, BertTokenizer]:
    """A network with random weights, and a tokenizer of the study's vocabulary or of the rows' own.

    Raises:
        StudyError: the rows yield fewer pieces than the study asks for.
    """
    pieces = _given(study)
    if not pieces:
        pieces = train_wordpiece(list(texts_of(rows)), config.vocab_size)
        if len(pieces) < config.vocab_size:
            raise study.error(
                "teacher.architecture.vocabulary",
                f"the training text yields only {len(pieces)} word pieces, got {config.vocab_size}",
            )
    return fresh(study, config, task), build_tokenizer(pieces, study.data.max_length)


def given_tokenizer(study: Study) -> BertTokenizer | None:
    """The tokenizer of the study's vocab.txt; None where the vocabulary is to be trained.

    Raises:
        StudyError: the vocabulary's file is wrong.
    """
    pieces = _given(study)
    return build_tokenizer(pieces, study.data.max_length) if pieces else None


def fresh(study: Study, config: BertConfig, task: Task) -> Any:
    """The network of the configuration with the study's random weights."""
    with seeded(study.search.seed):
        network = auto_class(task.tokens).from_config(config)
    attach_crf(network)
    return network


def fingerprint(study: Study) -> list[Any]:
    """All that decides what :func:`new_network` makes, but for the rows."""
    architecture = _architecture(study)
    return [architecture.model_dump(exclude={"vocabulary"}), _given(study) or architecture.vocabulary]


def build_tokenizer(pieces: Sequence[str], max_length: int) -> BertTokenizer:
    """BERT's tokenizer over these pieces; it lowers the case unless some piece begins with a capital."""
    cased = any(piece[:1] != piece[:1].lower() for piece in pieces)
    return BertTokenizer(
        vocab={piece: number for number, piece in enumerate(pieces)},
        do_lower_case=not cased,
        model_max_length=max_length,
    )


def _architecture(study: Study) -> Architecture:
    assert study.teacher.architecture, "only called for a teacher from scratch"
    return study.teacher.architecture


def _given(study: Study) -> list[str]:
    """The pieces of the study's vocab.txt; none where the vocabulary is to be trained."""
    vocabulary = _architecture(study).vocabulary
    if isinstance(vocabulary, int):
        return []
    try:
        return read_vocabulary(vocabulary)
    except (OSError, ValueError) as error:
        raise study.error("teacher.architecture.vocabulary", str(error)) from error

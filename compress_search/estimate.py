"""How long a study will take, before anything is spent: closed-form work over a measured matrix product.

Owns the estimate and its assumptions. Knows nothing of trials that ran; it is a guide, not a promise.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch

from compress_search.candidate import Subject
from compress_search.data.rows import Rows
from compress_search.study import Study

TRAINING_FORWARDS = 3
"""A training step costs about three forward passes."""

EFFICIENCY = 0.5
"""What a whole encoder reaches of a bare matrix product's rate: normalisations, softmax, small batches."""

PIECES_PER_WORD = 1.3
"""Of English in a WordPiece vocabulary of usual size."""

IDEOGRAPH = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f]")
"""What the tokenizers of BERT cut apart from all else: Chinese has no spaces between words."""

LOOKED_AT = 1000
"""About how many examples are looked at for their length."""

MEAN_TRIAL = 0.6
"""Work of a mean trial against a full training of the teacher: students are smaller, some trials stop early."""

FIXED_SECONDS = 8.0
"""Per trial: two exports, scoring and timing of a small encoder."""


@dataclass(frozen=True)
class Estimate:
    """Minutes for all teachers and for the whole search, and what they are computed from."""

    step_seconds: float
    steps_per_trial: int
    teacher_minutes: float
    search_minutes: float

    @property
    def minutes(self) -> float:
        """All of it."""
        return self.teacher_minutes + self.search_minutes


def mean_length(study: Study, rows: Rows) -> float:
    """Mean tokens of a training example, guessed from the words and ideographs of some without a tokenizer."""
    some = slice(None, None, max(1, len(rows) // LOOKED_AT))
    texts = rows.texts[some]
    pairs = rows.pairs[some] if rows.pairs else [""] * len(texts)
    lengths = [_pieces(text) + _pieces(other) + 2 for text, other in zip(texts, pairs, strict=True)]
    return fmean(min(length, study.data.max_length) for length in lengths)


def _pieces(text: str | Sequence[str]) -> float:
    """Tokens of a text, or of one that is a list of words."""
    whole = text if isinstance(text, str) else " ".join(text)
    words = IDEOGRAPH.sub(" ", whole).split()
    return len(IDEOGRAPH.findall(whole)) + PIECES_PER_WORD * len(words)


def matmul_rate(threads: int, seconds: float = 0.3) -> float:
    """Multiply-accumulates per second of a fp32 matrix product of an encoder's shape on this CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a, b = torch.ones(512, 384), torch.ones(384, 1536)
        torch.mm(a, b)
        runs, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            torch.mm(a, b)
            runs += 1
        return runs * 512 * 384 * 1536 / (time.perf_counter() - started)
    finally:
        torch.set_num_threads(before)


def estimate(
    study: Study,
    teacher: Subject,
    rows: int,
    mean_length: float,
    rate: float | None = None,
    *,
    further: Mapping[str, int] | None = None,
) -> Estimate:
    """The estimate for ``rows`` training examples of ``mean_length`` tokens.

    ``rate`` is in multiply-accumulates per second; measured on this machine when not given, so that a study
    for GPUs planned on a laptop is overestimated. ``further`` are the rows of further tasks by their names; a step
    of their teachers' is taken to be as long as one of a trial.
    """
    rate = rate or matmul_rate(max(1, round(study.cluster.cpus_per_trial)))
    batch = study.training.batch_size
    step_seconds = TRAINING_FORWARDS * batch * teacher.macs(round(mean_length)) / (rate * EFFICIENCY)
    per_epoch = -(-rows // batch)
    steps = max(1, round(study.training.epochs * per_epoch))
    trained = [(study.teacher.fine_tune, rows)]
    trained += [(study.auxiliary[name].teacher.fine_tune, count) for name, count in (further or {}).items()]
    teacher_steps = sum(tuning.epochs * -(-count // tuning.batch_size) for tuning, count in trained if tuning)
    per_trial = MEAN_TRIAL * steps * step_seconds + FIXED_SECONDS
    search_minutes = study.search.trials * per_trial / study.search.concurrency / 60
    if study.search.hours is not None:
        search_minutes = min(search_minutes, 60 * study.search.hours)
    return Estimate(step_seconds, steps, teacher_steps * step_seconds / 60, search_minutes)

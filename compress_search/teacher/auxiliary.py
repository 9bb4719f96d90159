"""Further tasks that students may learn by turns with the study's own: found, checked and got ready.

Owns the key ``auxiliary``: of each task the training rows and what its teacher says of them. Whose turn a step is,
and what the student has on top for it, is a method's to say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from compress_search.candidate import Subject
from compress_search.data import Raw, Split, tokenize_rows
from compress_search.data.contents import data_digests
from compress_search.data.rows import read_training
from compress_search.errors import NotFinite
from compress_search.recipe import digest
from compress_search.study import Study
from compress_search.tasks import Task
from compress_search.teacher import known_tokenizer, prepare_teacher, pretrained, teacher_subject
from compress_search.teacher.contents import teacher_digests
from compress_search.teacher.logits import LogitCache, teacher_logits

if TYPE_CHECKING:
    from compress_search.method import Batch

Sources = Mapping[str, tuple[Raw, Task]]
"""By a task's name its training rows and its labels."""


@dataclass(frozen=True)
class Auxiliary:
    """A further task as trials share it: its rows, and its teacher's logits on them."""

    task: Task
    train: Split
    logits: LogitCache
    reread: Callable[[PreTrainedTokenizerBase], Split]
    """The rows as another tokenizer cuts them."""
    digest: str
    """Of all that decides what can be learnt here."""

    def teacher_logits(self, batch: Batch) -> Tensor:
        """(B, C) or (B, S, C) for a batch of the rows, on its device; zero at padding."""
        tokens = batch["input_ids"]
        return self.logits.batch(batch["index"].cpu(), tokens.shape[1]).to(tokens.device)

    def read_by(self, tokenizer: PreTrainedTokenizerBase) -> Auxiliary:
        """The same texts in the pieces of a candidate's tokenizer; what was said of a word stays what it was."""
        split = self.reread(tokenizer)
        return replace(self, train=split, logits=self.logits.read_by(self.train, split))


def read(study: Study) -> dict[str, tuple[Raw, Task]]:
    """The training rows and labels of each further task, checked.

    Raises:
        StudyError: the first thing wrong with a row, as for the study's own.
    """
    found = {}
    for name, alone in _alone(study).items():
        with study.blamed(f"auxiliary.{name}", below=True):
            rows, task = read_training(alone)
        found[name] = Raw(rows, rows.take([])), task
    return found


def check(study: Study, subject: Subject, sources: Sources) -> None:
    """Refuse teachers that cannot be read or do not fit, from their configurations and tokenizers alone.

    Args:
        study: names them.
        subject: the study's own teacher.
        sources: what :func:`read` found.

    Raises:
        StudyError: as for the study's own teacher; or it has another vocabulary or a CRF, or the study's tokens do
            not say of words or segments what it was trained on.
    """
    own = known_tokenizer(study) if sources else None
    for name, alone in _alone(study).items():
        raw, task = sources[name]
        with study.blamed(f"auxiliary.{name}", below=True):
            teacher = teacher_subject(alone, task)
            if "crf" in teacher.traits:
                raise alone.error("teacher.model", "it has a CRF: expected one whose answers are logits alone")
            theirs = pretrained.load_tokenizer(alone)
            _check_size(study, alone, theirs)
            if own:
                _check_vocabulary(alone, own, theirs)
            _check_tokens(subject, teacher, alone, pairs=raw.train.pairs is not None)


def contents(study: Study, sources: Sources) -> dict[str, str]:
    """A hash of what the files of each task hold, by the key that names them."""
    found: dict[str, str] = {}
    for name, alone in _alone(study).items():
        raw, task = sources[name]
        held = {**teacher_digests(alone), "data.train": data_digests(alone, raw, task)["data.train"]}
        found |= {f"auxiliary.{name}.{key}": value for key, value in held.items()}
    return found


def prepare(
    study: Study, tokenizer: PreTrainedTokenizerBase, cache: Path, device: torch.device | str
) -> list[Auxiliary]:
    """All further tasks of a study, in the order of their names.

    Their teachers are trained on the first call, where they are to be.

    Args:
        study: names them.
        tokenizer: the study's own teacher's, which all read by.
        cache: holds teachers, rows and logits.
        device: where teachers answer.

    Raises:
        StudyError: see :func:`read` and :func:`check`; or weights are damaged or not there, or a training diverged.
    """
    found = []
    for name, (raw, task) in read(study).items():
        alone = _alone(study)[name]
        with study.blamed(f"auxiliary.{name}", below=True):
            _check_vocabulary(alone, tokenizer, pretrained.load_tokenizer(alone))
            try:
                path = prepare_teacher(alone, raw, task, cache)
            except NotFinite as error:
                raise alone.error("teacher.fine_tune", error.message) from error

        def reread(own: PreTrainedTokenizerBase, raw: Raw = raw, task: Task = task, alone: Study = alone) -> Split:
            return tokenize_rows(raw.train, own, alone.data.max_length, task, cache)

        train = reread(tokenizer)
        logits = teacher_logits(path, train, cache, device)
        found.append(Auxiliary(task, train, logits, reread, digest([path.name, train.path.name])))
    return found


def _alone(study: Study) -> dict[str, Study]:
    """Each further task as a study of its own, with this one's settings; in the order of their names."""
    longest = study.data.max_length
    return {
        name: study.model_copy(
            update={
                "task": other.task,
                "teacher": other.teacher,
                "data": other.data.model_copy(update={"max_length": min(other.data.max_length, longest)}),
                "auxiliary": {},
            }
        )
        for name, other in sorted(study.auxiliary.items())
    }


def _check_size(study: Study, alone: Study, theirs: PreTrainedTokenizerBase) -> None:
    """Refuse a vocabulary of another size than the study's is yet to be trained to."""
    wanted = study.teacher.architecture and study.teacher.architecture.vocabulary
    if isinstance(wanted, int) and len(theirs) != wanted:
        message = f"its vocabulary has {len(theirs)} pieces: expected that of the study's teacher, of {wanted}"
        raise alone.error("teacher.model", message)


def _check_tokens(own: Subject, teacher: Subject, alone: Study, *, pairs: bool) -> None:
    """Refuse a task whose texts the study's tokens would show to its teacher in another way than it knows.

    A byte-level BPE writes the space before a word into its piece, which words that come one by one have not got.
    """
    words = "token-classification"
    if own.family == "roberta" and (own.task == words) != (alone.task == words):
        raise alone.error("task", f"expected one like {own.task}: RoBERTa's pieces of lone words are others")
    if pairs and teacher.token_types > 1 >= own.token_types:
        raise alone.error("data.train", "these are pairs of texts, and the study's teacher takes no token types")


def _check_vocabulary(alone: Study, own: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> None:
    """Refuse a teacher that would read the study's tokens as something else."""
    if not pretrained.same_vocabulary(own, theirs):
        message = "its vocabulary is not that of the study's teacher, whose tokens it would be given"
        raise alone.error("teacher.model", f"{alone.teacher.model}: {message}")

"""Further tasks that students may learn by turns with the study's own: found, checked and got ready.

Owns the key ``auxiliary``: of each task the training rows and what its teacher says of them. Whose turn a step is,
and what the student has on top for it, is a method's to say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from compress_search.data import Raw, Split, tokenize_rows
from compress_search.data.contents import data_digests
from compress_search.data.rows import read_training
from compress_search.errors import StudyError
from compress_search.recipe import digest
from compress_search.study import Study
from compress_search.tasks import Task
from compress_search.teacher import known_tokenizer, load_teacher, prepare_teacher, pretrained, teacher_subject
from compress_search.teacher.contents import teacher_digests
from compress_search.teacher.logits import TeacherLogits

Sources = Mapping[str, tuple[Raw, Task]]
"""By a task's name its training rows and its labels."""


@dataclass(frozen=True)
class Auxiliary:
    """A further task as trials share it: its rows, and its teacher's logits on them."""

    task: Task
    train: Split
    logits: TeacherLogits
    reread: Callable[[PreTrainedTokenizerBase], Split]
    """The rows as another tokenizer cuts them."""
    digest: str
    """Of all that decides what can be learnt here."""

    def read_by(self, tokenizer: PreTrainedTokenizerBase, kept: Sequence[int]) -> Auxiliary:
        """The same texts in the pieces of a tokenizer that kept only these of the teacher's."""
        split = self.reread(tokenizer)
        return replace(self, train=split, logits=self.logits.read_by(split, kept))


def read(study: Study) -> dict[str, tuple[Raw, Task]]:
    """The training rows and labels of each further task, checked.

    Raises:
        StudyError: the first thing wrong with a row, as for the study's own.
    """
    found = {}
    for name, alone in _alone(study).items():
        with _blamed(study, name):
            rows, task = read_training(alone)
        found[name] = Raw(rows, rows.take([])), task
    return found


def check(study: Study, sources: Sources) -> None:
    """Refuse teachers that cannot be read or do not fit their tasks, from their configurations alone.

    Raises:
        StudyError: as for the study's own teacher; or a vocabulary is not its.
    """
    own = known_tokenizer(study) if sources else None
    for name, alone in _alone(study).items():
        with _blamed(study, name):
            teacher_subject(alone, sources[name][1])
            if own:
                _check_vocabulary(alone, own, pretrained.load_tokenizer(alone))


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
) -> dict[str, Auxiliary]:
    """All further tasks of a study, by name; their teachers are trained on the first call, where they are to be.

    Args:
        study: names them.
        tokenizer: the study's own teacher's, which all read by.
        cache: holds teachers, rows and logits.
        device: where teachers answer.

    Raises:
        StudyError: see :func:`read` and :func:`check`; or weights are damaged or not there.
        NotFinite: a training diverged.
    """
    found = {}
    for name, (raw, task) in read(study).items():
        alone = _alone(study)[name]
        with _blamed(study, name):
            path = prepare_teacher(alone, raw, task, cache)
            network, theirs = load_teacher(path, device)
            _check_vocabulary(alone, tokenizer, theirs)

        def reread(own: PreTrainedTokenizerBase, raw: Raw = raw, task: Task = task, alone: Study = alone) -> Split:
            return tokenize_rows(raw.train, own, alone.data.max_length, task, cache)

        train = reread(tokenizer)
        logits = TeacherLogits(network, [path], train, cache)
        found[name] = Auxiliary(task, train, logits, reread, digest([path.name, train.path.name]))
    return found


def _alone(study: Study) -> dict[str, Study]:
    """Each further task as a study of its own, with this one's settings."""
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
        for name, other in study.auxiliary.items()
    }


def _check_vocabulary(alone: Study, own: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> None:
    """Refuse a teacher that would read the study's tokens as something else."""
    if own.get_vocab() != other.get_vocab() or own.all_special_ids != other.all_special_ids:
        message = "its vocabulary is not that of the study's teacher, whose tokens it would be given"
        raise alone.error("teacher.model", f"{alone.teacher.model}: {message}")


@contextmanager
def _blamed(study: Study, name: str) -> Iterator[None]:
    """Complaints about a key of a task name its place in the study."""
    try:
        yield
    except StudyError as error:
        raise study.error(f"auxiliary.{name}.{error.key or 'teacher'}", error.message) from error

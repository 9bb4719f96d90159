"""The small pretrained network that students may start from, in place of parts of their teacher.

Owns the key ``teacher.student_start``: loading it under a new head for the task. Trains nothing, chooses no shape.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedTokenizerBase

from compress_search.candidate import Subject
from compress_search.study import Study
from compress_search.tasks import Task
from compress_search.teacher import pretrained
from compress_search.teacher.beside import Beside


def check(study: Study, task: Task) -> None:
    """Refuse one that cannot be read, from its configuration alone.

    Raises:
        StudyError: as for the teacher.
    """
    if (own := Beside(study, "student_start")).model:
        own.config(task)


def check_vocabulary(study: Study, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse one of another vocabulary than the teacher's; no weights are read.

    Raises:
        StudyError: see :meth:`Beside.check_vocabulary`.
    """
    if (own := Beside(study, "student_start")).model:
        own.check_vocabulary(tokenizer)


def unlike(study: Study, task: Task, teacher: Subject) -> frozenset[str]:
    """Traits that say which shapes it has in place of the teacher's."""
    own = Beside(study, "student_start")
    return own.unlike(task, teacher) if own.model else frozenset()


def fingerprint(study: Study) -> str:
    """Hash of its files."""
    return Beside(study, "student_start").fingerprint()


def load(study: Study, task: Task, tokenizer: PreTrainedTokenizerBase, *, crf: bool) -> nn.Module:
    """The network with a head for the task, random but for what it brings; the same at every call.

    Args:
        study: names it.
        task: gives the labels.
        tokenizer: the teacher's.
        crf: whether to put on a CRF that knows nothing yet.

    Raises:
        StudyError: it cannot be loaded, or its vocabulary is another one.
    """
    own = Beside(study, "student_start")
    own.check_vocabulary(tokenizer)
    named, source = own.as_teacher(crf=crf), own.source()
    with study.blamed(own.key):
        config = pretrained.read_config(named, task)
        network: nn.Module = pretrained.load_pretrained(named, source, config, task)[0]
    return network.eval()

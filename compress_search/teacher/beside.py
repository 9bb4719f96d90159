"""A model that a study names beside its teacher: found, described and checked before any work.

It is given the teacher's tokens, so its vocabulary has to be the teacher's. Owns every complaint that does not
depend on what the model is for; each names the key that it stands under. Loads no weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from compress_search.candidate import Subject
from compress_search.encoders import subject_of
from compress_search.study import FineTune, Study, TeacherConfig
from compress_search.tasks import Task
from compress_search.teacher import pretrained
from compress_search.teacher.networks import auto_class

_SHAPES = (
    "family",
    "layers",
    "heads",
    "hidden",
    "intermediate",
    "embedding_size",
    "vocabulary",
    "positions",
    "token_types",
)


@dataclass(frozen=True)
class Beside:
    """The model under one of the teacher's keys; nothing but :attr:`model` may be asked where there is none."""

    study: Study
    name: Literal["masked_lm", "student_start"]

    @property
    def key(self) -> str:
        """Where it stands in the study."""
        return f"teacher.{self.name}"

    @property
    def model(self) -> str | None:
        """What stands there."""
        found: str | None = getattr(self.study.teacher, self.name)
        return found

    def as_teacher(self, *, crf: bool = False) -> Study:
        """The study with the model in the teacher's place, any head of it to be trained anew."""
        teacher = TeacherConfig(model=self.model, fine_tune=FineTune(crf=crf))
        return self.study.model_copy(update={"teacher": teacher})

    def config(self, task: Task) -> Any:
        """Its configuration, for the task's labels.

        Raises:
            StudyError: as for the teacher; or it has another number of pieces than the teacher's tokenizer is yet
                to be trained to.
        """
        with self.study.blamed(self.key):
            config = pretrained.read_config(self.as_teacher(), task)
        wanted = self.study.teacher.architecture and self.study.teacher.architecture.vocabulary
        if isinstance(wanted, int) and (found := len(self.tokenizer())) != wanted:
            raise self.study.error(
                self.key, f"its vocabulary has {found} pieces: expected the teacher's, which is to have {wanted}"
            )
        return config

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer beside it."""
        with self.study.blamed(self.key):
            return pretrained.load_tokenizer(self.as_teacher())

    def check_vocabulary(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a model that would read the teacher's tokens as something else; no weights are read.

        Raises:
            StudyError: its tokenizer cannot be loaded, or has other pieces.
        """
        if self.tokenizer().get_vocab() != tokenizer.get_vocab():
            raise self.study.error(
                self.key, f"{self.model}: its vocabulary is not the teacher's, whose tokens it would be given"
            )

    def source(self) -> Path:
        """The directory of its files."""
        with self.study.blamed(self.key):
            return pretrained.directory_of(self.as_teacher())

    def fingerprint(self) -> str:
        """Hash of its files."""
        return pretrained.files_digest(self.source())

    def unlike(self, task: Task, teacher: Subject) -> frozenset[str]:
        """Traits, ``<name>:<shape>=<value>``, of which shapes its encoder has in place of the teacher's."""
        other = subject_of(auto_class(task.tokens).from_config(self.config(task)), task.name)
        return frozenset(
            f"{self.name.replace('_', '-')}:{shape}={getattr(other, shape)}"
            for shape in _SHAPES
            if getattr(other, shape) != getattr(teacher, shape)
        )

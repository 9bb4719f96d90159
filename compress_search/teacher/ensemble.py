"""Several teachers in place of one: who they are, whether they fit, and the average of what they say.

Owns the key ``teacher.ensemble``. The study's first teacher stays what is compressed and compared with; only what
students learn from is averaged. Knows nothing of files or training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from compress_search.crf import asks_for_crf
from compress_search.study import Study, TeacherConfig
from compress_search.tasks import Task
from compress_search.teacher import pretrained

Average = Literal["logits", "probabilities"]


def members(study: Study) -> list[Study]:
    """For each further teacher the study with it in the teacher's place, already fine-tuned."""
    return [study.model_copy(update={"teacher": TeacherConfig(model=model)}) for model in study.teacher.ensemble]


def check(study: Study, task: Task) -> None:
    """Refuse further teachers that cannot be read or do not fit the task, from their configurations alone.

    Raises:
        StudyError: as for the first teacher; or probabilities of numbers are to be averaged, or a CRF's scores.
    """
    if study.teacher.average == "probabilities" and not task.labels:
        raise study.error("teacher.average", f"{task.name} has no probabilities: expected logits")
    for number, member in enumerate(members(study)):
        with study.blamed(key_of(number)):
            config = pretrained.read_config(member, task)
        if asks_for_crf(config):
            raise study.error(key_of(number), "it has a CRF, whose transitions cannot be averaged")


def key_of(number: int) -> str:
    """Where a further teacher stands in the study."""
    return f"teacher.ensemble.{number}"


def check_vocabularies(study: Study, first: PreTrainedTokenizerBase) -> None:
    """Refuse further teachers that would read the first one's tokens as something else; no weights are read.

    Raises:
        StudyError: a tokenizer cannot be loaded, or is another one.
    """
    for number, member in enumerate(members(study)):
        with study.blamed(key_of(number)):
            tokenizer = pretrained.load_tokenizer(member)
        check_vocabulary(study, number, first, tokenizer)


def check_vocabulary(
    study: Study, number: int, first: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase
) -> None:
    """Refuse a teacher that would read the first one's tokens as something else.

    Raises:
        StudyError: their pieces or special tokens have different numbers.
    """
    if not pretrained.same_vocabulary(first, other):
        raise study.error(
            key_of(number),
            f"{study.teacher.ensemble[number]}: its vocabulary is not the first teacher's, "
            "whose tokens it would be given",
        )


def average(logits: Sequence[Tensor], how: Average = "logits") -> Tensor:
    """One teacher's logits (…, C) for those of several: their mean, or the logarithm of the mean probability.

    Of one teacher, its own. The logarithms are shifted, each row by the mean of the teachers' normalisers, so that
    teachers of one mind give their own logits: no softmax sees it, squared differences do.

    Source: Yang et al. 2020, TextBrewer (mean of logits).
    """
    if len(logits) == 1:
        return logits[0]
    stacked = torch.stack(list(logits))
    if how == "logits":
        return stacked.mean(0)
    normalisers = stacked.logsumexp(-1, keepdim=True)
    return (stacked - normalisers).logsumexp(0) - math.log(len(logits)) + normalisers.mean(0)

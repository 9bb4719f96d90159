"""A masked language model beside the teacher, for methods that learn from one or write examples with it.

Owns the key ``teacher.masked_lm``: who that is and every complaint about it. Trains nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForMaskedLM, PreTrainedTokenizerBase

from compress_search.errors import StudyError
from compress_search.study import FineTune, Study, TeacherConfig
from compress_search.tasks import Task
from compress_search.teacher import pretrained
from compress_search.teacher.networks import quiet

KEY = "teacher.masked_lm"


def check(study: Study, task: Task) -> None:
    """Refuse a language model that cannot be read or does not read the teacher's tokens, without loading weights.

    Raises:
        StudyError: as for the teacher; or its vocabulary is not the teacher's.
    """
    if study.teacher.masked_lm is None:
        return
    with _blamed(study):
        pretrained.read_config(_as_teacher(study), task)
    if study.teacher.model:
        _check_vocabulary(study, pretrained.load_tokenizer(study))


def fingerprint(study: Study) -> str:
    """Hash of the language model's files."""
    with _blamed(study):
        return pretrained.files_digest(pretrained.directory_of(_as_teacher(study)))


def load(study: Study, task: Task, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> nn.Module:
    """The language model, frozen and in evaluation mode on the device.

    Raises:
        StudyError: see :func:`check`; or the files have no head that predicts pieces.
    """
    check(study, task)
    _check_vocabulary(study, tokenizer)
    with _blamed(study):
        source = pretrained.directory_of(_as_teacher(study))
    try:
        with quiet():
            found: tuple[Any, Any] = AutoModelForMaskedLM.from_pretrained(
                source, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
            )
    except Exception as error:  # damaged files fail in as many ways as there are formats
        raise study.error(KEY, f"cannot load the weights: {str(error).splitlines()[0]}") from error
    network, info = found
    if info["missing_keys"]:
        missing = min(info["missing_keys"])
        raise study.error(KEY, f"expected a masked language model, and the weights lack {missing}")
    frozen: nn.Module = network.to(device).eval().requires_grad_(False)
    return frozen


def _as_teacher(study: Study) -> Study:
    """The study with the language model in the teacher's place, any head of it to be trained anew."""
    teacher = TeacherConfig(model=study.teacher.masked_lm, fine_tune=FineTune())
    return study.model_copy(update={"teacher": teacher})


def _check_vocabulary(study: Study, tokenizer: PreTrainedTokenizerBase) -> None:
    with _blamed(study):
        other = pretrained.load_tokenizer(_as_teacher(study))
    if other.get_vocab() != tokenizer.get_vocab():
        raise study.error(KEY, "its vocabulary is not the teacher's, whose tokens it would be given")


@contextmanager
def _blamed(study: Study) -> Iterator[None]:
    """Complaints about the model name the key it stands under."""
    try:
        yield
    except StudyError as error:
        raise study.error(KEY, error.message) from error

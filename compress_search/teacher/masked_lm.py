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

from compress_search.candidate import Subject
from compress_search.encoders import subject_of
from compress_search.errors import StudyError
from compress_search.study import FineTune, Study, TeacherConfig
from compress_search.tasks import Task
from compress_search.teacher import pretrained
from compress_search.teacher.networks import auto_class, quiet

KEY = "teacher.masked_lm"
_PREDICT_PIECES = ("ForMaskedLM", "BertForPreTraining", "LMHeadModel", "ForCausalLM")
"""What the names of classes end in that score every piece of the vocabulary."""
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


def check(study: Study, task: Task) -> None:
    """Refuse a language model that cannot be read or predicts no pieces, from its configuration alone.

    Raises:
        StudyError: as for the teacher; or it is another kind of model, or has another number of pieces than the
            teacher's tokenizer is yet to be trained to.
    """
    if study.teacher.masked_lm is None:
        return
    kinds = _config(study, task).architectures or []
    if kinds and not kinds[0].endswith(_PREDICT_PIECES):
        raise study.error(KEY, f"{study.teacher.masked_lm} is a {kinds[0]}: expected a masked language model")
    wanted = study.teacher.architecture and study.teacher.architecture.vocabulary
    if isinstance(wanted, int) and (found := len(_tokenizer(study))) != wanted:
        raise study.error(
            KEY, f"its vocabulary has {found} pieces: expected the teacher's, which is to have {wanted}"
        )


def unlike(study: Study, task: Task, teacher: Subject) -> frozenset[str]:
    """Traits that say which shapes the language model's encoder has in place of the teacher's."""
    if study.teacher.masked_lm is None:
        return frozenset()
    other = subject_of(auto_class(task.tokens).from_config(_config(study, task)), task.name)
    return frozenset(
        f"masked-lm:{name}={getattr(other, name)}"
        for name in _SHAPES
        if getattr(other, name) != getattr(teacher, name)
    )


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
    check_vocabulary(study, tokenizer)
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


def check_vocabulary(study: Study, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a language model that would read the teacher's tokens as something else; no weights are read.

    Raises:
        StudyError: its tokenizer cannot be loaded, or has other pieces; or there is no mask to predict behind.
    """
    if study.teacher.masked_lm is None:
        return
    if _tokenizer(study).get_vocab() != tokenizer.get_vocab():
        raise study.error(
            KEY,
            f"{study.teacher.masked_lm}: its vocabulary is not the teacher's, whose tokens it would be given",
        )
    if tokenizer.mask_token_id is None:
        raise study.error(KEY, "the teacher's tokenizer has no mask token, so that nothing could be hidden from it")


def _config(study: Study, task: Task) -> Any:
    with _blamed(study):
        return pretrained.read_config(_as_teacher(study), task)


def _tokenizer(study: Study) -> PreTrainedTokenizerBase:
    with _blamed(study):
        return pretrained.load_tokenizer(_as_teacher(study))


@contextmanager
def _blamed(study: Study) -> Iterator[None]:
    """Complaints about the model name the key it stands under."""
    try:
        yield
    except StudyError as error:
        raise study.error(KEY, error.message) from error

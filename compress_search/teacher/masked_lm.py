"""A masked language model beside the teacher, for methods that learn from one or write examples with it.

Owns the key ``teacher.masked_lm``: who that is and every complaint about it. Trains nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForMaskedLM, PreTrainedTokenizerBase

from compress_search.candidate import Subject
from compress_search.study import Study
from compress_search.tasks import Task
from compress_search.teacher.beside import Beside
from compress_search.teacher.networks import quiet

_PREDICT_PIECES = ("ForMaskedLM", "BertForPreTraining", "LMHeadModel", "ForCausalLM")
"""What the names of classes end in that score every piece of the vocabulary."""


def check(study: Study, task: Task) -> None:
    """Refuse a language model that cannot be read or predicts no pieces, from its configuration alone.

    Raises:
        StudyError: see :meth:`Beside.config`; or it is another kind of model.
    """
    own = Beside(study, "masked_lm")
    if own.model is None:
        return
    kinds = own.config(task).architectures or []
    if kinds and not kinds[0].endswith(_PREDICT_PIECES):
        raise study.error(own.key, f"{own.model} is a {kinds[0]}: expected a masked language model")


def unlike(study: Study, task: Task, teacher: Subject) -> frozenset[str]:
    """Traits that say which shapes the language model's encoder has in place of the teacher's."""
    own = Beside(study, "masked_lm")
    return own.unlike(task, teacher) if own.model else frozenset()


def fingerprint(study: Study) -> str:
    """Hash of the language model's files."""
    return Beside(study, "masked_lm").fingerprint()


def load(study: Study, task: Task, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> nn.Module:
    """The language model, frozen and in evaluation mode on the device.

    Raises:
        StudyError: see :func:`check`; or the files have no head that predicts pieces.
    """
    check(study, task)
    check_vocabulary(study, tokenizer)
    own = Beside(study, "masked_lm")
    source = own.source()
    try:
        with quiet():
            found: tuple[Any, Any] = AutoModelForMaskedLM.from_pretrained(
                source, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
            )
    except Exception as error:  # damaged files fail in as many ways as there are formats
        raise study.error(own.key, f"cannot load the weights: {str(error).splitlines()[0]}") from error
    network, info = found
    if info["missing_keys"]:
        missing = min(info["missing_keys"])
        raise study.error(own.key, f"expected a masked language model, and the weights lack {missing}")
    frozen: nn.Module = network.to(device).eval().requires_grad_(False)
    return frozen


def check_vocabulary(study: Study, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a language model that would read the teacher's tokens as something else; no weights are read.

    Raises:
        StudyError: see :meth:`Beside.check_vocabulary`; or there is no mask to predict behind.
    """
    own = Beside(study, "masked_lm")
    if own.model is None:
        return
    own.check_vocabulary(tokenizer)
    if tokenizer.mask_token_id is None:
        raise study.error(
            own.key, "the teacher's tokenizer has no mask token, so that nothing could be hidden from it"
        )

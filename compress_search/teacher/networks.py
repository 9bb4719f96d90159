"""transformers' classes for a task: which head, which labels, how to load without noise.

Knows nothing of studies or of where a model comes from.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, PreTrainedConfig
from transformers.utils import logging

from compress_search.crf import asks_for_crf, attach_crf, crf_of
from compress_search.tasks import Task

HEADS = {True: "ForTokenClassification", False: "ForSequenceClassification"}
"""What the name of a model's class ends in, by ``Task.tokens``."""


def auto_class(tokens: bool) -> Any:
    """The class that makes networks with a head for every token, or with one for the whole text."""
    return AutoModelForTokenClassification if tokens else AutoModelForSequenceClassification


def with_labels(config: PreTrainedConfig, task: Task) -> PreTrainedConfig:
    """The configuration, in place, with the task's labels in the task's order."""
    if task.labels:
        config.id2label = dict(enumerate(task.labels))
        config.label2id = {label: i for i, label in enumerate(task.labels)}
    else:
        config.num_labels = 1
    if not task.tokens:
        config.problem_type = "single_label_classification" if task.labels else "regression"
    return config


def with_crf(config: PreTrainedConfig, wanted: bool) -> PreTrainedConfig:
    """The configuration, in place, asking for a CRF or not."""
    if wanted or asks_for_crf(config):
        config.crf = wanted
    return config


def restore_crf(network: nn.Module, directory: Path) -> None:
    """Give the network, in place, the CRF that its configuration asks for, with the tensors from the directory.

    transformers writes these with all others, and reads only what its own classes have.

    Raises:
        RuntimeError: they are not there, or of another number of labels.
    """
    attach_crf(network)
    if crf := crf_of(network):
        crf.load_state_dict(
            {name: tensor for path in directory.glob("*.safetensors") for name, tensor in _crf(path)}
        )


def _crf(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 (no mapping)
            if name.startswith("crf."):
                yield name.removeprefix("crf."), file.get_tensor(name)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """New weights depend on the seed; the caller's random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and load reports: what matters in them is checked here."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()

"""Runs a model the way whoever deploys it will: from a directory, with transformers or ONNX Runtime.

Owns the forms an exported model takes. Knows nothing of artefacts or of how the directory came about.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from compress_search.encoders import inputs, load_network
from compress_search.runtimes import OnnxRunner, Runner
from compress_search.tasks import Task

Form = Literal["onnx", "transformers", "manifest"]
"""``onnx``: model.onnx for ONNX Runtime. ``transformers``: config.json and safetensors for ``from_pretrained``.
``manifest``: our architecture manifest and safetensors, for shapes that no configuration can express."""

ONNX_MODEL = "model.onnx"


def load_deployed(directory: Path, form: Form, task: Task, threads: int) -> Runner:
    """A runner on the CPU for a model in one of its exported forms."""
    if form == "onnx":
        return _onnx_runner(directory / ONNX_MODEL, threads)
    torch.set_num_threads(threads)
    return _torch_runner(_pretrained(directory, task) if form == "transformers" else load_network(directory))


def _pretrained(directory: Path, task: Task) -> nn.Module:
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    auto_class = AutoModelForTokenClassification if task.tokens else AutoModelForSequenceClassification
    return cast(nn.Module, auto_class.from_pretrained(directory))


def _onnx_runner(model: Path, threads: int) -> Runner:
    import onnx

    graph = onnx.load(str(model), load_external_data=False).graph
    return OnnxRunner(model, [node.name for node in graph.input], threads, "cpu")


def _torch_runner(network: nn.Module) -> Runner:
    names = inputs(network.eval())

    def run(batch: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        tensors = {name: torch.from_numpy(batch[name]) for name in names if name in batch}
        with torch.inference_mode():
            return cast(NDArray[np.float32], network(**tensors).logits.float().numpy())

    return run

"""Runs a model the way whoever deploys it will: from a directory, with transformers or ONNX Runtime.

Owns the forms an exported model takes, and ``settings.json`` beside each, which says how it was measured: engine,
threads, ONNX Runtime's configuration, longest input and buckets. Knows nothing of artefacts or of how the directory
came about.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from compress_search.runtimes.engines import CPU_SESSION, Bucketed, OnnxRunner, Runner, TorchRunner
from compress_search.tasks import Task

if TYPE_CHECKING:
    from torch import nn

    from compress_search.crf import Crf

Form = Literal["onnx", "transformers", "manifest"]
"""``onnx``: model.onnx for ONNX Runtime. ``transformers``: config.json and safetensors for ``from_pretrained``.
``manifest``: our architecture manifest and safetensors, for shapes that no configuration can express."""

ONNX_MODEL, SETTINGS = "model.onnx", "settings.json"


def settings_of(
    runtime: Mapping[str, Any], task: Task, max_length: int, pad: int, crf: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What ``settings.json`` says of a model that a runtime ran: all that whoever deploys it needs to know.

    ``max_length`` is the data's; the runtime may read less of an input. ``crf`` is a CRF's plain data.
    """
    return {
        "task": task.name,
        "labels": list(task.labels),
        "max_length": min(max_length, runtime.get("max_length") or max_length),
        "engine": runtime["engine"],
        "threads": runtime.get("threads"),
        "session": CPU_SESSION,
        "buckets": list(runtime.get("buckets", ())),
        "pad": pad,
        "crf": crf,
    }


def load_deployed(directory: Path, form: Form, task: Task, threads: int) -> Runner:
    """A runner on the CPU for a model in one of its exported forms, fed as its settings say where it has any.

    What torch.compile ran is run by torch as it is: the same numbers, without the wait.
    """
    settings = _settings(directory)
    threads = settings.get("threads") or threads
    run: Runner
    if form == "onnx":
        run = OnnxRunner(directory / ONNX_MODEL, threads, "cpu")
    else:
        from compress_search.encoders import inputs, load_network

        network = _pretrained(directory, task) if form == "transformers" else load_network(directory)
        run = TorchRunner(network, inputs(network), threads, "cpu")
    buckets = settings.get("buckets")
    return Bucketed(run, buckets, settings["pad"]) if buckets else run


def deployed_crf(directory: Path) -> Crf | None:
    """The CRF that turns an exported model's logits into labels, if there is one."""
    plain = _settings(directory).get("crf")
    if not plain:
        return None
    from compress_search.crf import Crf

    return Crf.from_dict(plain)


def _settings(directory: Path) -> dict[str, Any]:
    path = directory / SETTINGS
    return cast("dict[str, Any]", json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def _pretrained(directory: Path, task: Task) -> nn.Module:
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    auto_class = AutoModelForTokenClassification if task.tokens else AutoModelForSequenceClassification
    return cast("nn.Module", auto_class.from_pretrained(directory))

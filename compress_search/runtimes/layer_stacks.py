"""Small networks of a few equal layers, ready to run: what one layer of some shape costs is read off them.

Owns how such a network is built from shapes alone and how it is run as a study runs its candidates. Knows no clock.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from compress_search.candidate import Subject
from compress_search.encoders import inputs, prune_heads, prune_hidden, prune_neurons, set_attention
from compress_search.runtimes.engines import OnnxRunner
from compress_search.runtimes.onnx_attention import fuse_attention
from compress_search.runtimes.onnx_export import export

VOCABULARY = 64
"""Rows of the word table, which is no part of a layer; looking them up takes as long in a large one."""

Run = Callable[[Mapping[str, NDArray[Any]]], NDArray[Any]]


def layer_stack(subject: Subject, depth: int, heads: int, neurons: int) -> nn.Module:
    """An encoder of the subject's family and widths, with ``depth`` layers of so many heads and neurons.

    Weights are drawn from a generator of its own: how long a layer takes does not depend on them.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    width = int(subject.heads) * subject.head_dim
    if subject.family == "distilbert":
        sizes = {
            "n_layers": depth,
            "n_heads": int(subject.heads),
            "dim": width,
            "hidden_dim": int(subject.intermediate),
        }
    else:
        sizes = {"num_hidden_layers": depth, "num_attention_heads": int(subject.heads), "hidden_size": width}
        sizes |= {"intermediate_size": int(subject.intermediate), "embedding_size": width}
    table = {"vocab_size": VOCABULARY, "max_position_embeddings": subject.positions, "pad_token_id": 0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(subject.family, **sizes, **table)
        network: nn.Module = AutoModelForSequenceClassification.from_config(config).eval()
    prune_heads(network, dict.fromkeys(range(depth), range(heads)))
    prune_neurons(network, dict.fromkeys(range(depth), range(neurons)))
    if subject.hidden < width:
        prune_hidden(network, range(subject.hidden))
    return network


def runner(network: nn.Module, file: Path, threads: int, device: str) -> Run:
    """The network in the engine that candidates run in by default; ONNX Runtime reads it from ``file``."""
    if device == "cpu":
        export(network, file)
        fuse_attention(file)
        return OnnxRunner(file, threads, device)
    set_attention(network, "sdpa")
    network.to(device)

    def run(batch: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        feed = {name: torch.from_numpy(batch[name]).to(device) for name in inputs(network)}
        with torch.inference_mode():
            found: NDArray[Any] = network(**feed).logits.float().cpu().numpy()  # waits for the device
        return found

    return run


def example(batch_size: int, length: int) -> dict[str, NDArray[np.int64]]:
    """A batch without padding, of token ids that every such network has."""
    ids = np.random.default_rng(0).integers(1, VOCABULARY, size=(batch_size, length))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}

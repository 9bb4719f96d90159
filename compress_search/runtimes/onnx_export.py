"""Torch network -> ONNX file with dynamic batch and length. Owns the exporter's settings and its known noise."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.jit import TracerWarning  # type: ignore[attr-defined]

from compress_search.encoders import inputs
from compress_search.encoders.view import FAMILIES, set_attention
from compress_search.runtimes.onnx_shapes import copy_dimensions

OPSET = 17
GRAPHS = 3
"""Raised when other graphs are written for the same network: what was measured on earlier ones is not theirs."""

# what the TorchScript exporter says about every BERT-like network; anything else it says stays visible
_NOISE = (
    (DeprecationWarning, "You are using the legacy TorchScript-based ONNX export"),
    (DeprecationWarning, "The feature will be removed"),
    (TracerWarning, "Converting a tensor to a Python boolean"),
    (UserWarning, "Exporting aten::index operator of advanced indexing"),
    (UserWarning, "Exporting a model to ONNX with a batch_size other than 1"),  # initial states follow the batch
)


class _Logits(nn.Module):
    """Positional arguments in, the logits tensor out: the signature an exporter can trace."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.names = network, inputs(network)
        self.attends = cast(Any, network).config.model_type in FAMILIES

    def forward(self, *tensors: Tensor) -> Tensor:
        named = dict(zip(self.names, tensors, strict=True))
        if self.attends:
            named["attention_mask"] = _added(named["attention_mask"])
        return cast(Tensor, self.network(**named).logits)


def _added(mask: Tensor) -> Tensor:
    """What eager attention adds to its scores (B, 1, 1, S), from the mask (B, S).

    transformers passes four dimensions on as they are; from two it makes (B, 1, S, S) by 30 nodes.
    """
    return (1.0 - mask[:, None, None, :].float()) * torch.finfo(torch.float32).min


def export(network: nn.Module, path: Path) -> None:
    """Write the network as ONNX: int64 inputs (batch, length), output ``logits`` (batch, …).

    The network, on the CPU in float32, is left in evaluation mode with eager attention, whose graph is a
    quarter smaller than the one traced from scaled-dot-product attention and computes the same.
    """
    # sdpa's traced mask handling adds an IsNaN and a Where over (B, A, S, S) to every layer
    set_attention(network, "eager")
    wrapped = _Logits(network).eval()  # the exporter restores the wrapper's mode, and so the network's
    ids = torch.ones(2, 8, dtype=torch.long)
    # one row is padded: a mask of ones could be traced away
    mask = torch.ones_like(ids).index_put((torch.tensor(1), torch.arange(5, 8)), torch.tensor(0))
    example = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    axes = {name: {0: "batch", 1: "length"} for name in wrapped.names}
    rank = 3 if type(network).__name__.endswith("ForTokenClassification") else 2
    axes["logits"] = {0: "batch", 1: "length"} if rank == 3 else {0: "batch"}
    with _quiet(), torch.inference_mode():
        torch.onnx.export(
            wrapped,
            tuple(example[name] for name in wrapped.names),
            str(path),
            input_names=list(wrapped.names),
            output_names=["logits"],
            dynamic_axes=axes,
            opset_version=OPSET,
            dynamo=False,
        )
    if wrapped.attends:
        copy_dimensions(path)


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        for category, message in _NOISE:
            warnings.filterwarnings("ignore", message, category)
        yield

"""Quantization-aware training: the network learns with its weights rounded as the file will hold them.

Owns the rounding inside the training graph: parametrizations with straight-through gradients for weights, hooks for
activations. What is left is an ordinary network whose weights lie on their grids.

Source: Zhang et al. 2020, TernaryBERT: Distillation-aware Ultra-low Bit BERT, section 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from compress_search import Context
from compress_search.encoders import bake, embeddings

from ..distillation.soft_targets import soft_target_loss
from .bits import Grid, fake_quantize, fake_quantize_activations


class Rounded(nn.Module):
    """A parametrization: a matrix goes in, its values on the grid come out."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, weight: Tensor) -> Tensor:
        """(outputs, inputs) to the same shape."""
        return fake_quantize(weight, self.grid)


def embedding_tables(network: nn.Module) -> list[nn.Embedding]:
    """Every table of the embedding block."""
    return [module for module in embeddings(network).modules() if isinstance(module, nn.Embedding)]


def train_rounded(
    network: nn.Module,
    grids: Mapping[str, Grid],
    table_grid: Grid | None,
    context: Context,
    *,
    task: str,
    distil: bool,
    learning_rate: float,
    round_activations: bool,
) -> None:
    """Train in place on the step's whole budget, and leave the weights rounded.

    Args:
        network: no parametrizations in it; left in evaluation mode.
        grids: path of a linear map -> where its weights lie; the others stay as they are.
        table_grid: where embedding tables lie; None leaves them as they are.
        context: lends training, labels and the teacher's logits.
        task: the task's name.
        distil: learn from the teacher's logits beside the labels.
        learning_rate: the peak.
        round_activations: round the inputs of the maps as integer kernels do at run time.
    """
    maps = [network.get_submodule(path) for path in grids]
    for module, grid in zip(maps, grids.values(), strict=True):
        parametrize.register_parametrization(module, "weight", Rounded(grid))
    for table in embedding_tables(network) if table_grid else []:
        parametrize.register_parametrization(table, "weight", Rounded(table_grid))  # type: ignore[arg-type]
    with rounded_inputs(maps if round_activations else []):
        loss = soft_target_loss(context, task) if distil else None
        context.fit(network, loss=loss, learning_rate=learning_rate)
    bake(network)


@contextmanager
def rounded_inputs(modules: Iterable[nn.Module]) -> Iterator[None]:
    """What these modules read is rounded to 256 levels for the time of the block."""

    def hook(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return fake_quantize_activations(arguments[0]), *arguments[1:]

    handles = [module.register_forward_pre_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

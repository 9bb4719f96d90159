"""Quantization-aware training: the network learns with its weights rounded as the file will hold them.

Owns the rounding inside the training graph (parametrizations with straight-through gradients for weights, hooks for
activations) and what is learnt meanwhile. What is left is an ordinary network whose weights lie on their grids.

Sources: Zhang et al. 2020, TernaryBERT: Distillation-aware Ultra-low Bit BERT, section 3; Bai et al. 2021,
BinaryBERT, section 3.3 (inner states first, then logits).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from compress_search import Context
from compress_search.encoders import bake, embeddings, layers, parts

from ..distillation.matches import Match
from ..distillation.matching import Matching
from ..distillation.objective import Objective, reader
from ..distillation.soft_targets import SoftTerm
from .bits import Grid, fake_quantize, fake_quantize_activations, straight_through
from .number_formats import Features
from .weight_maps import linear_maps

FIRST_STAGE = 0.5
"""The part of the training that inner states take where they come first."""


class Rounded(nn.Module):
    """A parametrization: a matrix goes in, its values on the grid come out."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, weight: Tensor) -> Tensor:
        """(outputs, inputs) to the same shape."""
        return fake_quantize(weight, self.grid)


class Kept(nn.Module):
    """A parametrization: weights that are zero stay so, and the others are what they are."""

    def forward(self, weight: Tensor) -> Tensor:
        """A matrix of any shape to the same."""
        return straight_through(weight, weight, weight != 0)


def embedding_tables(network: nn.Module) -> list[nn.Embedding]:
    """Every table of the embedding block."""
    return [module for module in embeddings(network).modules() if isinstance(module, nn.Embedding)]


def train_rounded(
    network: nn.Module,
    grids: Mapping[str, Grid],
    table_grid: Grid | None,
    stages: Sequence[Objective],
    *,
    learning_rate: float,
    activation_bits: int | None,
) -> None:
    """Train in place on the step's whole budget, and leave the weights rounded.

    Args:
        network: no parametrizations in it; left in evaluation mode.
        grids: path of a linear map -> where its weights lie; the others stay as exact as they are, and as sparse.
        table_grid: where embedding tables lie; None leaves them as they are.
        stages: of :func:`objectives`; of two the first has :data:`FIRST_STAGE` of the budget.
        learning_rate: the peak.
        activation_bits: to how many bits the inputs of the maps are rounded, as they are at run time; None for not.
    """
    maps = [network.get_submodule(path) for path in grids]
    for module, grid in zip(maps, grids.values(), strict=True):
        parametrize.register_parametrization(module, "weight", Rounded(grid))
    for module in linear_maps(network).values():
        if module not in maps and not module.weight.all():
            parametrize.register_parametrization(module, "weight", Kept())
    for table in embedding_tables(network) if table_grid else []:
        parametrize.register_parametrization(table, "weight", Rounded(table_grid))  # type: ignore[arg-type]
    shares = [1.0] if len(stages) == 1 else [FIRST_STAGE, 1 - FIRST_STAGE]
    with rounded_inputs(maps, activation_bits):
        for stage, share in zip(stages, shares, strict=True):
            stage.fit(network, share=share, scored=stage.answers, learning_rate=learning_rate)
    bake(network)


def objectives(
    original: nn.Module, context: Context, *, task: str, distil: bool, features: Features
) -> list[Objective]:
    """What a rounded network learns from, stage by stage.

    The labels, with ``distil`` the study's teacher's logits in equal part, and what the network itself computed
    before it was rounded, whose widths and depth are always its own: the ``last_hidden`` states beside them, or in
    a ``two_stage`` training all hidden states and attention scores first, and the logits after these.

    Args:
        original: the network before rounding, in evaluation mode, not to be changed.
        context: lends training, labels and the teacher's logits.
        task: the task's name.
        distil: whether there is anything to learn from beside the labels.
        features: what of the original.
    """
    soft = 0.5 if distil else 0.0
    wanted = features if distil else "none"
    last = len(layers(original))

    def compare(matches: Sequence[Match], soft: float, hard: float) -> Objective:
        matching = Matching.between(matches, original, original, context.seed)
        return Objective(context, matching, SoftTerm(task), soft, hard, teacher=reader(original))

    first = [compare(inner_matches(original), 0.0, 0.0)] if wanted == "two_stage" else []
    beside = [_hidden(last)] if wanted == "last_hidden" else []
    return [*first, compare(beside, soft, 1 - soft)]


def inner_matches(network: nn.Module) -> list[Match]:
    """The embeddings, every layer's hidden states and every layer's attention scores; no scores without heads."""
    stack = layers(network)
    attended = [index for index, layer in enumerate(stack) if parts(layer).heads]
    return [*map(_hidden, range(len(stack) + 1)), *map(_scores, attended)]


def _hidden(number: int) -> Match:
    return _match(number, feature="hidden", loss="hidden_mse")


def _scores(number: int) -> Match:
    return _match(number, feature="attention_scores", loss="attention_mse")


def _match(number: int, **what: str) -> Match:
    return Match.model_validate({"teacher_layer": number, "student_layer": number, **what})


@contextmanager
def rounded_inputs(modules: Iterable[nn.Module], bits: int | None = 8) -> Iterator[None]:
    """What these modules read is rounded to 2^bits levels for the time of the block; with None it is not."""

    def hook(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return fake_quantize_activations(arguments[0], bits or 8), *arguments[1:]

    handles = [module.register_forward_pre_hook(hook) for module in modules] if bits else []
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

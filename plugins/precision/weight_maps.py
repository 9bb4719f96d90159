"""The linear maps of a network: which there are, which a study leaves alone, and which lose most by rounding.

Owns their names, in the network and in the ONNX file exported from it. Knows nothing of files or training.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from compress_search import Batch, Context
from compress_search.encoders import head_linears, layers, parts

from .bits import Grid


def linear_maps(network: nn.Module) -> dict[str, nn.Linear]:
    """Path -> linear map, in order; a shared one under its first path, one without weights not at all."""
    return {
        path: module
        for path, module in network.named_modules()
        if isinstance(module, nn.Linear) and module.weight.numel()
    }


def excluded_maps(network: nn.Module, names: Collection[str]) -> set[str]:
    """Paths of the linear maps within these parts; the head's last map is its classifier, the others its pooler."""
    stack, maps = list(layers(network)), linear_maps(network)
    ending = head_linears(network)
    owners: dict[str, Sequence[nn.Module]] = {
        "pooler": ending[:-1],
        "classifier": ending[-1:],
        "first_layer": stack[:1],
        "last_layer": stack[-1:],
        "attention_output": [parts(layer).attention_output for layer in stack],
        "ffn_down": [parts(layer).down for layer in stack],
    }
    chosen = {id(m) for name in names for owner in owners[name] for m in owner.modules()}
    return {path for path, module in maps.items() if id(module) in chosen}


def node_patterns(network: nn.Module, paths: Collection[str]) -> tuple[str, ...]:
    """Patterns of the names that the ONNX nodes of these linear maps have, at every place where they are used."""
    chosen = {id(network.get_submodule(path)) for path in paths}
    found = [path for path, module in network.named_modules(remove_duplicate=False) if id(module) in chosen]
    return tuple(map(_pattern, found))


def _pattern(path: str) -> str:
    """a.layer.0.b as /a/layer.0/b/, each part perhaps with the number of its repeated use."""
    scopes = re.split(r"\.(?!\d+(?:\.|$))", path)
    return "/" + "/".join(re.escape(scope) + r"(_\d+)?" for scope in scopes) + "/"


def most_sensitive(
    network: nn.Module, grids: Mapping[str, Grid], number: int, batches: Sequence[Batch], context: Context
) -> list[str]:
    """Paths of the maps whose rounding alone raises the loss most, the worst first.

    Costs one pass over the batches for each map. In a dry run, where weights mean nothing, they are the smallest:
    what is too large or too slow with these is so with any.
    """
    if context.dry or not number:
        return sorted(grids, key=lambda path: network.get_submodule(path).get_parameter("weight").numel())[:number]
    losses = {}
    for path, grid in grids.items():
        with _rounded(network.get_submodule(path), grid):
            losses[path] = _mean_loss(network, batches, context)
    return sorted(grids, key=lambda path: -losses[path])[:number]


@contextmanager
def _rounded(module: nn.Module, grid: Grid) -> Iterator[None]:
    """The module with rounded weights for the time of the block."""
    weight = module.get_parameter("weight")
    original = weight.data
    weight.data = grid.round(original)
    try:
        yield
    finally:
        weight.data = original


def _mean_loss(network: nn.Module, batches: Sequence[Batch], context: Context) -> float:
    with torch.no_grad():
        return sum(float(context.task_loss(network, batch)) for batch in batches) / max(len(batches), 1)

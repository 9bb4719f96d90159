"""Which layers stay when some go, by their place or by how little they change what passes through them.

Owns the strategies. The removal is surgery of the engine's; training that makes an encoder ready to lose any of its
layers (LayerDrop) is the engine's too.

Sources: Sajjad et al. 2023, On the Effect of Dropping Layers of Pre-trained Transformer Models (strategies by
place); Fan et al. 2020, Reducing Transformer Depth on Demand with Structured Dropout (layer_drop).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from compress_search import Batch
from compress_search.encoders import layers, read_features

STRATEGIES = ("top", "bottom", "alternate", "symmetric", "importance", "layer_drop")


def kept_layers(depth: int, drop: int, strategy: str) -> list[int]:
    """Which layers (0-based) stay when ``drop`` of ``depth`` go.

    ``top`` and ``bottom``: the last or first ones go; ``alternate``: every second one, down from the last but
    one, then the highest of the rest; ``symmetric``: the middle ones; ``layer_drop``: of layers counted from 1
    every ⌊1/p⌋-th one, p being drop/depth, as LayerDrop prunes; where these are too many the lowest of them stay.
    """
    if strategy == "bottom":
        return list(range(drop, depth))
    if strategy == "symmetric":
        start = (depth - drop + 1) // 2
        return [layer for layer in range(depth) if not start <= layer < start + drop]
    if strategy == "layer_drop" and drop:
        nth = depth // drop
        gone = range(nth - 1, depth, nth)[-drop:]
        return [layer for layer in range(depth) if layer not in gone]
    if strategy == "alternate":
        order = [*range(depth - 2, -1, -2), *range(depth - 1, -1, -2)]
        return sorted(order[drop:])
    return list(range(depth - drop))


def most_changing_layers(network: nn.Module, batches: Iterable[Batch], drop: int) -> list[int]:
    """The layers that stay when the ``drop`` go whose output is most like their input."""
    alike = similarity(network, batches)
    gone = alike.argsort(descending=True, stable=True)[:drop].tolist()
    return [layer for layer in range(len(alike)) if layer not in gone]


@torch.no_grad()
def similarity(network: nn.Module, batches: Iterable[Batch]) -> Tensor:
    """The cosine of each layer's output with its input, (L,), mean over the tokens that are no padding."""
    depth = len(layers(network))
    sums, tokens = torch.zeros(depth, dtype=torch.float64), 0
    for batch in batches:
        real = batch["attention_mask"].bool()
        found = read_features(network, batch, [f"hidden.{layer}" for layer in range(depth + 1)])
        states = [found[f"hidden.{layer}"][real] for layer in range(depth + 1)]  # (tokens, H)
        for layer in range(depth):
            sums[layer] += nn.functional.cosine_similarity(states[layer], states[layer + 1], dim=-1).sum().cpu()
        tokens += int(real.sum())
    return sums / max(tokens, 1)

"""The residual stream: every module that reads, writes or normalises the H hidden channels, and LayerNorm on some.

All of them share one set of channels, so that the width is a property of the whole network. Owns the list of these
modules; changes no shapes and decides on no channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar, cast

from torch import Tensor, nn

from compress_search.encoders import view

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Stream:
    """What touches the stream of width H; a module shared by several layers stands here once.

    ``tables`` (n, H) and ``norms`` (H) of the embeddings and layers; ``writers`` (H, n): attention and feed-forward
    outputs and the projection of narrow embeddings; ``readers`` (n, H): queries, keys, values, ups and the head's
    first linear map. ``pooled`` are the head's further linear maps: what is between them has the stream's channels
    too, so its first one is a writer as well. ``projection`` writes what no norm follows, where there is one.
    """

    tables: tuple[nn.Embedding, ...]
    norms: tuple[nn.LayerNorm, ...]
    writers: tuple[nn.Linear, ...]
    readers: tuple[nn.Linear, ...]
    pooled: tuple[nn.Linear, ...]
    projection: nn.Linear | None

    @property
    def width(self) -> int:
        """H."""
        return len(self.norms[-1].weight)


def stream(network: nn.Module) -> Stream:
    """The residual stream of a network; a word table that is a product of two matrices is left out."""
    all_parts = [view.parts(layer) for layer in view.layers(network)]
    block = view.embeddings(network)
    projection = cast("nn.Linear | None", getattr(view.backbone(network), "embeddings_project", None))
    tables = [] if projection else [m for m in block.children() if isinstance(m, nn.Embedding)]
    norms = [] if projection else [cast(nn.LayerNorm, block.LayerNorm)]
    linears = view.head_linears(network)
    readers = [m for p in all_parts for m in (p.query, p.key, p.value, p.up)]
    writers = [m for p in all_parts for m in (p.attention_output, p.down)]
    return Stream(
        tables=tuple(tables),
        norms=_distinct(norms + [norm for p in all_parts for norm in (p.attention_norm, p.output_norm)]),
        writers=_distinct([*filter(None, [projection]), *writers, *linears[:-1]]),
        readers=_distinct(readers + linears),
        pooled=tuple(linears[1:]),
        projection=projection,
    )


def norm_over(norm: nn.LayerNorm, x: Tensor, alive: Tensor, *, zeroed: bool = True) -> Tensor:
    """LayerNorm of x (…, H) over the channels ``alive`` (H,) alone, 0 elsewhere: what it is once they are cut out.

    Plain LayerNorm of an input that is zero elsewhere is something else, as mean and variance count the zeros.
    Without ``zeroed`` the other channels are what they would be by the same mean and variance.
    """
    weights = alive.to(x)
    mean = (x * weights).sum(-1, keepdim=True) / weights.sum()
    centred = x - mean
    variance = (centred * weights).square().sum(-1, keepdim=True) / weights.sum()
    normed = centred * (variance + norm.eps).rsqrt() * norm.weight + norm.bias
    return normed * weights if zeroed else normed


def _distinct(modules: list[M]) -> tuple[M, ...]:
    return tuple({id(module): module for module in modules}.values())

"""Masks that switch heads, feed-forward neurons and hidden channels off or turn them down, and their removal.

A head's mask variable multiplies its context before the attention's output projection, a neuron's its activation
before the second feed-forward projection, a channel's everything that is written to it on the residual stream,
whose norms count the surviving channels alone. Owns what masks do to a network, and the surgery after which it
computes the same without them; which units go is not decided here.

All layers have the same shape. A block shared by several layers has one row of variables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from compress_search.encoders import (
    LayerParts,
    Stream,
    layers,
    norm_over,
    parts,
    prune_heads,
    prune_hidden,
    prune_neurons,
    stream,
)


class Units(NamedTuple):
    """One number for every head (attentions, A), neuron (feed-forwards, I) and hidden channel (1, H)."""

    heads: Tensor
    neurons: Tensor
    hidden: Tensor


class Masks:
    """Masks on a network, through forward hooks; any optimizer step leaves them alone.

    All ones leave the network's outputs as they were, to the bit. A unit masked with zero gives its weights no
    gradient. Values between turn a unit down, and may carry gradients of their own.
    """

    def __init__(self, network: nn.Module) -> None:
        views = [parts(layer) for layer in layers(network)]
        self.attentions = rows([view.query for view in views])
        self.feed_forwards = rows([view.up for view in views])
        device, first = views[0].down.weight.device, views[0]
        sizes = (
            (max(self.attentions) + 1, first.heads),
            (max(self.feed_forwards) + 1, first.neurons),
            (1, first.down.out_features),
        )
        self.units = Units(*(torch.ones(*size, device=device) for size in sizes))
        self._handles = [*self._hook_blocks(views), *self._hook_stream(stream(network))]

    def _hook_blocks(self, views: list[LayerParts]) -> Iterator[RemovableHandle]:
        for row, view in _first(self.attentions, views):
            yield view.attention_output.register_forward_pre_hook(self._on_heads(row, view.head_dim))
        for row, view in _first(self.feed_forwards, views):
            yield view.down.register_forward_pre_hook(self._on_neurons(row))

    def _hook_stream(self, found: Stream) -> Iterator[RemovableHandle]:
        for norm in found.norms:
            yield norm.register_forward_hook(self._normalise)
        if found.projection is not None:
            yield found.projection.register_forward_hook(lambda module, args, output: output * self.units.hidden[0])
        for linear in found.pooled:
            yield linear.register_forward_pre_hook(lambda module, args: (args[0] * self.units.hidden[0],))

    def _on_heads(self, row: int, width: int) -> Callable[[nn.Module, tuple[Tensor]], tuple[Tensor]]:
        return lambda module, args: (args[0] * self.units.heads[row].repeat_interleave(width),)

    def _on_neurons(self, row: int) -> Callable[[nn.Module, tuple[Tensor]], tuple[Tensor]]:
        return lambda module, args: (args[0] * self.units.neurons[row],)

    def _normalise(self, norm: Any, args: tuple[Tensor], output: Tensor) -> Tensor:
        mask = self.units.hidden[0]
        alive = mask.detach() != 0
        # the mask alone switches channels off, so that its gradient says what each would be worth
        return (output if alive.all() else norm_over(norm, args[0], alive, zeroed=False)) * mask

    @contextmanager
    def off(self) -> Iterator[None]:
        """The network as if nothing were masked, for the time of the block."""
        units, self.units = self.units, Units(*(torch.ones_like(mask) for mask in self.units))
        try:
            yield
        finally:
            self.units = units

    def remove(self) -> None:
        """Take the hooks off; the network computes as if nothing had been masked."""
        for handle in self._handles:
            handle.remove()


def rows(modules: list[nn.Module]) -> list[int]:
    """For each layer the number of its row of variables: layers that share the module share the row."""
    number: dict[int, int] = {}
    return [number.setdefault(id(module), len(number)) for module in modules]


def _first(row_of: list[int], views: list[LayerParts]) -> list[tuple[int, LayerParts]]:
    """Each row with the first layer that uses it."""
    return [(row, views[row_of.index(row)]) for row in sorted(set(row_of))]


def remove_masked(network: nn.Module, masks: Masks) -> None:
    """Take the masks off, fold what they turned down into the weights and cut out what they switched off, in place.

    The outputs stay what they were. Scales of heads and neurons go into the columns of the projection that follows,
    those of channels into the norms and into what reads the pooled vector.
    """
    masks.remove()
    _fold(network, masks)
    alive = [[row.nonzero().flatten().tolist() for row in mask] for mask in masks.units]
    prune_heads(network, {layer: alive[0][row] for layer, row in enumerate(masks.attentions)})
    prune_neurons(network, {layer: alive[1][row] for layer, row in enumerate(masks.feed_forwards)})
    if len(alive[2][0]) < masks.units.hidden.numel():
        prune_hidden(network, alive[2][0])


@torch.no_grad()
def _fold(network: nn.Module, masks: Masks) -> None:
    views, found = [parts(layer) for layer in layers(network)], stream(network)
    for row, view in _first(masks.attentions, views):
        view.attention_output.weight.mul_(masks.units.heads[row].repeat_interleave(view.head_dim))
    for row, view in _first(masks.feed_forwards, views):
        view.down.weight.mul_(masks.units.neurons[row])
    channels = masks.units.hidden[0]
    for norm in found.norms:
        norm.weight.mul_(channels)
        norm.bias.mul_(channels)
    if found.projection is not None:
        found.projection.weight.mul_(channels[:, None])
        found.projection.bias.mul_(channels)
    for linear in found.pooled:
        linear.weight.mul_(channels)

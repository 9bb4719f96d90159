"""Layers brought into the same order of heads and neurons, so that their mean means something.

The order of heads, and of neurons, is a layer's own affair: every order computes the same. Owns which head of one
layer takes which place of another's; the reordering itself is the engine's surgery, with nothing left out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compress_search.encoders import LayerParts, layers, parts, prune_heads, prune_neurons


def matching(ours: Tensor, reference: Tensor) -> list[int]:
    """The order of our rows (n, D) in which they lie nearest to the reference's (n, D), summed over rows.

    Equal to the largest sum of inner products, an assignment problem (Kuhn 1955, The Hungarian method).
    """
    from scipy.optimize import linear_sum_assignment

    likeness = reference.double() @ ours.double().T  # (n, n)
    _, order = linear_sum_assignment(likeness.cpu().numpy(), maximize=True)
    return [int(index) for index in order]


def head_vectors(layer: LayerParts) -> Tensor:
    """All weights of each head, (A, 4·d·H + 3·d): its rows of query, key and value and its output columns."""
    rows = [torch.cat([m.weight, m.bias[:, None]], dim=1) for m in (layer.query, layer.key, layer.value)]
    blocks = torch.cat([*rows, layer.attention_output.weight.T], dim=1)  # (A·d, 4·H + 3)
    return blocks.detach().reshape(layer.heads, -1)


def neuron_vectors(layer: LayerParts) -> Tensor:
    """All weights of each neuron, (f, 2·H + 1): what it reads, its bias and what it writes."""
    return torch.cat([layer.up.weight, layer.up.bias[:, None], layer.down.weight.T], dim=1).detach()


def align(network: nn.Module, layer: int, reference: int, *, heads: bool = True, neurons: bool = True) -> None:
    """Reorder a layer's heads and neurons, in place, to lie nearest to the reference layer's; it computes the same.

    Raises:
        ValueError: the layers differ in their numbers of heads or neurons.
    """
    ours, theirs = (parts(layers(network)[index]) for index in (layer, reference))
    if (heads and ours.heads != theirs.heads) or (neurons and ours.neurons != theirs.neurons):
        raise ValueError(f"layers {layer} and {reference} differ in shape: there is no order to bring one into")
    if heads and ours.heads:
        prune_heads(network, {layer: matching(head_vectors(ours), head_vectors(theirs))})
    if neurons and ours.neurons:
        prune_neurons(network, {layer: matching(neuron_vectors(ours), neuron_vectors(theirs))})

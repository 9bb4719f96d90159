"""How much each head, each feed-forward neuron and each hidden channel matters.

Owns the criteria that look at a network as it is; those that learn while it trains are gates.py's, the
masks whose gradients are taken masks.py's. How many units go, from where and when is not decided here.

Sources: Michel et al. 2019, Are Sixteen Heads Really Better than One? (taylor); Kwon et al. 2022, A Fast
Post-Training Pruning Framework for Transformers (fisher, rearrangement).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from compress_search import Batch, Loss
from compress_search.encoders import layers, parts, stream

from .masks import Masks, Units


@torch.no_grad()
def magnitude(network: nn.Module, masks: Masks) -> Units:
    """‖W_q; W_k; W_v; W_o‖_F of a head over the root of its number of weights; ‖up‖₂·‖down‖₂ of a neuron.

    A channel's is the norm of all that the layers write to it times the norm of all that they read from it.
    """
    views, found = [parts(layer) for layer in layers(network)], stream(network)
    heads = {}
    for row, view in zip(masks.attentions, views, strict=True):
        blocks = [m.weight.unflatten(0, (view.heads, -1)) for m in (view.query, view.key, view.value)]
        columns = view.attention_output.weight.T.unflatten(0, (view.heads, -1))
        weights = torch.cat([w.flatten(1) for w in (*blocks, columns)], dim=1)  # (A, 4·d·H)
        heads[row] = weights.norm(dim=1) / weights.shape[1] ** 0.5
    neurons = {
        row: view.up.weight.norm(dim=1) * view.down.weight.norm(dim=0)
        for row, view in zip(masks.feed_forwards, views, strict=True)
    }
    written = torch.cat([linear.weight for linear in found.writers], dim=1).norm(dim=1)
    read = torch.cat([linear.weight for linear in found.readers]).norm(dim=0)
    return Units(torch.stack(list(heads.values())), torch.stack(list(neurons.values())), (written * read)[None])


def random(masks: Masks, seed: int) -> Units:
    """Uniform scores, as the control that any criterion has to beat; the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return Units(*(torch.rand(mask.shape, generator=generator).to(mask) for mask in masks.units))


def mask_gradients(network: nn.Module, masks: Masks, batches: Iterable[Batch], loss: Loss) -> Units:
    """∂L/∂ξ of every mask variable, each (batches, rows, units), in evaluation mode.

    A block that several layers share has one variable for all its uses, so its gradient is their sum. Weights get
    no gradients; the network's mode is left as it was.
    """
    mode = network.training
    network.eval()
    masks.units = Units(*(mask.detach().requires_grad_() for mask in masks.units))
    gradients = [torch.autograd.grad(loss(network, batch), masks.units) for batch in batches]  # of masks: small
    masks.units = Units(*(mask.detach() for mask in masks.units))
    network.train(mode)
    return Units(*(torch.stack(each) for each in zip(*gradients, strict=True)))


def taylor(gradients: Units) -> Units:
    """The mean over batches of |∂L/∂ξ|: what removing a unit does to the loss, to first order (Michel, 4.1)."""
    return Units(*(gradient.abs().mean(0) for gradient in gradients))


def fisher(gradients: Units) -> Units:
    """The sum over batches of (∂L/∂ξ)², the diagonal of the empirical Fisher information (Kwon 2022, 4.1)."""
    return Units(*(gradient.square().sum(0) for gradient in gradients))


CRITERIA = {"taylor": taylor, "fisher": fisher}
NEED_GRADIENTS = tuple(CRITERIA)


def of_blocks(criterion: str, gradients: Units) -> tuple[Tensor, Tensor]:
    """What the criterion says of whole attentions and feed-forwards, (rows,) each.

    One mask variable for all units of a block has the sum of their gradients, so that units which stand in for each
    other, and matter little one by one, count together.
    """
    heads, neurons, _ = CRITERIA[criterion](Units(*(gradient.sum(2, keepdim=True) for gradient in gradients)))
    return heads[:, 0], neurons[:, 0]


def beyond_units(scores: Tensor, blocks: Tensor) -> Tensor:
    """What each block matters more than its units do one by one, (rows,); what blocks matter is told in their unit.

    Args:
        scores: of units, (rows, units); −inf where they are masked.
        blocks: of the blocks as wholes, (rows,), in any unit.
    """
    units = scores.masked_fill(scores.isinf(), 0.0).double().sum(1)
    whole = blocks.double() * units.sum() / blocks.double().sum().clamp(min=1e-30)
    return (whole - units).clamp(min=0)


def normalised(scores: Units) -> Units:
    """Each row over its L2 norm, so that no layer's scale decides (Michel 2019, 4.1)."""
    return Units(*(score / score.norm(dim=1, keepdim=True).clamp(min=1e-12) for score in scores))


def rearranged(mask: Tensor, gradients: Tensor) -> Tensor:
    """Another choice of as many units of each row, whose loss together is smaller.

    The diagonal of the Fisher information knows nothing of units that stand in for each other. In each row every
    masked unit is exchanged for the kept one that most reduces ‖Σ_{i masked} g_i‖², if any does, one after the
    other from the least important (Kwon 2022, 4.2).

    Args:
        mask: (rows, units), zeros and ones.
        gradients: (batches, rows, units).
    """
    mask = mask.clone()
    for row, gradient in zip(mask, gradients.transpose(0, 1).mT, strict=True):  # (units,), (units, batches)
        _rearrange(row, gradient)
    return mask


def _rearrange(mask: Tensor, gradient: Tensor) -> None:
    masked = (mask == 0).nonzero().flatten()
    total, squares = gradient[masked].sum(0), gradient.square().sum(1)
    for unit in masked[squares[masked].argsort(stable=True)]:
        rest = total - gradient[unit]
        # ‖rest + g_k‖² − ‖rest‖² for each k that could be masked in its place
        change = (2 * gradient @ rest + squares).masked_fill(mask == 0, torch.inf)
        best = change.argmin()
        if change[best] < 2 * gradient[unit] @ rest + squares[unit]:
            mask[unit], mask[best] = 1, 0
            total = rest + gradient[best]

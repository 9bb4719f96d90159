"""How much each head and each feed-forward neuron matters, and masks that switch them off.

A head's mask variable ξ multiplies its context before the attention's output projection, a neuron's η its
activation before the second feed-forward projection. Owns the masks and the criteria; how many units go, from
where and when is not decided here. All layers must have the same shape: everything is (layers, units).

Sources: Michel et al. 2019, Are Sixteen Heads Really Better than One? (taylor); Kwon et al. 2022, A Fast
Post-Training Pruning Framework for Transformers (fisher).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from compress_search import Batch, Loss
from compress_search.encoders import layers, parts

CRITERIA = ("taylor", "fisher", "magnitude", "random")
NEED_GRADIENTS = ("taylor", "fisher")


class Units(NamedTuple):
    """One number for every head (L, A) and every neuron (L, I)."""

    heads: Tensor
    neurons: Tensor


class Masks:
    """Masks on a network's heads and neurons, through forward pre-hooks; any optimizer step leaves them alone.

    All ones leave the network's outputs as they were, to the bit. A masked unit gets no gradient.
    """

    def __init__(self, network: nn.Module) -> None:
        views = [parts(layer) for layer in layers(network)]
        device = views[0].down.weight.device
        self.units = Units(
            torch.ones(len(views), views[0].heads, device=device),
            torch.ones(len(views), views[0].neurons, device=device),
        )
        self._handles = []
        for index, view in enumerate(views):
            hooks = ((view.attention_output, self._head_hook(index, view.head_dim)), (view.down, self._hook(index)))
            self._handles += [module.register_forward_pre_hook(hook) for module, hook in hooks]

    def _head_hook(self, layer: int, width: int) -> Callable[[nn.Module, tuple[Tensor]], tuple[Tensor]]:
        return lambda module, args: (args[0] * self.units.heads[layer].repeat_interleave(width),)

    def _hook(self, layer: int) -> Callable[[nn.Module, tuple[Tensor]], tuple[Tensor]]:
        return lambda module, args: (args[0] * self.units.neurons[layer],)

    def remove(self) -> None:
        """Take the hooks off; the network computes as if nothing had been masked."""
        for handle in self._handles:
            handle.remove()


def magnitude(network: nn.Module) -> Units:
    """‖W_q; W_k; W_v; W_o‖_F of a head over the root of its number of weights; ‖up‖₂·‖down‖₂ of a neuron."""
    heads, neurons = [], []
    with torch.no_grad():
        for view in map(parts, layers(network)):
            rows = [m.weight.unflatten(0, (view.heads, -1)) for m in (view.query, view.key, view.value)]
            columns = view.attention_output.weight.T.unflatten(0, (view.heads, -1))
            weights = torch.cat([w.flatten(1) for w in (*rows, columns)], dim=1)  # (A, 4·d·H)
            heads.append(weights.norm(dim=1) / weights.shape[1] ** 0.5)
            neurons.append(view.up.weight.norm(dim=1) * view.down.weight.norm(dim=0))
    return Units(torch.stack(heads), torch.stack(neurons))


def random(masks: Masks, seed: int) -> Units:
    """Uniform scores, as the control that any criterion has to beat; the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    heads, neurons = (torch.rand(mask.shape, generator=generator).to(mask) for mask in masks.units)
    return Units(heads, neurons)


def from_gradients(network: nn.Module, masks: Masks, batches: Iterable[Batch], loss: Loss, criterion: str) -> Units:
    """The loss's sensitivity to each mask variable, in evaluation mode.

    ``taylor``: mean over batches of the size of ∂L/∂ξ; ``fisher``: sum over batches of (∂L/∂ξ)², the diagonal of
    the empirical Fisher information. Weights get no gradients; the network's mode is left as it was.
    """
    mode = network.training
    network.eval()
    masks.units = Units(*(mask.detach().requires_grad_() for mask in masks.units))
    gradients = [torch.autograd.grad(loss(network, batch), masks.units) for batch in batches]  # of masks: small
    masks.units = Units(*(mask.detach() for mask in masks.units))
    network.train(mode)
    heads, neurons = (torch.stack(each) for each in zip(*gradients, strict=True))  # (batches, L, units)
    if criterion == "taylor":
        return Units(heads.abs().mean(0), neurons.abs().mean(0))
    return Units(heads.square().sum(0), neurons.square().sum(0))

"""LayerDrop: train an encoder with layers skipped at random, so that any of them can be left out later.

Owns the gates, which stand in the layers' places for the time of a training. Decides nothing about which layers go
in the end.

Source: Fan et al. 2020, Reducing Transformer Depth on Demand with Structured Dropout.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compress_search.encoders import view


class Skippable(nn.Module):
    """A layer that in training is skipped with probability ``rate``, for a whole batch at a time.

    The call is left out, not its result set to zero: a skipped layer costs nothing and hands its input on.
    """

    def __init__(self, layer: nn.Module, rate: float) -> None:
        super().__init__()
        self.layer, self.rate = layer, rate

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Hidden states (B, S, H) to hidden states."""
        # drawn on the CPU wherever the network is: a gate decides what Python runs next
        if self.training and torch.rand(()) < self.rate:
            return hidden_states
        result: Tensor = self.layer(hidden_states, *args, **kwargs)
        return result


@contextmanager
def layer_drop(network: nn.Module, rate: float) -> Iterator[None]:
    """Skip each layer of the network, independently, with this probability while it trains; 0 changes nothing.

    To leave out N − r of N layers later, train at 1 − r/N (section 3.2 of the paper). Gates come from torch's own
    generator. When the block ends the layers stand where they stood.

    Raises:
        ValueError: the rate does not lie in [0, 1).
    """
    if not 0 <= rate < 1:
        raise ValueError(f"a layer is skipped with a probability in [0, 1), got {rate}")
    stack = list(view.layers(network))
    if rate:
        view.set_layers(network, [Skippable(layer, rate) for layer in stack])
    try:
        yield
    finally:
        if rate:
            view.set_layers(network, stack)

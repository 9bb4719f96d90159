"""Forward passes that compute in 16 bits, with weights, gradients and results in 32.

Owns which passes these are and what leaves them. Losses, optimizers and scores stay in 32 bits and know nothing of
it, as does whoever reads features by :mod:`compress_search.encoders.features`, which gives them in 32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import nn

Precision = Literal["fp32", "bf16"]


@contextmanager
def computing_in(precision: Precision, network: nn.Module) -> Iterator[None]:
    """The network's forward passes inside the block compute in this precision; what they return is float32.

    With ``bf16`` these are torch's autocast: matrix products and attention in bfloat16, which has float32's range,
    so no loss needs scaling. The loss is computed from float32: soft targets in 16 bits would be coarse.

    Source: Micikevicius et al. 2018, Mixed Precision Training, section 3; Kalamkar et al. 2019, A Study of
    BFLOAT16 for Deep Learning Training.
    """
    if precision == "fp32":
        yield
        return
    casting = ExitStack()

    def enter(module: nn.Module, args: Any) -> None:
        device = next(network.parameters()).device
        casting.enter_context(torch.autocast(device.type, dtype=torch.bfloat16))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        casting.close()
        if output is not None:  # as where the pass raised
            output.logits = output.logits.float()

    with ExitStack() as hooks:
        hooks.callback(network.register_forward_pre_hook(enter).remove)
        # before all other hooks, so that these see what the caller will
        hooks.callback(network.register_forward_hook(leave, prepend=True, always_call=True).remove)
        yield

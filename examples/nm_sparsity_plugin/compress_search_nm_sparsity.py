"""N:M semi-structured sparsity: of every m consecutive weights of a row only the n largest stay.

Owns the pattern and the mask that keeps it through later training. Changes no shape, so no latency; what is stored
leaves the zeros out.

Source: Mishra et al., Accelerating Sparse Deep Neural Networks, 2021, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compress_search import Candidate, Context, Dim, Method, Params, Space, Stage, Subject, TrialError
from compress_search.encoders import layers


def pattern(weight: Tensor, n: int, m: int) -> Tensor:
    """1 for the n weights of greatest magnitude of each group of m in a row of (out, in), 0 for the others.

    Raises:
        ValueError: the rows do not divide into groups of m.
    """
    rows, columns = weight.shape
    if columns % m:
        raise ValueError(f"rows of {columns} weights do not divide into groups of {m}")
    groups = weight.detach().abs().view(rows, columns // m, m)
    kept = groups.topk(n, dim=-1).indices
    return torch.zeros_like(groups).scatter_(-1, kept, 1.0).view_as(weight)


class Mask(nn.Module):
    """Multiplies a weight by a fixed pattern, so that training cannot revive what was zeroed."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask: Tensor
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        """The masked weight."""
        return weight * self.mask


def linears(network: nn.Module) -> list[nn.Linear]:
    """Every linear map of the encoder's layers."""
    return [module for module in layers(network).modules() if isinstance(module, nn.Linear)]


def zero_fraction(network: nn.Module) -> float:
    """The part of the encoder's matrices that is zero."""
    weights = [linear.weight for linear in linears(network)]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


class NMSparsity(Method):
    """The functions above as a step of a recipe."""

    stage = Stage.SPARSITY

    def search_space(self, teacher: Subject) -> Space:
        """``kept`` of every ``group`` weights stay."""
        return {
            "group": Dim.choice((4, 8), default=4),
            "kept": Dim.integer(1, 4, default=2),
        }

    def effective(self, subject: Subject, params: Params) -> Params:
        """All four of a group of four would change nothing: three is the most."""
        return {**params, "kept": min(int(params["kept"]), int(params["group"]) - 1)}

    def after(self, subject: Subject, params: Params) -> Subject:
        """The same shapes with fewer weights; training could win back accuracy."""
        return subject.having("lossy", "sparse", density=int(params["kept"]) / int(params["group"]))

    def apply(self, candidate: Candidate, params: Params, context: Context) -> Candidate:
        """Mask every linear map of a copy."""
        sparse = candidate.copy()
        for linear in linears(sparse.network):
            try:
                mask = pattern(linear.weight, int(params["kept"]), int(params["group"]))
            except ValueError as error:
                raise TrialError(str(error)) from error
            parametrize.register_parametrization(linear, "weight", Mask(mask))
        return sparse.replace(subject=self.after(candidate.subject, params))

    def evaluate(self, candidate: Candidate, context: Context) -> Mapping[str, float]:
        """``nm_sparsity.zeros``: the part of the encoder's matrices that is zero."""
        return {"zeros": zero_fraction(candidate.network)}

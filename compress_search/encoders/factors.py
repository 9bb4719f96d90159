"""Modules that hold a matrix as the product of two thinner ones, and stand where the whole one stood.

Owns their shapes and how they compute; :data:`KINDS` is all that the manifest knows of them. Decides no rank and
decomposes nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Self

from torch import Tensor, nn


class Factored(nn.Module, ABC):
    """A module whose weight is a product of ``rank`` inner columns.

    The manifest writes ``{"kind": …, "rank": …}`` for each, and rebuilds it with :meth:`like`; so ``kind`` must be
    in :data:`KINDS`, and nothing but the replaced module and the rank may decide on shapes.
    """

    kind: ClassVar[str]
    rank: int

    @classmethod
    @abstractmethod
    def like(cls, whole: nn.Module, rank: int) -> Self:
        """A stand-in for ``whole`` on its device and in its dtype, with weights that mean nothing.

        Draws no random numbers.

        Raises:
            TypeError: ``whole`` is no module of this kind.
        """


class FactoredEmbedding(Factored):
    """An embedding table W (V, H) as A·Bᵀ: rows of A (V, E) are looked up, then projected by B (H, E), no bias.

    Called like the :class:`torch.nn.Embedding` it replaces; ``rank`` is E.

    Source: Lan et al. 2020, ALBERT: A Lite BERT for Self-supervised Learning of Language Representations, 3.1.
    """

    kind = "embedding"

    def __init__(self, rows: Tensor, projection: Tensor, padding_idx: int | None = None) -> None:
        """From A (V, E) and B (H, E), which become parameters as they are."""
        super().__init__()
        self.num_embeddings, self.rank = rows.shape
        self.embedding_dim = len(projection)
        self.table = nn.Embedding(self.num_embeddings, self.rank, padding_idx=padding_idx, _weight=rows)
        self.projection = nn.Linear(self.rank, self.embedding_dim, bias=False, device="meta")
        self.projection.weight = nn.Parameter(projection)

    @classmethod
    def like(cls, whole: nn.Module, rank: int) -> Self:
        """See :meth:`Factored.like`."""
        if not isinstance(whole, nn.Embedding):
            raise TypeError(f"{type(whole).__name__} is no embedding table")
        rows, projection = (whole.weight.new_empty(size, rank) for size in whole.weight.shape)
        return cls(rows.detach(), projection.detach(), whole.padding_idx)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (…) to vectors (…, H)."""
        projected: Tensor = self.projection(self.table(ids))
        return projected

    def extra_repr(self) -> str:
        """Shapes as printed by ``repr``."""
        return f"{self.num_embeddings}, {self.embedding_dim}, rank={self.rank}"


class LowRankLinear(Factored):
    """A linear map x·Wᵀ + b with W (out, in) = L·R: R (r, in) without a bias, then L (out, r) with b.

    Has the attributes of the :class:`torch.nn.Linear` it replaces; ``weight`` is the product, made when asked for.
    """

    kind = "linear"

    def __init__(self, left: Tensor, right: Tensor, bias: Tensor | None = None) -> None:
        """From L (out, r), R (r, in) and b (out,), which become parameters as they are."""
        super().__init__()
        self.out_features, self.rank = left.shape
        self.in_features = right.shape[1]
        self.reduce = nn.Linear(self.in_features, self.rank, bias=False, device="meta")
        self.expand = nn.Linear(self.rank, self.out_features, bias=bias is not None, device="meta")
        self.reduce.weight, self.expand.weight = nn.Parameter(right), nn.Parameter(left)
        if bias is not None:
            self.expand.bias = nn.Parameter(bias)

    @classmethod
    def like(cls, whole: nn.Module, rank: int) -> Self:
        """See :meth:`Factored.like`."""
        if not isinstance(whole, nn.Linear):
            raise TypeError(f"{type(whole).__name__} is no linear map")
        weight, bias = whole.weight.detach(), None if whole.bias is None else whole.bias.detach().clone()
        return cls(weight.new_empty(whole.out_features, rank), weight.new_empty(rank, whole.in_features), bias)

    @property
    def weight(self) -> Tensor:
        """W (out, in); no parameter, and of rank r at most."""
        return self.expand.weight @ self.reduce.weight

    @property
    def bias(self) -> nn.Parameter | None:
        """b (out,)."""
        return self.expand.bias

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) to (…, out)."""
        mapped: Tensor = self.expand(self.reduce(x))
        return mapped

    def extra_repr(self) -> str:
        """Shapes as printed by ``repr``."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


KINDS: dict[str, type[Factored]] = {kind.kind: kind for kind in (FactoredEmbedding, LowRankLinear)}
"""Every kind that a manifest may name."""

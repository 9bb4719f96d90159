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


KINDS: dict[str, type[Factored]] = {kind.kind: kind for kind in (FactoredEmbedding,)}
"""Every kind that a manifest may name."""

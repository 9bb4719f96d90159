"""Low-rank factorization of tiny models: settings as a plan makes them, what comes out, and random matrices."""

from __future__ import annotations

from typing import Any

import torch
from compress_search_plugins.low_rank import LowRank

from compress_search import Candidate, Subject
from compress_search.space import defaults, narrow
from compress_search.testing import tiny_batches, tiny_context

METHOD = LowRank()
BASE = Subject("bert", "text-classification", 12, 12, 64, 768, 3072, 30522, 512, 2, 2)


def settings_of(subject: Subject, **params: Any) -> dict[str, Any]:
    space = METHOD.search_space(subject)
    narrowed = {name: narrow(dim, params[name]) if name in params else dim for name, dim in space.items()}
    return dict(METHOD.effective(subject, defaults(narrowed)))


def applied(candidate: Candidate, *, dry: bool = False, seed: int = 0, **params: Any) -> Candidate:
    chosen = settings_of(candidate.subject, rank_multiple=params.pop("rank_multiple", 1), **params)
    result = METHOD.apply(candidate, chosen, tiny_context(candidate, dry=dry, seed=seed))
    result.network.eval()
    return result


def outputs(candidate: Candidate, seed: int = 3) -> torch.Tensor:
    batch = next(tiny_batches(candidate, seed=seed))
    with torch.no_grad():
        return candidate.network(**{k: v for k, v in batch.items() if k not in ("labels", "index")}).logits


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def counted(candidate: Candidate) -> int:
    """The parameters that the network has."""
    return sum(parameter.numel() for parameter in candidate.network.parameters())

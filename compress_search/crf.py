"""A linear-chain conditional random field on a network's token logits: its loss, its marginals, its best paths.

A network has one as its submodule ``crf``, and its configuration then says ``crf: true``; its logits stay those of
single tokens, the emissions. The chain runs over the positions that count alone, one after the other: others are
left out of it, not given impossible emissions. Owns that arithmetic and its plain form. Knows nothing of what the
emissions come from.

Source: Lafferty et al. 2001, Conditional Random Fields; Rabiner 1989, A Tutorial on Hidden Markov Models (forward,
backward, Viterbi).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compress_search.errors import NotFinite, TrialError
from compress_search.losses import IGNORED
from compress_search.losses.logits import wide

ROWS = 256
"""Sequences that are decoded at a time."""

Array = NDArray[Any]


class Crf(nn.Module):
    """Transitions (C, C) from row to column, and what it takes to start and to end with each of C labels.

    All are 0 at first: then labels are independent of each other, and the loss is the cross-entropy. They stay in
    32 bits whatever the network around them is converted to.
    """

    def __init__(self, labels: int) -> None:
        super().__init__()
        self.transitions = nn.Parameter(torch.zeros(labels, labels))
        self.start = nn.Parameter(torch.zeros(labels))
        self.end = nn.Parameter(torch.zeros(labels))

    def loss(self, emissions: Tensor, labels: Tensor) -> Tensor:
        """The negative log-likelihood of the labelled positions' labels, as a scalar for each such position.

        Args:
            emissions: (B, S, C).
            labels: (B, S), ``IGNORED`` where there is none.
        """
        mask = labels != IGNORED
        chain, inside = compacted(wide(emissions), mask)
        gold, _ = compacted(labels, mask)
        total = self._log_partition(self._forward(chain, inside)) - self._score(chain, gold, inside)
        # a batch may hold no label at all, when every word was cut off
        return total.sum() / mask.sum().clamp(min=1)

    def log_marginals(self, emissions: Tensor, mask: Tensor) -> Tensor:
        """The logarithms of p(label at a position | text), (N, C) for the N positions of the mask, row after row.

        Args:
            emissions: (B, S, C).
            mask: (B, S), the positions of the chain.
        """
        chain, inside = compacted(wide(emissions), mask)
        ahead, back = self._forward(chain, inside), self._backward(chain, inside)
        marginals: Tensor = (ahead + back - self._log_partition(ahead)[:, None, None])[inside]
        return marginals

    @torch.no_grad()
    def viterbi(self, emissions: Tensor, mask: Tensor) -> Tensor:
        """The most likely sequences of labels, (B, S) with ``IGNORED`` outside the mask; arguments as above."""
        chain, inside = compacted(wide(emissions), mask)
        best, pointers = self.start + chain[:, 0], []
        stay = torch.arange(chain.shape[-1], device=chain.device).expand_as(best)
        for emission, here in zip(chain[:, 1:].unbind(1), inside[:, 1:].unbind(1), strict=True):
            reached, came_from = (best.unsqueeze(2) + self.transitions).max(1)
            best = torch.where(here[:, None], reached + emission, best)
            pointers.append(torch.where(here[:, None], came_from, stay))
        path = [(best + self.end).argmax(-1, keepdim=True)]
        for pointer in reversed(pointers):
            path.append(pointer.gather(1, path[-1]))
        found = torch.full(mask.shape, IGNORED, device=chain.device)
        found[mask.bool()] = torch.cat(path[::-1], 1)[inside]
        return found

    def decode(self, rows: Sequence[Array]) -> list[Array]:
        """The most likely labels (S_i,) of each of some sequences, from their emissions (S_i, C).

        Raises:
            NotFinite: an emission is infinite or not a number.
        """
        if bad := sum(not np.isfinite(row).all() for row in rows):
            raise NotFinite(f"the network's logits are not finite for {bad} of {len(rows)} examples")
        return [path for start in range(0, len(rows), ROWS) for path in self._paths(rows[start : start + ROWS])]

    def _paths(self, rows: Sequence[Array]) -> list[Array]:
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        emissions = torch.zeros(*mask.shape, len(self.start))
        emissions[mask] = torch.from_numpy(np.concatenate(rows)).float()
        device = self.start.device
        labels = self.viterbi(emissions.to(device), mask.to(device)).cpu().numpy()
        return [row[:length] for row, length in zip(labels, lengths.tolist(), strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, the inverse of :meth:`from_dict`."""
        return {name: tensor.tolist() for name, tensor in self.state_dict().items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Crf:
        """Rebuild one from :meth:`to_dict`'s output, frozen."""
        crf = cls(len(data["start"]))
        crf.load_state_dict({name: torch.tensor(values) for name, values in data.items()})
        return crf.requires_grad_(False)

    def _forward(self, chain: Tensor, inside: Tensor) -> Tensor:
        """(R, W, C) log-sums over all beginnings that end with a label; after a row's end those of its last."""
        found = [self.start + chain[:, 0]]
        for emission, here in zip(chain[:, 1:].unbind(1), inside[:, 1:].unbind(1), strict=True):
            reached = (found[-1].unsqueeze(2) + self.transitions).logsumexp(1) + emission
            found.append(torch.where(here[:, None], reached, found[-1]))
        return torch.stack(found, 1)

    def _backward(self, chain: Tensor, inside: Tensor) -> Tensor:
        """(R, W, C) log-sums over all ways to go on from a label."""
        found = [self.end.expand(len(chain), -1)]
        for emission, here in zip(chain[:, 1:].flip(1).unbind(1), inside[:, 1:].flip(1).unbind(1), strict=True):
            onward = (self.transitions + (emission + found[-1]).unsqueeze(1)).logsumexp(2)
            found.append(torch.where(here[:, None], onward, self.end))
        return torch.stack(found[::-1], 1)

    def _log_partition(self, ahead: Tensor) -> Tensor:
        """(R,) log-sums over all sequences."""
        return (ahead[:, -1] + self.end).logsumexp(-1)

    def _score(self, chain: Tensor, gold: Tensor, inside: Tensor) -> Tensor:
        """(R,) scores of one sequence each."""
        emitted = (chain.gather(-1, gold.unsqueeze(-1)).squeeze(-1) * inside).sum(1)
        passed = (self.transitions[gold[:, :-1], gold[:, 1:]] * inside[:, 1:]).sum(1)
        last = gold.gather(1, inside.sum(1, keepdim=True) - 1).squeeze(1)
        return self.start[gold[:, 0]] + emitted + passed + self.end[last]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Crf:
        """Moves between devices are followed, conversions to another dtype are not."""

        def moved(tensor: Tensor) -> Tensor:
            other = fn(tensor)
            return other if other.dtype == tensor.dtype else tensor.to(other.device)

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return self


def compacted(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The positions of the mask moved to the front of each row, and which of the result's positions hold one.

    Args:
        values: (B, S, …).
        mask: (B, S).

    Returns:
        (R, W, …) and (R, W) for the R rows that have any position, W of them at most; 0 where there is none.
    """
    mask = mask.bool()
    lengths = mask.sum(1)
    lengths = lengths[lengths > 0]
    width = int(lengths.max()) if len(lengths) else 1
    inside = torch.arange(width, device=mask.device) < lengths[:, None]
    chain = values.new_zeros(*inside.shape, *values.shape[2:])
    # what lies outside, infinities perhaps, takes no part
    return chain.masked_scatter(_like(inside, chain), values[mask]), inside


def _like(mask: Tensor, values: Tensor) -> Tensor:
    return mask.view(*mask.shape, *[1] * (values.ndim - 2)).expand_as(values)


def asks_for_crf(config: object) -> bool:
    """Whether a network of this configuration has a CRF."""
    return getattr(config, "crf", False) is True


def attach_crf(network: nn.Module) -> None:
    """Give a network whose configuration asks for a CRF one that knows nothing yet, in place."""
    config = cast(Any, network).config
    if asks_for_crf(config):
        network.crf = Crf(len(config.id2label))


def crf_of(network: nn.Module) -> Crf | None:
    """The network's CRF; None where its labels are independent of each other.

    Raises:
        TrialError: its configuration asks for one, and whoever made the network left it out.
    """
    found = cast("Crf | None", getattr(network, "crf", None))
    if found is None and asks_for_crf(getattr(network, "config", None)):
        raise TrialError("the network was made without the CRF that its configuration asks for")
    return found

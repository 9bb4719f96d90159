"""A linear-chain CRF against every sequence there is: loss, marginals, best paths, and what is left out."""

from __future__ import annotations

from copy import deepcopy
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from compress_search.crf import Crf, compacted
from compress_search.errors import NotFinite
from compress_search.losses import IGNORED

shapes = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(0, 10**6))
"""Length, labels and seed."""


def random_crf(labels: int, generator: torch.Generator) -> Crf:
    crf = Crf(labels)
    for parameter in crf.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return crf


def scores(crf: Crf, emissions: Tensor) -> dict[tuple[int, ...], float]:
    """The score of every sequence of labels for emissions (S, C), term by term."""
    length, labels = emissions.shape
    crf = deepcopy(crf).requires_grad_(False)
    found = {}
    for path in product(range(labels), repeat=length):
        score = float(crf.start[path[0]] + crf.end[path[-1]])
        score += sum(float(emissions[t, label]) for t, label in enumerate(path))
        found[path] = score + sum(float(crf.transitions[a, b]) for a, b in pairwise(path))
    return found


def scene(length: int, labels: int, seed: int) -> tuple[Crf, Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    crf = random_crf(labels, generator)
    return crf, 2 * torch.randn(length, labels, generator=generator, dtype=torch.float64), generator


@given(shapes)
@settings(max_examples=60, deadline=None)
def test_the_loss_is_that_of_the_sequence_among_all(shape: tuple[int, int, int]) -> None:
    crf, emissions, generator = scene(*shape)
    gold = torch.randint(shape[1], (shape[0],), generator=generator)
    every = scores(crf, emissions)
    log_partition = np.logaddexp.reduce(list(every.values()))
    expected = (log_partition - every[tuple(gold.tolist())]) / shape[0]
    assert crf.loss(emissions[None], gold[None]).item() == pytest.approx(expected, abs=1e-9)


@given(shapes)
@settings(max_examples=60, deadline=None)
def test_marginals_are_sums_over_all_sequences(shape: tuple[int, int, int]) -> None:
    crf, emissions, _ = scene(*shape)
    expected = np.zeros(emissions.shape)
    every = scores(crf, emissions)
    log_partition = np.logaddexp.reduce(list(every.values()))
    for path, score in every.items():
        expected[range(len(path)), path] += np.exp(score - log_partition)
    found = crf.log_marginals(emissions[None], torch.ones(1, shape[0])).exp()
    np.testing.assert_allclose(found.detach(), expected, atol=1e-9)


@given(shapes)
@settings(max_examples=60, deadline=None)
def test_the_best_path_is_the_best_of_all(shape: tuple[int, int, int]) -> None:
    crf, emissions, _ = scene(*shape)
    every = scores(crf, emissions)
    found = crf.viterbi(emissions[None], torch.ones(1, shape[0]))
    assert tuple(found[0].tolist()) == max(every, key=every.__getitem__)


@given(st.integers(0, 10**6), st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_positions_outside_the_mask_are_as_if_they_were_not_there(seed: int, masks: list[list[bool]]) -> None:
    """Each row equals the sequence of its own positions, whatever stands between them or beside it in the batch."""
    mask = torch.tensor(masks)
    generator = torch.Generator().manual_seed(seed)
    crf = random_crf(3, generator)
    emissions = torch.randn(*mask.shape, 3, generator=generator, dtype=torch.float64)
    labels = torch.where(mask, torch.randint(3, mask.shape, generator=generator), IGNORED)
    noisy = torch.where(mask[..., None], emissions, float("nan"))
    rows = [(e[m], y[m]) for e, y, m in zip(emissions, labels, mask, strict=True) if m.any()]
    total = sum((crf.loss(e[None], y[None]) * len(y) for e, y in rows), torch.zeros(()))
    torch.testing.assert_close(crf.loss(noisy, labels), total / max(int(mask.sum()), 1), check_dtype=False)
    alone = [crf.log_marginals(e[None], torch.ones(1, len(e))) for e, _ in rows]
    torch.testing.assert_close(crf.log_marginals(noisy, mask), torch.cat([*alone, emissions[:0, 0]]))
    paths = [crf.viterbi(e[None], torch.ones(1, len(e)))[0] for e, _ in rows]
    found = crf.viterbi(noisy, mask)
    assert torch.equal(found[mask], torch.cat([*paths, labels[:0, 0]]))
    assert bool((found[~mask] == IGNORED).all())
    decoded = crf.decode([e[m].numpy() for e, m in zip(emissions, mask, strict=True)])
    assert [row.tolist() for row in decoded] == [f[m].tolist() for f, m in zip(found, mask, strict=True)]


def test_without_transitions_the_loss_is_the_cross_entropy() -> None:
    emissions, labels = torch.randn(3, 5, 4), torch.randint(4, (3, 5))
    labels[0, 2:] = labels[1, 0] = IGNORED
    expected = F.cross_entropy(emissions.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    torch.testing.assert_close(Crf(4).loss(emissions, labels), expected)


def test_gradients_are_finite_and_none_reaches_what_is_left_out() -> None:
    crf = random_crf(3, torch.Generator().manual_seed(0))
    emissions = 1e4 * torch.randn(2, 6, 3)
    emissions[0, 3] = float("inf")
    emissions.requires_grad_()
    labels = torch.tensor([[0, 1, IGNORED, IGNORED, 2, IGNORED], [IGNORED] * 6])
    (crf.loss(emissions, labels) + crf.log_marginals(emissions, labels != IGNORED).sum()).backward()
    assert emissions.grad is not None
    assert all(bool(t.grad.isfinite().all()) for t in (emissions, *crf.parameters()) if t.grad is not None)
    assert bool((emissions.grad[labels == IGNORED] == 0).all())


def test_the_gradient_is_that_of_finite_differences() -> None:
    crf, emissions, _ = scene(4, 3, 0)
    labels = torch.tensor([[0, IGNORED, 2, 1]])
    assert torch.autograd.gradcheck(lambda e: crf.loss(e[None], labels), emissions.requires_grad_())


def test_a_batch_without_labels_costs_nothing() -> None:
    emissions = torch.randn(2, 3, 4, requires_grad=True)
    loss = Crf(4).loss(emissions, torch.full((2, 3), IGNORED))
    loss.backward()
    assert (loss.item(), emissions.grad is not None and emissions.grad.abs().sum().item()) == (0, 0)
    assert [row.tolist() for row in Crf(4).decode([np.zeros((0, 4), np.float32)])] == [[]]


def test_a_chain_learns_what_single_tokens_cannot_say() -> None:
    """Emissions that say nothing, labels that alternate: transitions alone bring the loss near to 0."""
    crf, labels = Crf(2), torch.tensor([[0, 1, 0, 1, 0, 1]])
    optimizer = torch.optim.Adam(crf.parameters(), lr=0.3)
    for _ in range(60):
        optimizer.zero_grad()
        loss = crf.loss(torch.zeros(1, 6, 2), labels)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.01
    assert crf.decode([np.zeros((6, 2), np.float32)])[0].tolist() == labels[0].tolist()


def test_emissions_that_are_no_numbers_are_refused() -> None:
    rows = [np.zeros((2, 3)), np.full((1, 3), np.nan)]
    with pytest.raises(NotFinite, match="not finite for 1 of 2 examples"):
        Crf(3).decode(rows)


def test_plain_data_are_exact() -> None:
    crf: Any = Crf(3)
    for parameter in crf.parameters():
        parameter.data.normal_()
    again = Crf.from_dict(crf.to_dict())
    for name, tensor in crf.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])


@pytest.mark.parametrize("convert", ["half", "bfloat16", "double"])
def test_it_keeps_its_precision(convert: str) -> None:
    around = torch.nn.ModuleList([torch.nn.Linear(2, 2), Crf(2)])
    getattr(around, convert)()
    assert {p.dtype for p in around[0].parameters()} != {torch.float32}
    assert {p.dtype for p in around[1].parameters()} == {torch.float32}


def test_compaction_moves_positions_to_the_front() -> None:
    values = torch.arange(8).view(2, 4)
    chain, inside = compacted(values, torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0]]))
    assert (chain.tolist(), inside.tolist()) == ([[1, 3]], [[True, True]])

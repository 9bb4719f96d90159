"""The plugin contract for nm_sparsity, and what the method itself promises."""

import pytest
import torch

from compress_search.testing import MethodContract, tiny_candidate, tiny_context
from compress_search_nm_sparsity import NMSparsity, pattern, zero_fraction


class TestContract(MethodContract):
    method = NMSparsity()


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (3, 8)])
def test_keeps_the_n_largest_of_every_m(n: int, m: int) -> None:
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    mask = pattern(weight, n, m)
    groups, kept = weight.abs().view(-1, m), mask.view(-1, m).bool()
    assert (kept.sum(-1) == n).all()
    for group, keep in zip(groups, kept, strict=True):
        assert group[keep].min() > group[~keep].max()


def test_rows_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="rows of 10 weights do not divide into groups of 4"):
        pattern(torch.ones(2, 10), 2, 4)


def test_reports_its_zeros_and_keeps_them_through_training() -> None:
    candidate = tiny_candidate()
    context = tiny_context(candidate)
    sparse = NMSparsity().apply(candidate, {"group": 4, "kept": 2}, context)
    context.fit(sparse.network)
    assert zero_fraction(sparse.network) == 0.5
    assert NMSparsity().evaluate(sparse, context) == {"zeros": 0.5}

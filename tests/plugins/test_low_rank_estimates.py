"""Ranks that only weights can tell: what is promised of them, and that a candidate and its bytes have the truth."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compress_search_plugins.low_rank import PARTS, energy_rank, useful_rank
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_search.encoders import LowRankLinear, layers, parts, prune_neurons, subject_of
from compress_search.runtimes.lowering import lower
from compress_search.testing import tiny_candidate, tiny_context
from tests.factored import BASE, METHOD, applied, counted, matrix, outputs, settings_of
from tests.quantized import CLASSIFICATION, INT8, distinct, stored_bytes
from tests.quantized import METHOD as QUANTIZATION


def test_the_energy_rank_is_the_smallest_that_holds_the_part() -> None:
    spectrum = torch.tensor([3.0, 2.0, 1.0, 1.0, 1.0]).double()  # 9, 4, 1, 1, 1 of 16
    assert [energy_rank(spectrum, part, 1) for part in (9 / 16, 0.6, 13 / 16, 0.85, 1.0)] == [1, 2, 2, 3, 5]
    assert energy_rank(spectrum, 0.6, 4) == 4


def test_energy_ranks_follow_the_spectra_and_stay_below_what_after_promised() -> None:
    model = tiny_candidate(layers=2)
    with torch.no_grad():
        thin = parts(layers(model.network)[0]).up
        thin.weight.copy_(matrix(64, 3) @ matrix(3, 32))
    result = applied(model, rank_mode="energy", energy=0.95, decomposition="svd")
    found = parts(layers(result.network)[0]).up
    assert isinstance(found, LowRankLinear)
    assert found.rank <= 3
    assert isinstance(parts(layers(result.network)[1]).up, torch.nn.Linear), "a flat spectrum stays whole"
    assert "non-uniform" in result.subject.traits
    assert counted(result) == result.subject.parameters, "the candidate tells the truth"
    promised = METHOD.after(model.subject, settings_of(model.subject, rank_mode="energy", rank_multiple=1))
    assert "estimated" in promised.traits
    assert result.subject.keeps(promised)
    assert result.subject.parameters < model.subject.parameters
    assert METHOD.evaluate(result, tiny_context(model)) == {"factored": 1}


@pytest.mark.parametrize("decomposition", ["svd", "activation_aware", "fisher_weighted"])
def test_a_dry_run_takes_the_ranks_of_the_weights_that_there_are(decomposition: str) -> None:
    """The largest there could be would reject recipes for a size that they do not have."""
    model = tiny_candidate(layers=2)
    with torch.no_grad():
        for layer in layers(model.network):
            parts(layer).down.weight.copy_(matrix(32, 5) @ matrix(5, 64))
    dry, real = (
        applied(model, dry=dry, rank_mode="energy", energy=0.9, decomposition=decomposition, recover="kd")
        for dry in (True, False)
    )
    assert dry.subject == real.subject
    assert counted(dry) == dry.subject.parameters < model.subject.parameters


@settings(max_examples=10, deadline=None)
@given(energy=st.floats(0.8, 0.99), targets=st.sampled_from(["ffn", "attention", "all"]), seed=st.integers(0, 99))
def test_bytes_by_energy_are_exact_in_the_end_however_much_was_promised(
    energy: float, targets: str, seed: int
) -> None:
    model = tiny_candidate(layers=2, seed=seed)
    with torch.no_grad():
        for layer, rank in zip(layers(model.network), (1, 6), strict=True):
            for part in PARTS:
                weight = getattr(parts(layer), part).weight
                weight.copy_(matrix(len(weight), rank, seed) @ matrix(rank, weight.shape[1], seed + 1))
    result = applied(model, rank_mode="energy", energy=energy, targets=targets, decomposition="svd")
    assert counted(result) == result.subject.parameters < model.subject.parameters


def test_bytes_of_a_quantized_product_follow_the_ranks_that_there_are(tmp_path: Path) -> None:
    model = distinct(layers=2, hidden=128, intermediate=512)
    with torch.no_grad():
        for layer, rank in zip(layers(model.network), (8, 24), strict=True):
            parts(layer).up.weight.copy_(matrix(512, rank) @ matrix(rank, 128))
    result = applied(model, rank_mode="energy", energy=0.99, targets="up", decomposition="svd", rank_multiple=4)
    assert result.subject.ranks[4] == 16
    promised = METHOD.after(model.subject, settings_of(model.subject, rank_mode="energy", targets="up"))
    assert promised.megabytes > 1.1 * result.subject.megabytes, "what was promised is the most it can be"
    chosen = INT8["dynamic_int8"]
    lower(QUANTIZATION.apply(result, chosen, tiny_context(result)), tmp_path / "artifact", CLASSIFICATION)
    expected = QUANTIZATION.after(result.subject, chosen).megabytes * 1e6
    assert stored_bytes(tmp_path / "artifact") == pytest.approx(expected, rel=0.02)


def test_flat_spectra_leave_all_as_it_was_and_the_subject_says_so() -> None:
    model = tiny_candidate(layers=2)
    result = applied(model, rank_mode="energy", energy=0.99, targets="attention", decomposition="svd")
    assert torch.equal(outputs(result), outputs(model))
    assert result.subject == model.subject.having("lossy", "non-uniform")
    assert METHOD.evaluate(result, tiny_context(model)) == {"factored": 0}


@pytest.mark.parametrize("ratio", [0.4, 0.8])
def test_the_ranks_of_unequal_layers_are_their_own(ratio: float) -> None:
    model = tiny_candidate(layers=3)
    prune_neurons(model.network, {0: range(16), 1: range(40)})
    model = model.replace(subject=subject_of(model.network, "text-classification"))
    result = applied(model, rank_ratio=ratio, targets="all", decomposition="svd", rank_multiple=4)
    chosen = settings_of(model.subject, rank_ratio=ratio, targets="all", rank_multiple=4)
    promised = METHOD.after(model.subject, chosen)
    assert counted(result) == result.subject.parameters
    assert result.subject.without("low-rank", "lossy") == subject_of(result.network, "text-classification")
    assert "estimated" in promised.traits
    assert "estimated" not in result.subject.traits


def test_only_an_estimated_promise_leaves_ranks_open() -> None:
    promised = BASE.having("low-rank", "lossy", ranks=(0, 0, 0, 0, 96, 96))
    found = promised.having(ranks=(0, 0, 0, 0, 90.5, 80))
    assert promised.keeps(promised)
    assert not found.keeps(promised)
    estimated = promised.having("estimated")
    assert found.keeps(estimated)
    assert found.having(bits=8.5).keeps(estimated)
    assert BASE.having("lossy").keeps(estimated), "none gained anything"
    assert not BASE.having("lossy", layers=6).keeps(estimated)
    assert not BASE.keeps(estimated), "what may follow has been decided on"


def test_layers_that_are_all_smaller_than_their_mean_promises_stay_whole() -> None:
    model = tiny_candidate(layers=2, intermediate=32)
    promised = model.replace(subject=model.subject.having("non-uniform", intermediate=128))
    params = settings_of(promised.subject, decomposition="fisher_weighted", rank_multiple=16, rank_ratio=0.9)
    assert useful_rank(128, 32, params)
    assert not useful_rank(32, 32, params)
    result = METHOD.apply(promised, params, tiny_context(model))
    assert torch.equal(outputs(result), outputs(model))
    assert METHOD.after(promised.subject, params).traits >= {"low-rank", "estimated"}
    assert result.subject == promised.subject.having("lossy"), "nothing became a product, and nothing says so"
    assert METHOD.evaluate(result, tiny_context(model)) == {"factored": 0}

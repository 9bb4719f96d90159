"""Low-rank factorization: what decompositions satisfy, closed forms, and every form that factors are kept in."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compress_search_plugins.distillation.soft_targets import soft_target_loss
from compress_search_plugins.low_rank import (
    PARTS,
    WORTHWHILE,
    break_even,
    decompose,
    largest_ratio,
    row_weights,
    second_moments,
    useful_rank,
)
from compress_search_plugins.quantization import Quantization
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_search import Candidate, Subject, TrialError
from compress_search.encoders import (
    LowRankLinear,
    bake,
    describe,
    layers,
    load,
    load_network,
    parts,
    prune_neurons,
    save,
    shape_key,
    share_parts,
    subject_of,
)
from compress_search.runtimes import load_runner, size_mb
from compress_search.runtimes.lowering import lower
from compress_search.space import defaults, narrow
from compress_search.testing import tiny_batches, tiny_candidate, tiny_context
from tests.factored import BASE, METHOD, applied, matrix, outputs, settings_of
from tests.quantized import INT8, operators

SIX = Subject("bert", "text-classification", 6, 12, 32, 384, 1536, 30522, 512, 2, 4)


def product(factors: Any) -> torch.Tensor:
    return factors.left.double() @ factors.right.double()


shapes = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(0, 1000))


# --- decompositions ---


@settings(max_examples=40, deadline=None)
@given(shapes)
def test_the_error_of_a_truncation_is_what_it_leaves_out(shape: tuple[int, int, int]) -> None:
    weight = matrix(*shape).double()
    found = decompose(weight)
    for rank in range(len(found.spectrum) + 1):
        error = (weight - product(found.cut(rank, like=weight))).square().sum()
        expected = found.spectrum[rank:].square().sum()
        torch.testing.assert_close(error, expected, rtol=1e-5, atol=1e-20)


@settings(max_examples=40, deadline=None)
@given(shapes, st.sampled_from(["svd", "activation_aware", "fisher_weighted"]))
def test_at_full_rank_nothing_is_lost_whatever_counts(shape: tuple[int, int, int], kind: str) -> None:
    weight = matrix(*shape)
    inputs = matrix(3, shape[1], seed=1)  # fewer than there are dimensions, so some were never seen
    importance = {
        "svd": None,
        "activation_aware": inputs.T @ inputs / 3,
        "fisher_weighted": matrix(shape[0], 1)[:, 0].abs(),
    }
    factors = decompose(weight, importance[kind]).cut(min(shape[:2]), like=weight)
    assert factors.left.dtype == weight.dtype
    torch.testing.assert_close(product(factors).float(), weight, atol=1e-4, rtol=0)


def test_rows_and_inputs_without_weight_cost_nothing() -> None:
    weight = matrix(6, 8)
    assert product(decompose(weight, torch.zeros(6)).cut(6, like=weight)).isfinite().all()
    assert product(decompose(weight, torch.zeros(8, 8)).cut(6, like=weight)).isfinite().all()
    rows = torch.tensor([1.0, 1.0, 0, 0, 0, 0])
    close = product(decompose(weight, rows).cut(2, like=weight))
    torch.testing.assert_close(close[:2].float(), weight[:2], atol=1e-4, rtol=0)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 5))
def test_each_decomposition_is_the_best_where_it_measures(seed: int, rank: int) -> None:
    weight, inputs = matrix(6, 9, seed).double(), matrix(40, 9, seed + 1).double() * torch.linspace(0.1, 3, 9)
    rows = torch.linspace(0.2, 4, 6).double()
    plain = product(decompose(weight).cut(rank, like=weight))
    aware = product(decompose(weight, inputs.T @ inputs / 40).cut(rank, like=weight))
    fisher = product(decompose(weight, rows).cut(rank, like=weight))

    def output_error(found: torch.Tensor) -> float:
        return float((inputs @ (weight - found).T).square().sum())

    def weighted_error(found: torch.Tensor) -> float:
        return float((rows[:, None] * (weight - found)).square().sum())

    assert output_error(aware) <= output_error(plain) * (1 + 1e-4)
    assert weighted_error(fisher) <= weighted_error(plain) * (1 + 1e-9)


def test_an_error_falls_with_every_rank() -> None:
    weight, inputs = matrix(10, 14).double(), matrix(60, 14, seed=1).double()
    for importance in (None, inputs.T @ inputs / 60, torch.linspace(0.5, 2, 10).double()):
        found = decompose(weight, importance)
        if importance is None:
            errors = [(weight - product(found.cut(r, like=weight))).norm() for r in range(11)]
        elif importance.dim() == 1:
            errors = [
                (importance[:, None] * (weight - product(found.cut(r, like=weight)))).norm() for r in range(11)
            ]
        else:
            errors = [(inputs @ (weight - product(found.cut(r, like=weight))).T).norm() for r in range(11)]
        assert all(after <= before * (1 + 1e-9) for before, after in pairwise(errors))


def test_second_moments_count_real_tokens_only_and_all_places_of_a_shared_map() -> None:
    model = tiny_candidate(layers=2)
    linear = parts(layers(model.network)[0]).up
    seen: list[torch.Tensor] = []
    batches = list(tiny_batches(model, examples=12, batch_size=5))
    handle = linear.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    found = second_moments(model.network, [linear], batches)[0]
    handle.remove()
    rows = torch.cat([x[batch["attention_mask"].bool()] for x, batch in zip(seen, batches, strict=True)]).double()
    torch.testing.assert_close(found, rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6)
    assert not linear._forward_pre_hooks, "no hook is left behind"


class Wide(torch.nn.Module):
    """One map of many inputs, all of them between those of a GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(768, 16)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        inputs = torch.nn.functional.gelu(torch.randn(*input_ids.shape, 768, generator=generator))
        found: torch.Tensor = self.linear(inputs)
        return found


def test_fewer_tokens_than_inputs_are_enough() -> None:
    network = Wide()
    batch = {name: torch.ones(16, 16, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    [moments] = second_moments(network, [network.linear], [batch])
    found = decompose(network.linear.weight, moments)
    whole = product(found.cut(16, like=network.linear.weight))
    torch.testing.assert_close(whole, network.linear.weight.double(), rtol=1e-4, atol=1e-4)


def test_row_weights_are_the_root_of_summed_squared_gradients() -> None:
    model = tiny_candidate(layers=1)
    context = tiny_context(model)
    linear = parts(layers(model.network)[0]).down
    batches = list(tiny_batches(model, examples=8, batch_size=4))
    found = row_weights(model.network, [linear], batches, context.task_loss)[0]
    expected = torch.zeros(linear.out_features)
    for batch in batches:
        model.network.zero_grad()
        context.task_loss(model.network, batch).backward()
        assert linear.weight.grad is not None
        expected += linear.weight.grad.square().sum(1)
    torch.testing.assert_close(found, expected.sqrt())


# --- ranks and closed forms ---


def test_break_even_and_the_ranks_of_the_design() -> None:
    assert [int(break_even(*shape)) for shape in ((384, 384), (1536, 384))] == [192, 307]
    params = {"rank_mode": "ratio", "rank_ratio": 96 / 307.2, "rank_multiple": 16}
    assert useful_rank(1536, 384, params) == 96
    assert useful_rank(1536, 384, {**params, "rank_ratio": 0.9}) == 272, (
        "0.9 of 307 is nearest to 272, which is below"
    )
    assert useful_rank(384, 384, {**params, "rank_ratio": 0.9}) == 0, "176 is above nine tenths of 192"
    assert useful_rank(0, 384, params) == 0


@pytest.mark.parametrize(("rank", "millions"), [(96, 17.84), (192, 20.05)])
def test_parameters_match_the_measured_sizes(rank: int, millions: float) -> None:
    """71.4 and 80.2 MB in float32, where the whole has 90.9."""
    after = METHOD.after(SIX, settings_of(SIX, rank_ratio=rank / 307.2))
    assert after.ranks == (0, 0, 0, 0, rank, rank)
    assert SIX.parameters - after.parameters == 6 * 2 * (1536 * 384 - rank * (1536 + 384))
    assert after.parameters / 1e6 == pytest.approx(millions, abs=0.03)
    assert SIX.macs(64) - after.macs(64) == 64 * (SIX.parameters - after.parameters)


@settings(max_examples=60, deadline=None)
@given(
    ratio=st.floats(0.1, 0.9),
    multiple=st.sampled_from([1, 4, 8, 16, 32]),
    targets=st.sampled_from(["ffn", "attention", "all", "query_key", "value_output", "up", "down"]),
    subject=st.sampled_from([BASE, SIX, SIX.having(intermediate=700.5, heads=7.25)]),
)
def test_effective_ratios_give_the_same_ranks_again_and_never_more_parameters(ratio, multiple, targets, subject):
    asked = {
        **defaults(METHOD.search_space(subject)),
        "rank_ratio": ratio,
        "rank_multiple": multiple,
        "targets": targets,
    }
    once = METHOD.effective(subject, asked)
    assert METHOD.effective(subject, once) == once
    assert (METHOD.after(subject, once) == subject) == bool(METHOD.faults(subject, once)), "or it does nothing"
    assert 0.1 <= float(once["rank_ratio"]) <= 0.9
    after = METHOD.after(subject, once)
    assert after.parameters <= subject.parameters
    if after != subject:
        assert after.parameters < subject.parameters
        assert {"low-rank", "lossy"} <= after.traits


@pytest.mark.parametrize(
    ("chosen", "name", "fault"),
    [
        (
            {"rank_ratio": 0.89},
            "rank_ratio",
            "0.89 is rank 176, and a rank gains something below 172.8: expected at most 0.87",
        ),
        ({"rank_ratio": 0.87}, None, None),
        ({"rank_ratio": 0.9, "targets": "all"}, None, None),
    ],
)
def test_a_rank_at_which_nothing_is_gained_is_a_fault_that_names_the_largest(chosen, name, fault) -> None:
    params = settings_of(SIX, **{"targets": "attention", **chosen})
    assert METHOD.faults(SIX, params) == ({name: fault} if name else {})


@settings(max_examples=60, deadline=None)
@given(
    out=st.integers(1, 400),
    within=st.integers(1, 400),
    multiple=st.sampled_from([1, 4, 8, 16, 32]),
    over=st.floats(0.0101, 0.5),
)
def test_the_largest_ratio_is_useful_and_more_is_not(out: int, within: int, multiple: int, over: float) -> None:
    largest = largest_ratio(out, within, multiple)
    params = {"rank_mode": "ratio", "rank_multiple": multiple}
    if multiple < WORTHWHILE * break_even(out, within):
        assert useful_rank(out, within, {**params, "rank_ratio": largest})
    assert not useful_rank(out, within, {**params, "rank_ratio": largest + over})


@pytest.mark.parametrize("recover", ["none", "kd"])
@pytest.mark.parametrize("decomposition", ["svd", "activation_aware", "fisher_weighted"])
def test_a_rank_that_no_map_has_is_refused_before_any_training(decomposition: str, recover: str) -> None:
    model = tiny_candidate(layers=2)
    context = tiny_context(model)
    params = settings_of(model.subject, targets="attention", decomposition=decomposition, recover=recover)
    with pytest.raises(
        TrialError, match=r"rank_multiple: 16, and a rank gains .* below 14\.4: expected one of 1, 4, 8"
    ):
        METHOD.apply(model, params, context)
    assert context.fits == []


def test_multiples_are_smaller_where_maps_are() -> None:
    found = [METHOD.search_space(subject)["rank_multiple"].default for subject in (BASE, SIX)]
    assert found == [16, 16]
    small = SIX.having(hidden=32, intermediate=16)
    assert METHOD.search_space(small)["rank_multiple"].default == 8
    assert not METHOD.faults(small, settings_of(small))


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta"])
@pytest.mark.parametrize("targets", ["ffn", "attention", "all", "query_key", "value_output"])
def test_after_agrees_with_the_network_to_the_parameter(family: str, targets: str) -> None:
    model = tiny_candidate(family, layers=2)
    result = applied(model, targets=targets, decomposition="svd", rank_ratio=0.5)
    assert result.subject.without("low-rank", "lossy") == subject_of(result.network, "text-classification")
    names = [name for name in PARTS if isinstance(getattr(parts(layers(result.network)[0]), name), LowRankLinear)]
    assert names == [name for name, rank in zip(PARTS, result.subject.ranks, strict=True) if rank]
    saved = sum(p.numel() for p in model.network.parameters()) - sum(p.numel() for p in result.network.parameters())
    assert saved == model.subject.parameters - result.subject.parameters > 0


def test_stored_subjects_of_earlier_runs_still_load() -> None:
    old = {name: value for name, value in BASE.to_dict().items() if name not in ("ranks", "alphabet")}
    assert Subject.from_dict(old) == BASE
    new = BASE.having(ranks=(0, 0, 0, 0, 96.0, 96.0))
    assert Subject.from_dict(new.to_dict()) == new
    assert hash(new) != hash(BASE)


# --- what a factored map is ---


def test_a_factored_map_behaves_like_the_linear_it_replaces() -> None:
    left, right, bias = matrix(5, 2), matrix(2, 7), matrix(5, 1)[:, 0]
    module = LowRankLinear(left, right, bias)
    x = matrix(3, 7, seed=9)
    torch.testing.assert_close(module(x), x @ (left @ right).T + bias)
    assert (module.in_features, module.out_features, module.rank) == (7, 5, 2)
    torch.testing.assert_close(module.weight, left @ right)
    assert module.bias is not None
    assert "rank=2" in repr(module)
    assert [name for name, _ in module.named_parameters()] == ["reduce.weight", "expand.weight", "expand.bias"]
    assert LowRankLinear(left, right).bias is None
    assert sum(p.numel() for p in module.parameters()) == 2 * (5 + 7) + 5


def test_it_cannot_be_cut_afterwards() -> None:
    result = applied(tiny_candidate(layers=1), decomposition="svd")
    with pytest.raises(ValueError, match="cut first, then factor"):
        prune_neurons(result.network, {0: range(8)})


def test_nothing_follows_that_would_undo_it_or_that_it_would_undo() -> None:
    assert METHOD.unsupported(BASE) is None
    assert "products of two already" in str(METHOD.unsupported(BASE.having("low-rank")))
    assert "zeros that must stay" in str(METHOD.unsupported(BASE.having("sparse")))


@pytest.mark.parametrize("bad", [0.95, 1.5, 0.05, {"low": 0.5, "high": 1.2}, "wide"])
def test_a_study_cannot_ask_for_ranks_at_the_break_even_or_above(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"outside the space: expected a number from 0\.1 to 0\.9"):
        narrow(METHOD.search_space(BASE)["rank_ratio"], bad)


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_saved_and_loaded_it_computes_the_same(family: str, tmp_path: Path) -> None:
    result = applied(tiny_candidate(family, layers=2), targets="all", rank_ratio=0.6)
    save(result.network, result.tokenizer, tmp_path)
    network, _ = load(tmp_path)
    assert torch.equal(outputs(result.replace(network=network)), outputs(result))
    assert shape_key(describe(network)) == shape_key(describe(result.network))
    thinner = applied(tiny_candidate(family, layers=2), targets="all", rank_ratio=0.3)
    assert shape_key(describe(thinner.network)) != shape_key(describe(network))


def test_a_shared_map_is_factored_once(tmp_path: Path) -> None:
    model = tiny_candidate(layers=4)
    share_parts(model.network, PARTS, {1: 0, 2: 0, 3: 0})
    model = model.replace(subject=subject_of(model.network, "text-classification"))
    result = applied(model, targets="all", decomposition="activation_aware", rank_ratio=0.5)
    assert len({id(parts(layer).up) for layer in layers(result.network)}) == 1
    assert isinstance(parts(layers(result.network)[3]).query, LowRankLinear)
    assert result.subject.without("low-rank", "lossy") == subject_of(result.network, "text-classification")
    actual = sum(p.numel() for p in result.network.parameters())
    assert result.subject.parameters == actual
    save(result.network, result.tokenizer, tmp_path)
    assert torch.equal(outputs(result.replace(network=load_network(tmp_path))), outputs(result))


def test_recovery_learns_from_labels_and_teacher_what_was_lost() -> None:
    model = tiny_candidate(layers=2)
    rough = applied(model, rank_ratio=0.3)
    params = settings_of(model.subject, rank_multiple=1, rank_ratio=0.3, recover="kd", learning_rate=0.005)
    context = tiny_context(model, steps=40)
    recovered = METHOD.apply(model, params, context)
    assert METHOD.trains(params)
    assert context.fits == [40]
    loss, batch = soft_target_loss(context, "text-classification"), next(tiny_batches(model, batch_size=64, seed=9))
    with torch.no_grad():
        assert loss(recovered.network, batch) < loss(rough.network, batch)


def test_activation_aware_outputs_are_nearer_than_plain_ones_on_the_calibration_data() -> None:
    model = tiny_candidate(layers=1)
    batches = list(tiny_batches(model, examples=32, seed=0))
    linear = parts(layers(model.network)[0]).up
    moments = second_moments(model.network, [linear], batches)[0]
    errors = []
    for importance in (moments, None):
        factors = decompose(linear.weight.detach(), importance).cut(8, like=linear.weight)
        delta = linear.weight.detach().double() - product(factors)
        errors.append(float((delta @ moments @ delta.T).trace()))
    assert errors[0] <= errors[1]


# --- as it is deployed ---


def lowered(candidate: Candidate, folder: Path) -> np.ndarray[Any, Any]:
    bake(candidate.network)
    lower(candidate, folder, tiny_context(candidate).task)
    batch = {name: tensor.numpy() for name, tensor in next(tiny_batches(candidate, seed=3)).items()}
    return load_runner(folder, threads=1)(batch)


def test_exported_to_onnx_it_computes_the_same_from_two_thin_products(tmp_path: Path) -> None:
    import onnx

    model = tiny_candidate(layers=2)
    result = applied(model, targets="all", rank_ratio=0.6, decomposition="svd")
    found = lowered(result, tmp_path / "thin")
    np.testing.assert_allclose(found, outputs(result).numpy(), atol=1e-4)
    graph = onnx.load(tmp_path / "thin" / "model.onnx").graph
    ranks = {int(rank) for rank in result.subject.ranks}
    thin = [tensor for tensor in graph.initializer if len(tensor.dims) == 2 and ranks & set(tensor.dims)]
    assert len(thin) == 2 * len(PARTS) * 2
    lowered(model.copy(), tmp_path / "whole")
    assert size_mb(tmp_path / "thin") < size_mb(tmp_path / "whole")


def test_both_factors_are_quantized(tmp_path: Path) -> None:
    import onnx

    model = tiny_candidate(layers=2)
    result = applied(model, targets="ffn", rank_ratio=0.6, decomposition="svd")
    quantized = Quantization().apply(result, INT8["dynamic_int8"], tiny_context(result))
    found = lowered(quantized, tmp_path / "int8")
    expected = outputs(result).numpy()
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 0.15
    found = operators(onnx.load(tmp_path / "int8" / "model.onnx"))
    assert found["MatMulInteger"] == 2 * (4 + 2 * 2) + 2, "up and down in two each, pooler and classifier"
    assert quantized.subject.bits < 32

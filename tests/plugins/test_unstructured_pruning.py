"""Exact counts, patterns and gradients; zeros that survive training, baking, quantization and the file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from compress_search_plugins import unstructured_pruning
from compress_search_plugins.pruning import sparse_masks
from compress_search_plugins.pruning.gates import STEPS
from compress_search_plugins.pruning.sparse_masks import PATTERNS, Mask, keep_per_group, keep_top, linears, select
from compress_search_plugins.quantization import Quantization
from compress_search_plugins.structured_pruning import StructuredPruning
from compress_search_plugins.unstructured_pruning import Sparsifier, UnstructuredPruning
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compress_search import Candidate, Subject, TrialError
from compress_search.candidate import packed_bits
from compress_search.encoders import bake, load_network, prune_neurons, subject_of
from compress_search.runtimes import load_runner, size_mb
from compress_search.runtimes.lowering import lower
from compress_search.space import active, defaults, in_order
from compress_search.testing import tiny_batches, tiny_candidate, tiny_context
from tests.pruning import parameters as pruning_parameters

METHOD = UnstructuredPruning()
BASE = Subject("bert", "text-classification", 12, 12, 64, 768, 3072, 30522, 512, 2, 2, traits=frozenset({"sized"}))


def chosen(subject: Subject, **changes: Any) -> dict[str, Any]:
    """The method's defaults with these changes, at a learning rate at which the tiny model moves."""
    space = METHOD.search_space(subject)
    params: dict[str, Any] = {}
    for name, dim in in_order(space):
        if active(dim, params):
            params[name] = changes.get(name, dim.default)
    return params | ({"learning_rate": 1e-3} if "learning_rate" in params else {})


def tiny(**sizes: int) -> Candidate:
    candidate = tiny_candidate(**sizes)
    return candidate.replace(subject=candidate.subject.having("sized"))


def pruned(candidate: Candidate | None = None, steps: int = 10, **changes: Any) -> Candidate:
    candidate = candidate or tiny()
    return METHOD.apply(candidate, chosen(candidate.subject, **changes), tiny_context(candidate, steps=steps))


def weights(network: nn.Module) -> list[Tensor]:
    return [linear.weight.detach() for linear in linears(network).values()]


def randoms(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# which weights stay


@given(st.integers(1, 60), st.integers(1, 60), st.floats(0.0, 1.0), st.booleans(), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_exactly_so_many_weights_stay_and_they_are_the_largest(rows, columns, part, tied, seed):
    scores = randoms(rows, columns, seed=seed)
    scores = scores.round() if tied else scores  # many equal ones
    count = math.floor(part * scores.numel())
    mask = keep_top(scores, count)
    assert int(mask.sum()) == count
    if 0 < count < scores.numel():
        assert scores[mask].min() >= scores[~mask].max()


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8)])
def test_every_group_keeps_its_n_largest(n, m):
    scores = randoms(6, 4 * m)
    mask = keep_per_group(scores, n, m)
    for group, kept in zip(scores.view(-1, m), mask.view(-1, m), strict=True):
        assert int(kept.sum()) == n
        assert group[kept].min() > group[~kept].max()


def test_blocks_go_as_a_whole_the_weakest_first():
    scores = torch.ones(64, 96)
    scores[:32, 32:64] = 3
    scores[32:, :32] = 2
    (mask,) = select([scores], 4 / 6, PATTERNS["block_32x32"])
    assert int(mask.sum()) == 2 * 32 * 32
    assert mask[:32, 32:64].all()
    assert mask[32:, :32].all()


def test_a_matrix_loses_its_own_part_or_competes_with_the_others():
    scores = [randoms(40, 50).abs(), 100 * randoms(30, 50, seed=1).abs()]
    local = select(scores, 0.9, PATTERNS["unstructured"])
    assert [int(mask.sum()) for mask in local] == [200, 150]
    joint = select(scores, 0.9, PATTERNS["unstructured"], jointly=True)
    least = math.ceil(sparse_masks.LEAST * 2000)
    assert [int(mask.sum()) for mask in joint] == [least, 350 - least], "no matrix is emptied"


@pytest.mark.parametrize("jointly", [False, True])
def test_one_block_at_least_stays_of_each_matrix(jointly):
    scores = [randoms(32, 32).abs(), randoms(64, 32, seed=1).abs(), randoms(32, 64, seed=2).abs()]
    masks = select(scores, 0.97, PATTERNS["block_32x32"], jointly=jointly)
    assert [int(mask.sum()) for mask in masks] == [32 * 32] * 3


def test_matrices_that_compete_by_magnitude_are_measured_by_their_own_deviation():
    """Else the scale of a matrix, which a norm after it undoes, would decide."""
    candidate = tiny()
    next(iter(linears(candidate.network).values())).weight.data *= 1000
    masks = weights(pruned(candidate, method="one_shot", scope="global").network)
    parts = [int(mask.count_nonzero()) / mask.numel() for mask in masks]
    assert max(parts) < 0.3


# when


def test_the_schedule_begins_dense_and_ends_at_the_target():
    matrices = sparse_masks.mask_linears(tiny().network)
    params = chosen(BASE, sparsity=0.8, initial_warmup=0.1, final_warmup=0.2)
    sparsifier = Sparsifier(matrices, params)
    found = []
    for step in range(80):  # the last 20 of 100 steps are the final warm-up
        sparsifier.on_step(step, 80)
        total = sum(matrix.mask.mask.numel() for matrix in matrices)
        found.append(1 - sum(int(matrix.mask.mask.sum()) for matrix in matrices) / total)
    assert found[:11] == [0.0] * 11, "dense for a tenth of all training"
    assert found == sorted(found)
    assert found[45] == pytest.approx(0.8 * 7 / 8, abs=0.01), "half way 7/8 are gone"
    sparsifier.settle()
    assert sparse_masks.density(tiny_with(matrices)) == pytest.approx(0.2, abs=1e-3)


def tiny_with(matrices: list[sparse_masks.Matrix]) -> nn.Module:
    """The network that these matrices came from has no name here: another, with their weights."""
    network = tiny().network
    for linear, matrix in zip(linears(network).values(), matrices, strict=True):
        linear.weight.data = matrix.linear.weight.detach()
    return network


def test_groups_are_thinned_weight_by_weight():
    pattern = PATTERNS["4:8"]
    assert [pattern.per_group(sparsity) for sparsity in (0.0, 0.05, 0.125, 0.3, 0.45, 0.5)] == [8, 8, 7, 6, 4, 4]
    # of four, the third weight and the second go apart, not both at the very end
    assert [PATTERNS["2:4"].per_group(sparsity) for sparsity in (0.1, 0.2, 0.35, 0.4, 0.5)] == [4, 3, 3, 2, 2]


# scores


def test_scores_get_the_gradient_times_the_weight_everywhere():
    linear = nn.Linear(6, 5)
    linear.weight.data = randoms(5, 6)
    mask = Mask(linear.weight.detach(), scored=True)
    mask.mask = randoms(5, 6, seed=1) > 0
    parametrize.register_parametrization(linear, "weight", mask)
    inputs, weight = randoms(7, 6, seed=2), linear.parametrizations.weight.original
    masked = linear.weight
    masked.retain_grad()
    (nn.functional.linear(inputs, masked, linear.bias) ** 2).sum().backward()
    assert torch.equal(mask.scores.grad, masked.grad * weight)
    assert torch.equal(weight.grad, masked.grad * mask.mask), "masked weights do not move"


def test_new_scores_change_nothing():
    candidate = tiny()
    network = candidate.copy().network
    sparse_masks.mask_linears(network, scored=True)
    bake(network)
    before = candidate.network.state_dict()
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_movement_keeps_what_moves_away_from_zero():
    """S accumulates −g·w: under a loss of Σ target·w the weights that the loss would have larger stay."""
    network = tiny().network
    matrices = sparse_masks.mask_linears(network, scored=True)
    sparsifier = Sparsifier(matrices, chosen(BASE, method="movement", sparsity=0.5))
    (group,) = sparsifier.groups
    assert (group.learning_rate, group.weight_decay) == (1e-2, 0.0)
    optimizer = torch.optim.SGD(group.parameters, lr=1.0)
    directions = [randoms(*matrix.weight.shape, seed=i) for i, matrix in enumerate(matrices)]
    sum((d * m.linear.weight).sum() for d, m in zip(directions, matrices, strict=True)).backward()
    optimizer.step()
    sparsifier.settle()
    for direction, matrix in zip(directions, matrices, strict=True):
        assert torch.equal(matrix.mask.mask, keep_top(-direction * matrix.weight, matrix.weight.numel() // 2))
        assert matrix.mask.scores is None


def test_the_soft_threshold_ends_at_a_tenth_and_its_penalty_grows_with_it():
    matrices = sparse_masks.mask_linears(tiny().network, scored=True)
    params = chosen(BASE, method="soft_movement", initial_warmup=0.0, penalty=100.0)
    sparsifier = Sparsifier(matrices, params)
    sparsifier.on_step(0, STEPS)
    assert sparsifier.penalty() == 0
    assert all(bool(matrix.mask.mask.all()) for matrix in matrices), "θ = 0 keeps all"
    sparsifier.on_step(STEPS, STEPS)
    assert float(sparsifier.penalty().detach()) == pytest.approx(100 * 0.5), "σ(0) = 1/2"
    with torch.no_grad():
        for matrix in matrices:
            matrix.mask.scores.fill_(-3.0)
            matrix.mask.scores[0, :3] = torch.tensor([-2.1, -2.2, -2.0])  # σ = 0.109, 0.0998, 0.119
    sparsifier.on_step(STEPS, STEPS)
    for matrix in matrices:
        kept = matrix.mask.mask
        assert kept[0, :3].tolist() == [True, int(0.005 * kept.numel() + 1e-6) > 2, True]
        assert int(kept.sum()) == max(2, math.ceil(0.005 * kept.numel())), "but half a percent stays"


def test_scores_of_a_short_training_cut_as_those_of_a_long_one():
    matrices = sparse_masks.mask_linears(tiny().network, scored=True)
    sparsifier = Sparsifier(matrices, chosen(BASE, method="soft_movement", initial_warmup=0.0, penalty=100.0))
    with torch.no_grad():
        for matrix in matrices:
            matrix.mask.scores.fill_(-3.0 * 30 / STEPS)  # what 30 steps can do where 3000 come to -3
            matrix.mask.scores[0, 0] = 0.0
    sparsifier.on_step(30, 30)
    assert all(int(matrix.mask.mask.sum()) < 0.02 * matrix.mask.mask.numel() for matrix in matrices)
    assert all(bool(matrix.mask.mask[0, 0]) for matrix in matrices)


# the method


@pytest.mark.parametrize("method", unstructured_pruning.METHODS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_network_has_exactly_the_weights_that_were_asked_for(method, pattern):
    result = pruned(method=method, pattern=pattern, sparsity=0.7, steps=6)
    found, joint = weights(result.network), method == "soft_movement"
    if pattern in ("2:4", "4:8"):
        n, m = map(int, pattern.split(":"))
        assert all((weight.view(-1, m).count_nonzero(dim=1) <= n).all() for weight in found)
        expected = [weight.numel() // m * n for weight in found]
    else:
        area = 32 * 32 if pattern == "block_32x32" else 1
        expected = [max(1, math.floor(0.3 * weight.numel() / area + 1e-6)) * area for weight in found]
    kept = [int(weight.count_nonzero()) for weight in found]
    if joint and pattern in unstructured_pruning.COUNTED:
        units = [weight.numel() // area for weight in found]
        least = sum(math.ceil(sparse_masks.LEAST * unit) for unit in units)
        assert sum(kept) == max(least, math.floor(0.3 * sum(units) + 1e-6)) * area
    else:
        assert kept == expected
    assert result.subject.density == sum(kept) / sum(weight.numel() for weight in found)
    assert result.subject.traits >= {"sparse", "lossy"}


@pytest.mark.parametrize("scope", ["local", "global"])
def test_the_density_that_is_promised_is_that_of_the_network_with_unequal_layers_too(scope):
    candidate = tiny()
    prune_neurons(candidate.network, {0: range(7), 2: range(31)})
    candidate = candidate.replace(subject=subject_of(candidate.network, "text-classification").having("sized"))
    result = pruned(candidate, method="one_shot", sparsity=0.77, scope=scope)
    found = weights(result.network)
    total = sum(weight.numel() for weight in found)
    assert result.subject.density == pytest.approx(sparse_masks.density(result.network), abs=len(found) / total)
    assert candidate.subject.linear_parameters == total


def test_only_the_encoders_matrices_are_touched_when_nothing_trains():
    candidate = tiny()
    result = pruned(candidate, method="one_shot")
    bake(result.network)
    sparse = {f"bert.encoder.layer.{name}.weight" for name in linears(result.network)}
    assert len(sparse) == 4 * 6
    before = candidate.network.state_dict()
    changed = {
        name for name, tensor in result.network.state_dict().items() if not torch.equal(tensor, before[name])
    }
    assert changed == sparse


@pytest.mark.parametrize("method", unstructured_pruning.METHODS)
def test_zeros_stay_through_training_decay_and_baking(method):
    result = pruned(method=method)
    zeros = [weight == 0 for weight in weights(result.network)]
    before = [weight.clone() for weight in weights(result.network)]
    tiny_context(result, steps=20).fit(result.network, learning_rate=0.01)
    bake(result.network)
    assert not any(parametrize.is_parametrized(module) for module in result.network.modules())
    after = weights(result.network)
    assert [bool((weight[zero] == 0).all()) for weight, zero in zip(after, zeros, strict=True)] == [True] * len(
        zeros
    )
    assert not any(torch.equal(old, new) for old, new in zip(before, after, strict=True)), "the others learned"


@pytest.mark.parametrize("kd", [True, False])
def test_the_teacher_is_asked_only_with_distillation(kd):
    candidate = tiny()
    context, asked = tiny_context(candidate), []
    original = context.teacher_logits
    context.teacher_logits = lambda batch: asked.append(1) or original(batch)  # type: ignore[method-assign]
    METHOD.apply(candidate, chosen(candidate.subject, kd=kd), context)
    assert bool(asked) == kd


def test_training_is_split_into_the_pruning_and_the_last_phase():
    candidate = tiny()
    context = tiny_context(candidate, steps=20)
    METHOD.apply(candidate, chosen(candidate.subject, final_warmup=0.3), context)
    assert context.fits == [14, 6]


# what it fits


def test_patterns_are_those_that_the_widths_divide_into():
    assert METHOD.search_space(BASE)["pattern"].distribution.choices == tuple(PATTERNS)
    odd = BASE.having(intermediate=3068)
    assert METHOD.search_space(odd)["pattern"].distribution.choices == ("unstructured", "2:4")
    assert METHOD.missing(odd).keys() == {"pattern: 4:8", "pattern: block_32x32"}
    assert METHOD.missing(odd)["pattern: 4:8"] == "inputs that 8 divides, and there are matrices of 768 x 3068"
    fault = {"pattern": "4:8 needs inputs that 8 divides, and there are matrices of 768 x 3068"}
    assert METHOD.faults(odd, chosen(BASE, pattern="4:8")) == fault, "after an earlier step"
    assert METHOD.missing(BASE) == METHOD.faults(BASE, chosen(BASE, pattern="4:8")) == {}


@pytest.mark.parametrize(
    ("traits", "fits"),
    [
        ((), ("unstructured",)),
        (("neurons:4",), ("unstructured", "2:4")),
        (("neurons:32",), tuple(PATTERNS)),
    ],
)
def test_where_layers_differ_a_pattern_fits_that_divides_what_all_their_widths_are_multiples_of(traits, fits):
    uneven = BASE.having("non-uniform", *traits, heads=7.3, intermediate=1234.5)
    faults = {name: METHOD.faults(uneven, chosen(BASE, pattern=name)) for name in PATTERNS}
    assert tuple(name for name, fault in faults.items() if not fault) == fits
    assert METHOD.search_space(uneven)["pattern"].distribution.choices == fits
    if not traits:
        needs = "4:8 needs inputs that 8 divides, and the layers' matrices are multiples of 768 x 1"
        assert faults["4:8"] == {"pattern": needs}


@given(
    st.sampled_from(["2:4", "4:8", "block_32x32"]),
    st.sampled_from([1, 8, 16, 32]),
    st.sampled_from([0.0, 0.2, 0.5]),
    st.sampled_from(["ratios", "macs"]),
    st.integers(0, 9),
)
@settings(max_examples=30, deadline=None)
def test_no_pattern_without_a_fault_meets_a_matrix_that_it_does_not_divide(pattern, multiple, hidden, budget, seed):
    """After pruning by chance that leaves layers unequal, of odd widths and without some of their blocks."""
    candidate, pruning = tiny(layers=2, hidden=64, heads=2), StructuredPruning()
    changes = {"budget": budget, "target": 0.3, "criterion": "random", "recover": "none", "hidden_ratio": hidden}
    params = pruning_parameters(candidate.subject, ffn_multiple=multiple, **given_in(budget, changes))
    left = pruning.apply(candidate, params, tiny_context(candidate, seed=seed, dry=False))
    if not METHOD.faults(left.subject, chosen(candidate.subject, pattern=pattern)):
        unstructured_pruning.check_divides(left.network, PATTERNS[pattern])


def given_in(budget: str, changes: dict[str, Any]) -> dict[str, Any]:
    """The changes that have an effect under this budget."""
    return {name: value for name, value in changes.items() if budget != "ratios" or name != "target"}


@pytest.mark.parametrize(("pattern", "kept", "number"), [("2:4", 50, 4), ("4:8", 52, 8), ("block_32x32", 48, 32)])
def test_a_pattern_that_a_width_does_not_divide_into_is_refused_before_training(pattern, kept, number):
    candidate = tiny()
    params = chosen(candidate.subject, pattern=pattern)
    prune_neurons(candidate.network, {1: range(kept)})
    context = tiny_context(candidate)
    with pytest.raises(
        TrialError, match=rf"^pattern {pattern} needs .*that {number} divides, and layer\.1\..*{kept}"
    ):
        METHOD.apply(candidate, params, context)
    assert not context.fits


def test_it_is_refused_where_nothing_measured_can_gain():
    assert METHOD.unsupported(BASE) is None
    assert "size_mb" in str(METHOD.unsupported(BASE.without("sized")))
    assert "size_mb" in str(METHOD.unsupported(BASE.without("sized").having("timed")))
    after = METHOD.after(BASE, chosen(BASE))
    assert "sparse already" in str(METHOD.unsupported(after))


def test_a_dry_run_has_the_density_of_the_real_one():
    candidate = tiny()
    for method in unstructured_pruning.METHODS:
        params = chosen(candidate.subject, method=method)
        dry = METHOD.apply(candidate, params, tiny_context(candidate, dry=True))
        assert sparse_masks.density(dry.network) == dry.subject.density


# the file


def lowered(candidate: Candidate, directory: Path) -> Path:
    candidate = candidate.copy()
    bake(candidate.network)
    lower(candidate, directory, tiny_context(candidate).task)
    return directory


def dense(candidate: Candidate) -> Candidate:
    """The same weights, zeros and all, to be stored in full in an ONNX file."""
    return candidate.replace(subject=candidate.subject.without("sparse"))


def logits(directory: Path) -> NDArray[np.float32]:
    batch = {name: tensor.numpy() for name, tensor in next(tiny_batches(tiny())).items()}
    return load_runner(directory, 1)(batch)


@pytest.mark.parametrize("sparsity", [0.5, 0.97])
def test_the_onnx_file_is_as_small_as_the_closed_form_says_and_computes_the_same(sparsity, tmp_path):
    candidate = tiny(hidden=128, intermediate=512)
    result = pruned(candidate, method="one_shot", sparsity=sparsity)
    full, packed = lowered(dense(result), tmp_path / "full"), lowered(result, tmp_path / "packed")
    saved = candidate.subject.megabytes - result.subject.megabytes
    assert size_mb(full) - size_mb(packed) == pytest.approx(saved, rel=0.02)
    assert (logits(packed) == logits(full)).all(), "expanded to the same bits, and run by the same kernels"


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.97])
def test_so_are_the_weights_that_torch_runs(sparsity, tmp_path):
    candidate = tiny(hidden=128, intermediate=512).replace(runtime={"engine": "torch"})
    result = pruned(candidate, method="one_shot", sparsity=sparsity)
    full, packed = lowered(candidate, tmp_path / "full"), lowered(result, tmp_path / "packed")
    saved = candidate.subject.megabytes - result.subject.megabytes
    assert size_mb(full) - size_mb(packed) == pytest.approx(saved, rel=0.02)
    reloaded = load_network(packed / "weights")
    assert all(map(torch.equal, weights(reloaded), weights(result.network)))


def test_the_density_on_disk_is_what_was_asked_for(tmp_path):
    result = pruned(sparsity=0.83)
    found = weights(load_network(lowered(result, tmp_path) / "weights"))
    for weight in found:
        assert abs(int(weight.count_nonzero()) / weight.numel() - 0.17) <= 1 / weight.numel()


def test_zeros_survive_quantization(tmp_path):
    result = pruned(tiny(hidden=128, intermediate=512), method="one_shot", sparsity=0.8)
    bake(result.network)
    context = tiny_context(result)
    params = Quantization().effective(result.subject, defaults(Quantization().search_space(result.subject)))
    quantized = Quantization().apply(result, params, context)
    full, packed = lowered(dense(quantized), tmp_path / "full"), lowered(quantized, tmp_path / "packed")
    stored = [numpy_helper.to_array(tensor) for tensor in onnx.load(full / "model.onnx").graph.initializer]
    matrices = [array for array in stored if array.ndim == 2 and (array == 0).mean() > 0.5]
    assert sum(array.size for array in matrices) == result.subject.linear_parameters
    kept = sum(int((array != 0).sum()) for array in matrices) / result.subject.linear_parameters
    assert 0.15 < kept <= 0.2, "zeros stay zeros, and a few small weights are rounded to zero"
    weights_saved = result.subject.linear_parameters * (8 - packed_bits(8, 0.2)) / 8e6
    assert size_mb(full) - size_mb(packed) > 0.95 * weights_saved
    assert (logits(packed) == logits(full)).all()

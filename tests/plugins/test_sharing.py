"""Sharing: groups, alignment, common weights, tying and recovery, and what is left of it on disk."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from compress_search_plugins import sharing
from compress_search_plugins.alignment import align, head_vectors, matching, neuron_vectors
from compress_search_plugins.quantization import Quantization
from compress_search_plugins.sharing import INITS, MODES, Sharing
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from torch import Tensor, nn

from compress_search import Candidate, Subject
from compress_search.encoders import (
    describe,
    layers,
    load,
    parts,
    prune_heads,
    prune_neurons,
    read_features,
    save,
    share_parts,
    subject_of,
)
from compress_search.runtimes import load_runner, size_mb
from compress_search.runtimes.lowering import lower
from compress_search.space import active, defaults, fix_experts
from compress_search.testing import TinyContext, tiny_batches, tiny_candidate, tiny_context
from tests.quantized import operators

FAMILIES = ("bert", "distilbert", "roberta", "electra")
BASE = Subject("bert", "text-classification", 12, 12, 64, 768, 3072, 30522, 512, 2, 2)
EVERYTHING = MODES["all"]
MEAN = {"convert_init": "average"}
DRAWN = {**MEAN, "tie_warmup": 0.5}


def parameters(subject: Subject, **changes: Any) -> dict[str, Any]:
    """The method's defaults with some values changed, active ones only, made effective."""
    space = Sharing().search_space(subject)
    wanted = {name: dim.default for name, dim in space.items()} | changes
    chosen: dict[str, Any] = {n: v for n, v in wanted.items() if active(space[n], wanted)}
    return dict(Sharing().effective(subject, chosen))


def shared(candidate: Candidate, context: TinyContext | None = None, **changes: Any) -> Candidate:
    params = parameters(candidate.subject, **changes)
    return Sharing().apply(candidate, params, context or tiny_context(candidate))


def inputs(candidate: Candidate, seed: int = 0) -> dict[str, Tensor]:
    batch = next(tiny_batches(candidate, seed=seed))
    return {name: batch[name] for name in candidate.tokenizer.model_input_names}


def logits(candidate: Candidate, network: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = network(**inputs(candidate)).logits
    return found


def noisy(family: str = "bert", **sizes: int) -> Candidate:
    """No two tensors alike, biases and norms included."""
    candidate = tiny_candidate(family, **sizes)
    generator = torch.Generator().manual_seed(1)
    for parameter in candidate.network.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return candidate


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


# Groups


def test_groups_are_the_consecutive_ones_of_albert() -> None:
    assert sharing.group_counts(12) == [1, 2, 3, 4, 6]
    assert sharing.groups_of(12, 3) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert [sharing.middle(group) for group in ([0], [0, 1], [4, 5, 6], [4, 5, 6, 7])] == [0, 0, 5, 5]


@given(st.integers(2, 24), st.integers(1, 24), st.sampled_from(sorted(MODES)))
@settings(deadline=None)
def test_groups_asked_for_become_groups_that_fit(depth: int, asked: int, mode: str) -> None:
    subject = BASE.having(layers=depth)
    params = Sharing().effective(subject, parameters(BASE) | {"groups": asked, "mode": mode})
    count = int(params["groups"])
    assert count <= asked
    assert depth % count == 0
    assert count < depth
    after = Sharing().after(subject, params)
    assert {after.attention_sets, after.ffn_sets} <= {0, count}
    assert after.encoder_parameters < subject.encoder_parameters
    assert after.macs(64) == subject.macs(64)


@pytest.mark.parametrize(("mode", "millions"), [("all", 31.515648), ("attention", 83.479296), ("ffn", 57.518592)])
def test_sizes_of_bert_base_are_those_of_the_albert_table(mode: str, millions: float) -> None:
    after = Sharing().after(BASE, parameters(BASE, mode=mode))
    assert after.parameters - 2 * 769 == round(millions * 1e6)


def test_twelve_layers_on_one_set_are_a_twelfth() -> None:
    for groups in (1, 2, 3, 4, 6):
        after = Sharing().after(BASE, parameters(BASE, groups=groups))
        assert after.encoder_parameters * 12 == BASE.encoder_parameters * groups


def test_a_search_decides_on_what_is_shared_and_by_how_many() -> None:
    space = fix_experts(Sharing().search_space(BASE))
    assert {name for name, dim in space.items() if not dim.fixed} == {"mode", "groups"}


@pytest.mark.parametrize(
    ("subject", "reason"),
    [
        (BASE.having(layers=1), "1 layer has no other to share with"),
        (BASE.having("shared"), "its layers share weights already"),
        (BASE.having("non-uniform"), "its layers differ in shape"),
    ],
)
def test_what_cannot_be_shared_is_said(subject: Subject, reason: str) -> None:
    assert Sharing().unsupported(subject) == reason
    assert Sharing().unsupported(BASE) is None


# Alignment


@given(st.permutations(range(7)), st.integers(0, 5))
@settings(deadline=None)
def test_matching_undoes_a_permutation(order: list[int], seed: int) -> None:
    reference = torch.randn(7, 5, generator=torch.Generator().manual_seed(seed))
    ours = reference[torch.tensor(order)] + 1e-3
    assert torch.equal(torch.tensor(order)[matching(ours, reference)], torch.arange(7))


@given(st.integers(0, 200))
@settings(max_examples=30, deadline=None)
def test_no_order_lies_nearer_than_the_matching(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ours, reference = torch.randn(2, 4, 3, generator=generator)
    best = (ours[matching(ours, reference)] - reference).square().sum()
    others = [(ours[torch.randperm(4, generator=generator)] - reference).square().sum() for _ in range(24)]
    assert best <= min(others) + 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_aligning_changes_no_output_and_brings_layers_nearer(family: str) -> None:
    candidate = noisy(family)
    network = candidate.copy().network

    def distances() -> list[float]:
        found = [parts(layer) for layer in layers(network)]
        return [
            float((vectors(found[layer]) - vectors(found[1])).square().sum())
            for layer in (0, 2, 3)
            for vectors in (head_vectors, neuron_vectors)
        ]

    before = distances()
    for layer in (0, 2, 3):
        align(network, layer, 1)
    torch.testing.assert_close(logits(candidate, network), logits(candidate, candidate.network), atol=1e-5, rtol=0)
    assert all(after < earlier for after, earlier in zip(distances(), before, strict=True))


def test_a_reordered_copy_of_a_layer_is_brought_back_to_the_bit() -> None:
    network = noisy().network
    layers(network)[2].load_state_dict(layers(network)[1].state_dict())
    prune_heads(network, {2: [3, 1, 0, 2]})
    prune_neurons(network, {2: torch.randperm(64, generator=torch.Generator().manual_seed(0)).tolist()})
    align(network, 2, 1)
    for ours, theirs in zip(layers(network)[2].parameters(), layers(network)[1].parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_only_layers_of_one_shape_have_a_common_order() -> None:
    network = tiny_candidate().network
    prune_neurons(network, {0: range(9)})
    align(network, 0, 1, neurons=False)
    with pytest.raises(ValueError, match="layers 0 and 1 differ in shape"):
        align(network, 0, 1)


# Common weights


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", MODES)
def test_means_are_means_and_the_rest_stays(family: str, mode: str) -> None:
    candidate = noisy(family)
    network = candidate.copy().network
    sharing.tie_means(network, MODES[mode], sharing.groups_of(4, 2))
    for index, layer in enumerate(layers(network)):
        group = [0, 1] if index < 2 else [2, 3]
        for name in EVERYTHING:
            originals = [getattr(parts(layers(candidate.network)[i]), name).weight for i in group]
            own = originals[group.index(index)]
            expected = torch.stack(originals).mean(0) if name in MODES[mode] else own
            assert torch.equal(getattr(parts(layer), name).weight, expected)


@pytest.mark.parametrize("init", INITS)
def test_sharing_equal_layers_changes_no_output(init: str) -> None:
    candidate = noisy()
    for layer in layers(candidate.network)[1:]:
        layer.load_state_dict(layers(candidate.network)[0].state_dict())
    for groups in (1, 2):
        result = shared(candidate, convert_init=init, recover="none", groups=groups, calib_examples=16)
        torch.testing.assert_close(
            logits(candidate, result.network), logits(candidate, candidate.network), atol=1e-6, rtol=0
        )


@pytest.mark.parametrize(("init", "sources"), [("first", (0, 2)), ("last", (1, 3)), ("middle", (0, 2))])
def test_a_named_layer_gives_its_weights(init: str, sources: tuple[int, int]) -> None:
    candidate = noisy()
    result = shared(candidate, convert_init=init, recover="none", groups=2)
    for index, layer in enumerate(layers(result.network)):
        source = layers(candidate.network)[sources[index // 2]]
        assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), source.parameters(), strict=True))


def test_best_of_takes_the_layers_with_the_least_loss() -> None:
    candidate = noisy()
    context, batch = tiny_context(candidate), next(tiny_batches(candidate))

    def loss(network: nn.Module) -> float:
        return context.task_loss(network, batch).item()

    losses: dict[int, float] = {}
    for layer in range(4):
        repeated = candidate.copy().network
        share_parts(repeated, EVERYTHING, dict.fromkeys(range(4), layer))
        losses[layer] = loss(repeated)
    found = sharing.best_sources(candidate.network, EVERYTHING, [range(4)], loss)
    assert len(set(losses.values())) == 4
    assert set(found.values()) == {min(losses, key=losses.__getitem__)}


def test_best_of_decides_for_one_group_after_the_other() -> None:
    asked: list[list[int]] = []
    network = noisy().network
    first = [id(parts(layer).query) for layer in layers(network)]
    for position, layer in enumerate(layers(network)):
        layer.position = position
        parts(layer).query.origin = position

    def loss(trial: nn.Module) -> float:
        asked.append([int(parts(layer).query.origin) for layer in layers(trial)])  # type: ignore[arg-type]
        return float(-sum(asked[-1]))

    found = sharing.best_sources(network, EVERYTHING, [[0, 1], [2, 3]], loss)
    assert asked == [[0, 0, 2, 3], [1, 1, 2, 3], [1, 1, 2, 2], [1, 1, 3, 3]]
    assert found == {0: 1, 1: 1, 2: 3, 3: 3}
    assert [id(parts(layer).query) for layer in layers(network)] == first, "the network itself is left alone"


def test_best_of_scores_on_the_calibration_examples() -> None:
    candidate = noisy()
    context = tiny_context(candidate)
    seen: list[int] = []
    calibration = context.calibration

    def counting(examples: int, batch_size: int = 32) -> Iterator[dict[str, Tensor]]:
        seen.append(examples)
        return calibration(64, batch_size)

    context.calibration = counting  # type: ignore[method-assign]
    shared(candidate, context, convert_init="best_of", recover="none")
    assert seen == [512] * 4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("groups", [1, 2])
def test_the_promise_is_what_the_network_holds(family: str, mode: str, groups: int) -> None:
    candidate = tiny_candidate(family, "token-classification")
    for own_norms in (False, True) if mode == "all" else (False,):
        result = shared(candidate, mode=mode, groups=groups, share_layernorm=not own_norms, recover="none")
        measured = subject_of(result.network, "token-classification")
        assert measured.having("lossy") == result.subject
        assert result.subject.parameters == count(result.network)
        named = "up" if mode == "ffn" else "query"
        assert len({id(getattr(parts(layer), named)) for layer in layers(result.network)}) == groups
        norms = {id(parts(layer).output_norm) for layer in layers(result.network)}
        assert len(norms) == (4 if own_norms or mode == "attention" else groups)


@pytest.mark.parametrize("heads", [[], [1, 3]])
def test_layers_that_were_cut_alike_share_what_is_left(heads: list[int], tmp_path: Path) -> None:
    candidate = noisy()
    prune_heads(candidate.network, dict.fromkeys(range(4), heads))
    prune_neurons(candidate.network, dict.fromkeys(range(4), range(10)))
    candidate = candidate.replace(subject=subject_of(candidate.network, "text-classification"))
    result = shared(candidate)
    assert result.subject == subject_of(result.network, "text-classification").having("lossy")
    assert result.subject.parameters == count(result.network)
    save(result.network, result.tokenizer, tmp_path)
    assert torch.equal(logits(candidate, load(tmp_path)[0]), logits(candidate, result.network))


# Tying and recovery


def test_disagreement_is_the_sum_of_squares_over_that_of_the_mean() -> None:
    network = noisy().network
    groups = sharing.groups_of(4, 2)
    vectors = [
        torch.cat([p.flatten() for name in MODES["ffn"] for p in getattr(parts(layer), name).parameters()])
        for layer in layers(network)
    ]
    expected = 0.0
    for a, b in groups:
        mean = (vectors[a] + vectors[b]) / 2
        apart = sum((vectors[i] - mean).square().sum().item() for i in (a, b))
        expected += apart / mean.square().sum().item() / 2
    assert sharing.disagreement(network, MODES["ffn"], groups).item() == pytest.approx(expected, rel=1e-5)
    sharing.tie_means(network, MODES["ffn"], groups)
    assert sharing.disagreement(network, MODES["ffn"], groups) == 0


def test_the_penalty_draws_layers_to_their_mean_and_nothing_else() -> None:
    network = noisy().network
    groups = [range(4)]
    before = sharing.disagreement(network, MODES["attention"], groups)
    before.backward()
    query = [parts(layer).query.weight for layer in layers(network)]
    mean = torch.stack(list(query)).mean(0)
    for weight in query:
        assert weight.grad is not None
        angle = torch.cosine_similarity(weight.grad.flatten(), (weight - mean).flatten(), dim=0)
        assert angle.item() == pytest.approx(1, abs=1e-5)
    assert all(parts(layer).up.weight.grad is None for layer in layers(network))


class Watching(TinyContext):
    """Notes how each call of fit was made, and how far apart the layers were when it ended."""

    def fit(self, network: nn.Module, **options: Any) -> None:
        super().fit(network, **options)
        apart = sharing.disagreement(network, EVERYTHING, sharing.groups_of(4, 2)).item()
        self.__dict__.setdefault("calls", []).append(options | {"apart": apart})


def watching(candidate: Candidate, tmp_path: Path, steps: int = 6) -> Watching:
    return Watching(candidate, tmp_path, steps=steps)


def test_layers_are_tied_in_the_middle(tmp_path: Path) -> None:
    candidate = tiny_candidate()
    context = watching(candidate, tmp_path)
    shared(candidate, context, groups=2, learning_rate=1e-3, **DRAWN)
    first, second = context.__dict__["calls"]
    assert (first["share"], second["share"]) == (0.5, 0.5)
    assert (first["scored"], second.get("scored", True)) == (False, True)
    assert first["learning_rate"] == second["learning_rate"] == 1e-3
    assert first["apart"] > 0 == second["apart"]


def test_what_layers_share_learns_slower_and_what_each_has_alone_does_not(tmp_path: Path) -> None:
    candidate = tiny_candidate()
    context = watching(candidate, tmp_path)
    result = shared(candidate, context, groups=2, mode="attention", learning_rate=1e-3)
    *apart, group = context.__dict__["calls"][-1]["parameters"]
    assert group.learning_rate == pytest.approx(1e-3 / math.sqrt(2))
    for layer in layers(result.network):
        assert parts(layer).query.weight in set(group.parameters)
        assert parts(layer).up.weight in set(apart)
    assert len(apart) + len(group.parameters) == len(list(result.network.parameters()))


def test_a_stronger_penalty_leaves_layers_nearer(tmp_path: Path) -> None:
    candidate, apart = tiny_candidate(), []
    for penalty in (0.01, 10.0):
        context = watching(candidate, tmp_path, steps=20)
        shared(candidate, context, groups=2, tie_penalty=penalty, recover="kd", learning_rate=5e-3, **DRAWN)
        apart.append(context.__dict__["calls"][0]["apart"])
    assert apart[1] < 0.9 * apart[0]


@pytest.mark.parametrize("changes", [{}, MEAN, {**DRAWN, "convert_init": "first"}])
def test_without_a_warm_up_layers_are_tied_cold(changes: dict[str, Any], tmp_path: Path) -> None:
    candidate = tiny_candidate()
    context = watching(candidate, tmp_path)
    shared(candidate, context, groups=2, **changes)
    (only,) = context.__dict__["calls"]
    assert (only["share"], only["apart"]) == (1.0, 0.0)
    assert "tie_penalty" not in parameters(candidate.subject, **changes)


def test_recovery_learns_the_hidden_states_of_the_network_before() -> None:
    candidate = tiny_candidate(layers=2)
    batch = next(tiny_batches(candidate, seed=5))
    names = ["hidden.1", "hidden.2"]

    def distance(**changes: Any) -> float:
        result = shared(candidate, tiny_context(candidate, steps=60), learning_rate=3e-3, **changes)
        with torch.no_grad():
            ours, theirs = (read_features(n, batch, names) for n in (result.network, candidate.network))
        return float(sum((ours[name] - theirs[name]).square().mean() for name in names))

    assert distance(recover="layer_match", hidden_weight=10.0) < 0.5 * distance(recover="none")


def test_recovery_is_left_to_others_where_it_is_not_wanted() -> None:
    candidate = tiny_candidate()
    params = parameters(candidate.subject, recover="none")
    assert not Sharing().trains(params)
    assert not {"learning_rate", "tie_warmup", "tie_penalty", "hidden_weight"} & set(params)
    context = tiny_context(candidate)
    Sharing().apply(candidate, params, context)
    assert context.fits == []


# Files


def artifact(candidate: Candidate, tmp_path: Path, **quantize: Any) -> tuple[Candidate, Path]:
    context = tiny_context(candidate)
    if quantize:
        space = Quantization().search_space(candidate.subject)
        wanted = Quantization().effective(candidate.subject, defaults(space) | quantize)
        candidate = Quantization().apply(candidate, wanted, context)
    lower(candidate, tmp_path / "artifact", context.task)
    return candidate, tmp_path / "artifact"


@pytest.mark.parametrize("mode", MODES)
def test_files_hold_each_shared_weight_once(mode: str, tmp_path: Path) -> None:
    candidate = noisy(layers=6, hidden=64, intermediate=128)
    result = shared(candidate, mode=mode, groups=2, recover="none")
    found, directory = artifact(result, tmp_path)
    weights = directory / "weights" / "model.safetensors"
    assert weights.stat().st_size / 1e6 == pytest.approx(found.subject.megabytes, rel=0.04)
    model = onnx.load(directory / "model.onnx")
    stored = sum(numpy_helper.to_array(tensor).nbytes for tensor in model.graph.initializer)
    assert stored / 1e6 == pytest.approx(found.subject.megabytes, rel=0.02)
    feed = {name: value.numpy() for name, value in inputs(candidate).items()}
    np.testing.assert_allclose(load_runner(directory, 1)(feed), logits(candidate, result.network), atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_integer_kernels_find_the_shared_weights(mode: str, tmp_path: Path) -> None:
    candidate = noisy(layers=6, hidden=64, intermediate=128)
    found, directory = artifact(
        shared(candidate, mode=mode, groups=2, recover="none"),
        tmp_path,
        weight_bits=8,
        scheme="dynamic_int8",
        embedding_bits=8,
    )
    model = onnx.load(directory / "model.onnx")
    assert operators(model)["MatMulInteger"] == 6 * 6 + 2
    tensors = [numpy_helper.to_array(tensor) for tensor in model.graph.initializer]
    assert sum(value.nbytes for value in tensors) / 1e6 == pytest.approx(found.subject.megabytes, rel=0.02)
    assert size_mb(directory) < found.subject.megabytes + 0.2


def test_a_trained_shared_network_reloads_as_it_was(tmp_path: Path) -> None:
    candidate = tiny_candidate("distilbert")
    result = shared(candidate)
    save(result.network, result.tokenizer, tmp_path)
    network, _ = load(tmp_path)
    assert torch.equal(logits(candidate, network), logits(candidate, result.network))
    assert describe(network) == describe(result.network)
    assert [id(parts(layer).up) for layer in layers(network)] == [id(parts(layers(network)[0]).up)] * 4

"""The factored word table: the best of its rank, exact at full rank, smaller or refused, and recovered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from compress_search_plugins.distillation.imitation import hidden_distance, imitation_loss
from compress_search_plugins.distillation.soft_targets import soft_target_loss
from compress_search_plugins.embedding_factorization import (
    SIZES,
    EmbeddingFactorization,
    break_even,
    factorize,
    factorize_words,
    token_counts,
)
from compress_search_plugins.quantization import Quantization
from compress_search_plugins.sharing import Sharing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from compress_search import Candidate, Recipe, Step, Subject, TrialError
from compress_search.encoders import (
    FactoredEmbedding,
    embeddings,
    prune_neurons,
    read_features,
    subject_of,
)
from compress_search.recipe import settle
from compress_search.runtimes import load_runner
from compress_search.runtimes.lowering import lower
from compress_search.space import active, defaults, fix_experts
from compress_search.testing import tiny_batches, tiny_candidate, tiny_context
from tests.quantized import operators

FAMILIES = ("bert", "distilbert", "roberta", "electra")
BASE = Subject("bert", "text-classification", 12, 12, 64, 768, 3072, 30522, 512, 2, 2)
METHOD = EmbeddingFactorization()
seeds = st.integers(0, 1000)


def parameters(subject: Subject, **changes: Any) -> dict[str, Any]:
    """The method's defaults with some values changed, active ones only, made effective."""
    space = METHOD.search_space(subject)
    wanted = {name: dim.default for name, dim in space.items()} | changes
    return dict(METHOD.effective(subject, {n: v for n, v in wanted.items() if active(space[n], wanted)}))


def table(seed: int, rows: int = 40, width: int = 12) -> Tensor:
    """With a spectrum that falls, as that of a trained table does."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator) * torch.linspace(2, 0.1, width)


def counts(seed: int, rows: int = 40) -> Tensor:
    return torch.rand(rows, generator=torch.Generator().manual_seed(seed + 1)).double() ** 4 * 100


def inputs(candidate: Candidate) -> dict[str, Tensor]:
    batch = next(tiny_batches(candidate))
    return {name: batch[name] for name in candidate.tokenizer.model_input_names}


def logits(candidate: Candidate, network: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = network(**inputs(candidate)).logits
    return found


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


# The decomposition


@given(seeds, st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_what_is_lost_is_the_rest_of_the_spectrum(seed: int, rank: int) -> None:
    whole = table(seed)
    rows, projection = factorize(whole, rank)
    assert (rows.shape, projection.shape) == ((40, rank), (12, rank))
    torch.testing.assert_close(projection.T @ projection, torch.eye(rank), atol=1e-5, rtol=0)
    lost = (whole - rows @ projection.T).double().square().sum()
    rest = torch.linalg.svdvals(whole.double())[rank:].square().sum()
    assert float(lost) == pytest.approx(float(rest), rel=1e-5, abs=1e-8)


@given(seeds, st.integers(1, 11))
@settings(max_examples=40, deadline=None)
def test_weights_move_the_loss_to_the_rows_that_count_less(seed: int, rank: int) -> None:
    whole, weights = table(seed), counts(seed)

    def lost(by: Tensor | None, of: Tensor) -> float:
        rows, projection = factorize(whole, rank, by)
        return float((of * (whole - rows @ projection.T).double().square().sum(1)).sum())

    even = torch.ones(40, dtype=torch.double)
    assert lost(weights, weights) <= lost(None, weights) * (1 + 1e-5)
    assert lost(None, even) <= lost(weights, even) * (1 + 1e-5)
    scaled = torch.linalg.svdvals(whole.double() * weights.sqrt()[:, None])[rank:].square().sum()
    assert lost(weights, weights) == pytest.approx(float(scaled), rel=1e-4, abs=1e-8)


def test_more_ranks_lose_less_and_all_of_them_nothing() -> None:
    whole = table(0)
    lost = []
    for rank in range(1, 13):
        rows, projection = factorize(whole, rank)
        lost.append(float((whole - rows @ projection.T).square().sum()))
    assert lost[-1] < 1e-8
    assert lost == sorted(lost, reverse=True)


@pytest.mark.parametrize("rank", [0, 13, -1])
def test_a_table_has_no_other_ranks(rank: int) -> None:
    with pytest.raises(TrialError, match=rf"a table of shape \(40, 12\) has no rank {rank}: expected 1 to 12"):
        factorize(table(0), rank)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("weighted", [False, True])
def test_at_full_rank_the_network_computes_the_same(family: str, weighted: bool) -> None:
    candidate = tiny_candidate(family)
    network = candidate.copy().network
    factorize_words(network, 32, counts(0, rows=len(candidate.tokenizer)) if weighted else None)
    assert isinstance(embeddings(network).word_embeddings, FactoredEmbedding)
    torch.testing.assert_close(logits(candidate, network), logits(candidate, candidate.network), atol=1e-4, rtol=0)


def test_tokens_are_counted_where_there_is_no_padding() -> None:
    batch = {
        "input_ids": torch.tensor([[3, 1, 1], [3, 4, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
    }
    assert token_counts([batch, batch], 6).tolist() == [1, 5, 1, 5, 3, 1]


# What it promises


def test_sizes_of_bert_base() -> None:
    after = METHOD.after(BASE, parameters(BASE))
    assert after.word_rank == 128
    assert BASE.parameters - after.parameters == 30522 * 768 - 128 * (30522 + 768)
    assert after.macs(128) == BASE.macs(128)
    # ALBERT keeps its other tables as narrow, and so has 514·(768 − 128) fewer weights in them
    assert after.embedding_parameters == 128 * (30522 + 768) + 514 * 768 + 2 * 768


def test_only_ranks_that_save_something_are_offered() -> None:
    assert break_even(BASE) == pytest.approx(749.15, abs=0.01)
    assert METHOD.search_space(BASE)["embedding_size"].describe() == "one of 16, 32, 64, 96, 128, 192, 256"
    narrow = BASE.having(hidden=100)
    assert METHOD.search_space(narrow)["embedding_size"].describe() == "one of 16, 32, 64, 96"
    assert parameters(narrow)["embedding_size"] == 96
    for hidden in (100, 768):
        for size in SIZES:
            subject = BASE.having(hidden=hidden)
            if size < break_even(subject):
                smaller = METHOD.after(subject, {"embedding_size": size})
                assert smaller.parameters < subject.parameters


def test_a_rank_that_saves_nothing_is_refused() -> None:
    with pytest.raises(TrialError, match="embedding_size 768 saves nothing: expected a rank from 1 to 749"):
        METHOD.after(BASE, {"embedding_size": 768})
    with pytest.raises(TrialError, match="embedding_size 0 saves nothing"):
        METHOD.after(BASE, {"embedding_size": 0})
    candidate = tiny_candidate()
    assert candidate.subject.hidden == 32
    with pytest.raises(TrialError, match="embedding_size 32 saves nothing: expected a rank from 1 to 2"):
        METHOD.apply(candidate, {"embedding_size": 32}, tiny_context(candidate))


def test_a_rank_follows_the_model_that_an_earlier_step_left() -> None:
    narrow = BASE.having(hidden=64)
    assert METHOD.effective(narrow, parameters(BASE, embedding_size=256))["embedding_size"] == 32
    assert METHOD.unsupported(BASE) is None
    assert METHOD.unsupported(BASE.having(word_rank=64)) == "its word table is factored already, with rank 64"
    assert METHOD.unsupported(BASE.having(hidden=16)) == (
        "factors of rank 16 or more are no smaller than its word table"
    )


def test_a_search_decides_on_rank_and_weighting() -> None:
    space = fix_experts(METHOD.search_space(BASE))
    assert {name for name, dim in space.items() if not dim.fixed} == {"embedding_size", "embedding_init"}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_promise_is_what_the_network_holds(family: str) -> None:
    candidate = tiny_candidate(family)
    params = parameters(candidate.subject, recover="none")
    result = METHOD.apply(candidate, params, tiny_context(candidate))
    assert subject_of(result.network, "text-classification").having("lossy") == result.subject
    assert result.subject == METHOD.after(candidate.subject, params)
    assert result.subject.parameters == count(result.network)


def test_a_narrow_electra_keeps_its_own_projection() -> None:
    from transformers import ElectraConfig, ElectraForSequenceClassification

    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2}
    config = ElectraConfig(vocab_size=200, embedding_size=32, num_attention_heads=4, **sizes)
    network = ElectraForSequenceClassification(config).eval()
    before = subject_of(network, "text-classification")
    factorize_words(network, 16)
    after = subject_of(network, "text-classification")
    assert METHOD.after(before, {"embedding_size": 16}) == after.having("lossy")
    assert after.parameters == count(network) == before.parameters - 200 * 32 + 16 * 232


# Recovery


def embedding_distance(network: nn.Module, candidate: Candidate) -> float:
    batch = next(tiny_batches(candidate, seed=5))
    with torch.no_grad():
        ours, theirs = (read_features(each, batch, ["hidden.0"]) for each in (network, candidate.network))
    return float(hidden_distance(ours, theirs, batch["attention_mask"]))


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_imitation_brings_lost_embeddings_back(family: str) -> None:
    candidate = tiny_candidate(family, layers=1)
    network = candidate.copy().network
    factorize_words(network, 23)
    nn.init.normal_(embeddings(network).word_embeddings.projection.weight, std=0.2)
    lost, context = embedding_distance(network, candidate), tiny_context(candidate, steps=80)
    loss = imitation_loss(context, "text-classification", context.teacher, ["hidden.0"], weight=10.0)
    context.fit(network, loss=loss, learning_rate=2e-2)
    assert embedding_distance(network, candidate) < 0.5 * lost


def test_a_network_that_is_the_original_has_nothing_to_imitate() -> None:
    candidate = tiny_candidate(layers=1)
    context, batch = tiny_context(candidate), next(tiny_batches(candidate))
    alone, imitating = (
        loss(candidate.network, batch).item()
        for loss in (
            soft_target_loss(context, "text-classification"),
            imitation_loss(context, "text-classification", context.teacher, ["hidden.0", "hidden.1"], 10.0),
        )
    )
    assert imitating == alone


def test_padding_and_scale_of_hidden_distances() -> None:
    mask = torch.tensor([[1, 1, 0]])
    ours = {"a": torch.ones(1, 3, 4), "b": torch.zeros(1, 3, 4)}
    theirs = {"a": torch.tensor([2.0, 3.0, 99.0]).expand(4, 3).T[None], "b": torch.zeros(1, 3, 4)}
    assert float(hidden_distance(ours, theirs, mask)) == pytest.approx((1 + 4) / 2 / 2)


def test_frequencies_come_from_the_calibration_examples() -> None:
    candidate = tiny_candidate()
    results = [
        METHOD.apply(
            candidate,
            parameters(candidate.subject, embedding_init=init, recover="none", calib_examples=512),
            tiny_context(candidate),
        )
        for init in ("svd", "weighted_svd")
    ]
    whole = embeddings(candidate.network).word_embeddings.weight.detach()
    weights = token_counts(tiny_context(candidate).calibration(512), len(whole))
    errors = []
    for result in results:
        words = embeddings(result.network).word_embeddings(torch.arange(len(whole))).detach()
        errors.append(float((weights * (words - whole).square().sum(1)).sum()))
    assert errors[1] < errors[0]


def test_a_table_of_fewer_rows_than_are_known_of_is_weighed_by_its_own() -> None:
    candidate = tiny_candidate()
    rows = candidate.subject.vocabulary
    bound = candidate.replace(subject=candidate.subject.having("data-sized", vocabulary=rows + 10))
    chosen = parameters(bound.subject, embedding_init="weighted_svd", recover="none", calib_examples=512)
    words = embeddings(METHOD.apply(bound, chosen, tiny_context(candidate)).network).word_embeddings
    exact = embeddings(METHOD.apply(candidate, chosen, tiny_context(candidate)).network).word_embeddings
    torch.testing.assert_close(words(torch.arange(rows)), exact(torch.arange(rows)))


# Files and company


@pytest.mark.parametrize("bits", [8, 4])
def test_the_closed_form_predicts_the_bytes(bits: int, tmp_path: Path) -> None:
    candidate = tiny_candidate("bert", layers=2, hidden=64, intermediate=128)
    generator = torch.Generator().manual_seed(1)
    for parameter in candidate.network.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    context = tiny_context(candidate)
    factored = METHOD.apply(candidate, parameters(candidate.subject, recover="none", embedding_size=32), context)
    space = Quantization().search_space(factored.subject)
    wanted = {"weight_bits": bits, "embedding_bits": bits, "group_size": 32}
    params = {n: v for n, v in (defaults(space) | wanted).items() if active(space[n], defaults(space) | wanted)}
    candidate = Quantization().apply(factored, Quantization().effective(factored.subject, params), context)
    lower(candidate, tmp_path / "artifact", context.task)
    model = onnx.load(tmp_path / "artifact" / "model.onnx")
    kinds = operators(model)
    assert kinds["MatMulInteger"] + kinds["MatMulNBits"] == 6 * 2 + 2 + 1, "the projection is quantized too"
    # two 4-bit values are one byte in the file, and two in an array
    stored = sum(len(tensor.raw_data) or len(tensor.float_data) * 4 for tensor in model.graph.initializer)
    assert stored / 1e6 == pytest.approx(candidate.subject.megabytes, rel=0.03)


def test_shared_layers_and_a_factored_table_run_as_one_file(tmp_path: Path) -> None:
    candidate = tiny_candidate("bert")
    context = tiny_context(candidate)
    for method in (Sharing(), METHOD):
        params = method.effective(candidate.subject, defaults(method.search_space(candidate.subject)))
        candidate = method.apply(candidate, params, context)
    assert candidate.subject == subject_of(candidate.network, "text-classification").having("lossy")
    assert candidate.subject.parameters == count(candidate.network)
    lower(candidate, tmp_path / "artifact", context.task)
    feed = {name: value.numpy() for name, value in inputs(candidate).items()}
    found = load_runner(tmp_path / "artifact", 1)(feed)
    np.testing.assert_allclose(found, logits(candidate, candidate.network), atol=1e-4)


def test_layers_of_unequal_shapes_do_not_matter() -> None:
    candidate = tiny_candidate()
    prune_neurons(candidate.network, {0: range(9)})
    candidate = candidate.replace(subject=subject_of(candidate.network, "text-classification"))
    result = METHOD.apply(candidate, parameters(candidate.subject), tiny_context(candidate))
    assert result.subject.traits == {"non-uniform", "lossy"}


def test_both_take_their_place_in_a_recipe() -> None:
    methods = {"embedding_factorization": METHOD, "quantization": Quantization(), "sharing": Sharing()}
    steps = [
        Step.of(name, methods[name].effective(BASE, defaults(methods[name].search_space(BASE))))
        for name in sorted(methods)
    ]
    settled, subject = settle(Recipe(tuple(steps)), methods, BASE)
    assert settled.methods == ("sharing", "embedding_factorization", "quantization")
    # 7,087,872 in the layers, 4,398,336 in the embeddings, 592,130 in the head, at about a byte each
    assert subject.parameters == 7_087_872 + 128 * (30522 + 768) + 516 * 768 + 592_130
    assert subject.megabytes == pytest.approx(12.2, abs=0.3)

"""Recurrent students: what they take from the teacher, what padding may not change, and how they travel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compress_search_plugins import bilstm
from compress_search_plugins.bilstm import BiLstm
from torch import Tensor

from compress_search import Candidate, TrialError
from compress_search.encoders import (
    describe,
    embeddings,
    keep_tokens,
    layers,
    load_network,
    save,
    shape_key,
    subject_of,
)
from compress_search.losses import kl, mse_logits
from compress_search.registry import Registry
from compress_search.runtimes import load_runner
from compress_search.runtimes.lowering import lower
from compress_search.space import active, defaults
from compress_search.testing import tiny_batches, tiny_candidate, tiny_context
from compress_search.training import forward

TASKS = ("text-classification", "text-regression", "token-classification")
every_cell_and_task = pytest.mark.parametrize(
    ("cell", "task", "layers"),
    [
        ("lstm", TASKS[0], 1),
        ("gru", TASKS[1], 2),
        ("lstm", TASKS[2], 2),
        ("gru", TASKS[0], 1),
        ("gru", TASKS[2], 1),
    ],
)


def parameters(candidate: Candidate, **changes: Any) -> dict[str, Any]:
    space = BiLstm().search_space(candidate.subject)
    params = defaults(space) | {"units": 32} | changes
    return {name: value for name, value in params.items() if active(space[name], params)}


def student(task: str = TASKS[0], family: str = "bert", *, dry: bool = True, **changes: Any) -> Candidate:
    candidate = tiny_candidate(family, task)
    return BiLstm().apply(candidate, parameters(candidate, **changes), tiny_context(candidate, dry=dry))


def logits(candidate: Candidate, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return forward(candidate.network.eval(), batch)


@every_cell_and_task
def test_its_subject_is_what_the_network_is_and_counts_every_weight(cell: str, task: str, layers: int) -> None:
    found = student(task, cell=cell, layers=layers)
    assert found.subject.without("lossy") == subject_of(found.network, task)
    assert found.subject.parameters == sum(p.numel() for p in found.network.parameters())
    assert found.subject.family == f"bi{cell}"


def test_its_work_grows_with_the_length_alone() -> None:
    """One multiplication a token for every weight of the cells, and none for biases and tables."""
    found = student(units=64, layers=2)
    weights = sum(p.numel() for name, p in found.network.named_parameters() if ".weight_" in name)
    assert found.subject.macs(10) == 10 * weights
    assert found.subject.macs(20) == 2 * found.subject.macs(10)


@every_cell_and_task
def test_padding_changes_nothing(cell: str, task: str, layers: int) -> None:
    found = student(task, cell=cell, layers=layers)
    batch = next(tiny_batches(found))
    length = batch["input_ids"].shape[1]
    padded = {name: torch.nn.functional.pad(batch[name], (0, 9), value=3) for name in ("input_ids",)}
    padded["attention_mask"] = torch.nn.functional.pad(batch["attention_mask"], (0, 9))
    short, long = logits(found, batch), logits(found, padded)
    if task == "token-classification":
        real = batch["attention_mask"].bool()
        short, long = short[real], long[:, :length][real]
    torch.testing.assert_close(long, short, rtol=0, atol=1e-6)


def test_a_row_is_what_torchs_own_bidirectional_cell_makes_of_it() -> None:
    found = student("token-classification", units=32, embedding_ratio=1.0)
    network: Any = found.network
    ahead, back = network.ahead[0], network.back[0]
    both = torch.nn.LSTM(32, 32, batch_first=True, bidirectional=True)
    backward = {f"{name}_reverse": value for name, value in back.state_dict().items()}
    both.load_state_dict(ahead.state_dict() | backward)
    batch = next(tiny_batches(found))
    for row in range(3):
        ids = batch["input_ids"][row : row + 1, : int(batch["attention_mask"][row].sum())]
        with torch.no_grad():
            expected = network.classifier(both(network.word_embeddings(ids))[0])
        torch.testing.assert_close(logits(found, batch)[row : row + 1, : ids.shape[1]], expected)


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "electra"])
def test_it_reads_the_teachers_words(family: str) -> None:
    candidate = tiny_candidate(family)
    found = BiLstm().apply(candidate, parameters(candidate, embedding_ratio=1.0), tiny_context(candidate, dry=True))
    table = embeddings(candidate.network).word_embeddings.weight
    assert torch.equal(found.network.word_embeddings.weight, table)  # type: ignore[union-attr]


def test_principal_coordinates_keep_most_of_the_rows() -> None:
    """No other half of the width keeps more of the squared length: the best rank by Eckart and Young."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(200, 16, generator=generator) @ torch.diag(torch.linspace(3, 0.1, 16))
    kept = bilstm.principal(table, 8)
    singular = torch.linalg.svdvals(table)
    assert kept.square().sum().item() == pytest.approx(singular[:8].square().sum().item(), rel=1e-5)
    assert torch.equal(bilstm.principal(table, 16), table)


@pytest.mark.parametrize("task", TASKS)
def test_by_default_the_teachers_logits_are_all_it_learns_from(task: str) -> None:
    candidate = tiny_candidate("bert", task)
    context = tiny_context(candidate)
    asked: list[dict[str, Any]] = []
    context.fit = lambda network, **options: asked.append(options | {"network": network})  # type: ignore[method-assign]
    BiLstm().apply(candidate, parameters(candidate, learning_rate=1e-4, rate_factor=10.0), context)
    batch = next(tiny_batches(candidate))
    said, truth = forward(asked[0]["network"], batch), context.teacher_logits(batch)
    mask = batch["labels"] != -100 if task == "token-classification" else None
    expected = mse_logits(said, truth) if task == "text-regression" else kl(said, truth, 2.0, mask)
    torch.testing.assert_close(asked[0]["loss"](asked[0]["network"], batch), expected)
    assert asked[0]["learning_rate"] == pytest.approx(1e-3)


@pytest.mark.parametrize("frozen", [True, False])
def test_embeddings_learn_unless_they_are_frozen_and_are_free_again_after(frozen: bool) -> None:
    found = student(dry=False, freeze_embeddings=frozen)
    start = student(freeze_embeddings=frozen)
    tables = [each.network.word_embeddings.weight for each in (found, start)]  # type: ignore[union-attr]
    assert torch.equal(*tables) == frozen
    assert tables[0].requires_grad


@every_cell_and_task
def test_it_saves_loads_and_runs_on_onnx_runtime_at_any_shape(
    cell: str, task: str, layers: int, tmp_path: Path
) -> None:
    found = student(task, cell=cell, layers=layers)
    save(found.network, found.tokenizer, tmp_path / "saved")
    loaded = load_network(tmp_path / "saved")
    batch = next(tiny_batches(found))
    assert torch.equal(logits(found.replace(network=loaded), batch), logits(found, batch))
    lower(found, tmp_path / "artifact", tiny_context(found).task)
    run = load_runner(tmp_path / "artifact", threads=1)
    for rows in (8, 3, 1):
        part = {name: tensor[:rows] for name, tensor in batch.items()}
        result = run({name: tensor.numpy() for name, tensor in part.items()})
        np.testing.assert_allclose(result, logits(found, part).numpy(), atol=1e-5)


def test_shapes_that_run_differently_have_keys_of_their_own() -> None:
    changes: list[dict[str, Any]] = [{}, {"cell": "gru"}, {"units": 64}, {"layers": 2}, {"pooling": "mean"}]
    changes.append({"embedding_ratio": 1.0})
    assert len({shape_key(describe(student(**change).network)) for change in changes}) == len(changes)


def test_what_needs_transformer_layers_refuses_it() -> None:
    found = student()
    reasons = {
        "embedding_factorization": "no transformer layers",
        "sharing": "no transformer layers",
        "structured_pruning": "no transformer layers",
        "low_rank": "no transformer layers",
        "unstructured_pruning": "no transformer layers",
        "quantization": "recurrent cells",
    }
    for name, reason in reasons.items():
        assert reason in (Registry()[name].unsupported(found.subject.having("sized")) or ""), name
    with pytest.raises(TrialError, match="family 'recurrent' are not supported"):
        layers(found.network)


def test_a_vocabulary_may_be_smaller_than_the_subject_knows() -> None:
    candidate = tiny_candidate()
    keep_tokens(candidate.network, range(20))
    pruned = candidate.replace(subject=candidate.subject.having("data-sized"))
    found = BiLstm().apply(pruned, parameters(candidate), tiny_context(pruned, dry=True))
    assert found.network.config.vocab_size == len(found.network.word_embeddings.weight) == 20


def test_it_comes_near_its_teacher() -> None:
    candidate = tiny_candidate(layers=2)
    context = tiny_context(candidate, steps=80, batch_size=16)
    batch = next(tiny_batches(candidate, batch_size=128, seed=9))
    params = parameters(candidate, learning_rate=5e-4, soft_loss="mse_logits")
    result = BiLstm().apply(candidate, params, context)
    start = BiLstm().apply(candidate, params, tiny_context(candidate, dry=True))
    truth = logits(candidate, batch)
    after, before = ((logits(each, batch) - truth).square().mean() for each in (result, start))
    assert after < 0.5 * before

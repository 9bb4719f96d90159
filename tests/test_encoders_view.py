"""The view reads the same facts off every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from compress_search import TrialError
from compress_search.encoders import (
    FAMILIES,
    backbone,
    embeddings,
    head,
    inputs,
    layers,
    parts,
    set_attention,
    set_layers,
    subject_of,
)
from compress_search.testing import tiny_batches, tiny_candidate

TASKS = ("text-classification", "token-classification")
every_family = pytest.mark.parametrize("family", FAMILIES)
every_task = pytest.mark.parametrize("task", TASKS)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@every_family
def test_parts_are_the_linears_of_the_layer(family: str) -> None:
    layer = layers(tiny_candidate(family, hidden=32, heads=4, intermediate=48).network)[1]
    found = parts(layer)
    assert (found.heads, found.head_dim, found.neurons) == (4, 8, 48)
    linears = (found.query, found.key, found.value, found.attention_output, found.up, found.down)
    assert {id(m) for m in linears} == {id(m) for m in layer.modules() if isinstance(m, nn.Linear)}
    norms = (found.attention_norm, found.output_norm)
    assert {id(m) for m in norms} == {id(m) for m in layer.modules() if isinstance(m, nn.LayerNorm)}
    assert found.up.weight.shape == (48, 32)
    assert found.down.weight.shape == (32, 48)


@every_family
def test_attention_runs_through_query_and_key(family: str) -> None:
    """With a query of zeros attention is uniform, whatever the keys: the two are what they are called."""
    network = tiny_candidate(family).network
    set_attention(network, "eager")
    for layer in layers(network):
        nn.init.zeros_(parts(layer).query.weight)
        nn.init.zeros_(parts(layer).query.bias)
    batch = next(tiny_batches(tiny_candidate(family), batch_size=1))
    feed = {name: batch[name] for name in batch if name not in ("labels", "index")}
    for probabilities in network(**feed, output_attentions=True).attentions:
        torch.testing.assert_close(probabilities, torch.full_like(probabilities, 1 / probabilities.shape[-1]))


@every_task
@every_family
def test_subject_predicts_the_parameter_count(family: str, task: str) -> None:
    network = tiny_candidate(family, task, layers=3).network
    subject = subject_of(network, task, "cuda")
    assert (subject.family, subject.task, subject.device, subject.layers) == (family, task, "cuda", 3)
    assert subject.parameters == count(network)
    assert subject.head_parameters == sum(map(count, head(network)))
    assert subject.encoder_parameters == count(layers(network))
    assert "non-uniform" not in subject.traits


def test_subject_counts_narrow_embeddings() -> None:
    from transformers import ElectraConfig, ElectraForSequenceClassification

    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = ElectraConfig(vocab_size=50, embedding_size=16, num_attention_heads=4, **sizes)
    network = ElectraForSequenceClassification(config)
    subject = subject_of(network, "text-classification")
    assert subject.embedding_size == 16
    assert subject.parameters == count(network)


@every_family
def test_embeddings_and_backbone(family: str) -> None:
    network = tiny_candidate(family).network
    block = embeddings(network)
    assert isinstance(block.word_embeddings, nn.Embedding)
    assert network.get_input_embeddings() is block.word_embeddings
    assert count(backbone(network)) + count(network.classifier) <= count(network)


def test_inputs_follow_the_segments() -> None:
    assert inputs(tiny_candidate("bert").network) == ("input_ids", "attention_mask", "token_type_ids")
    assert inputs(tiny_candidate("distilbert").network) == ("input_ids", "attention_mask")


class Twice(nn.Module):
    """Called like a layer, without being one."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        once: torch.Tensor = self.layer(hidden_states, *args, **kwargs)
        return torch.as_tensor(self.layer(once, *args, **kwargs))


@every_family
def test_anything_called_like_a_layer_can_stand_in(family: str) -> None:
    candidate = tiny_candidate(family, layers=2)
    network = candidate.network
    feed = {k: v for k, v in next(tiny_batches(candidate)).items() if k not in ("labels", "index")}
    first, second = layers(network)
    set_layers(network, [first, first, second, second])
    expected = network(**feed).logits
    set_layers(network, [Twice(first), Twice(second)])
    assert torch.equal(network(**feed).logits, expected)
    assert network.config.num_hidden_layers == 2
    with pytest.raises(TypeError, match="Twice is no encoder layer"):
        parts(layers(network)[0])


def test_other_families_are_refused_by_name() -> None:
    network = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=10))
    with pytest.raises(TrialError, match="'gpt2' are not supported: expected one of bert"):
        layers(network)

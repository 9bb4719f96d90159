"""Students that are no transformers: word embeddings, a bidirectional LSTM or GRU, and the task's head.

Owns the network and its description; :mod:`compress_search.encoders.manifest` saves and loads it like any other.
It has no transformer layers to be viewed, cut or shared: its subject says so by the trait ``"recurrent"``.

Source: Tang et al. 2019, Distilling Task-Specific Knowledge from BERT into Simple Neural Networks.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import SequenceClassifierOutput, TokenClassifierOutput

from compress_search.candidate import Subject
from compress_search.crf import attach_crf, crf_of

MODEL_TYPE = "recurrent"

Cell = Literal["lstm", "gru"]
Pooling = Literal["max", "mean"]
CELLS: dict[str, type[nn.LSTM] | type[nn.GRU]] = {"lstm": nn.LSTM, "gru": nn.GRU}


class RecurrentConfig(PreTrainedConfig):
    """The shape of a recurrent network; labels are kept as transformers keeps them."""

    model_type = MODEL_TYPE

    def __init__(
        self,
        vocab_size: int = 100,
        embedding_size: int = 32,
        units: int = 32,
        num_layers: int = 1,
        cell: Cell = "lstm",
        pooling: Pooling = "max",
        dropout: float = 0.1,
        **rest: Any,
    ) -> None:
        """``units`` are those of one direction; a token's representation is twice as wide."""
        self.vocab_size, self.embedding_size, self.units = vocab_size, embedding_size, units
        self.num_layers, self.cell, self.pooling, self.dropout = num_layers, cell, pooling, dropout
        super().__init__(**rest)


class Recurrent(nn.Module):
    """Embeddings and both directions of each layer; what follows is the subclass's.

    A direction is a module of its own. The backward one reads each row's real tokens in reverse, so padding, which
    is on the right, changes nothing, and nothing in the graph depends on the lengths of a traced example.
    """

    def __init__(self, config: RecurrentConfig) -> None:
        super().__init__()
        self.config = config
        self.word_embeddings = nn.Embedding(config.vocab_size, config.embedding_size)
        widths = [config.embedding_size] + [2 * config.units] * (config.num_layers - 1)
        self.ahead = nn.ModuleList(self._direction(width) for width in widths)
        self.back = nn.ModuleList(self._direction(width) for width in widths)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(2 * config.units, len(config.id2label or ()))

    def _direction(self, width: int) -> nn.LSTM | nn.GRU:
        return CELLS[self.config.cell](width, self.config.units, batch_first=True)

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Representations (B, S, 2·units) of tokens (B, S), those of padding without meaning."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        lengths = attention_mask.sum(1, keepdim=True)
        reverse = torch.where(positions < lengths, lengths - 1 - positions, positions)
        states: Tensor = self.word_embeddings(input_ids)
        for ahead, back in zip(self.ahead, self.back, strict=True):
            states = self.dropout(states)
            reversed_states = _run(back, _reordered(states, reverse))
            states = torch.cat([_run(ahead, states), _reordered(reversed_states, reverse)], dim=-1)
        return states


class RecurrentForSequenceClassification(Recurrent):
    """One prediction a text, from the largest or the mean value of each channel over its tokens."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Tensor) -> SequenceClassifierOutput:
        """Tokens and mask (B, S) to logits (B, C)."""
        states = self.encode(input_ids, attention_mask)
        real = attention_mask.unsqueeze(-1).to(states.dtype)
        if self.config.pooling == "max":
            pooled = (states * real + (real - 1) * 1e4).amax(1)  # cells put out values in (-1, 1)
        else:
            pooled = (states * real).sum(1) / real.sum(1).clamp(min=1)
        return SequenceClassifierOutput(logits=self.classifier(self.dropout(pooled)))


class RecurrentForTokenClassification(Recurrent):
    """One prediction a token."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Tensor) -> TokenClassifierOutput:
        """Tokens and mask (B, S) to logits (B, S, C)."""
        return TokenClassifierOutput(logits=self.classifier(self.dropout(self.encode(input_ids, attention_mask))))


CLASSES: dict[str, type[Recurrent]] = {
    kind.__name__: kind for kind in (RecurrentForSequenceClassification, RecurrentForTokenClassification)
}


def new_recurrent(config: RecurrentConfig, tokens: bool) -> Recurrent:
    """A network with random weights, a head for the whole text or every token, and a CRF where it asks for one."""
    kind = RecurrentForTokenClassification if tokens else RecurrentForSequenceClassification
    network = kind(config)
    attach_crf(network)
    return network


def build(kind: str, config: dict[str, Any], device: str = "cpu") -> Recurrent:
    """The network of a class and a configuration as the manifest holds them, with weights that mean nothing."""
    with torch.random.fork_rng(devices=[]), torch.device(device):
        asked = RecurrentConfig(**{k: v for k, v in config.items() if k != "model_type"})
        return new_recurrent(asked, tokens=CLASSES[kind] is RecurrentForTokenClassification)


def shapes(network: Recurrent) -> list[dict[str, Any]]:
    """What the manifest says of each layer."""
    config = network.config
    return [{"cell": config.cell, "units": config.units, "pooling": config.pooling}] * config.num_layers


def describe(network: Recurrent, task: str, device: str) -> Subject:
    """The network's shapes, read off its modules."""
    table = network.word_embeddings
    return Subject(
        family=f"bi{network.config.cell}",
        task=task,
        layers=len(network.ahead),
        heads=0,
        head_dim=0,
        hidden=network.classifier.in_features,
        intermediate=0,
        vocabulary=table.num_embeddings,
        positions=0,
        token_types=0,
        labels=network.classifier.out_features,
        pooler=False,
        device=device,
        embedding_size=table.embedding_dim,
        traits=frozenset({"recurrent", *(["crf"] if crf_of(network) else [])}),
    )


def _run(direction: nn.Module, states: Tensor) -> Tensor:
    output: Tensor = direction(states)[0]
    return output


def _reordered(states: Tensor, order: Tensor) -> Tensor:
    """Each row's positions (B, S, …) in its own order (B, S)."""
    return states.gather(1, order.unsqueeze(-1).expand(-1, -1, states.shape[-1]))

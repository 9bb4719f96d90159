"""One view over the encoder families of transformers: where each keeps its layers and their parts.

Supports bert, roberta, xlm-roberta, electra and distilbert with a sequence- or token-classification head. Owns
module paths and nothing else: changes no shapes, reads no files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from compress_search.candidate import Subject
from compress_search.crf import crf_of
from compress_search.encoders import recurrent
from compress_search.encoders.factors import FactoredEmbedding, LowRankLinear
from compress_search.errors import TrialError


@dataclass(frozen=True)
class Layout:
    """Module paths inside one layer."""

    attention: str
    query: str
    key: str
    value: str
    attention_output: str
    attention_norm: str
    up: str
    activation: str
    down: str
    output_norm: str


_BERT = Layout(
    attention="attention.self",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    attention_output="attention.output.dense",
    attention_norm="attention.output.LayerNorm",
    up="intermediate.dense",
    activation="intermediate.intermediate_act_fn",
    down="output.dense",
    output_norm="output.LayerNorm",
)
_DISTILBERT = Layout(
    attention="attention",
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    attention_output="attention.out_lin",
    attention_norm="sa_layer_norm",
    up="ffn.lin1",
    activation="ffn.activation",
    down="ffn.lin2",
    output_norm="output_layer_norm",
)
_STACK = {
    "bert": "encoder",
    "roberta": "encoder",
    "xlm-roberta": "encoder",
    "electra": "encoder",
    "distilbert": "transformer",
}
FAMILIES = tuple(_STACK)
"""``config.model_type`` of every supported family."""


@dataclass(frozen=True)
class LayerParts:
    """The linear maps and norms of one layer, with ``heads`` heads of width ``head_dim``.

    For k heads of width d and f neurons: query, key, value (k·d, H); attention_output (H, k·d); up (f, H);
    down (H, f). A removed sub-layer keeps its linears, without width, and with them its output bias.
    """

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    attention_output: nn.Linear
    attention_norm: nn.LayerNorm
    up: nn.Linear
    down: nn.Linear
    output_norm: nn.LayerNorm
    heads: int
    head_dim: int

    @property
    def neurons(self) -> int:
        """Width f of the feed-forward block."""
        return self.up.out_features


def family(network: nn.Module) -> str:
    """The network's family.

    Raises:
        TrialError: it is none of :data:`FAMILIES`.
    """
    name = getattr(getattr(network, "config", None), "model_type", type(network).__name__)
    if name not in _STACK:
        raise TrialError(f"models of the family {name!r} are not supported: expected one of {', '.join(FAMILIES)}")
    return cast(str, name)


def layout(layer: nn.Module) -> Layout:
    """Where this layer keeps its parts.

    Raises:
        TypeError: it is no layer of a supported family.
    """
    for candidate, mark in ((_BERT, "intermediate"), (_DISTILBERT, "ffn")):
        if hasattr(layer, "attention") and hasattr(layer, mark):
            return candidate
    raise TypeError(f"{type(layer).__name__} is no encoder layer of {', '.join(FAMILIES)}")


def backbone(network: nn.Module) -> nn.Module:
    """The network without its task head."""
    family(network)
    return cast(nn.Module, getattr(network, cast(str, network.base_model_prefix)))


def layers(network: nn.Module) -> nn.ModuleList:
    """The stack of layers, each called as ``layer(hidden_states, attention_mask, …)`` and returning a tensor."""
    return cast(nn.ModuleList, backbone(network).get_submodule(_STACK[family(network)]).layer)


def set_layers(network: nn.Module, layers: Sequence[nn.Module]) -> None:
    """Put other modules in place of the stack, in place; anything that is called like a layer will do."""
    stack = backbone(network).get_submodule(_STACK[family(network)])
    stack.layer = nn.ModuleList(layers)
    network.config.num_hidden_layers = len(layers)  # type: ignore[union-attr]


def parts(layer: nn.Module) -> LayerParts:
    """The linears and norms of a layer.

    Raises:
        TypeError: it is no layer of a supported family.
    """
    at = layout(layer)

    def linear(path: str) -> nn.Linear:
        return cast(nn.Linear, layer.get_submodule(path))

    head_dim = cast(int, layer.get_submodule(at.attention).attention_head_size)
    return LayerParts(
        query=linear(at.query),
        key=linear(at.key),
        value=linear(at.value),
        attention_output=linear(at.attention_output),
        attention_norm=cast(nn.LayerNorm, layer.get_submodule(at.attention_norm)),
        up=linear(at.up),
        down=linear(at.down),
        output_norm=cast(nn.LayerNorm, layer.get_submodule(at.output_norm)),
        heads=linear(at.query).out_features // head_dim,
        head_dim=head_dim,
    )


def embeddings(network: nn.Module) -> nn.Module:
    """The embedding block: ``word_embeddings``, ``position_embeddings``, ``LayerNorm`` and, in some families,
    ``token_type_embeddings``; each an ``nn.Embedding``, the first maybe a :class:`FactoredEmbedding`.
    """
    return cast(nn.Module, backbone(network).embeddings)


def head(network: nn.Module) -> list[nn.Module]:
    """What follows the last layer and holds weights: the pooler, where there is one, the classifier, then a CRF."""
    body = backbone(network)
    pooler = [body.pooler] if isinstance(getattr(body, "pooler", None), nn.Module) else []
    rest = [child for child in network.children() if child is not body and any(True for _ in child.parameters())]
    return cast(list[nn.Module], pooler + rest)


def head_linears(network: nn.Module) -> list[nn.Linear]:
    """The linear maps of the head in the order in which they run: the first reads states, the last gives logits."""
    return [part for module in head(network) for part in module.modules() if isinstance(part, nn.Linear)]


def inputs(network: nn.Module) -> tuple[str, ...]:
    """Names of the tensors the network takes, all of shape (B, S)."""
    segments = getattr(network.config, "type_vocab_size", 0) > 1  # type: ignore[union-attr]
    return ("input_ids", "attention_mask", *(("token_type_ids",) if segments else ()))


def set_attention(network: nn.Module, implementation: str) -> None:
    """Compute attention by ``"sdpa"`` or ``"eager"``, which alone hands out attention probabilities."""
    if not isinstance(network, recurrent.Recurrent):
        cast(Any, network).set_attn_implementation(implementation)


def subject_of(network: nn.Module, task: str, device: str = "cpu") -> Subject:
    """The network's shapes, read off its modules."""
    if isinstance(network, recurrent.Recurrent):
        return recurrent.describe(network, task, device)
    all_parts = [parts(layer) for layer in layers(network)]
    block = embeddings(network)
    words = cast(nn.Embedding | FactoredEmbedding, block.word_embeddings)
    tables = {
        name: table.num_embeddings
        for name, table in block.named_children()
        if isinstance(table, nn.Embedding | FactoredEmbedding)
    }
    linears = head_linears(network)
    shapes = {(p.heads, p.neurons) for p in all_parts}
    sets = _shared_sets(all_parts)
    traits = {"non-uniform": len(shapes) > 1, "shared": any(sets.values()), "crf": crf_of(network) is not None}
    return Subject(
        family=family(network),
        task=task,
        layers=len(all_parts),
        heads=sum(p.heads for p in all_parts) / len(all_parts),
        head_dim=all_parts[0].head_dim,
        hidden=all_parts[0].down.out_features,
        intermediate=sum(p.neurons for p in all_parts) / len(all_parts),
        embedding_size=words.embedding_dim,
        word_rank=words.rank if isinstance(words, FactoredEmbedding) else 0,
        **sets,
        ranks=_ranks(all_parts),
        vocabulary=tables["word_embeddings"],
        positions=tables["position_embeddings"],
        token_types=tables.get("token_type_embeddings", 0),
        labels=linears[-1].out_features,
        pooler=len(linears) > 1,
        device=device,
        traits=frozenset(name for name, holds in traits.items() if holds),
    )


def _ranks(all_parts: Sequence[LayerParts]) -> tuple[float, ...]:
    """The inner widths of the layers' maps, as :class:`Subject` counts them: () where none is a product."""
    rows = [(p.query, p.key, p.value, p.attention_output, p.up, p.down) for p in all_parts]
    if not any(isinstance(linear, LowRankLinear) for row in rows for linear in row):
        return ()
    return tuple(map(_mean_rank, zip(*rows, strict=True)))


def _mean_rank(linears: Sequence[nn.Linear | LowRankLinear]) -> float:
    """The rank r with which r·(out + in) is the mean number of weights of these maps; 0 where all are whole."""
    if not any(isinstance(linear, LowRankLinear) for linear in linears):
        return 0
    widths = sum(linear.out_features + linear.in_features for linear in linears)
    matrices = [matrix for linear in linears for matrix in linear.modules() if isinstance(matrix, nn.Linear)]
    return sum(matrix.out_features * matrix.in_features for matrix in matrices) / widths


def _shared_sets(all_parts: Sequence[LayerParts]) -> dict[str, int]:
    """How many distinct weights blocks and norms have, as :class:`Subject` counts them: 0 where none is shared."""
    owners: dict[str, list[nn.Module]] = {
        "attention_sets": [p.query for p in all_parts],
        "ffn_sets": [p.up for p in all_parts],
        "norm_sets": [norm for p in all_parts for norm in (p.attention_norm, p.output_norm)],
    }
    # by a parameter: a removed sub-layer has a module of its own, and a masked weight is another tensor each time
    distinct = {name: len({id(next(m.parameters())) for m in modules}) for name, modules in owners.items()}
    return {name: count if count < len(owners[name]) else 0 for name, count in distinct.items()}

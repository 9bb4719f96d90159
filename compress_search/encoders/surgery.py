"""Physical removal of heads, neurons, layers and tokens, their sharing, in place, and the folding of masks.

Owns the exact recipe by which a masked network and the smaller one it stands for compute the same. Decides
nothing: what to keep is the caller's business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compress_search.encoders import view
from compress_search.encoders.factors import Factored
from compress_search.encoders.stream import stream


class Offset(nn.Linear):
    """An (H, 0) projection: the bias is all that is left of a sub-layer without inner width."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would initialise a weight without elements, and warn
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """(…, H) -> the bias in the shape of the argument."""
        return self.bias.expand_as(x)


class Skip(nn.Linear):
    """A (0, H) projection without neurons; hands its input on, so that :class:`Offset` knows the shape."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """The input itself."""
        return x


class NoAttention(nn.Module):
    """Attention without heads, in place of a family's own; keeps the names of its tensors."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        for name, child in attention.named_children():
            self.add_module(name, child)
        self.attention_head_size = attention.attention_head_size

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, None]:
        """Hidden states (B, S, H) through the output projection where this family has it here; no weights."""
        project = getattr(self, "out_lin", None)
        return (project(hidden_states) if project else hidden_states), None


def prune_heads(network: nn.Module, keep: Mapping[int, Sequence[int]]) -> None:
    """Keep only these heads of these layers; the output bias of a layer without heads survives as LN(x + b).

    A layer shared by several positions is pruned once, at all of them.

    Raises:
        ValueError: unknown layers or heads, duplicates, or different heads for positions that share a layer.
    """
    for parts, heads in _distinct(network, keep, "query"):
        _check(heads, parts.heads, "heads")
        offsets = torch.arange(parts.head_dim)
        rows = (torch.tensor(heads, dtype=torch.long)[:, None] * parts.head_dim + offsets).flatten()
        for linear in (parts.query, parts.key, parts.value):
            _keep_rows(linear, rows)
        _keep_columns(parts.attention_output, rows)
    for layer in view.layers(network):
        if not view.parts(layer).heads:
            _remove_attention(layer)


def prune_neurons(network: nn.Module, keep: Mapping[int, Sequence[int]]) -> None:
    """Keep only these feed-forward neurons of these layers; what is left of a layer without any is LN(x + b).

    Raises:
        ValueError: unknown layers or neurons, duplicates, or different neurons for positions that share a layer.
    """
    for parts, neurons in _distinct(network, keep, "up"):
        _check(neurons, parts.neurons, "neurons")
        rows = torch.tensor(neurons, dtype=torch.long)
        _keep_rows(parts.up, rows)
        _keep_columns(parts.down, rows)
    for layer in view.layers(network):
        if not view.parts(layer).neurons:
            _remove_feed_forward(layer)


def prune_hidden(network: nn.Module, keep: Sequence[int]) -> None:
    """Keep only these channels of the residual stream, in everything that reads, writes or normalises it.

    Heads keep their width, so that the hidden width is no more their number times their width; the configuration
    stays that of the network before, and the manifest says what is left.

    Raises:
        ValueError: no channel, unknown channels or duplicates, or the word table is a product of two matrices.
    """
    found = stream(network)
    if not isinstance(view.embeddings(network).word_embeddings, nn.Embedding):
        raise ValueError("the hidden width cannot change once the word embeddings are factorized")
    if not keep:
        raise ValueError("an encoder needs at least one hidden channel")
    _check(keep, found.width, "channels")
    channels = torch.tensor(keep, dtype=torch.long)
    for table in found.tables:
        table.weight = _parameter(table.weight[:, channels.to(table.weight.device)], table.weight)
        table.embedding_dim = len(channels)
    for norm in found.norms:
        here = channels.to(norm.weight.device)
        norm.weight, norm.bias = _parameter(norm.weight[here], norm.weight), _parameter(norm.bias[here], norm.bias)
        norm.normalized_shape = (len(channels),)
    for linear in found.writers:
        _keep_rows(linear, channels)
    for linear in found.readers:
        _keep_columns(linear, channels)


def keep_layers(network: nn.Module, keep: Sequence[int]) -> None:
    """Keep only these layers, in the order given.

    Raises:
        ValueError: no layer, unknown layers or duplicates.
    """
    stack = view.layers(network)
    if not keep:
        raise ValueError("an encoder needs at least one layer")
    _check(keep, len(stack), "layers")
    view.set_layers(network, [stack[index] for index in keep])


def share_parts(network: nn.Module, names: Sequence[str], source: Mapping[int, int]) -> None:
    """Put parts of one layer in place of those of another: one module at several positions, never a copy.

    Layers themselves stay distinct, so that each still hands out hidden states of its own.

    Args:
        network: changed in place.
        names: parts to share, as :class:`LayerParts` calls its modules.
        source: layer -> the layer whose parts it uses from now on.

    Raises:
        ValueError: unknown layers or parts, or parts of different shapes.
    """
    stack = view.layers(network)
    if unknown := [index for pair in source.items() for index in pair if not 0 <= index < len(stack)]:
        raise ValueError(f"layer {unknown[0]} does not exist: there are {len(stack)}")
    paths = [_part_path(stack[0], name) for name in names]
    owned = {owner: [stack[owner].get_submodule(path) for path in paths] for owner in set(source.values())}
    for index, owner in source.items():
        for path, module in zip(paths, owned[owner], strict=True):
            _check_same_shapes(stack[index].get_submodule(path), module, f"layers {index} and {owner}, {path}")
            stack[index].set_submodule(path, module)


def keep_tokens(network: nn.Module, keep: Sequence[int]) -> None:
    """Keep only these rows of the token embedding, in the order given, and renumber the configuration's tokens.

    Raises:
        ValueError: unknown rows or duplicates, or the padding's number would change, from which some families
            count positions.
    """
    table = cast(nn.Embedding, view.embeddings(network).word_embeddings)
    _check(keep, table.num_embeddings, "tokens")
    padding = table.padding_idx
    if padding is not None and (padding >= len(keep) or keep[padding] != padding):
        raise ValueError(f"the padding's number {padding} must stay as it is")
    table.weight = _parameter(table.weight[torch.tensor(keep, device=table.weight.device)], table.weight)
    table.num_embeddings = len(keep)
    config = cast(Any, network.config)
    number = {old: new for new, old in enumerate(keep)}
    changed = {
        name: number.get(value)
        for name, value in config.to_dict().items()
        if name.endswith("_token_id") and type(value) is int
    }
    config.update({**changed, "vocab_size": len(keep)})


def bake(network: nn.Module) -> None:
    """Fold every torch parametrization (masks, factors) into a plain parameter of the value it has now."""
    for module in list(network.modules()):
        if parametrize.is_parametrized(module):
            # removal edits the module's class, which torch shares between a parametrized module and its copies
            kind = type(module)
            module.__class__ = type(kind.__name__, kind.__bases__, dict(kind.__dict__))
            for name in list(cast(nn.ModuleDict, module.parametrizations)):
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)


def _distinct(
    network: nn.Module, keep: Mapping[int, Sequence[int]], owner: str
) -> list[tuple[view.LayerParts, list[int]]]:
    """The parts of each named layer with the indices to keep; positions that share the owner appear once."""
    stack = view.layers(network)
    chosen: dict[int, tuple[view.LayerParts, list[int]]] = {}
    for index, kept in keep.items():
        if not 0 <= index < len(stack):
            raise ValueError(f"layer {index} does not exist: there are {len(stack)}")
        parts = view.parts(stack[index])
        if chosen.setdefault(id(getattr(parts, owner)), (parts, list(kept)))[1] != list(kept):
            raise ValueError(f"layer {index} is shared: its positions must keep the same parts")
    return list(chosen.values())


def _part_path(layer: nn.Module, name: str) -> str:
    at = view.layout(layer)
    if name in ("attention", "activation") or not hasattr(at, name):
        raise ValueError(f"{name!r} is no part of a layer that can be shared")
    return str(getattr(at, name))


def _check_same_shapes(one: nn.Module, other: nn.Module, where: str) -> None:
    shapes = [[tuple(parameter.shape) for parameter in module.parameters()] for module in (one, other)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"{where}: parts of shapes {shapes[0]} and {shapes[1]} cannot be one")


def _check(kept: Sequence[int], count: int, what: str) -> None:
    if len(set(kept)) != len(kept) or not all(0 <= index < count for index in kept):
        raise ValueError(f"cannot keep {what} {list(kept)} of {count}: expected distinct indices below {count}")


def _keep_rows(linear: nn.Linear, rows: Tensor) -> None:
    _require_plain(linear)
    rows = rows.to(linear.weight.device)
    linear.weight = _parameter(linear.weight[rows], linear.weight)
    linear.bias = _parameter(linear.bias[rows], linear.bias)
    linear.out_features = len(rows)


def _keep_columns(linear: nn.Linear, columns: Tensor) -> None:
    _require_plain(linear)
    linear.weight = _parameter(linear.weight[:, columns.to(linear.weight.device)], linear.weight)
    linear.in_features = len(columns)


def _parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach().clone(memory_format=torch.contiguous_format), like.requires_grad)


def _require_plain(linear: nn.Linear) -> None:
    if isinstance(linear, Factored):
        raise ValueError("a factored weight cannot be cut: cut first, then factor what is left")
    if parametrize.is_parametrized(linear):
        raise ValueError("a parametrized weight cannot be cut: fold the masks with bake(network) first")


def _remove_attention(layer: nn.Module) -> None:
    at, parts = view.layout(layer), view.parts(layer)
    if not isinstance(parts.attention_output, Offset):
        layer.set_submodule(at.attention_output, Offset(parts.attention_output))
    if not isinstance(attention := layer.get_submodule(at.attention), NoAttention):
        layer.set_submodule(at.attention, NoAttention(attention))


def _remove_feed_forward(layer: nn.Module) -> None:
    at, parts = view.layout(layer), view.parts(layer)
    if not isinstance(parts.up, Skip):
        layer.set_submodule(at.up, Skip(parts.up))
        layer.set_submodule(at.activation, nn.Identity())
        layer.set_submodule(at.down, Offset(parts.down))

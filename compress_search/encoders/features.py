"""Reading what an encoder computes on the way to its logits, by forward hooks, whichever way it does attention.

Owns the names of features, their shapes and where in a network each is found. Knows nothing of losses or of who
asks. A feature is named by what it is and, where that takes one, a number:

=====================  ===================  ================================================================
name                   shape                what
=====================  ===================  ================================================================
``hidden.<n>``         (B, S, H)            output of the n-th layer, counted from 1; ``hidden.0`` is the input
                                            of the first one, the embeddings
``query.<i>`` …        (B, A, S, d)         ``query``, ``key``, ``value`` of the attention of layer i, from 0
``scores.<i>``         (B, A, S, S)         Q·Kᵀ/√d of layer i, from 0: before the mask and the softmax
``probabilities.<i>``  (B, A, S, S)         their softmax over the keys that are no padding
``values.<i>``         (B, A, S, S)         V·Vᵀ/√d of layer i, from 0: MiniLM's value relation before the softmax
``pooled``             (B, H)               the sentence, before dropout: the pooler's output, or where there is
                                            none that of the classifier's first linear map
``logits``             (B, C), (B, S, C)    the network's output
=====================  ===================  ================================================================

What lies at padding is undefined, and so are the rows and columns of padding in what is (S, S).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from compress_search.encoders import view
from compress_search.errors import TrialError
from compress_search.losses import masked_softmax, relation

PROJECTIONS = ("query", "key", "value")
DERIVED: Mapping[str, tuple[str, ...]] = {
    "scores": ("query", "key"),
    "probabilities": ("query", "key"),
    "values": ("value",),
}
"""Features of a layer's attention that follow from its projections."""
ATTENTION = (*PROJECTIONS, *DERIVED)
KINDS = ("hidden", *ATTENTION, "pooled", "logits")


def parse(name: str) -> tuple[str, int]:
    """Kind and number of a feature; ``pooled`` and ``logits``, which have no number, get 0.

    Raises:
        ValueError: no feature has such a name.
    """
    kind, dot, number = name.partition(".")
    if kind not in KINDS or (kind in ("pooled", "logits")) == bool(dot) or (dot and not number.isdecimal()):
        raise ValueError(f"no feature is called {name!r}: expected one of {', '.join(KINDS)}, with .<number>")
    return kind, int(number or 0)


def primitives(names: Collection[str]) -> list[str]:
    """The features that are read off the network itself, which all of these follow from; sorted."""
    found = set()
    for name in names:
        kind, number = parse(name)
        found |= {f"{part}.{number}" for part in DERIVED[kind]} if kind in DERIVED else {name}
    return sorted(found)


def derive(read: Mapping[str, Tensor], names: Collection[str], attention_mask: Tensor) -> dict[str, Tensor]:
    """The features by name, from their primitives.

    Args:
        read: at least :func:`primitives` of the names.
        names: what is wanted.
        attention_mask: (B, S), 1 = no padding.
    """
    return {name: read[name] if name in read else _derived(name, read, attention_mask) for name in names}


@contextmanager
def recording(
    network: nn.Module, names: Collection[str], called: nn.Module | None = None
) -> Iterator[dict[str, Tensor]]:
    """Yields a mapping that holds the features of the network's one call inside the block, once that has ended.

    ``called`` is what is called there, by default the network.

    ::

        with recording(network, ["hidden.2", "scores.1"]) as found:
            loss = context.task_loss(network, batch)
        found["hidden.2"]

    Gradients flow through what is read. A layer that several positions share is read at each of them.

    Raises:
        TrialError: the network has no such feature, or was not called exactly once.
        ValueError: no feature has such a name.
    """
    found: dict[str, Tensor] = {}
    taps = {name: _tap(network, name) for name in primitives(names)}
    taps[_MASK] = _Tap(called or network, keyword=_MASK)
    seen: dict[str, list[Any]] = {name: [] for name in taps}
    with ExitStack() as hooks:
        for name, tap in taps.items():
            hooks.callback(tap.listen(seen[name].append).remove)
        yield found
    read = {name: tap.pick(name, seen[name]) for name, tap in taps.items()}
    found.update(derive(read, names, read[_MASK]))


def read_features(
    network: nn.Module, batch: Mapping[str, Tensor], names: Collection[str], *, head: bool = True
) -> dict[str, Tensor]:
    """The features of one forward pass over a batch; see :func:`recording`.

    Without its ``head`` a network has neither ``logits`` nor ``pooled``.
    """
    called = network if head else view.backbone(network)
    with recording(network, names, called) as found:
        called(**{name: tensor for name, tensor in batch.items() if name not in ("labels", "index")})
    return found


def feature_shape(network: nn.Module, name: str) -> tuple[int, ...]:
    """The shape of a primitive feature but for batch and length: (H,), for projections (A, d), for logits (C,).

    Raises:
        TrialError: the network has no such feature.
    """
    kind, _ = parse(name)
    if kind == "logits":
        words = cast(Any, network).get_output_embeddings()  # of language models alone
        return (cast(Any, network.config).num_labels if words is None else words.out_features,)
    if kind == "pooled":
        return (_pooled(network)[1],)
    layer = view.parts(_layer(network, name))
    return (layer.down.out_features,) if kind == "hidden" else (layer.heads, layer.head_dim)


_MASK = "attention_mask"


@dataclass(frozen=True)
class _Tap:
    """Where a feature passes by: what a module gives or, with ``keyword``, takes, at one of its calls."""

    module: nn.Module
    keyword: str = ""
    calls: int = 1
    call: int = 0
    heads: int = 0

    def listen(self, hear: Callable[[Any], None]) -> RemovableHandle:
        """Have ``hear`` called with what passes by."""
        if not self.keyword:
            return self.module.register_forward_hook(lambda module, args, output: hear(output))
        return self.module.register_forward_pre_hook(
            # a layer's hidden states come by position
            lambda module, args, kwargs: hear(kwargs.get(self.keyword, args[0] if args else None)),
            with_kwargs=True,
        )

    def pick(self, name: str, heard: list[Any]) -> Tensor:
        """The feature among what was heard."""
        if len(heard) != self.calls:
            raise TrialError(f"{name} was computed {len(heard)} times in a forward pass, expected {self.calls}")
        value = heard[self.call]
        value = getattr(value, "logits", value).float()  # under autocast some are in 16 bits
        # (B, S, A·d) -> (B, A, S, d)
        return value.unflatten(-1, (self.heads, -1)).transpose(1, 2) if self.heads else cast(Tensor, value)


def _tap(network: nn.Module, name: str) -> _Tap:
    kind, number = parse(name)
    if kind == "logits":
        return _Tap(network)
    if kind == "pooled":
        return _Tap(_pooled(network)[0])
    layer, stack = _layer(network, name), view.layers(network)
    if kind == "hidden":
        same = [index for index, other in enumerate(stack) if other is layer]
        return _Tap(layer, "hidden_states" if number == 0 else "", len(same), same.index(max(0, number - 1)))
    heads = view.parts(layer).heads
    if not heads:
        raise TrialError(f"{name} cannot be read: all heads of layer {number} are gone")
    module = getattr(view.parts(layer), kind)
    same = [index for index, other in enumerate(stack) if getattr(view.parts(other), kind) is module]
    return _Tap(module, "", len(same), same.index(number), heads)


def _layer(network: nn.Module, name: str) -> nn.Module:
    """The layer that gives a hidden state, the first one for the embeddings, or that holds a projection."""
    kind, number = parse(name)
    stack = view.layers(network)
    last = len(stack) if kind == "hidden" else len(stack) - 1
    if number > last:
        raise TrialError(f"{name} does not exist: {kind} counts from 0 to {last} in {len(stack)} layers")
    return stack[max(0, number - 1) if kind == "hidden" else number]


def _pooled(network: nn.Module) -> tuple[nn.Module, int]:
    """The module that gives ``pooled``, and its width."""
    linears = view.head_linears(network)
    if len(linears) < 2:
        raise TrialError("pooled cannot be read: the network classifies tokens, it has no sentence to pool")
    pooler = getattr(view.backbone(network), "pooler", None)
    return (pooler if isinstance(pooler, nn.Module) else linears[0]), linears[0].out_features


def _derived(name: str, read: Mapping[str, Tensor], attention_mask: Tensor) -> Tensor:
    kind, layer = parse(name)
    parts = [read[f"{part}.{layer}"] for part in DERIVED[kind]]
    relations = relation(parts[0], parts[-1])
    return masked_softmax(relations, attention_mask) if kind == "probabilities" else relations

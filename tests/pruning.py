"""What the tests of structured pruning share: parameters, inputs and outputs of tiny models."""

from __future__ import annotations

from typing import Any

import torch
from compress_search_plugins.pruning.masks import Masks, Units
from compress_search_plugins.structured_pruning import StructuredPruning
from torch import Tensor, nn

from compress_search import Candidate, Subject
from compress_search.encoders import layers, parts
from compress_search.space import active
from compress_search.testing import TinyContext, tiny_batches

FAMILIES = ("bert", "distilbert", "roberta", "electra")
BASE = Subject("bert", "text-classification", 12, 12, 64, 768, 3072, 30522, 512, 2, 2)


def parameters(subject: Subject, **changes: Any) -> dict[str, Any]:
    """The method's defaults with some values changed, active ones only, made effective."""
    space = StructuredPruning().search_space(subject)
    assert changes.keys() <= space.keys()
    wanted = {name: dim.default for name, dim in space.items()} | changes
    return dict(
        StructuredPruning().effective(subject, {n: v for n, v in wanted.items() if active(space[n], wanted)})
    )


def inputs(candidate: Candidate, seed: int = 0) -> dict[str, Tensor]:
    batch = next(tiny_batches(candidate, seed=seed))
    return {name: batch[name] for name in candidate.tokenizer.model_input_names}


def logits(network: nn.Module, given: dict[str, Tensor]) -> Tensor:
    result: Tensor = network(**given).logits
    return result.detach()


def random_masks(network: nn.Module, seed: int = 0, *, hidden: bool = True, soft: bool = False) -> Masks:
    """Masks that differ from row to row, each of which keeps its first unit; soft ones turn units down as well."""
    masks, generator = Masks(network), torch.Generator().manual_seed(seed)
    units = [(torch.rand(mask.shape, generator=generator) < 0.6).float() for mask in masks.units]
    for mask in units:
        mask[:, 0] = 1
    if soft:
        units = [mask * (0.5 + torch.rand(mask.shape, generator=generator)) for mask in units]
    masks.units = Units(units[0], units[1], units[2] if hidden else torch.ones_like(units[2]))
    return masks


def layer_shapes(candidate: Candidate) -> list[tuple[int, int]]:
    """Heads and neurons of each layer."""
    return [(view.heads, view.neurons) for view in map(parts, layers(candidate.network))]


def recorded(context: TinyContext) -> list[dict[str, Any]]:
    """What each call of the context's fit is asked, and the size of the network it is asked to train."""
    calls, fit = [], context.fit

    def recording(network: Any, **options: Any) -> None:
        calls.append(options | {"parameters": sum(p.numel() for p in network.parameters())})
        fit(network, **options)

    context.fit = recording  # type: ignore[method-assign]
    return calls

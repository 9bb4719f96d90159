"""The losses by the names under which a study or a method asks for them, with what each can be given.

Owns the names, and what must agree between the two models for each loss. Knows nothing of networks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from compress_search.losses import features as f
from compress_search.losses import logits as z

STATES = ("hidden", "pooled")
RELATIONS = ("scores", "values")
PROJECTIONS = ("query", "key", "value")


@dataclass(frozen=True)
class FeatureLoss:
    """A loss ``function(student, teacher, mask)`` of what two models compute on the way.

    ``kinds``: features it compares, by :mod:`compress_search.encoders.features`. ``pair``: whether it takes two
    layers of each model. ``any_heads``, ``any_width``: whether the models may differ in their number of heads, in
    their width. ``classes``: whether it compares probabilities of classes, so that a single number says nothing.
    """

    function: Callable[[Any, Any, Any], Tensor]
    kinds: tuple[str, ...]
    pair: bool = False
    any_heads: bool = False
    any_width: bool = False
    classes: bool = False

    def __call__(self, student: Any, teacher: Any, mask: Tensor) -> Tensor:
        """The loss of tensors, or of pairs of them, under a mask (B, S)."""
        return self.function(student, teacher, mask)


def _relation_kl(heads: float) -> FeatureLoss:
    if heads < 1 or heads != int(heads):
        raise ValueError(f"expected a number of relation heads, got {heads:g}")
    return FeatureLoss(partial(f.relation_kl, heads=int(heads)), PROJECTIONS, any_heads=True, any_width=True)


def _kd_ce(temperature: float) -> FeatureLoss:
    loss = _of_logits(partial(z.soft_cross_entropy, temperature=temperature))
    return replace(loss, classes=True)


def _kd_kl(temperature: float) -> FeatureLoss:
    loss = _of_logits(partial(z.kl, temperature=temperature))
    return replace(loss, classes=True)


def _kd_mse(temperature: float) -> FeatureLoss:
    return _of_logits(lambda student, teacher: z.mse_logits(student, teacher) / temperature**2)


def _of_logits(function: Callable[[Tensor, Tensor], Tensor]) -> FeatureLoss:
    """A loss of logits, of which those of tokens, (B, S, C), count where the mask is set."""
    return FeatureLoss(lambda s, t, mask: z.in_blocks(function, s, t, mask if s.ndim == 3 else None), ("logits",))


FEATURE_LOSSES: Mapping[str, FeatureLoss] = {
    "mse": FeatureLoss(f.mse, (*STATES, *RELATIONS, *PROJECTIONS)),
    "hidden_mse": FeatureLoss(f.hidden_mse, ("hidden",)),
    "mae": FeatureLoss(f.mae, ("hidden",)),
    "cos": FeatureLoss(f.cos, ("hidden",)),
    "pkd": FeatureLoss(f.pkd, STATES),
    "infonce": FeatureLoss(f.infonce, STATES),
    "fsp": FeatureLoss(f.fsp, ("hidden",), pair=True),
    "nst": FeatureLoss(f.nst, ("hidden",), pair=True, any_width=True),
    "attention_mse": FeatureLoss(f.attention_mse, (*RELATIONS, "probabilities"), any_width=True),
    "attention_mse_sum": FeatureLoss(
        f.attention_mse_sum, (*RELATIONS, "probabilities"), any_heads=True, any_width=True
    ),
    "attention_ce": FeatureLoss(f.attention_ce, RELATIONS, any_width=True),
    "attention_ce_mean": FeatureLoss(f.attention_ce_mean, RELATIONS, any_heads=True, any_width=True),
    "relation_kl_rows": FeatureLoss(f.relation_kl_rows, RELATIONS, any_width=True),
    "value_relation_kl": FeatureLoss(f.relation_kl_rows, ("values",), any_width=True),
    "kl_probs": FeatureLoss(f.kl_probs, ("probabilities",), any_width=True),
}
PARAMETRIC: Mapping[str, tuple[str, float | None, Callable[[float], FeatureLoss]]] = {
    "kd_ce": ("temperature", 1.0, _kd_ce),
    "kd_kl": ("temperature", 1.0, _kd_kl),
    "kd_mse": ("temperature", 1.0, _kd_mse),
    "relation_kl": ("heads", None, _relation_kl),
}
"""Losses written ``name:<number>``: what the number is, its default where there is one, and the loss for it."""
ALIASES = {
    "gram": "fsp",
    "mmd": "nst",
    "mse_with_mask": "hidden_mse",
    "attention_mse_with_mask": "attention_mse",
    "cross_entropy": "kd_ce",
}
"""Names that TextBrewer and KnowledgeDistillation give to losses of ours."""


def feature_loss(name: str) -> FeatureLoss:
    """The loss of a name, such as ``hidden_mse``, ``kd_ce:4`` (τ = 4) or ``relation_kl:48`` (48 heads).

    Raises:
        ValueError: no loss has that name, or its number is missing or none.
    """
    written, colon, number = name.partition(":")
    kind = ALIASES.get(written, written)
    if kind in PARAMETRIC:
        what, default, build = PARAMETRIC[kind]
        value = _number(number) if colon else default
        if value is None or not 0 < value < math.inf:
            raise ValueError(f"expected {kind}:<{what}>, a number above 0, got {name!r}")
        return build(value)
    if kind not in FEATURE_LOSSES or colon:
        names = ", ".join([*FEATURE_LOSSES, *(f"{kind}:<{PARAMETRIC[kind][0]}>" for kind in PARAMETRIC), *ALIASES])
        raise ValueError(f"no loss is called {name!r}: expected one of {names}")
    return FEATURE_LOSSES[kind]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None

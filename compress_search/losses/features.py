"""Losses between what a student and its teacher compute on the way to their logits; pure functions of tensors.

Owns the rule of what counts, one for all: positions that are no padding, and of what relates two positions, the
pairs of which neither is. Means are over what counts, so that no loss depends on how far a batch was padded, nor on
what lies there; a batch of padding alone gives 0. Shapes: (B, S, H) hidden states, (B, A, S, d) projections of A
heads, (B, A, S, S) relations before their softmax; ``mask`` (B, S), 1 = no padding.

Sources: TextBrewer (Yang et al. 2020) for what is also there; the others as they say.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from compress_search.losses.logits import masked_mean, wide

Pair = tuple[Tensor, Tensor]
"""The same feature of two layers."""


def relation(left: Tensor, right: Tensor) -> Tensor:
    """Scaled dot products L·Rᵀ/√d: (…, S, d), (…, S, d) -> (…, S, S)."""
    return left @ right.transpose(-1, -2) / math.sqrt(left.shape[-1])


def masked_softmax(relations: Tensor, mask: Tensor) -> Tensor:
    """Row-wise softmax of (B, A, S, S) over the keys that the mask (B, S) leaves."""
    return _without_padded_keys(relations, mask).softmax(-1)


def mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference over all elements, padding included: the only loss here for which it counts."""
    return F.mse_loss(wide(student), wide(teacher))


def hidden_mse(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Mean squared difference over features and positions: Σ M·(a − b)²/(ΣM·H)."""
    return masked_mean((wide(student) - wide(teacher)) ** 2, mask)


def mae(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Mean absolute difference over features and positions."""
    return masked_mean((wide(student) - wide(teacher)).abs(), mask)


def cos(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """1 − the cosine between the two states of a position, mean over positions.

    Source: Sanh et al. 2019, DistilBERT, section 2.
    """
    return masked_mean(1 - F.cosine_similarity(wide(student), wide(teacher), dim=-1), mask)


def pkd(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean ‖ŝ − t̂‖² between the normalised states of the first token; (B, H) are such states already.

    Source: Sun et al. 2019, Patient Knowledge Distillation for BERT Model Compression, section 3.2.
    """
    return (_first(student) - _first(teacher)).pow(2).sum(-1).mean()


def infonce(student: Tensor, teacher: Tensor, mask: Tensor | None = None, temperature: float = 0.1) -> Tensor:
    """−log of the part of exp(cos/τ) that falls on the teacher's state of the same text among those of the batch.

    States of the first token, or (B, H). Not 0 for equal states, for other texts are never entirely unlike.

    Source: Oord et al. 2018, Representation Learning with Contrastive Predictive Coding, equation 4.
    """
    similarities = _first(student) @ _first(teacher).T / temperature
    return F.cross_entropy(similarities, torch.arange(len(similarities), device=similarities.device))


def fsp(student: Pair, teacher: Pair, mask: Tensor) -> Tensor:
    """Mean squared difference of S₁ᵀS₂/n, how two layers' features go together over a text's n positions.

    Source: Yim et al. 2017, A Gift from Knowledge Distillation, section 3.2 (there of images).
    """
    lengths = mask.sum(1).clamp(min=1)[:, None, None]
    grams = [_zeroed(first, mask).transpose(1, 2) @ _zeroed(second, mask) for first, second in (student, teacher)]
    return F.mse_loss(grams[0] / lengths, grams[1] / lengths)


def nst(student: Pair, teacher: Pair, mask: Tensor) -> Tensor:
    """Mean squared difference of S₁S₂ᵀ/H over pairs of positions; each model is divided by its own width H.

    Source: Huang and Wang 2017, Like What You Like (neuron selectivity transfer), with the linear kernel.
    """
    grams = [wide(first) @ wide(second).transpose(1, 2) / first.shape[-1] for first, second in (student, teacher)]
    return attention_mse(grams[0][:, None], grams[1][:, None], mask)


def attention_mse(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Mean squared difference of relations over heads and pairs of positions, before the softmax.

    Source: Jiao et al. 2020, TinyBERT, equation 7.
    """
    pairs = (mask.bool()[:, None, :, None] & mask.bool()[:, None, None, :]).expand_as(student)
    difference = torch.where(pairs, wide(student) - wide(teacher), 0.0)
    return (difference**2).sum() / max(int(pairs.sum()), 1)


def attention_mse_sum(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """:func:`attention_mse` of the sums over heads, whose numbers may differ."""
    return attention_mse(wide(student).sum(1, keepdim=True), wide(teacher).sum(1, keepdim=True), mask)


def attention_ce(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy of the rows' softmax over the keys that are no padding, mean over heads and rows.

    Its least value is the teacher's entropy; :func:`relation_kl_rows` is without that.
    """
    target = masked_softmax(wide(teacher), mask)
    return _mean_over_queries(-target * _log_softmax(student, mask), mask)


def attention_ce_mean(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """:func:`attention_ce` of the means over heads, whose numbers may differ."""
    return attention_ce(wide(student).mean(1, keepdim=True), wide(teacher).mean(1, keepdim=True), mask)


def relation_kl_rows(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """KL(teacher ‖ student) of the rows' softmax over the keys that are no padding, mean over heads and rows.

    Of attention scores it is MiniLM's attention transfer, of value relations its value-relation transfer.

    Source: Wang et al. 2020, MiniLM, equations 6 to 8.
    """
    log_teacher = _log_softmax(teacher, mask)
    return _mean_over_queries(log_teacher.exp() * (log_teacher - _log_softmax(student, mask)), mask)


def kl_probs(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """KL(teacher ‖ student) of rows that are probabilities already, mean over heads and rows."""
    student, teacher = wide(student), wide(teacher)
    least = torch.finfo(student.dtype).tiny
    return _mean_over_queries(teacher * (teacher.clamp(min=least).log() - student.clamp(min=least).log()), mask)


def relation_kl(student: Tensor, teacher: Tensor, mask: Tensor, heads: int) -> Tensor:
    """KL of the relations X·Xᵀ/√dᵣ of one projection, split anew into so many heads for both models.

    The models' own heads and widths may differ.

    Args:
        student: queries, keys or values, (B, A, S, d).
        teacher: the same of the teacher, (B, A', S, d').
        mask: (B, S).
        heads: relation heads; divides A·d and A'·d'.

    Raises:
        ValueError: it divides one of them not.

    Source: Wang et al. 2021, MiniLMv2, section 3.1.
    """
    ours, theirs = (_split(wide(projection), heads) for projection in (student, teacher))
    return relation_kl_rows(relation(ours, ours), relation(theirs, theirs), mask)


def _split(projection: Tensor, heads: int) -> Tensor:
    """(B, A, S, d) -> (B, heads, S, A·d/heads)."""
    joined = projection.transpose(1, 2).flatten(2)
    if joined.shape[-1] % heads:
        raise ValueError(f"{heads} relation heads do not divide a width of {joined.shape[-1]}")
    split: Tensor = joined.unflatten(-1, (heads, -1))
    return split.transpose(1, 2)


def _first(states: Tensor) -> Tensor:
    return F.normalize(wide(states[:, 0] if states.ndim == 3 else states), dim=-1)


def _zeroed(states: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask.bool()[..., None], wide(states), 0.0)


def _without_padded_keys(relations: Tensor, mask: Tensor) -> Tensor:
    # half the least number, so that differences of two such entries stay finite
    return relations.masked_fill(~mask.bool()[:, None, None, :], torch.finfo(relations.dtype).min / 2)


def _log_softmax(relations: Tensor, mask: Tensor) -> Tensor:
    return _without_padded_keys(wide(relations), mask).log_softmax(-1)


def _mean_over_queries(values: Tensor, mask: Tensor) -> Tensor:
    """Sum over keys, mean over heads and the queries that are no padding: (B, A, S, S) -> ()."""
    rows = values.masked_fill(~mask.bool()[:, None, None, :], 0).sum(-1)
    return masked_mean(rows.transpose(1, 2), mask)

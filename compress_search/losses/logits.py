"""Distillation losses of logits, pure.

Owns the arithmetic of soft targets and its one rule of reduction: sum over classes, mean over the rows that
count. Knows nothing of networks, batches or training.

All sums are taken in float32, or float64 where that is what comes in, whatever precision the network runs in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

IGNORED = -100
"""The label of a position that has none."""

SoftLoss = Literal["kl", "mse_logits"]
TokenScope = Literal["labelled", "attended"]
Temperature = float | Tensor
"""τ > 0: one number, or one for each row of logits, (…) for logits (…, C)."""
TemperatureScheduler = Literal["constant", "flsw", "cwsm"]

BLOCK = 2**24
"""Logits of a network that are compared at a time where there are more, as over a vocabulary."""

LOWEST_TEMPERATURE = 0.1
"""Where a row's own temperature stops falling: at 0 there would be nothing to divide by."""


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``values`` (…, features) over the positions where ``mask`` (…) is set; zero where none is."""
    selected = wide(values[mask.bool()])
    return selected.sum() / max(selected.numel(), 1)


def valid_tokens(labels: Tensor, attention_mask: Tensor, scope: TokenScope = "labelled") -> Tensor:
    """Which positions of a token task count, (B, S) bool: those with a label, or all that are no padding."""
    return labels != IGNORED if scope == "labelled" else attention_mask.bool()


def soft_cross_entropy(
    student: Tensor, teacher: Tensor, temperature: Temperature = 1.0, mask: Tensor | None = None
) -> Tensor:
    """τ²·CE(softmax(teacher/τ), softmax(student/τ)): :func:`kl` plus τ² times the teacher's entropy.

    Same gradient as :func:`kl`, but its minimum is not 0. Arguments as there.
    """
    student, teacher = _rows(student, mask), _rows(teacher, mask)
    tau = _per_row(temperature, mask)
    target = F.softmax(teacher / tau, dim=-1)
    return -_mean_over_rows(tau**2 * target * F.log_softmax(student / tau, dim=-1))


def kl(
    student: Tensor,
    teacher: Tensor,
    temperature: Temperature = 1.0,
    mask: Tensor | None = None,
    *,
    squared: bool = True,
) -> Tensor:
    """τ²·KL(softmax(teacher/τ) ‖ softmax(student/τ)), summed over classes, mean over rows.

    The factor τ² keeps the gradient's size, which would fall as 1/τ², so that a weight beside another loss means
    the same at any temperature: the gradient is τ·(softmax(student/τ) − softmax(teacher/τ)) per row.

    Args:
        student: logits, (…, C).
        teacher: logits, (…, C).
        temperature: τ > 0; one for all, or one for each row, (…), then squared row by row too.
        mask: which rows count, (…); all by default.
        squared: whether there is the factor τ², which TextBrewer's losses lack.

    Source: Hinton et al. 2015, Distilling the Knowledge in a Neural Network, section 2.
    """
    student, teacher = _rows(student, mask), _rows(teacher, mask)
    tau = _per_row(temperature, mask)
    log_student = F.log_softmax(student / tau, dim=-1)
    log_teacher = F.log_softmax(teacher / tau, dim=-1)
    factor = tau**2 if squared else 1.0
    return _mean_over_rows(factor * log_teacher.exp() * (log_teacher - log_student))


def mse_logits(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference of logits (…, C) over the classes of all rows that count.

    Source: Ba and Caruana 2014, Do Deep Nets Really Need to be Deep?, section 2.2.
    """
    student, teacher = _rows(student, mask), _rows(teacher, mask)
    return _mean_over_rows((student - teacher) ** 2) / student.shape[-1]


def soft_loss(
    student: Tensor,
    teacher: Tensor,
    kind: SoftLoss = "kl",
    temperature: Temperature = 1.0,
    mask: Tensor | None = None,
    *,
    squared: bool = True,
) -> Tensor:
    """The named soft term: :func:`kl`, or :func:`mse_logits`, which is also the one for regression (C = 1)."""
    if kind == "mse_logits":
        return mse_logits(student, teacher, mask)
    return kl(student, teacher, temperature, mask, squared=squared)


def in_blocks(
    loss: Callable[[Tensor, Tensor], Tensor],
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    *,
    block: int = BLOCK,
) -> Tensor:
    """A loss that is a mean over rows, of a few rows at a time where there are many.

    What each block computes on the way is computed again for the gradient: over a vocabulary it would take several
    times the memory of the logits.

    Args:
        loss: of logits (N, C) and (N, C).
        student: logits, (…, C).
        teacher: logits, (…, C).
        mask: which rows count, (…); all by default.
        block: logits of a network in a block, but at least a row.
    """
    student, teacher = _rows(student, mask), _rows(teacher, mask)
    if student.numel() <= block:
        return loss(student, teacher)
    rows = max(1, block // student.shape[-1])

    def total(ours: Tensor, theirs: Tensor) -> Tensor:
        return loss(ours, theirs) * len(ours)

    pairs = zip(student.split(rows), teacher.split(rows), strict=True)
    sums: list[Tensor] = [checkpoint(total, *pair, use_reentrant=False) for pair in pairs]
    return torch.stack(sums).sum() / len(student)


def row_temperatures(
    student: Tensor,
    teacher: Tensor,
    scheduler: TemperatureScheduler,
    base: float,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    mask: Tensor | None = None,
) -> Temperature:
    """A temperature for each row of logits: τᵢ = base + β·(mean(w) − wᵢ), without a gradient.

    ``flsw``: w = (1 − cos(student, teacher))^γ, so that the rows on which the two differ most are softened least.
    ``cwsm``: w = 1/(max softmax(student) + 10⁻³), so that those the student is least sure of are.
    ``constant``: the base.

    Args:
        student: logits, (…, C).
        teacher: logits, (…, C).
        scheduler: which weights w.
        base: the mean temperature over the rows that count, but for what is held above 0.
        beta: β ≥ 0, how far rows spread.
        gamma: γ > 0, of ``flsw``.
        mask: which rows the mean is over, (…); all by default.

    Returns:
        (…) for logits (…, C), at least ``LOWEST_TEMPERATURE``; a number for ``constant``.

    Source: Yang et al. 2020, TextBrewer, temperature schedulers.
    """
    if scheduler == "constant":
        return base
    student, teacher = wide(student.detach()), wide(teacher)
    if scheduler == "flsw":
        # rounding may take the cosine of equal rows above 1
        weights = (1 - F.cosine_similarity(student, teacher, dim=-1)).clamp(min=0) ** gamma
    else:
        weights = 1 / (F.softmax(student, dim=-1).amax(-1) + 1e-3)
    counted = weights.flatten() if mask is None else weights[mask.bool()]
    mean = counted.sum() / max(counted.numel(), 1)
    return (base + beta * (mean - weights)).clamp(min=LOWEST_TEMPERATURE)


def shifted(teacher: Tensor, labels: Tensor) -> Tensor:
    """The teacher's logits (…, C) with the gold class on top: where another is, the two change places.

    Rows whose label (…) is ``IGNORED`` stay as they are.

    Source: Wen et al. 2019, Preparing Lessons: Improve Knowledge Distillation with Better Supervision (probability
    shift).
    """
    top, gold = teacher.argmax(-1, keepdim=True), labels.clamp(min=0).unsqueeze(-1)
    highest, golden = teacher.gather(-1, top), teacher.gather(-1, gold)
    swapped = teacher.scatter(-1, top, golden).scatter(-1, gold, highest)
    return torch.where((labels != IGNORED).unsqueeze(-1), swapped, teacher)


def mixed(soft: Tensor, hard: Tensor, alpha: float) -> Tensor:
    """α·soft + (1 − α)·hard; a term of weight 0 takes no part at all, not even through NaN or its graph."""
    if alpha == 0:
        return hard
    return soft if alpha == 1 else alpha * soft + (1 - alpha) * hard


def annealed(start: float, end: float, progress: float) -> float:
    """The weight that goes linearly from ``start`` to ``end`` as ``progress`` goes from 0 to 1.

    Source: Clark et al. 2019, BAM! Born-Again Multi-Task Networks (teacher annealing).
    """
    return start + (end - start) * min(max(progress, 0.0), 1.0)


def wide(values: Tensor) -> Tensor:
    """In float32, or in float64 if that is what it is."""
    return values if values.dtype == torch.float64 else values.float()


def _rows(logits: Tensor, mask: Tensor | None) -> Tensor:
    """The rows that count, (N, C)."""
    # selected rather than multiplied by 0: an infinity in a row that does not count would turn into NaN
    return wide(logits.flatten(0, -2) if mask is None else logits[mask.bool()])


def _per_row(temperature: Temperature, mask: Tensor | None) -> Temperature:
    """The temperature as it divides the rows that count: a number, or (N, 1)."""
    if not isinstance(temperature, Tensor):
        return temperature
    return (temperature.flatten() if mask is None else temperature[mask.bool()]).unsqueeze(-1)


def _mean_over_rows(values: Tensor) -> Tensor:
    """Sum over classes, mean over rows; zero (with a gradient of zero) for no rows."""
    return values.sum() / max(values.shape[0], 1)

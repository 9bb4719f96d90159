"""Which layer of a student learns from which of its teacher's: the maps that have a name.

Pure functions of two depths, or of what each pair of layers costs. Hidden states count from 1, 0 being the
embeddings; layers of attention count from 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

STRATEGIES = ("uniform", "skip", "last", "first", "mirror_theseus")
SOURCES = ("spread", "first", "last")
"""Which of the teacher's layers a student can start as: see :func:`source_layers`."""


def layer_pairs(strategy: str, student: int, teacher: int) -> list[tuple[int, int]]:
    """(student's, teacher's) hidden states that go together, 1-based, for ``student`` ≤ ``teacher`` layers.

    ``uniform``: m with g(m) = m·L/M, rounded half up, the last with the last (TinyBERT); ``skip``: the same without
    the last, unless there is but one (BERT-PKD); ``last``: the teacher's top layers; ``first``: its bottom ones;
    ``mirror_theseus``: as ``uniform``, the ends of the blocks that the student's layers stand for.
    """
    if strategy == "first":
        return [(m, m) for m in range(1, student + 1)]
    if strategy == "last":
        return [(m, teacher - student + m) for m in range(1, student + 1)]
    pairs = [(m, (2 * m * teacher + student) // (2 * student)) for m in range(1, student + 1)]
    return pairs[:-1] or pairs if strategy == "skip" else pairs


def attention_pairs(strategy: str, student: int, teacher: int) -> list[tuple[int, int]]:
    """(student's, teacher's) layers whose attention goes together, 0-based; arguments as of :func:`layer_pairs`.

    The layers whose outputs do, but for ``mirror_theseus``: there a layer of the student stands for a block of the
    teacher's as a successor does for its predecessors (BERT-of-Theseus), so that it attends as the first layer of
    the block, which reads what it reads, and says what the last one says.
    """
    pairs = [(ours - 1, theirs - 1) for ours, theirs in layer_pairs(strategy, student, teacher)]
    if strategy != "mirror_theseus":
        return pairs
    return [(ours, theirs + 1) for (ours, _), theirs in zip(pairs, [-1, *(end for _, end in pairs)], strict=False)]


def source_layers(init: str, student: int, teacher: int) -> list[int]:
    """Which of the teacher's layers (0-based) each of the student's starts as a copy of.

    ``spread``: evenly with both ends, 0, 2, 4, 7, 9, 11 for six of twelve (DistilBERT); ``first`` and ``last``: the
    bottom and the top ones.
    """
    if init == "spread":
        return [round(i * (teacher - 1) / max(student - 1, 1)) for i in range(student)]
    return [i + (teacher - student) * (init == "last") for i in range(student)]


def written_layers(text: str, lowest: int, highest: int) -> tuple[int, ...]:
    """The layers that a study lists itself, such as ``"3, 6, 9, 12"``; none for an empty text.

    Raises:
        ValueError: they are not rising numbers of this range; the text says what was expected.
    """
    words = [word.strip() for word in text.split(",")] if text.strip() else []
    numbers = tuple(int(word) for word in words if word.isdecimal())
    rising = list(numbers) == sorted(set(numbers))
    if len(numbers) < len(words) or not rising or not all(lowest <= number <= highest for number in numbers):
        raise ValueError(f"expected rising numbers from {lowest} to {highest} with commas between, got {text!r}")
    return numbers


def align(costs: Tensor) -> list[int]:
    """For each of a few teacher layers the student layer that it costs least to match, in strictly rising order.

    Teacher layers choose from the top down; each leaves enough student layers below for those still to choose.

    Args:
        costs: (T, M), T ≤ M, rising layers both.

    Returns:
        T columns, strictly rising.

    Source: Xia et al. 2022, Structured Pruning Learns Compact and Accurate Models (CoFi), section 2.2.
    """
    found: list[int] = []
    end = costs.shape[1]
    for row in reversed(range(costs.shape[0])):
        end = row + int(torch.argmin(costs[row, row:end]))
        found.insert(0, end)
    return found


def transport(costs: Tensor) -> Tensor:
    """How much of each teacher layer goes to each student layer, where moving all of it costs least.

    Every teacher layer holds 1/T of the mass, every student layer takes 1/M of it. Cut into lcm(T, M) equal parts
    on either side, the mass moves part by part: some plan of least cost does (Birkhoff 1946), so that the linear
    programme of the earth mover's distance is an assignment problem, solved exactly and for costs of any size.

    BERT-EMD's cost attention is left out, which after each step shifts mass according to what moving it cost.

    Args:
        costs: (T, M). One that is not finite counts as 0 here: what is wrong is for the loss to show.

    Returns:
        (T, M) in float64 on the CPU, not negative; rows sum to 1/T, columns to 1/M.

    Source: Li et al. 2020, BERT-EMD: Many-to-Many Layer Mapping for BERT Compression with Earth Mover's Distance.
    """
    from scipy.optimize import linear_sum_assignment

    count = math.lcm(*costs.shape)
    above, below = (torch.arange(size).repeat_interleave(count // size) for size in costs.shape)
    finite = torch.where(costs.isfinite(), costs, 0.0).detach().double().cpu()
    _, order = linear_sum_assignment(finite[above][:, below].numpy())
    parts = torch.zeros(costs.shape, dtype=torch.float64)
    moved = (above, below[torch.from_numpy(order)])
    return parts.index_put_(moved, torch.ones(count, dtype=torch.float64), accumulate=True) / count


def anchors(student: int, teacher: int, count: int = 4) -> list[int]:
    """The teacher's hidden states, 1-based and evenly spread with the last, that :func:`align` finds partners for.

    3, 6, 9 and 12 of twelve; no more than the student has layers.
    """
    return [pair[1] for pair in layer_pairs("uniform", min(student, count), teacher)]

"""Which layer of a student learns from which of its teacher's: the maps that have a name.

Pure functions of two depths. Hidden states count from 1, 0 being the embeddings; layers of attention count from 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

STRATEGIES = ("uniform", "skip", "last", "first")


def layer_pairs(strategy: str, student: int, teacher: int) -> list[tuple[int, int]]:
    """(student's, teacher's) hidden states that go together, 1-based, for ``student`` ≤ ``teacher`` layers.

    ``uniform``: m with g(m) = m·L/M, rounded half up, the last with the last (TinyBERT); ``skip``: the same without
    the last, unless there is but one (BERT-PKD); ``last``: the teacher's top layers; ``first``: its bottom ones.
    """
    if strategy == "first":
        return [(m, m) for m in range(1, student + 1)]
    if strategy == "last":
        return [(m, teacher - student + m) for m in range(1, student + 1)]
    pairs = [(m, (2 * m * teacher + student) // (2 * student)) for m in range(1, student + 1)]
    return pairs[:-1] or pairs if strategy == "skip" else pairs


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


def anchors(student: int, teacher: int, count: int = 4) -> list[int]:
    """The teacher's hidden states, 1-based and evenly spread with the last, that :func:`align` finds partners for.

    3, 6, 9 and 12 of twelve; no more than the student has layers.
    """
    return [pair[1] for pair in layer_pairs("uniform", min(student, count), teacher)]

"""What a network may cost: a part of the multiply-accumulates before, or of the teacher's milliseconds.

Owns what a target is a part of. How the budget is spent is allocation.py's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from compress_search import Batch, Context, Params, Subject
from compress_search.encoders import subject_of

from .cuts import Cut, LayerCost, macs_per_layer


@dataclass(frozen=True)
class Budget:
    """What the layers may cost together: ``cap`` at the end, ``full`` before anything is pruned from them.

    ``whole`` is what a ``target`` is a part of; ``unit`` names it for people.
    """

    cost: LayerCost
    full: float
    cap: float
    whole: float
    unit: str

    @property
    def gone(self) -> float:
        """The part of ``full`` that is to go."""
        return max(0.0, 1 - self.cap / self.full)

    def at(self, gone: float) -> float:
        """What they may cost when this part has gone."""
        return self.full * (1 - gone)


def budget_of(subject: Subject, cut: Cut, params: Params, context: Context) -> Budget | None:
    """The budget that the parameters ask for; None where they are ratios.

    Multiply-accumulates are counted for the calibration data's mean length, and against the model before this step;
    milliseconds against the teacher.
    """
    if params["budget"] == "ratios":
        return None
    left = subject.having(hidden=cut.hidden)
    if params["budget"] == "macs":
        length = _mean_length(context.calibration(int(params.get("calib_examples", 512))))
        cost, unit = macs_per_layer(left, length), "multiply-accumulates of the model before"
        whole = subject.layers * macs_per_layer(subject, length)(int(subject.heads), int(subject.intermediate))
    else:
        cost, unit = context.layer_latency(left), "milliseconds of the teacher's layers"
        teacher = subject_of(context.teacher, subject.task, subject.device)
        of_teacher = context.layer_latency(teacher)
        whole = teacher.layers * of_teacher(round(teacher.heads), round(teacher.intermediate))
    full = cut.layers * cost(int(subject.heads), int(subject.intermediate))
    return Budget(cost, full, float(params["target"]) * whole, whole, unit)


def _mean_length(batches: Iterator[Batch]) -> int:
    lengths = [int(length) for batch in batches for length in batch["attention_mask"].sum(1)]
    return round(sum(lengths) / len(lengths))

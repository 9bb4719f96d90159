"""Born-again networks: the teacher's own architecture, trained anew on the labels and on what the teacher says.

Each generation starts where the teacher once started, before it was trained on the task, and learns from the
generation before it. Nothing gets smaller: a better network of the same shape is to gain what later steps lose,
and is the control for every method that replaces layers by equal ones. Owns the generations and their shares of the
budget.

Sources: Furlanello et al. 2018, Born-Again Neural Networks; Clark et al. 2019, BAM! (annealing).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from compress_search import Batch, Candidate, Context, Dim, Method, Params, Stage, Subject
from compress_search.encoders import read_features

from .distillation.soft_targets import (
    SoftTerm,
    annealed_loss,
    crf_missing,
    idle_soft,
    mix_space,
    soft_space,
)
from .distillation.starts import beginning, started_anew, startless

NO_MEAN = "and several generations have no transitions in common: expected emission, or average: false"


class BornAgain(Method):
    """Generations of networks of the same shape, each the student of the one before."""

    stage = Stage.STUDENT

    def search_space(self, teacher: Subject) -> Mapping[str, Dim]:
        """With ``average`` a generation learns from the mean logits of the teacher and all generations before."""
        return {
            "generations": Dim.integer(1, 3, 1),
            **mix_space(),
            **soft_space(teacher),
            "average": Dim.flag(False, expert=True),
            "learning_rate": Dim.real(1e-6, 1e-2, 5e-5, log=True, expert=True),
        }

    def unsupported(self, subject: Subject) -> str | None:
        """From a trained network on nothing is born again: the control would be no control."""
        return startless(subject)

    def effective(self, subject: Subject, params: Params) -> Params:
        """The first generation has one network to learn from: nothing to average; and nothing of no soft term."""
        found = {**params, "average": bool(params["average"]) and params["generations"] != 1}
        idle = idle_soft(subject, params)
        return {name: value for name, value in found.items() if name not in idle}

    def faults(self, subject: Subject, params: Params) -> Mapping[str, str]:
        """Transitions of several generations at once."""
        chained = params.get("crf_target", "emission") != "emission"
        return {"crf_target": f"{params['crf_target']}, {NO_MEAN}"} if chained and params["average"] else {}

    def missing(self, teacher: Subject) -> Mapping[str, str]:
        """A CRF to learn from."""
        return crf_missing(teacher)

    def trains(self, params: Params) -> bool:
        """Always."""
        return True

    def apply(self, candidate: Candidate, params: Params, context: Context) -> Candidate:
        """Train generation after generation on equal shares of the budget; the last one is the result."""
        ancestors: list[nn.Module] = []
        generations = int(params["generations"])
        for _ in range(generations):
            student = started_anew(candidate, beginning(context))
            elders = ancestors[:] if params["average"] else ancestors[-1:]
            _train(student, candidate.subject.task, elders, params, context)
            ancestors.append(student.requires_grad_(False))
        return candidate.replace(network=ancestors[-1].requires_grad_(True))


def _train(student: nn.Module, task: str, elders: Sequence[nn.Module], params: Params, context: Context) -> None:
    teacher = targets(elders, context, with_teacher=not elders or bool(params["average"]))
    speaker = elders[-1] if elders else None
    loss, on_step = annealed_loss(context, SoftTerm.of(task, params), params, teacher, speaker)
    share, rate = 1 / int(params["generations"]), float(params["learning_rate"])
    context.fit(student, loss=loss, share=share, learning_rate=rate, on_step=on_step)


def targets(elders: Sequence[nn.Module], context: Context, *, with_teacher: bool) -> Callable[[Batch], Tensor]:
    """The mean logits of these networks, and of the teacher if it counts among them."""

    def mean(batch: Batch) -> Tensor:
        with torch.no_grad():
            said = [read_features(elder, batch, ["logits"])["logits"] for elder in elders]
        if with_teacher:
            said.append(context.teacher_logits(batch))
        return torch.stack(said).mean(0)

    return mean

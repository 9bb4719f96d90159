"""Recovery by knowledge distillation: train what earlier steps damaged on the labels and the teacher's logits.

Where a study names unlabelled text, the teacher's logits on that can come first (Hinton's transfer set); where it
names further tasks, these can have their turns beside its own. Owns the schedule of the two terms. Changes weights
only: no shape, no size, no latency. After it nothing is left to recover, so the trait "lossy" goes.

Sources: Hinton et al. 2015, Distilling the Knowledge in a Neural Network; Clark et al. 2019, BAM! Born-Again
Multi-Task Networks (annealing, turns).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress_search import Candidate, Context, Dim, Method, Params, Stage, Subject

from .distillation.objective import UNLABELLED_BATCH, text_missing
from .distillation.soft_targets import (
    SoftTerm,
    annealed_weight,
    crf_missing,
    idle_soft,
    mix_space,
    soft_space,
    soft_target_loss,
    transfer_loss,
)
from .distillation.turns import settled_turns, taking_turns, turns_missing, turns_space

LONGEST_TRANSFER = 0.9
"""The part of the training that unlabelled text may take: the labels have the last word."""


class Distill(Method):
    """Hinton's distillation after lossy steps; the teacher's logits are computed once per study."""

    stage = Stage.RECOVERY

    def search_space(self, teacher: Subject) -> Mapping[str, Dim]:
        """``transfer`` is the part of the training that goes before, on unlabelled text and the soft term alone."""
        text = {"transfer": Dim.real(0.0, LONGEST_TRANSFER, 0.0, expert=True)}
        return {
            **mix_space(),
            **soft_space(teacher, "posterior"),
            **(text if "unlabelled" in teacher.traits else {}),
            **turns_space(teacher),
            "learning_rate": Dim.real(1e-6, 1e-2, 5e-5, log=True, expert=True),
        }

    def unsupported(self, subject: Subject) -> str | None:
        """Only what a lossy step left can be recovered."""
        return None if "lossy" in subject.traits else "there is nothing to recover: no step before it was lossy"

    def missing(self, teacher: Subject) -> Mapping[str, str]:
        """Text without labels to transfer by, further tasks, and a CRF to learn from."""
        return text_missing(teacher, "transfer") | turns_missing(teacher) | crf_missing(teacher)

    def effective(self, subject: Subject, params: Params) -> Params:
        """Without what is said of a soft term that has no weight, or of turns that nobody takes."""
        idle = set() if params.get("transfer") else idle_soft(subject, params)
        return {name: value for name, value in settled_turns(subject, params).items() if name not in idle}

    def after(self, subject: Subject, params: Params) -> Subject:
        """The same shapes, recovered."""
        return subject.without("lossy")

    def trains(self, params: Params) -> bool:
        """Always."""
        return True

    def apply(self, candidate: Candidate, params: Params, context: Context) -> Candidate:
        """Train a copy on its whole share of the budget."""
        candidate = candidate.copy()
        term, transfer = SoftTerm.of(candidate.subject.task, params), float(params.get("transfer", 0.0))
        rate = float(params["learning_rate"])
        if transfer:
            context.fit(
                candidate.network,
                loss=transfer_loss(context, term),
                batches=context.unlabelled(UNLABELLED_BATCH),
                share=transfer,
                learning_rate=rate,
            )
        alpha, on_step = annealed_weight(params)
        loss = soft_target_loss(context, term, alpha=alpha)
        options: dict[str, Any] = {"loss": loss, "on_step": on_step}
        if params.get("by_turns"):
            options = taking_turns(candidate, params, context, loss, alpha, on_step)
        context.fit(candidate.network, share=1 - transfer, learning_rate=rate, **options)
        return candidate.replace(subject=self.after(candidate.subject, params))

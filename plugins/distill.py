"""Recovery by knowledge distillation: train what earlier steps damaged on the labels and the teacher's logits.

Owns the schedule of the two terms. Changes weights only: no shape, no size, no latency. After it nothing is
left to recover, so the trait "lossy" goes.

Sources: Hinton et al. 2015, Distilling the Knowledge in a Neural Network; Clark et al. 2019, BAM! Born-Again
Multi-Task Networks (annealing).
"""

from __future__ import annotations

from collections.abc import Mapping

from compress_search import Candidate, Context, Dim, Method, Params, Stage, Subject
from compress_search.losses import annealed

from .soft_targets import SoftTerm, soft_space, soft_target_loss


class Distill(Method):
    """Hinton's distillation after lossy steps; the teacher's logits are computed once per study."""

    stage = Stage.RECOVERY

    def search_space(self, teacher: Subject) -> Mapping[str, Dim]:
        """``alpha`` weighs the soft term; with annealing it goes linearly to ``anneal_to`` over the training."""
        return {
            "alpha": Dim.real(0.0, 1.0, 0.5),
            **soft_space(teacher),
            "annealing": Dim.choice(("none", "linear"), "none", expert=True),
            "anneal_to": Dim.real(0.0, 1.0, 0.0, when={"annealing": ("linear",)}, expert=True),
            "learning_rate": Dim.real(1e-6, 1e-2, 5e-5, log=True, expert=True),
        }

    def unsupported(self, subject: Subject) -> str | None:
        """Only what a lossy step left can be recovered."""
        return None if "lossy" in subject.traits else "there is nothing to recover: no step before it was lossy"

    def after(self, subject: Subject, params: Params) -> Subject:
        """The same shapes, recovered."""
        return subject.without("lossy")

    def trains(self, params: Params) -> bool:
        """Always."""
        return True

    def apply(self, candidate: Candidate, params: Params, context: Context) -> Candidate:
        """Train a copy on its whole share of the budget."""
        candidate = candidate.copy()
        alpha, progress = float(params["alpha"]), 0.0
        end = float(params.get("anneal_to", alpha))

        def on_step(step: int, steps: int) -> None:
            nonlocal progress
            progress = step / steps

        loss = soft_target_loss(
            context,
            SoftTerm.of(candidate.subject.task, params),
            alpha=lambda: annealed(alpha, end, progress),
        )
        context.fit(candidate.network, loss=loss, learning_rate=float(params["learning_rate"]), on_step=on_step)
        return candidate.replace(subject=self.after(candidate.subject, params))

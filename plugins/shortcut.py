"""A student of some of its teacher's layers, whose head makes up for the others by a linear map found in one go.

Least squares bring the last states of what stays to those of the whole network, and the head takes the map in: no
weight is added, and the student answers as its teacher does, as far as that is linear, before any training. Which
layers stay is found in the same way. Owns the parameters, and what follows: nothing, or training on logits and
labels.

Sources: Din et al. 2024, Jump to Conclusions: Short-Cutting Transformers With Linear Transformations; Shopkhoev et
al. 2025, ReplaceMe: Network Simplification via Depth Pruning and Transformer Block Linearization.
"""

from __future__ import annotations

from collections.abc import Mapping

from compress_search import Candidate, Context, Dim, Method, Params, Stage, Subject

from .distillation.shortcuts import best_cut, blocks_out, take_in
from .distillation.soft_targets import SoftTerm, crf_missing, crf_space, soft_target_loss, tempered
from .distillation.students import cut_student, student_subject, unfit

KEPT = ("fitted", "first", "last")


class Shortcut(Method):
    """Fewer layers, and a head that reads the last one left as if it were the teacher's last."""

    stage = Stage.STUDENT

    def search_space(self, teacher: Subject) -> Mapping[str, Dim]:
        """``keep`` says which layers: the first, the last, or some of either, as the map explains most."""
        depths = list(range(1, teacher.layers)) or [1]
        trained: dict[str, tuple[str | bool, ...]] = {"trained": (True,)}
        space = {
            "layers": Dim.choice(depths, max(1, teacher.layers // 2)),
            "keep": Dim.choice(KEPT, "fitted", expert=True),
            "calib_examples": Dim.choice((256, 512, 1024, 2048, 4096), 1024, expert=True),
            "trained": Dim.flag(True, expert=True),
            "alpha": Dim.real(0.0, 1.0, 0.5, when=trained, expert=True),
            "learning_rate": Dim.real(1e-6, 1e-2, 5e-5, log=True, when=trained, expert=True),
        }
        if teacher.task != "text-regression":
            soft = {**trained, **tempered(teacher)}
            space["temperature"] = Dim.real(1.0, 10.0, 2.0, when=soft, expert=True)
        return space | crf_space(teacher, when=trained)

    def unsupported(self, subject: Subject) -> str | None:
        """A student is made of the teacher's own layers, all alike."""
        return unfit(subject)

    def effective(self, subject: Subject, params: Params) -> Params:
        """Without what says nothing where the logits have no weight."""
        idle = set() if params.get("alpha") else {"temperature", "crf_target"}
        return {name: value for name, value in params.items() if name not in idle}

    def missing(self, teacher: Subject) -> Mapping[str, str]:
        """A CRF to learn from."""
        return crf_missing(teacher)

    def after(self, subject: Subject, params: Params) -> Subject:
        """Fewer layers."""
        return student_subject(subject, int(params["layers"]), 1.0)

    def trains(self, params: Params) -> bool:
        """Where it is not left as least squares make it."""
        return bool(params["trained"])

    def apply(self, candidate: Candidate, params: Params, context: Context) -> Candidate:
        """Find layers and map, have the head take it in, then train everything."""
        student = candidate_shortcut(candidate, params, context)
        if params["trained"]:
            alpha = float(params["alpha"])
            loss = soft_target_loss(context, SoftTerm.of(candidate.subject.task, params), alpha=lambda: alpha)
            context.fit(student.network, loss=loss, learning_rate=float(params["learning_rate"]))
        return student

    def evaluate(self, candidate: Candidate, context: Context) -> Mapping[str, float]:
        """The part of the variance of the teacher's last states that the map left unexplained."""
        found: Mapping[str, float] = candidate.notes.get("shortcut", {})
        return found


def candidate_shortcut(candidate: Candidate, params: Params, context: Context) -> Candidate:
    """The student as least squares make it; in a dry run with weights that mean nothing."""
    ways = blocks_out(candidate.subject.layers, int(params["layers"]))
    ways = {"fitted": ways, "first": ways[:1], "last": ways[-1:]}[str(params["keep"])]
    if context.dry:
        return cut_student(candidate, ways[0], 1.0)
    pooled = candidate.subject.task != "token-classification"
    batches = context.calibration(int(params["calib_examples"]))
    whole = candidate.copy().network.to(context.device).eval()
    kept, found = best_cut(whole, ways, batches, pooled=pooled)
    student = cut_student(candidate, kept, 1.0)
    take_in(student.network.to(context.device), found)
    return student.replace(notes={**student.notes, "shortcut": {"unexplained": found.unexplained}})

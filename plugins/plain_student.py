"""The control: a student without any method, the bottom layers of the model trained directly on the task.

Every other student has to be better than this one at the same size; so has what is trained large and then
compressed. Owns the choice of the start: the teacher's untrained layers, as a model of that size would have been
trained in the first place, its trained ones, or a small pretrained network that the study names. Of a narrower
student's channels it keeps those that matter most, as every narrower student does.
"""

from __future__ import annotations

from collections.abc import Mapping

from compress_search import Candidate, Context, Dim, Method, Params, Stage, Subject

from .distillation.soft_targets import SoftTerm, crf_missing, crf_space, soft_target_loss, tempered
from .distillation.starts import (
    CHECKPOINT,
    NO_CHECKPOINT,
    beginning,
    begun_faults,
    checkpoint_subject,
    checkpoints,
    cut_when,
    from_checkpoint,
    started_anew,
    startless,
)
from .distillation.students import cut_student, settled_width, student_subject, width_dim

STARTS = ("untrained", "trained")
"""Where the layers come from that are cut out."""


class PlainStudent(Method):
    """The bottom layers, fine-tuned; with ``alpha`` above 0 on the teacher's logits too (plain distillation)."""

    stage = Stage.STUDENT

    def search_space(self, teacher: Subject) -> Mapping[str, Dim]:
        """``layers`` of the teacher's are kept, from the bottom, which suits a truncated network best.

        ``width`` is the part of the teacher's that is *kept*.
        """
        cut = cut_when(teacher, *STARTS)
        space = {
            "layers": Dim.integer(1, max(teacher.layers, 1), max(teacher.layers // 2, 1), when=cut),
            "width": width_dim(teacher, when=cut, expert=True),
            "start": Dim.choice((*STARTS, *checkpoints(teacher)), "trained", expert=True),
            "alpha": Dim.real(0.0, 1.0, 0.0, expert=True),
            "learning_rate": Dim.real(1e-6, 1e-2, 5e-5, log=True, expert=True),
        }
        if teacher.task != "text-regression":
            space["temperature"] = Dim.real(1.0, 10.0, 2.0, when=tempered(teacher), expert=True)
        return space | crf_space(teacher)

    def unsupported(self, subject: Subject) -> str | None:
        """A control is a plain network: layers all alike, each with weights of its own."""
        if "shared" in subject.traits:
            return "its layers share weights"
        return "its layers differ in shape" if "non-uniform" in subject.traits else None

    def effective(self, subject: Subject, params: Params) -> Params:
        """No more layers than there are, a width of whole heads, and nothing of logits that nobody looks at."""
        found = settled_width(subject, params)
        if "layers" in found:
            found["layers"] = min(int(found["layers"]), subject.layers)
        idle = set() if params["alpha"] else {"temperature", "crf_target"}
        return {name: value for name, value in found.items() if name not in idle}

    def faults(self, subject: Subject, params: Params) -> Mapping[str, str]:
        """An untrained start that nobody knows, or a checkpoint that is no student's."""
        if params["start"] == CHECKPOINT:
            return begun_faults(subject, params)
        fault = startless(subject) if params["start"] == "untrained" else None
        return {"start": f"untrained, and {fault}"} if fault else {}

    def missing(self, teacher: Subject) -> Mapping[str, str]:
        """A CRF to learn from, and a small network to start as."""
        start = {} if checkpoints(teacher) else {f"start: {CHECKPOINT}": NO_CHECKPOINT}
        return start | crf_missing(teacher)

    def after(self, subject: Subject, params: Params) -> Subject:
        """So many layers, or the checkpoint's own shapes."""
        if params["start"] == CHECKPOINT:
            return checkpoint_subject(subject)
        return student_subject(subject, int(params["layers"]), float(params["width"]))

    def trains(self, params: Params) -> bool:
        """Always."""
        return True

    def apply(self, candidate: Candidate, params: Params, context: Context) -> Candidate:
        """Cut, or take the checkpoint, then train everything on the whole share of the budget."""
        student = _started(candidate, params, context)
        alpha = float(params["alpha"])
        loss = soft_target_loss(context, SoftTerm.of(candidate.subject.task, params), alpha=lambda: alpha)
        context.fit(student.network, loss=loss, learning_rate=float(params["learning_rate"]))
        return student


def _started(candidate: Candidate, params: Params, context: Context) -> Candidate:
    if params["start"] == CHECKPOINT:
        return from_checkpoint(candidate, context)
    source = started_anew(candidate, beginning(context) if params["start"] == "untrained" else None)
    return cut_student(candidate.replace(network=source), range(int(params["layers"])), float(params["width"]))

"""Keeps the first layers of the encoder and fine-tunes what is left: the control every depth method must beat.

Source: Sajjad et al., On the Effect of Dropping Layers of Pre-trained Transformer Models, 2023 (top layers).
"""

from compress_search import Candidate, Context, Dim, Method, Params, Space, Stage, Subject
from compress_search.encoders import keep_layers


class FirstLayers(Method):
    """A shallower network, trained on the labels alone."""

    stage = Stage.STUDENT

    def search_space(self, teacher: Subject) -> Space:
        """``depth`` layers stay."""
        return {"depth": Dim.integer(1, max(1, teacher.layers - 1), default=max(1, teacher.layers // 2))}

    def unsupported(self, subject: Subject) -> str | None:
        """Something must be left to drop."""
        return "it has a single layer" if subject.layers < 2 else None

    def after(self, subject: Subject, params: Params) -> Subject:
        """Fewer layers; recovery could still win back accuracy."""
        return subject.having("lossy", layers=int(params["depth"]))

    def trains(self, params: Params) -> bool:
        """Always."""
        return True

    def apply(self, candidate: Candidate, params: Params, context: Context) -> Candidate:
        """Cut, then train on this step's part of the trial's budget."""
        student = candidate.copy()
        keep_layers(student.network, range(int(params["depth"])))
        context.fit(student.network)
        return student.replace(subject=self.after(candidate.subject, params))

"""A student of some of its teacher's layers, whose head makes up for the others by a linear map.

Least squares bring the last states of what stays to those of the whole network, and the head takes the map in: no
weight is added, and as far as a linear map goes the student answers as its teacher does before any training. Which
layers stay is found in the same way. Owns the parameters and what follows: training on logits and labels, or none.

Sources: Din et al. 2024, Jump to Conclusions: Short-Cutting Transformers With Linear Transformations; Shopkhoev et
al. 2025, ReplaceMe: Network Simplification via Depth Pruning and Transformer Block Linearization.
"""

from __future__ import annotations

from collections.abc import Mapping

from compress_search import Candidate, Context, Dim, Method, Params, Stage, Subject

from .distillation.layer_maps import SOURCES, source_layers
from .distillation.shortcuts import best_cut, blocks_out, take_in
from .distillation.soft_targets import SoftTerm, crf_missing, crf_space, soft_target_loss, tempered
from .distillation.starts import settled_cut
from .distillation.students import cut_student, student_subject, unfit

FITTED = "fitted"


class Shortcut(Method):
    """Fewer layers, and a head that reads the last one left as if it were the teacher's last."""

    stage = Stage.STUDENT

    def search_space(self, teacher: Subject) -> Mapping[str, Dim]:
        """``init`` says which layers stay: all but one block of consecutive ones, fitted, or those it names."""
        depths = list(range(1, teacher.layers)) or [1]
        examples = 256 if teacher.task == "token-classification" else 1024  # the states of all words are read
        trained: dict[str, tuple[str | bool, ...]] = {"trained": (True,)}
        space = {
            "layers": Dim.choice(depths, max(1, teacher.layers // 2)),
            "init": Dim.choice((FITTED, *SOURCES), FITTED, expert=True),
            "calib_examples": Dim.choice((256, 512, 1024, 2048, 4096), examples, expert=True),
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
        """Layers by the first name that they have, and nothing of logits that have no weight."""
        found = dict(params) if params["init"] == FITTED else settled_cut(subject, params)
        idle = set() if params.get("alpha") else {"temperature", "crf_target"}
        return {name: value for name, value in found.items() if name not in idle}

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
        student = fitted_student(candidate, params, context)
        if params["trained"]:
            alpha = float(params["alpha"])
            loss = soft_target_loss(context, SoftTerm.of(candidate.subject.task, params), alpha=lambda: alpha)
            context.fit(student.network, loss=loss, learning_rate=float(params["learning_rate"]))
        return student

    def evaluate(self, candidate: Candidate, context: Context) -> Mapping[str, float]:
        """The part of the variance of the last states that the map would leave unexplained of other examples."""
        found: Mapping[str, float] = candidate.notes.get("shortcut", {})
        return found


def fitted_student(candidate: Candidate, params: Params, context: Context) -> Candidate:
    """The student as least squares make it; in a dry run with weights that mean nothing."""
    depth, count, init = candidate.subject.layers, int(params["layers"]), str(params["init"])
    ways = blocks_out(depth, count) if init == FITTED else [source_layers(init, count, depth)]
    if context.dry:
        return cut_student(candidate, ways[0], 1.0)
    pooled = candidate.subject.task != "token-classification"
    batches = context.calibration(int(params["calib_examples"]))
    whole = candidate.copy().network.to(context.device).eval()
    kept, found = best_cut(whole, ways, batches, pooled=pooled)
    student = cut_student(candidate, kept, 1.0)
    take_in(student.network.to(context.device), found)
    return student.replace(notes={**student.notes, "shortcut": {"unexplained": found.unexplained}})

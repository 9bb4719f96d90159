"""Where a network starts that is no part of the trained teacher.

As the teacher once started, as layers of the study's masked language model (``start: masked_lm``), or as the small
pretrained network that a study names (``start: checkpoint``). Owns what such a student's shapes are, and what is
wrong with them. Trains nothing.

Source of the last: Turc et al. 2019, Well-Read Students Learn Better.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from compress_search import Candidate, Context, Dim, Params, Subject, TrialError

from .language_models import language_model, started_from
from .layer_maps import SOURCES, source_layers
from .masked_text import MASKED_LM, unlike_teacher
from .students import cut_student, same_shape, settled_width, student_subject

CUT, LANGUAGE, CHECKPOINT = "teacher", "masked_lm", "checkpoint"
"""What ``start`` is called where a student starts as layers of one or the other, or as the small network itself."""
NO_CHECKPOINT = "a small pretrained network of the teacher's vocabulary: name one under teacher.student_start"
_TRAIT = "student-start"
_THE_TEACHERS = ("family", "vocabulary", "token_types")
"""What has to be the teacher's: it reads the same inputs."""

CAME_TRAINED = (
    "the teacher came trained, so that nothing is known of its start: have it trained by teacher.fine_tune"
)


def startless(subject: Subject) -> str | None:
    """Why nothing can start where the teacher did; None where it can."""
    return CAME_TRAINED if "came-trained" in subject.traits else None


def beginning(context: Context) -> nn.Module:
    """The network that the teacher was before it was trained on the task.

    Raises:
        TrialError: it came trained.
    """
    start = context.untrained()
    if start is None:
        raise TrialError(CAME_TRAINED)
    return start


def started_anew(candidate: Candidate, start: nn.Module | None) -> nn.Module:
    """A copy of the candidate's network with the weights of ``start``.

    A tensor whose shape an earlier step changed stays as that step left it; without a start all do.
    """
    network = candidate.copy().network
    if start is not None:
        fresh, own = start.state_dict(), network.state_dict()
        fitting = {name: fresh[name] for name, value in own.items() if fresh[name].shape == value.shape}
        network.load_state_dict({**own, **fitting})
    return network


def checkpoints(teacher: Subject) -> tuple[str, ...]:
    """The option of ``start`` that is only there where a study names a network for it."""
    return (CHECKPOINT,) if _TRAIT in teacher.traits else ()


def cuts(teacher: Subject) -> tuple[str, ...]:
    """The options of :func:`start_space` by which students are cut out of something larger."""
    return (CUT, LANGUAGE) if "masked-lm" in teacher.traits else (CUT,)


def cut_when(teacher: Subject, *starts: str) -> dict[str, tuple[str, ...]]:
    """When dimensions of a student's shape say something: where it starts otherwise than as that network."""
    return {"start": starts} if checkpoints(teacher) else {}


def start_space(teacher: Subject) -> dict[str, Dim]:
    """Where students start that are else cut out of their teacher; nothing to choose without another network."""
    starts = (*cuts(teacher), *checkpoints(teacher))
    return {"start": Dim.choice(starts, CUT, expert=True)} if len(starts) > 1 else {}


def start_missing(teacher: Subject) -> dict[str, str]:
    """What :func:`start_space` would need, for ``Method.missing``."""
    found = {} if checkpoints(teacher) else {f"start: {CHECKPOINT}": NO_CHECKPOINT}
    return found if LANGUAGE in cuts(teacher) else {**found, f"start: {LANGUAGE}": MASKED_LM}


def checkpoint_subject(subject: Subject) -> Subject:
    """The shapes of a student that starts as the study's small pretrained network."""
    found = _unlike(subject)
    numbers = {name: float(value) for name, value in found.items() if name not in _THE_TEACHERS}
    sizes = {name: type(getattr(subject, name))(number) for name, number in numbers.items()}
    student = subject.having("lossy", **sizes)
    return student.having(head_dim=round(student.hidden / student.heads))


def checkpoint_fault(subject: Subject) -> str | None:
    """Why no student can start as the study's small pretrained network; None where one can."""
    found = _unlike(subject)
    wrong = [f"{name} {found[name]} and not {getattr(subject, name)}" for name in _THE_TEACHERS if name in found]
    if wrong:
        return f"checkpoint, and teacher.student_start is unlike the teacher: {', '.join(wrong)}"
    student = checkpoint_subject(subject)
    if student.layers > subject.layers or student.parameters >= subject.parameters:
        return (
            f"checkpoint, and teacher.student_start, with {student.layers} layers and "
            f"{student.parameters} parameters, is no smaller than the teacher"
        )
    return None


def _unlike(subject: Subject) -> Mapping[str, str]:
    """The shapes of the small network that are not the teacher's."""
    named = (trait.removeprefix(f"{_TRAIT}:") for trait in subject.traits if trait.startswith(f"{_TRAIT}:"))
    pairs = (shape.partition("=") for shape in sorted(named))
    return {name: value for name, _, value in pairs}


def from_checkpoint(candidate: Candidate, context: Context) -> Candidate:
    """The student that starts as the study's small pretrained network, with a head that knows nothing yet.

    Raises:
        TrialError: the study names none, or it cannot be a student.
    """
    network = context.student_start()
    if network is None:
        raise TrialError(f"this needs {NO_CHECKPOINT}")
    if fault := checkpoint_fault(candidate.subject):
        raise TrialError(fault)
    return candidate.replace(network=network, subject=checkpoint_subject(candidate.subject))


def init_dim(when: Mapping[str, tuple[str, ...]]) -> Dim:
    """Which of the teacher's layers a student starts as. Spread ones reach up, the first know one another."""
    return Dim.choice(SOURCES, "spread", when=when, usual=("spread", "first"))


def settled_cut(teacher: Subject, params: Params) -> dict[str, int | float | str]:
    """The parameters with a width of whole heads, and layers to start as by the first name that they have."""
    found = settled_width(teacher, params)
    if "init" in found:
        depths = int(found["layers"]), teacher.layers
        wanted = source_layers(str(found["init"]), *depths)
        found["init"] = next(name for name in SOURCES if source_layers(name, *depths) == wanted)
    return found


def begun_subject(subject: Subject, params: Params) -> Subject:
    """The shapes of :func:`begun`'s result."""
    if params.get("start") == CHECKPOINT:
        return checkpoint_subject(subject)
    return student_subject(subject, int(params["layers"]), float(params["width"]))


def begun_faults(subject: Subject, params: Params) -> dict[str, str]:
    """A student that is no smaller than its teacher, or a network that is none, by dimension."""
    if params.get("start") == CHECKPOINT:
        fault = checkpoint_fault(subject)
        return {"start": fault} if fault else {}
    if unlike := params.get("start") == LANGUAGE and unlike_teacher(subject):
        return {"start": f"{LANGUAGE}, and {unlike}"}
    fault = same_shape(subject, int(params["layers"]), float(params["width"]))
    return {"layers": fault} if fault else {}


def begun(candidate: Candidate, params: Params, context: Context) -> Candidate:
    """A student before any training, by ``start`` and, where it is cut out, ``layers``, ``width`` and ``init``.

    Raises:
        TrialError: there is no such network, or none that fits.
    """
    if params.get("start") == CHECKPOINT:
        return from_checkpoint(candidate, context)
    if params.get("start") == LANGUAGE:
        candidate = started_from(candidate, language_model(candidate, context))
    sources = source_layers(str(params["init"]), int(params["layers"]), candidate.subject.layers)
    return cut_student(candidate, sources, float(params["width"]))

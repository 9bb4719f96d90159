"""The plugin interface: everything a compression method must, may and can rely on, on one screen.

Knows nothing of the search, of storage or of any particular method.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

from compress_search.candidate import Candidate, Subject
from compress_search.space import Dim, Params

if TYPE_CHECKING:
    import torch
    from torch import nn

Batch = dict[str, "torch.Tensor"]
"""``input_ids``, ``attention_mask`` (B, S), where the family has them ``token_type_ids``; ``labels`` (B,) or
(B, S) with -100 where there is none; ``index`` (B,), the rows' numbers in their split. Unlabelled batches have
neither ``labels`` nor ``index``."""

Loss = Callable[["nn.Module", Batch], "torch.Tensor"]
"""(network, batch) -> scalar to minimise."""


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters trained at a peak learning rate, or with a decoupled weight decay, of their own."""

    parameters: Collection[nn.Parameter]
    learning_rate: float | None = None
    weight_decay: float | None = None


@dataclass(frozen=True)
class AuxiliaryTask:
    """A further task that the study names, as a method is lent it.

    ``kind`` is as :attr:`Subject.task`, ``outputs`` the number of logits C and ``examples`` that of training rows.
    ``batches`` are endless, of those rows and on the context's device. ``loss`` compares logits, (B, C) or
    (B, S, C), with a batch's labels; ``teacher_logits`` are those of the task's own teacher, of the same shape.
    """

    kind: str
    outputs: int
    examples: int
    batches: Iterator[Batch]
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    teacher_logits: Callable[[Batch], torch.Tensor]


class Stage(IntEnum):
    """The order in which the steps of a recipe apply."""

    VOCABULARY = 1
    STUDENT = 2
    STRUCTURE = 3
    SHARING = 4
    FACTORIZATION = 5
    SPARSITY = 6
    RECOVERY = 7
    PRECISION = 8
    RUNTIME = 9

    @property
    def exclusive(self) -> bool:
        """Whether a recipe holds at most one step of this stage."""
        return self in (Stage.STUDENT, Stage.RECOVERY, Stage.PRECISION, Stage.RUNTIME)


class Context(Protocol):
    """What the engine lends a method for the time of one step."""

    @property
    def seed(self) -> int:
        """Where all randomness of the step comes from."""

    @property
    def device(self) -> torch.device:
        """Where networks and batches live."""

    @property
    def scratch(self) -> Path:
        """A directory of this trial's own; removed when the trial ends."""

    @property
    def dry(self) -> bool:
        """Whether only shapes matter: ``fit`` trains zero steps and trained weights mean nothing."""

    @property
    def examples(self) -> int:
        """How many training examples there are."""

    @property
    def teacher(self) -> nn.Module:
        """The frozen teacher in evaluation mode on ``device``; never to be changed."""

    def untrained(self) -> nn.Module | None:
        """The teacher as it was before it was trained on the task: a network of the caller's own, on ``device``.

        None where the study's model came trained, so that nothing is known of its start.
        """

    def student_start(self) -> nn.Module | None:
        """The study's small pretrained network with a new head: a network of the caller's own, on ``device``.

        Of the teacher's vocabulary and task, and with a CRF that knows nothing yet where the teacher has one. None
        where the study names none; the subject has the trait "student-start" if it does.
        """

    def masked_lm(self) -> nn.Module | None:
        """The study's masked language model, of the teacher's vocabulary; frozen, on ``device``, not to be changed.

        Its logits are (B, S, V). None where the study names none; the subject has the trait "masked-lm" if it does.
        """

    def fit(
        self,
        network: nn.Module,
        *,
        loss: Loss | None = None,
        scored: bool = True,
        share: float = 1.0,
        parameters: Iterable[nn.Parameter | ParameterGroup] | None = None,
        beside: nn.Module | None = None,
        batches: Iterator[Batch] | None = None,
        learning_rate: float | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> None:
        """Train the network in place: the only training loop there is.

        Args:
            network: what to train; left in evaluation mode.
            loss: defaults to the task's own loss on the labels.
            scored: whether the validation score means something while this runs; it is then reported at rungs,
                after an unscored phase once a third of what is left of the trial's budget was scored.
            share: part of this step's training budget to spend, in (0, 1].
            parameters: what to optimise, of ``network`` and ``beside``; all that require gradients by default.
            beside: modules that only the loss uses, such as projections; trained with the network, and no part
                of it. Moved to ``device``, left in evaluation mode.
            batches: endless, for a method that trains on other than the training rows; moved to ``device``.
            learning_rate: the peak; the study's own by default.
            on_step: called as ``on_step(step, steps)`` before each optimizer step, step counted from 0.
        """

    def task_loss(self, network: nn.Module, batch: Batch) -> torch.Tensor:
        """The task's loss on the labels of a batch; that of the network's CRF, where it has one."""

    def teacher_logits(self, batch: Batch) -> torch.Tensor:
        """The teacher's logits, (B, C) or (B, S, C); read from disk for training rows, else computed.

        Where the study names further teachers, the average of all; ``teacher`` is the first alone.
        """

    def teacher_outputs(self, batch: Batch, features: Collection[str]) -> dict[str, torch.Tensor]:
        """What the teacher computes on the way, by the names of :mod:`compress_search.encoders.features`.

        Where the study names further teachers, ``logits`` are the average of all, the rest is the first's.
        For training rows read from disk where the study's ``training.teacher_cache_gb`` allows and that is sooner,
        else computed. Zero at padding where it is read from disk; undefined there otherwise.
        """

    def training_batches(self) -> Iterator[Batch]:
        """Endless batches of the training rows on ``device`` as :meth:`fit` draws them, to be changed first."""

    def auxiliary(self) -> Sequence[AuxiliaryTask]:
        """The study's further tasks; there are some if the subject has the trait "auxiliary"."""

    def unlabelled(self, batch_size: int, *, once: bool = False) -> Iterator[Batch]:
        """Batches of the study's unlabelled text; there is some if the subject has the trait "unlabelled".

        They are endless, or hold every text ``once``. Raises TrialError where there is none.
        """

    def calibration(self, examples: int, batch_size: int = 32) -> Iterator[Batch]:
        """Batches of training examples on ``device``, the same ones for the same trial seed."""

    def layer_latency(self, subject: Subject) -> Callable[[int, int], float]:
        """Milliseconds of one encoder layer as wide as the subject's, by its heads and its neurons.

        For examples of the training data's mean length, as the study deploys its candidates. Measured at a few
        shapes, once for a machine, and linear between them; the two blocks' times add up.
        """


class Method(ABC):
    """A compression method.

    Instances hold no state: every call gets all it needs, and may run in another process. Randomness comes
    from ``context.seed``. The class is a thin wrapper; the method itself is a pure function beside it.
    """

    stage: ClassVar[Stage]

    @abstractmethod
    def search_space(self, teacher: Subject) -> Mapping[str, Dim]:
        """The dimensions to search, from the teacher alone; pure, so that it is the same for a whole study."""

    @abstractmethod
    def apply(self, candidate: Candidate, params: Params, context: Context) -> Candidate:
        """The compressed candidate. Owns its copy: the argument stays as it was.

        ``params`` holds every active dimension, as :meth:`effective` returned it. What is done here must
        survive later training. Raises TrialError for what cannot be done with these parameters.
        """

    def unsupported(self, subject: Subject) -> str | None:
        """Why this step cannot follow on such a model; None when it can."""
        return None

    def effective(self, subject: Subject, params: Params) -> Params:
        """The parameters as ``apply`` will really use them, for example a ratio rounded to whole heads.

        Recipes that agree in these are the same recipe. Pure and idempotent.
        """
        return params

    def changes_nothing(self, subject: Subject, params: Params) -> bool:
        """Whether with these effective parameters the step leaves all as it is; a recipe does not hold it then."""
        return False

    def faults(self, subject: Subject, params: Params) -> Mapping[str, str]:
        """What is wrong with these effective parameters on such a model, by dimension; no recipe holds such a step.

        Pure, and nothing with the defaults unless the study itself is at fault, which is then refused.
        """
        return {}

    def missing(self, teacher: Subject) -> Mapping[str, str]:
        """What dimensions would need that the space lacks for this teacher, for studies that name them.

        Choices that a dimension of the space lacks are written ``dimension: choice``.
        """
        return {}

    def after(self, subject: Subject, params: Params) -> Subject:
        """What the step will leave: shapes in closed form and traits."""
        return subject

    def trains(self, params: Params) -> bool:
        """Whether ``apply`` calls ``context.fit``, and so takes a part of the trial's training budget."""
        return False

    def evaluate(self, candidate: Candidate, context: Context) -> Mapping[str, float]:
        """Extra metrics of the trained network, recorded as ``<method>.<key>``."""
        return {}

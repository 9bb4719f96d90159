"""Training a student under matches, the teacher's logits and the labels, each with its weight.

Owns how the three meet on a batch, in one forward pass of the student, and the record of the unweighted terms: a
sum says nothing of how many matches it is of. Which matches, weights and phases there are is the method's to say.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from compress_search import Batch, Context, Dim, Loss, ParameterGroup, Params, Subject
from compress_search.encoders import read_features, recording

from .layer_maps import align, transport
from .matching import Matching
from .soft_targets import SoftTerm, chains_of, soft_space

Features = Mapping[str, Tensor]
Teacher = Callable[[Batch, Collection[str]], Features]
Choice = Callable[[Matching, Features, Features, Tensor], Mapping[int, float]]
"""(matching, student's features, teacher's, mask) -> the matches that count in this step, and how much each."""

UNLABELLED = "text without labels: name some under data.unlabeled"
"""What a dimension needs that is only there with such text."""
UNLABELLED_BATCH = 32
"""Texts without labels in a step."""
RECORDED = 20
"""Training steps over which the terms that are reported are averaged."""


def target_space(teacher: Subject) -> dict[str, Dim]:
    """The weights of the teacher's logits and of the labels, and how soft the logits are taken.

    Either weight may be 0, as libraries and papers have it in some phases: that term is then not computed.
    """
    return {
        "logit_weight": Dim.real(0.0, 10.0, 1.0, expert=True),
        "hard_weight": Dim.real(0.0, 10.0, 1.0, expert=True),
        **soft_space(teacher),
    }


def has_targets(params: Params) -> bool:
    """Whether the logits or the labels have a weight, as :func:`target_space` describes them."""
    return bool(params["logit_weight"] or params["hard_weight"])


def idle_targets(subject: Subject, params: Params) -> set[str]:
    """The dimensions of :func:`target_space` that say nothing: how soft logits are that nobody looks at."""
    return set() if params["logit_weight"] else set(soft_space(subject))


def text_missing(teacher: Subject, dimension: str) -> dict[str, str]:
    """What a dimension would need that is only there with text without labels, for ``Method.missing``."""
    return {} if "unlabelled" in teacher.traits else {dimension: UNLABELLED}


class Record:
    """The unweighted terms of a loss by name, over the last steps."""

    def __init__(self) -> None:
        self._values: dict[str, deque[float]] = {}

    def __call__(self, name: str, term: Tensor) -> Tensor:
        """The term itself, once its value is written down."""
        self._values.setdefault(name, deque(maxlen=RECORDED)).append(term.item())
        return term

    def means(self) -> dict[str, float]:
        """Each term's mean."""
        return {name: sum(values) / len(values) for name, values in self._values.items()}


@dataclass
class Objective:
    """A loss for ``context.fit``: matches + ``soft_weight``·soft targets + ``hard_weight``·the loss of labels.

    ``hard`` is that loss, by default the task's. ``teacher`` answers for features; the study's by default.
    ``choose`` picks the matches of a step, all of them wholly by default. A term of weight 0 is not computed;
    batches without labels can have only matches.
    """

    context: Context
    matching: Matching
    soft: SoftTerm | None = None
    soft_weight: float = 0.0
    hard_weight: float = 0.0
    hard: Loss | None = None
    teacher: Teacher | None = None
    choose: Choice | None = None
    progress: float = 0.0
    recorded: Record = field(default_factory=Record)

    def __call__(self, network: nn.Module, batch: Batch) -> Tensor:
        """The weighted sum on a batch."""
        with recording(network, [*self.matching.student_features, "logits"]) as found:
            hard = self._forward(network, batch)
        total: Any = self._matches(found, batch)
        if self.soft and self.soft_weight:
            chains = chains_of(network, self.context.teacher, self.soft)
            soft = self.soft(found["logits"], self.context.teacher_logits(batch), batch, chains)
            total = total + self.soft_weight * self.recorded("soft", soft)
        if hard is not None:
            total = total + self.hard_weight * self.recorded("hard", hard)
        return total  # type: ignore[no-any-return]

    @property
    def learns(self) -> bool:
        """Whether there is any term at all."""
        return bool(self.matching.matches) or self.answers

    @property
    def answers(self) -> bool:
        """Whether a term reaches the head, so that what it says on validation rows means something."""
        matched = any(match.kind == "logits" for match in self.matching.matches)
        return matched or bool((self.soft and self.soft_weight) or self.hard_weight)

    def fit(self, network: nn.Module, **options: Any) -> None:
        """Train the network, and the projections beside it, under this objective; options as of ``context.fit``."""
        groups: list[nn.Parameter | ParameterGroup] = [*network.parameters(), *self.matching.groups()]
        beside = self.matching.projections
        self.context.fit(network, loss=self, on_step=self._on_step, parameters=groups, beside=beside, **options)

    def report(self) -> dict[str, float]:
        """The unweighted terms by their kind, those of a kind summed as chosen; means over the last steps."""
        return self.recorded.means()

    def _on_step(self, step: int, steps: int) -> None:
        self.progress = step / steps

    def _forward(self, network: nn.Module, batch: Batch) -> Tensor | None:
        if self.hard_weight:
            return (self.hard or self.context.task_loss)(network, batch)
        read_features(network, batch, ())
        return None

    def _matches(self, student: Features, batch: Batch) -> Tensor | float:
        if not self.matching.matches:
            return 0.0
        ask = self.teacher or self.context.teacher_outputs
        # what is kept on disk has no padding: without its rows' numbers a batch is computed
        known = {
            name: tensor for name, tensor in batch.items() if name != "index" or not self.matching.sees_padding
        }
        teacher, mask = ask(known, self.matching.teacher_features), batch["attention_mask"]
        everything = dict.fromkeys(range(len(self.matching.matches)), 1.0)
        shares = self.choose(self.matching, student, teacher, mask) if self.choose else everything
        labels = batch.get("labels")
        terms = {n: share * self.matching.term(n, student, teacher, mask, labels) for n, share in shares.items()}
        for kind in dict.fromkeys(self.matching.matches[n].feature for n in terms):
            of_kind = [term.detach() for n, term in terms.items() if self.matching.matches[n].feature == kind]
            self.recorded(kind, torch.stack(of_kind).sum())
        return self.matching.loss(terms, self.progress)


def some(rate: float, seed: int) -> Choice:
    """Each match is left out of a step with this probability, but never all of them.

    Source: Xia et al. 2022, CoFi: teacher layers at random are more stable than fixed ones (its authors' code).
    """
    generator = torch.Generator().manual_seed(seed)

    def choose(matching: Matching, student: Features, teacher: Features, mask: Tensor) -> dict[int, float]:
        draws = torch.rand(len(matching.matches), generator=generator)
        # the one with the largest draw stays: where all are to go, it is any of them with equal probability
        return {n: 1.0 for n, draw in enumerate(draws) if draw >= rate or n == int(draws.argmax())}

    return choose


def aligned(matching: Matching, student: Features, teacher: Features, mask: Tensor) -> dict[int, float]:
    """Of the matches of hidden states those that :func:`align` picks, one a teacher layer; all of the others.

    The matches of hidden states are those of every student layer with each of a few of the teacher's.
    """
    grid = _grid(matching, "hidden")
    columns = align(_costs(grid, matching, student, teacher, mask))
    picked = {row[column] for row, column in zip(grid, columns, strict=True)}
    return {n: 1.0 for n, match in enumerate(matching.matches) if n in picked or match.feature != "hidden"}


def transported(matching: Matching, student: Features, teacher: Features, mask: Tensor) -> dict[int, float]:
    """Of the matches of each feature the part that :func:`transport` moves by it at what they cost in this step.

    The matches of a feature are those of every student layer with each of the teacher's. The plan is a constant:
    gradients are those of the matches.
    """
    shares: dict[int, float] = {}
    for feature in dict.fromkeys(match.feature for match in matching.matches):
        grid = _grid(matching, feature)
        plan = transport(_costs(grid, matching, student, teacher, mask)).flatten().tolist()
        shares |= {n: share for n, share in zip(chain(*grid), plan, strict=True) if share}
    return shares


def _grid(matching: Matching, feature: str) -> list[list[int]]:
    """The numbers of a feature's matches, one for each pair of layers: T rows of M, rising layers both."""
    of_feature = [(n, match) for n, match in enumerate(matching.matches) if match.feature == feature]
    numbers = {(match.teacher_layer, match.student_layer): n for n, match in of_feature}
    above, below = (sorted(set(side)) for side in zip(*numbers, strict=True))  # type: ignore[type-var]
    return [[numbers[t, s] for s in below] for t in above]


@torch.no_grad()
def _costs(grid: list[list[int]], matching: Matching, student: Features, teacher: Features, mask: Tensor) -> Tensor:
    """The unweighted losses of these matches, (T, M)."""
    return torch.stack([torch.stack([matching.term(n, student, teacher, mask) for n in row]) for row in grid])


def reader(network: nn.Module) -> Teacher:
    """A network other than the study's teacher as the one that answers for features, without gradients.

    Its head, which may be over a vocabulary, is computed where its logits are asked for.
    """

    def read(batch: Batch, names: Collection[str]) -> Features:
        with torch.no_grad():
            return read_features(network, batch, names, head="logits" in names or "pooled" in names)

    return read

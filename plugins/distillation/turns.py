"""Learning further tasks by turns with the study's own, each on a head of its own that nobody keeps.

Owns the heads, whose turn a step is and the loss of a step that is another task's. Knows nothing of where the tasks
come from.

Sources: Liu et al. 2019, Multi-Task Deep Neural Networks for Natural Language Understanding (algorithm 1); Clark et
al. 2019, BAM! Born-Again Multi-Task Networks (a teacher for each task); Yang et al. 2020, TextBrewer (turns in
proportion to a power of the numbers of examples).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compress_search import AuxiliaryTask, Batch, Candidate, Context, Dim, Loss, Params, Subject
from compress_search.encoders import read_features
from compress_search.losses import mixed

from .soft_targets import SoftTerm

TURN = "turn"
"""Under which a batch carries whose it is: 0 is the study's own task, n the n-th further one."""

LONGEST_TURNS = 0.9
"""The part of a training that may be shared: the study's own task has the last word."""

DROPOUT = 0.1
"""What a head is trained with, as encoders' own are."""


def turns_space(teacher: Subject) -> dict[str, Dim]:
    """``by_turns`` is the part of the training on labels, from its beginning, in which further tasks have turns.

    A task of n examples then has its turn in proportion to n to the power of ``turn_exponent``. Its soft term is
    that of the study's own task; where that has no temperature, neither has this. Nothing where the study names no
    further task.
    """
    if "auxiliary" not in teacher.traits:
        return {}
    return {
        "by_turns": Dim.real(0.0, LONGEST_TURNS, 0.2),
        "turn_exponent": Dim.real(0.0, 1.0, 0.5, expert=True),
    }


def settled_turns(subject: Subject, params: Params) -> Params:
    """Without turns where the student has no states to put a head on, and without what says nothing then."""
    if "by_turns" not in params or (params["by_turns"] and "recurrent" not in subject.traits):
        return params
    return {**{name: value for name, value in params.items() if name != "turn_exponent"}, "by_turns": 0.0}


def turns_missing(teacher: Subject) -> dict[str, str]:
    """What :func:`turns_space` would need, for ``Method.missing``."""
    needed = "further tasks: name some under auxiliary"
    return {} if "auxiliary" in teacher.traits else dict.fromkeys(("by_turns", "turn_exponent"), needed)


class Head(nn.Module):
    """A task's logits from hidden states: of every token, or of the first one after a tanh, as BERT's are."""

    def __init__(self, width: int, task: AuxiliaryTask) -> None:
        super().__init__()
        self.each = task.kind == "token-classification"
        self.pooler = nn.Identity() if self.each else nn.Sequential(nn.Linear(width, width), nn.Tanh())
        self.classifier = nn.Sequential(nn.Dropout(DROPOUT), nn.Linear(width, task.outputs))

    def forward(self, states: Tensor) -> Tensor:
        """States (B, S, H) -> logits (B, S, C), or (B, C)."""
        logits: Tensor = self.classifier(self.pooler(states if self.each else states[:, 0]))
        return logits


def turn_shares(sizes: Sequence[int], exponent: float) -> list[float]:
    """How often each task has its turn: in proportion to its number of examples to this power; they sum to 1."""
    weights = np.asarray(sizes, dtype=np.float64) ** exponent
    shares: list[float] = (weights / weights.sum()).tolist()
    return shares


def take_turns(
    streams: Sequence[Iterator[Batch]], shares: Sequence[float], seed: int, alone: Callable[[], bool]
) -> Iterator[Batch]:
    """Endless batches of the streams, drawn by their shares, or of the first ``alone``; each says whose it is."""
    rng = np.random.default_rng(seed)
    while True:
        turn = 0 if alone() else int(rng.choice(len(streams), p=shares))
        yield {**next(streams[turn]), TURN: torch.tensor(turn)}


def taking_turns(
    student: Candidate,
    params: Params,
    context: Context,
    own: Loss,
    alpha: Callable[[], float],
    on_step: Callable[[int, int], None],
) -> dict[str, Any]:
    """Options of ``context.fit`` for training the student by turns, as :func:`turns_space` describes it.

    Args:
        student: whose network is trained.
        params: the dimensions of the method.
        context: lends the tasks.
        own: the loss of the study's own task.
        alpha: the weight of every task's soft term at the moment.
        on_step: what moves it.
    """
    tasks, subject = context.auxiliary(), student.subject
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(context.seed)
        heads = nn.ModuleList(Head(subject.hidden, task) for task in tasks)
    terms, feature = [SoftTerm.of(task.kind, params) for task in tasks], f"hidden.{subject.layers}"
    shares = turn_shares([context.examples, *(task.examples for task in tasks)], float(params["turn_exponent"]))
    streams = [context.training_batches(), *(task.batches for task in tasks)]
    progress = 0.0

    def step_begins(step: int, steps: int) -> None:
        nonlocal progress
        progress = step / steps
        on_step(step, steps)

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        batch = dict(batch)
        turn = int(batch.pop(TURN))
        if turn == 0:
            return own(network, batch)
        task, head, term = tasks[turn - 1], heads[turn - 1], terms[turn - 1]
        logits = head(read_features(network, batch, [feature])[feature])
        hard, weight = task.loss(logits, batch["labels"]), alpha()
        return mixed(term(logits, task.teacher_logits(batch), batch), hard, weight) if weight else hard

    return {
        "loss": loss,
        "on_step": step_begins,
        "batches": take_turns(streams, shares, context.seed, lambda: progress >= float(params["by_turns"])),
        "beside": heads,
    }

"""Pruning while the network trains: on a schedule by a criterion, by movement scores, or through L0's gates.

Owns what happens at which step of the training, and the loss under it. Which units a count means is pruner.py's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from compress_search import Batch, Loss, ParameterGroup

from .gates import RATE, HardConcrete, Lagrangian, Movement
from .masks import Units
from .pruner import Pruner, best

RAMP = 0.5
"""Part of the training under L0's gates in which their target rises to the final one."""


def train_while_pruning(pruner: Pruner, loss: Loss | None, share: float) -> None:
    """Spend this share of the budget on training under masks, until all that is to go is masked.

    The score meanwhile means nothing: a network that has not lost everything yet is better than it will be.
    """
    course = {"movement": MovementCourse, "l0": GateCourse}.get(pruner.criterion, Course)(pruner)
    learned = course.learned
    parameters: list[nn.Parameter | ParameterGroup] = list(pruner.network.parameters())
    if learned is not None:
        parameters.append(ParameterGroup(list(learned.parameters()), learning_rate=RATE, weight_decay=0.0))
    handle = pruner.network.register_forward_pre_hook(lambda *_: course.before_forward())
    try:
        pruner.context.fit(
            pruner.network,
            loss=course.loss(loss or pruner.context.task_loss),
            scored=False,
            share=share,
            parameters=parameters,
            beside=learned,
            learning_rate=float(pruner.params["learning_rate"]),
            on_step=course.on_step,
        )
    finally:
        handle.remove()
    course.finish()


class Course:
    """Importance measured anew ``num_prune_steps`` times, at equal distances after the warm-up.

    The last of these comes when the training is over.
    """

    learned: nn.Module | None = None

    def __init__(self, pruner: Pruner) -> None:
        self.pruner, params = pruner, pruner.params
        self.times, self.done = int(params.get("num_prune_steps", 1)), 0
        # of this phase; both are of the whole training
        self.start = float(params.get("s_warmup", 0.0)) / (1 - float(params["s_cooldown"]))

    def on_step(self, step: int, steps: int) -> None:
        """Prune whenever it is due."""
        due = math.floor(self.times * (step / steps - self.start) / (1 - self.start))
        if due > self.done:
            self.done = due
            self.prune(due / self.times)

    def prune(self, progress: float) -> None:
        """Mask what is to go at this part of the way."""
        self.pruner.prune(progress)

    def before_forward(self) -> None:
        """Set masks that are another in each forward pass."""

    def loss(self, loss: Loss) -> Loss:
        """What to minimise."""
        return loss

    def finish(self) -> None:
        """Mask all that is to go."""
        self.pruner.prune(1.0)


class MovementCourse(Course):
    """The counts follow the schedule; which units they are, the scores say anew in each forward pass."""

    def __init__(self, pruner: Pruner) -> None:
        super().__init__(pruner)
        self.learned: Movement = Movement(pruner.masks.units)

    def prune(self, progress: float) -> None:
        """Set how many units of each row are left."""
        self.pruner.kept = self.pruner.counts(self._scores(), progress)

    @torch.no_grad()
    def _scores(self) -> Units:
        # positive, as a budget adds importances up
        return self.pruner.scoped(Units(*(scores.sigmoid() for scores in self.learned.scores)))

    def before_forward(self) -> None:
        """Masks by the scores as they are now."""
        self.pruner.masks.units = self.learned.masks(lambda scores: best(scores, self.pruner.kept))

    def finish(self) -> None:
        """The best by the final scores stay."""
        self.pruner.masks.units = Units(*(torch.ones_like(mask) for mask in self.pruner.masks.units))
        self.pruner.choose(self._scores(), 1.0)


class GateCourse(Course):
    """Random gates in each forward pass, under a penalty for expected sizes that miss their targets."""

    def __init__(self, pruner: Pruner) -> None:
        super().__init__(pruner)
        goals, units = pruner.goals(1.0), pruner.masks.units
        pruned = [goal < mask.numel() for goal, mask in zip(goals, units, strict=True)]
        learn = (bool(pruner.budget) or pruned[0], bool(pruner.budget) or pruned[1], pruned[2])
        self.gates, self.ramp = HardConcrete(units, learn, pruner.context.seed), 0.0
        self.target = self._targets(goals)
        self.penalty = Lagrangian(len(self.target), units.heads.device)
        self.learned: nn.ModuleList = nn.ModuleList([self.gates, self.penalty])

    def on_step(self, step: int, steps: int) -> None:
        """Raise the target, and keep the gates within their bounds."""
        self.ramp = min(1.0, step / steps / RAMP)
        self.gates.hold(steps)
        self.penalty.stretch = self.gates.stretch

    def before_forward(self) -> None:
        """Draw the gates."""
        network = self.pruner.network
        self.pruner.masks.units = self.gates.sample() if network.training else self.gates.settled()

    def loss(self, loss: Loss) -> Loss:
        """The loss and the penalty."""

        def penalised(network: nn.Module, batch: Batch) -> Tensor:
            expected = self._sparsities(self.gates.expected())
            penalty: Tensor = self.penalty(expected, self.ramp * self.target)
            return loss(network, batch) + penalty

        return penalised

    def finish(self) -> None:
        """The most open gates stay, and turn their units down to where they settled."""
        settled = self.gates.settled()
        self.pruner.masks.units = Units(*(torch.ones_like(mask) for mask in settled))
        self.pruner.choose(self.pruner.scoped(settled), 1.0)
        pairs = zip(self.pruner.masks.units, settled, strict=True)
        self.pruner.masks.units = Units(*(mask * gate for mask, gate in pairs))

    def _kinds(self) -> list[int]:
        """The kinds of units whose number is a constraint of its own: under a budget, only the channels."""
        return [kind for kind in range(3) if self.gates.learn[kind] and not (self.pruner.budget and kind < 2)]

    def _targets(self, goals: tuple[int, int, int]) -> Tensor:
        budget, units = self.pruner.budget, self.pruner.masks.units
        of_budget = [budget.gone] if budget else []
        return units.heads.new_tensor(of_budget + [1 - goals[kind] / units[kind].numel() for kind in self._kinds()])

    def _sparsities(self, expected: Units) -> Tensor:
        """The parts removed, (constraints,)."""
        parts = [1 - expected[kind].mean() for kind in self._kinds()]
        return torch.stack([1 - self._cost(expected), *parts] if self.pruner.budget else parts)

    def _cost(self, expected: Units) -> Tensor:
        """What the expected units cost, as a part of what all of them do; equal shares for equal kinds."""
        budget, uses = self.pruner.budget, self.pruner.uses()
        assert budget is not None
        most, neurons = expected.heads.shape[1], expected.neurons.shape[1]
        empty = budget.cost(0, 0)
        attention = (budget.cost(most, 0) - empty) * (expected.heads.mean(1) * uses[0]).sum()
        feed_forward = (budget.cost(0, neurons) - empty) * (expected.neurons.mean(1) * uses[1]).sum()
        return (self.pruner.cut.layers * empty + attention + feed_forward) / budget.full

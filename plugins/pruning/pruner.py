"""A network on its way to a smaller shape: which units are masked when, and the surgery at the end.

Owns the course of a pruning: it asks a criterion for scores, an allocation for counts and the masks for the rest.
What follows the surgery is structured_pruning.py's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from compress_search import Context, Params, Subject, TrialError

from . import importance
from .allocation import Blocks, allot, best_units, sparsity, spread, within_budget
from .budgets import Budget, budget_of
from .cuts import Cut, forecast
from .masks import Masks, Units, remove_masked
from .rescale import tune

LEARNED = ("movement", "l0")
CRITERIA = ("taylor", "fisher", "magnitude", *LEARNED, "random")
TUNING_EXAMPLES = 512
"""At most so many examples for the least squares of mask tuning, which hold two hidden states of each."""

Counts = tuple[list[int], list[int], list[int]]
"""Units kept of each row of heads, neurons and channels."""


class Pruner:
    """Masks on a network, on their way to a cut.

    Args:
        network: of layers of equal shape, as many as the cut has.
        subject: the model before this step.
        cut: what is to be left.
        params: of the method, effective.
        context: of the step.

    Raises:
        TrialError: no shape is within the budget.
    """

    def __init__(self, network: nn.Module, subject: Subject, cut: Cut, params: Params, context: Context) -> None:
        self.network, self.cut, self.params, self.context, self.task = network, cut, params, context, subject.task
        self.criterion = str(params["criterion"])
        self.masks = Masks(network)
        self.budget = budget_of(subject, cut, params, context)
        self.of_blocks: tuple[Tensor, Tensor] | None = None
        self.even = context.dry or params["scope"] == "per_layer"
        if self.budget:
            self._within_budget(self.masks.units, 1.0)  # whether it can be met at all, before any training
        self.kept = self.counts(self.masks.units, 0.0)

    @property
    def channels(self) -> Tensor:
        """The hidden channels that are left."""
        return self.masks.units.hidden[0].nonzero().flatten()

    # how many

    def goals(self, progress: float) -> tuple[int, int, int]:
        """Heads, neurons and channels that are left in all at this part of the way, in [0, 1]."""
        cut, (heads, neurons, hidden) = self.cut, (len(mask) for mask in self.masks.units)
        finals = (cut.heads * heads // cut.layers, cut.neurons * neurons // cut.layers, cut.hidden * hidden)
        groups = (1, cut.multiple, cut.channels)
        left = []
        for mask, final, multiple in zip(self.masks.units, finals, groups, strict=True):
            part = sparsity(str(self.params.get("schedule", "one_shot")), progress, 1 - final / mask.numel())
            gone = multiple * math.floor(part * mask.numel() / multiple + 1e-6)
            left.append(max(final, mask.numel() - gone))
        return left[0], left[1], left[2]

    def counts(self, scores: Units, progress: float) -> Counts:
        """Units to keep of each row at this part of the way."""
        cut, (heads, neurons, hidden) = self.cut, self.goals(progress)
        if self.budget:
            return *self._within_budget(scores, progress), [hidden]
        if self.even:
            spreads = spread(heads, len(scores.heads)), spread(neurons, len(scores.neurons), cut.multiple)
            return *spreads, [hidden]
        by_score = allot(scores.heads, heads, 1, cut.min_heads), allot(scores.neurons, neurons, *[cut.multiple] * 2)
        return *by_score, [hidden]

    def _within_budget(self, scores: Units, progress: float) -> tuple[list[int], list[int]]:
        """Heads and neurons of each row.

        Raises:
            TrialError: no shape is within the budget.
        """
        budget, cut = self.budget, self.cut
        assert budget is not None
        cap = budget.at(sparsity(str(self.params.get("schedule", "one_shot")), progress, budget.gone))
        found = self._foretold(budget, cap) if self.context.dry else self._best(budget, scores, cap)
        if found is None:
            raise TrialError(
                f"target is {self.params['target']} of the {budget.unit}, and {cut.layers} layers come to no less "
                f"than {cut.least(budget.cost) / budget.whole:.3f}: expected at least that, or fewer layers "
                "(layer_ratio)"
            )
        return found

    def _foretold(self, budget: Budget, cap: float) -> tuple[list[int], list[int]] | None:
        """Where importance means nothing; a row that several layers use is as its first one."""
        size = self.masks.units.heads.shape[1], self.masks.units.neurons.shape[1]
        shapes = forecast(budget.cost, cap, size, self.cut)
        if shapes is None:
            return None
        rows = len(self.masks.units.heads), len(self.masks.units.neurons)
        return [heads for heads, _ in shapes][: rows[0]], [count for _, count in shapes][: rows[1]]

    def _best(self, budget: Budget, scores: Units, cap: float) -> tuple[list[int], list[int]] | None:
        whole_blocks = self.cut.whole_blocks and not self.even
        left = cap - self.cut.layers * budget.cost(0, 0)
        found = within_budget(*self._blocks(budget, scores), left, even=self.even, whole_blocks=whole_blocks)
        return None if found is None else (found.counts[0].tolist(), found.counts[1].tolist())

    def _blocks(self, budget: Budget, scores: Units) -> tuple[Blocks, Blocks]:
        """Attentions and feed-forwards, with what they cost and what they matter in one unit."""
        cut, uses, empty = self.cut, self.uses(), budget.cost(0, 0)

        def of_heads(count: int) -> float:
            return budget.cost(count, 0) - empty

        def of_neurons(count: int) -> float:
            return budget.cost(0, count) - empty

        weights = 1.0, 1.0
        if self.criterion not in importance.NEED_GRADIENTS or self.params["scope"] == "global_layer_normalised":
            # heads and neurons are not told in one unit: what is average of its kind is worth what it costs
            costs = of_heads(scores.heads.shape[1]), of_neurons(scores.neurons.shape[1])
            weights = costs[0] / finite_sum(scores.heads), costs[1] / finite_sum(scores.neurons)
        heads, neurons = (weight * score for weight, score in zip(weights, scores[:2], strict=True))
        beyond = self._beyond_units(heads, neurons)
        return (
            Blocks(heads, uses[0], of_heads, beyond[0], 1, cut.min_heads),
            Blocks(neurons, uses[1], of_neurons, beyond[1], cut.multiple, cut.multiple),
        )

    def _beyond_units(self, *scores: Tensor) -> list[Tensor]:
        """What is lost with whole blocks beside their units; nothing where the criterion only tells of units."""
        if self.of_blocks is None:
            return [score.new_zeros(len(score)).double() for score in scores]
        return [importance.beyond_units(*pair) for pair in zip(scores, self.of_blocks, strict=True)]

    def uses(self) -> tuple[Tensor, Tensor]:
        """How many layers use each row of heads and of neurons."""
        rows = (self.masks.attentions, self.masks.feed_forwards)
        heads, neurons = (torch.tensor(row).bincount().to(self.masks.units.heads.device) for row in rows)
        return heads, neurons

    # which

    def prune(self, progress: float) -> None:
        """Mask the least important units, until what is left is what there should be at this part of the way.

        What is masked stays masked. In a dry run, where importance means nothing, every layer gives the same.
        """
        if self.budget is None and self.goals(1.0) == tuple(mask.numel() for mask in self.masks.units):
            return
        self.choose(self.scores(), progress)

    def choose(self, scores: Units, progress: float) -> None:
        """Mask all but the best by these scores."""
        pairs = zip(scores, self.masks.units, strict=True)
        ranked = Units(*(score.masked_fill(mask == 0, -math.inf) for score, mask in pairs))
        self.kept = self.counts(ranked, progress)
        self.masks.units = best(ranked, self.kept)

    def scores(self) -> Units:
        """What the criterion says of every unit; of a learned one, before it has learned anything."""
        if self.criterion == "random":
            scores = importance.random(self.masks, self.context.seed)
        elif self.context.dry or self.criterion not in importance.NEED_GRADIENTS:
            scores = importance.magnitude(self.network, self.masks)
        else:
            scores = importance.CRITERIA[self.criterion](self.gradients())
        return self.scoped(scores)

    def scoped(self, scores: Units) -> Units:
        """The scores as layers are compared by them."""
        return importance.normalised(scores) if self.params["scope"] == "global_layer_normalised" else scores

    def gradients(self) -> Units:
        """The loss's gradient by every mask variable, batch by batch; what they say of blocks is kept."""
        batches = self.context.calibration(int(self.params["calib_examples"]))
        found = importance.mask_gradients(self.network, self.masks, batches, self.context.task_loss)
        self.of_blocks = importance.of_blocks(self.criterion, found)
        return found

    # at once, without training

    def prune_at_once(self) -> None:
        """Go all the way; by fisher, units that stand in for each other are then exchanged (Kwon 2022, 4.2)."""
        if self.criterion != "fisher" or self.context.dry:
            self.prune(1.0)
            return
        gradients = self.gradients()
        self.choose(self.scoped(importance.fisher(gradients)), 1.0)
        units, found = self.masks.units, (gradients.heads, gradients.neurons)
        heads, neurons = (importance.rearranged(mask, each) for mask, each in zip(units[:2], found, strict=True))
        self.masks.units = Units(heads, neurons, units.hidden)

    def rescale(self) -> None:
        """Scale what is left by least squares; nothing where importance means nothing."""
        if not self.context.dry:
            examples = min(TUNING_EXAMPLES, int(self.params.get("calib_examples", TUNING_EXAMPLES)))
            pooled = self.task != "token-classification"
            tune(self.network, self.masks, self.context.calibration(examples), pooled=pooled)

    def cut_out(self) -> None:
        """Surgery: the outputs stay the same."""
        remove_masked(self.network, self.masks)


def finite_sum(scores: Tensor) -> float:
    """The sum of the scores of units that are not masked."""
    return max(float(scores[scores.isfinite()].sum()), 1e-12)


def best(scores: Units, kept: Counts) -> Units:
    """Masks of ones for the highest scores of each row."""
    return Units(*(best_units(score, count) for score, count in zip(scores, kept, strict=True)))

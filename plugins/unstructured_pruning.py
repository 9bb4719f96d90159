"""Unstructured, N:M and block sparsity of the encoder's matrices: a smaller file, at the same speed.

``sparsity`` is the part of the weights that is *removed*; embeddings, biases, norms and the head stay. Owns when
how many weights go and by which score; masks and patterns are pruning/sparse_masks.py's, the packed file the
engine's. No kernel here is faster for zeros, so the method is of use only where the stored size counts.

Sources: Han et al. 2015, Learning both Weights and Connections for Efficient Neural Networks (magnitude); Zhu and
Gupta 2017, To prune, or not to prune (cubic schedule); Sanh et al. 2020, Movement Pruning (both kinds of it).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress_search import (
    Batch,
    Candidate,
    Context,
    Dim,
    Loss,
    Method,
    ParameterGroup,
    Params,
    Stage,
    Subject,
    TrialError,
)

from .distillation.soft_targets import soft_target_loss
from .pruning.allocation import cubic_sparsity
from .pruning.gates import STEPS
from .pruning.sparse_masks import (
    PATTERNS,
    Matrix,
    Pattern,
    density,
    linears,
    mask_linears,
    select,
    spread,
    unit_scores,
)

METHODS = ("magnitude", "one_shot", "movement", "soft_movement")
SCORED = ("movement", "soft_movement")
COUNTED = ("unstructured", "block_32x32")
FINAL_THRESHOLD = 0.1
"""Where the threshold of soft movement ends (Sanh et al. 2020, section 5)."""


def matrices_of(subject: Subject) -> list[tuple[float, float, int]]:
    """(outputs, inputs, how many) of the encoder's linear maps."""
    hidden, width, neurons = subject.hidden, subject.heads * subject.head_dim, subject.intermediate
    attention, feed_forward = (sets or subject.layers for sets in (subject.attention_sets, subject.ffn_sets))
    return [
        (width, hidden, 3 * attention),
        (hidden, width, attention),
        (neurons, hidden, feed_forward),
        (hidden, neurons, feed_forward),
    ]


def density_after(subject: Subject, params: Params) -> float:
    """The part of the weights that is left, each matrix rounded down to whole units; exact for equal layers."""
    pattern, sparsity = PATTERNS[str(params["pattern"])], final_sparsity(params)
    sizes = [(round(outputs * inputs), count) for outputs, inputs, count in matrices_of(subject)]
    weights = sum(size * count for size, count in sizes)
    if not weights:
        return 1.0
    if jointly(params):
        least = sum(pattern.least(size) * count for size, count in sizes)
        return max(least, pattern.kept(sparsity, weights)) / weights
    return sum(pattern.kept(sparsity, size) * count for size, count in sizes) / weights


def final_sparsity(params: Params) -> float:
    """The part that is removed in the end; N:M patterns fix it."""
    pattern = PATTERNS[str(params["pattern"])]
    return 1 - pattern.n / pattern.m if pattern.m else float(params["sparsity"])


def jointly(params: Params) -> bool:
    """Whether matrices compete for the weights that stay; soft movement has one threshold for all."""
    return params["pattern"] in COUNTED and params.get("scope", "global") == "global"


def soft_threshold(scheduled: float, final: float) -> float:
    """θ, from 0 to :data:`FINAL_THRESHOLD` as the scheduled sparsity goes from 0 to its end."""
    return FINAL_THRESHOLD * scheduled / final


@dataclass
class Sparsifier:
    """The encoder's matrices on their way to the final sparsity."""

    matrices: list[Matrix]
    params: Params
    dry: bool = False

    def __post_init__(self) -> None:
        self.pattern: Pattern = PATTERNS[str(self.params["pattern"])]
        self.final = final_sparsity(self.params)
        self.scheduled, self.stretch = 0.0, 1.0

    def on_step(self, step: int, steps: int) -> None:
        """Bring the masks to where the schedule is before this step of the pruning phase."""
        warm, cool = (float(self.params[name]) for name in ("initial_warmup", "final_warmup"))
        self.scheduled = cubic_sparsity(step / steps, warm / (1 - cool), 1.0, 0.0, self.final)
        # scores of a short training move as far as a long one's: see gates.STEPS
        self.stretch = max(1.0, STEPS / steps)
        if self.params["method"] == "soft_movement":
            self._cut_at(soft_threshold(self.scheduled, self.final))
        elif self.scheduled > 0:
            self._keep(self.scheduled)

    def settle(self) -> None:
        """Bring the masks to exactly the final sparsity, and drop the scores: what is left only masks."""
        self._keep(self.final)
        for matrix in self.matrices:
            matrix.mask.scores = None

    def penalty(self) -> Tensor | float:
        """λ(t)·mean σ(S) of soft movement, λ growing with the threshold; 0 for the others."""
        if self.params["method"] != "soft_movement":
            return 0.0
        scores = self._trained_scores
        mean = sum((self.stretch * score).sigmoid().sum() for score in scores) / sum(
            score.numel() for score in scores
        )
        return float(self.params["penalty"]) * self.scheduled / self.final * mean

    @property
    def groups(self) -> list[ParameterGroup]:
        """The scores, which learn at a rate of their own and do not decay; none for magnitudes."""
        rate = float(self.params.get("score_learning_rate", 0.0))
        return [ParameterGroup(self._trained_scores, rate, 0.0)] if self._trained_scores else []

    @property
    def _trained_scores(self) -> list[nn.Parameter]:
        return [matrix.mask.scores for matrix in self.matrices if matrix.mask.scores is not None]

    def _keep(self, sparsity: float) -> None:
        masks = select(self._scores(), sparsity, self.pattern, jointly=jointly(self.params))
        self._set(masks)

    def _cut_at(self, threshold: float) -> None:
        """M = 1[σ(S) > θ], all where θ is 0, but at least the best few of each matrix; S stretched."""
        least = select(self._scores(), 0.995, self.pattern)
        limit = math.log(threshold / (1 - threshold)) if threshold > 0 else -math.inf
        moved = [self.stretch * score.detach() for score in self._trained_scores]
        units = [unit_scores(score, self.pattern.block) > limit for score in moved]
        above = [spread(unit, self.pattern.block) for unit in units]
        self._set([mask | few for mask, few in zip(above, least, strict=True)])

    def _set(self, masks: list[Tensor]) -> None:
        for matrix, mask in zip(self.matrices, masks, strict=True):
            matrix.mask.mask.copy_(mask)

    def _scores(self) -> list[Tensor]:
        """Trained scores, else magnitudes; in units of each matrix's deviation where matrices compete."""
        if self._trained_scores and not self.dry:
            return [score.detach() for score in self._trained_scores]
        weights = [matrix.weight for matrix in self.matrices]
        if jointly(self.params):
            return [weight.abs() / weight.std().clamp_min(torch.finfo(weight.dtype).tiny) for weight in weights]
        return [weight.abs() for weight in weights]


class UnstructuredPruning(Method):
    """Zeros that the stored model leaves out, by magnitude or by movement."""

    stage = Stage.SPARSITY

    def search_space(self, teacher: Subject) -> Mapping[str, Dim]:
        """Patterns are those that the teacher's widths divide into.

        ``method``: the smallest magnitudes gradually while the network trains, or all at once without training
        (``one_shot``); or what moves towards zero as it trains. ``initial_warmup`` and ``final_warmup`` are the
        parts of the training before the first weight goes and after the last one did.
        """
        patterns = [name for name, pattern in PATTERNS.items() if not misfit(teacher, pattern)]
        trained = {"method": tuple(name for name in METHODS if name != "one_shot")}
        scored = {"method": SCORED}
        ranked = {"method": ("magnitude", "one_shot", "movement"), "pattern": COUNTED}
        return {
            "pattern": Dim.choice(patterns, "unstructured", expert=True),
            "sparsity": Dim.real(0.3, 0.97, 0.8, when={"pattern": COUNTED}),
            "method": Dim.choice(METHODS, "magnitude"),
            "scope": Dim.choice(("local", "global"), "local", when=ranked, expert=True),
            "initial_warmup": Dim.real(0.0, 0.2, 0.1, when=trained, expert=True),
            "final_warmup": Dim.real(0.1, 0.3, 0.2, when=trained, expert=True),
            "score_learning_rate": Dim.real(1e-3, 1e-1, 1e-2, log=True, when=scored, expert=True),
            "penalty": Dim.real(1.0, 1000.0, 400.0, log=True, when={"method": ("soft_movement",)}, expert=True),
            "kd": Dim.flag(True, when=trained, expert=True),
            "learning_rate": Dim.real(1e-6, 1e-2, 5e-5, log=True, when=trained, expert=True),
        }

    def unsupported(self, subject: Subject) -> str | None:
        """Zeros are of use where the size counts, in matrices that are neither sparse nor products already."""
        if "recurrent" in subject.traits:
            return "it has no transformer layers"
        if "sized" not in subject.traits:
            return "zeros make a model smaller, not faster, and neither an objective nor a constraint is size_mb"
        if "sparse" in subject.traits:
            return "its matrices are sparse already"
        return (
            "its matrices are products, which zeros in the factors do not make sparse"
            if _factored(subject)
            else None
        )

    def missing(self, teacher: Subject) -> Mapping[str, str]:
        """Widths that the patterns divide."""
        return {
            f"pattern: {name}": fault for name, pattern in PATTERNS.items() if (fault := misfit(teacher, pattern))
        }

    def faults(self, subject: Subject, params: Params) -> Mapping[str, str]:
        """Patterns that an earlier step leaves no widths for."""
        fault = misfit(subject, PATTERNS[str(params["pattern"])])
        return {"pattern": f"{params['pattern']} needs {fault}"} if fault else {}

    def after(self, subject: Subject, params: Params) -> Subject:
        """The same shapes with fewer weights."""
        return subject.having("lossy", "sparse", density=density_after(subject, params))

    def trains(self, params: Params) -> bool:
        """Unless all goes at once."""
        return params["method"] != "one_shot"

    def apply(self, candidate: Candidate, params: Params, context: Context) -> Candidate:
        """Prune while training, settle the masks, then train what is left; or settle them at once."""
        candidate = candidate.copy()
        network, pattern = candidate.network.to(context.device), PATTERNS[str(params["pattern"])]
        check_divides(network, pattern)
        matrices = mask_linears(network, scored=params["method"] in SCORED)
        sparsifier = Sparsifier(matrices, params, context.dry)
        if self.trains(params):
            _train(candidate, params, context, sparsifier)
        sparsifier.settle()
        if self.trains(params):
            _train(candidate, params, context)
        return candidate.replace(network=network, subject=self.after(candidate.subject, params))

    def evaluate(self, candidate: Candidate, context: Context) -> Mapping[str, float]:
        """``unstructured_pruning.density``: the part of the encoder's weights that are not zero."""
        return {"density": density(candidate.network)}


def check_divides(network: nn.Module, pattern: Pattern) -> None:
    """Refuse a pattern that the network's matrices do not divide into.

    Raises:
        TrialError: naming the first such matrix.
    """
    for name, linear in linears(network).items():
        if not pattern.fits(linear.weight.shape):
            shape = " x ".join(map(str, linear.weight.shape))
            raise TrialError(f"pattern {pattern.name} needs {pattern.needs}, and layer.{name} is {shape}")


def _train(candidate: Candidate, params: Params, context: Context, sparsifier: Sparsifier | None = None) -> None:
    """The pruning phase with a sparsifier, where the network scores better than it will; else the last phase."""
    task, cool, network = candidate.subject.task, float(params["final_warmup"]), candidate.network
    loss = soft_target_loss(context, task) if params["kd"] else context.task_loss
    groups = sparsifier.groups if sparsifier else []
    grouped = {id(parameter) for group in groups for parameter in group.parameters}
    context.fit(
        network,
        loss=_penalised(loss, sparsifier) if sparsifier else loss,
        scored=sparsifier is None,
        share=1 - cool if sparsifier else cool,
        parameters=[*groups, *(p for p in network.parameters() if id(p) not in grouped)],
        learning_rate=float(params["learning_rate"]),
        on_step=sparsifier.on_step if sparsifier else None,
    )


def _penalised(loss: Loss, sparsifier: Sparsifier) -> Loss:
    def penalised(network: nn.Module, batch: Batch) -> Tensor:
        return loss(network, batch) + sparsifier.penalty()

    return penalised


def misfit(subject: Subject, pattern: Pattern) -> str | None:
    """What a pattern needs that the first matrix does not have which it does not divide; None where all fit.

    Where layers differ, each has heads of one width and a number of neurons of which the subject may know a
    divisor: a pattern fits that fits the smallest such layer.
    """
    differ = "non-uniform" in subject.traits
    shapes = subject.having(heads=1, intermediate=neurons_divisor(subject)) if differ else subject
    odd = next(((a, b) for a, b, _ in matrices_of(shapes) if not pattern.fits((a, b))), None)
    there = "the layers' matrices are multiples of" if differ else "there are matrices of"
    return f"{pattern.needs}, and {there} {odd[0]:g} x {odd[1]:g}" if odd else None


def neurons_divisor(subject: Subject) -> int:
    """What divides the number of neurons of every layer, as far as the step that made them differ has said."""
    found = [int(trait.partition(":")[2]) for trait in subject.traits if trait.startswith("neurons:")]
    return math.gcd(*found) if found else 1


def _factored(subject: Subject) -> bool:
    return "low-rank" in subject.traits

"""The loss of a network that learns from the labels and from the teacher's logits at once.

Owns how the two meet on a batch of any task, in one forward pass. The arithmetic is in compress_search.losses;
which methods train under this loss, and when, is theirs to say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from torch import Tensor, nn

from compress_search import Batch, Context, Dim, Loss, Params, Subject
from compress_search.encoders import Crf, crf_of, read_features
from compress_search.losses import (
    IGNORED,
    SoftLoss,
    TemperatureScheduler,
    TokenScope,
    annealed,
    mixed,
    row_temperatures,
    shifted,
    soft_loss,
    valid_tokens,
)

CrfTarget = Literal["emission", "posterior", "viterbi"]
Chains = tuple[Crf, Crf]
"""The student's CRF and the teacher's."""

CRF = "a teacher with a CRF: have one trained by teacher.fine_tune.crf, for a token task"
"""What ``crf_target`` needs."""


_FIELDS = {
    "soft_loss": "kind",
    "temperature": "temperature",
    "temperature_sq": "squared",
    "temperature_scheduler": "scheduler",
    "scheduler_beta": "beta",
    "scheduler_gamma": "gamma",
    "probability_shift": "shift",
    "token_scope": "scope",
    "crf_target": "crf_target",
}
"""Dimensions of :func:`soft_space` -> what of a :class:`SoftTerm` they say."""


@dataclass(frozen=True)
class SoftTerm:
    """How a network's logits are compared with the teacher's, on any task.

    ``scope``: which positions of a token task count. ``shift``: whether the teacher's gold class is put on top
    first. ``beta`` and ``gamma`` are the schedulers' of :func:`compress_search.losses.row_temperatures`. Regression
    has the squared difference of outputs, whatever the kind. ``squared``: whether the divergence is times τ².

    ``crf_target``: what of a teacher with a CRF is learnt. ``emission``: its logits, without the transitions;
    ``posterior``: the probabilities of each position's labels given the whole text, whose logarithms take the place
    of the logits; ``viterbi``: its best path, by the likelihood that the student gives to it.
    """

    task: str
    kind: SoftLoss = "kl"
    temperature: float = 2.0
    scope: TokenScope = "labelled"
    shift: bool = False
    scheduler: TemperatureScheduler = "constant"
    beta: float = 1.0
    gamma: float = 1.0
    crf_target: CrfTarget = "emission"
    squared: bool = True

    @classmethod
    def of(cls, task: str, params: Params) -> SoftTerm:
        """The term that the dimensions of :func:`soft_space` describe.

        Those that are inactive have defaults; logits that no temperature was chosen for stay as they are.
        """
        given: dict[str, Any] = {field: params[name] for name, field in _FIELDS.items() if name in params}
        return cls(task, **{"temperature": 1.0, **given})

    @property
    def unlabelled(self) -> SoftTerm:
        """The same term for text without labels; of token tasks all positions but padding count.

        Where a word's first piece is not known there is no chain of words: emissions are compared.
        """
        return replace(self, scope="attended", shift=False, crf_target="emission")

    def __call__(self, student: Tensor, teacher: Tensor, batch: Batch, chains: Chains | None = None) -> Tensor:
        """The term's value for logits (B, C) or (B, S, C); ``chains`` where both models have a CRF."""
        if self.task == "text-regression":
            return soft_loss(student, teacher, "mse_logits")
        if chains and self.crf_target != "emission":
            return self._of_chains(student, teacher, batch["labels"], chains)
        mask = None
        if self.task == "token-classification":
            labels = batch.get("labels", batch["input_ids"])  # looked at in the scope "labelled" alone
            mask = valid_tokens(labels, batch["attention_mask"], self.scope)
        return self._of_rows(student, teacher, batch.get("labels"), mask)

    def _of_chains(self, student: Tensor, teacher: Tensor, labels: Tensor, chains: Chains) -> Tensor:
        ours, theirs = chains
        mask = labels != IGNORED
        if self.crf_target == "viterbi":
            return ours.loss(student, theirs.viterbi(teacher, mask))
        marginals = ours.log_marginals(student, mask), theirs.log_marginals(teacher, mask)
        return self._of_rows(*marginals, labels[mask], None)

    def _of_rows(self, student: Tensor, teacher: Tensor, labels: Tensor | None, mask: Tensor | None) -> Tensor:
        if self.shift and labels is not None:
            teacher = shifted(teacher, labels)
        tau = row_temperatures(
            student, teacher, self.scheduler, self.temperature, beta=self.beta, gamma=self.gamma, mask=mask
        )
        return soft_loss(student, teacher, self.kind, tau, mask, squared=self.squared)


def crf_space(
    teacher: Subject, default: CrfTarget = "emission", *, when: Mapping[str, tuple[str | bool, ...]] | None = None
) -> dict[str, Dim]:
    """What of a teacher with a CRF is learnt; nothing to choose where it has none.

    It is searched by default where that is not the emissions.
    """
    if "crf" not in teacher.traits:
        return {}
    targets = ("emission", "posterior", "viterbi")
    return {"crf_target": Dim.choice(targets, default, when=when, expert=default == "emission")}


def crf_missing(teacher: Subject) -> dict[str, str]:
    """What :func:`crf_space` would need, for ``Method.missing``."""
    return {} if "crf" in teacher.traits else {"crf_target": CRF}


def crf_target(params: Params) -> CrfTarget:
    """What :func:`crf_space` came to."""
    return cast(CrfTarget, params.get("crf_target", "emission"))


def tempered(teacher: Subject) -> dict[str, tuple[str, ...]]:
    """When a soft term has a temperature: a best path has none, for it is a label at each position."""
    return {"crf_target": ("emission", "posterior")} if "crf" in teacher.traits else {}


def soft_space(teacher: Subject, target: CrfTarget = "emission") -> dict[str, Dim]:
    """The dimensions of a soft term on the teacher's task; a single output has neither classes nor temperature.

    ``temperature_sq``, the factor τ², is off only to repeat what TextBrewer computes. ``target`` is the
    default of ``crf_target``, where the teacher has a CRF.
    """
    if teacher.task == "text-regression":
        return {}
    chains = "crf" in teacher.traits
    soft = tempered(teacher)
    tokens = {"crf_target": ("emission",)} if chains else {}
    divided = {"soft_loss": ("kl",), **soft}
    scheduled = divided | {"temperature_scheduler": ("flsw", "cwsm")}
    space = {
        "soft_loss": Dim.choice(("kl", "mse_logits"), "kl", expert=True),
        "temperature": Dim.real(1.0, 10.0, 2.0, when=divided),
        "temperature_sq": Dim.flag(True, when=divided, expert=True),
        "temperature_scheduler": Dim.choice(("constant", "flsw", "cwsm"), "constant", when=divided, expert=True),
        "scheduler_beta": Dim.real(0.0, 2.0, 1.0, when=scheduled, expert=True),
        "scheduler_gamma": Dim.real(
            0.5, 4.0, 1.0, when=divided | {"temperature_scheduler": ("flsw",)}, expert=True
        ),
        "probability_shift": Dim.flag(False, when=soft, expert=True),
    }
    # squared differences of logarithms of probabilities mean little: only emissions are compared so
    space |= crf_space(teacher, target, when={"soft_loss": ("kl",)})
    if teacher.task == "token-classification":
        space["token_scope"] = Dim.choice(("labelled", "attended"), "labelled", when=tokens, expert=True)
    return space


def idle_soft(teacher: Subject, params: Params) -> set[str]:
    """The dimensions of :func:`soft_space` that say nothing, where ``alpha`` leaves no soft term at any time."""
    weights = (params["alpha"], params.get("anneal_to", 0.0) if params.get("annealing", "none") != "none" else 0.0)
    return set() if any(weights) else set(soft_space(teacher))


def soft_target_loss(
    context: Context,
    term: SoftTerm | str,
    *,
    alpha: Callable[[], float] = lambda: 0.5,
    teacher: Callable[[Batch], Tensor] | None = None,
    speaker: nn.Module | None = None,
) -> Loss:
    """α·soft + (1 − α)·hard, as a loss for ``context.fit``.

    Args:
        context: lends the hard loss, always at τ = 1, and the teacher's logits.
        term: the soft term; a task's name stands for that task's with its defaults.
        alpha: the soft term's weight, asked for at every batch.
        teacher: whose logits to learn from; the study's teacher by default.
        speaker: the network that says them, whose CRF they are read by; the study's teacher by default.

    Source: Hinton et al. 2015, Distilling the Knowledge in a Neural Network, section 2.
    """
    soft = SoftTerm(term) if isinstance(term, str) else term
    targets = teacher or context.teacher_logits

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        logits, hard = logits_and_task_loss(network, batch, context)
        weight = alpha()
        if weight == 0:
            return hard
        chains = chains_of(network, speaker or context.teacher, soft)
        return mixed(soft(logits, targets(batch), batch, chains), hard, weight)

    return loss


def chains_of(network: nn.Module, teacher: nn.Module, term: SoftTerm) -> Chains | None:
    """The CRFs of a network and its teacher, where the term looks at them and both have one."""
    if term.crf_target == "emission":
        return None
    ours, theirs = crf_of(network), crf_of(teacher)
    return (ours, theirs) if ours and theirs else None


def mix_space() -> dict[str, Dim]:
    """``alpha`` weighs the soft term; with annealing it goes linearly to ``anneal_to`` over the training."""
    return {
        "alpha": Dim.real(0.0, 1.0, 0.5),
        "annealing": Dim.choice(("none", "linear"), "none", expert=True),
        "anneal_to": Dim.real(0.0, 1.0, 0.0, when={"annealing": ("linear",)}, expert=True),
    }


def annealed_loss(
    context: Context,
    term: SoftTerm,
    params: Params,
    teacher: Callable[[Batch], Tensor] | None = None,
    speaker: nn.Module | None = None,
) -> tuple[Loss, Callable[[int, int], None]]:
    """The mixed loss with the weight that :func:`annealed_weight` gives, and the ``on_step`` that moves it.

    Arguments as of :func:`soft_target_loss`.
    """
    alpha, on_step = annealed_weight(params)
    return soft_target_loss(context, term, alpha=alpha, teacher=teacher, speaker=speaker), on_step


def annealed_weight(params: Params) -> tuple[Callable[[], float], Callable[[int, int], None]]:
    """The soft term's weight that :func:`mix_space` describes, and the ``on_step`` that moves it.

    Source: Clark et al. 2019, BAM! Born-Again Multi-Task Networks, section 3.2 (teacher annealing).
    """
    start, progress = float(params["alpha"]), 0.0
    end = float(params.get("anneal_to", start))

    def on_step(step: int, steps: int) -> None:
        nonlocal progress
        progress = step / steps

    def alpha() -> float:
        return annealed(start, end, progress)

    return alpha, on_step


def transfer_loss(context: Context, term: SoftTerm) -> Loss:
    """The soft term alone, for batches without labels."""
    soft = term.unlabelled

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        return soft(read_features(network, batch, ["logits"])["logits"], context.teacher_logits(batch), batch)

    return loss


def logits_and_task_loss(network: nn.Module, batch: Batch, context: Context) -> tuple[Tensor, Tensor]:
    """The network's logits, (B, C) or (B, S, C), and the task's loss on them, from a single forward pass."""
    seen: list[Tensor] = []
    handle = network.register_forward_hook(lambda module, args, output: seen.append(output.logits))
    try:
        hard = context.task_loss(network, batch)
    finally:
        handle.remove()
    return seen[-1], hard

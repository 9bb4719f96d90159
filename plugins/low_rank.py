"""Low-rank factorization: a layer's matrix as the product of two thin ones, cut off after so many singular values.

W (out, in) ≈ L·R with L (out, r) and R (r, in). That is fewer weights and operations where r is below the
break-even out·in/(out + in); every ``rank_ratio`` is the part of it that *stays*. Maps that would gain less than a
tenth stay whole. Owns ranks and decompositions; the module that holds two factors is the engine's. What a
decomposition keeps is measured by the weights alone (``svd``), by the outputs on training examples
(``activation_aware``) or with rows weighed by the loss's gradients (``fisher_weighted``). Ranks by a part of the
spectrum's energy are known from the weights only, and those of unequal layers from each layer: what is promised of
them is marked as estimated, and the candidate tells what they are.

Sources: Eckart and Young 1936 (the truncation is the best of its rank); Hsu et al. 2022, Language model compression
with weighted low-rank factorization (fisher); Wang et al. 2025, SVD-LLM, section 3.1 (whitened activations).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from compress_search import Batch, Candidate, Context, Dim, Loss, Method, Params, Stage, Subject, TrialError
from compress_search.encoders import LowRankLinear, layers, parts, subject_of

from .distillation.soft_targets import soft_target_loss

PARTS = ("query", "key", "value", "attention_output", "up", "down")
"""A layer's maps, in the order of a subject's ``ranks``."""

TARGETS: Mapping[str, tuple[str, ...]] = {
    "ffn": ("up", "down"),
    "attention": ("query", "key", "value", "attention_output"),
    "all": PARTS,
    "query_key": ("query", "key"),
    "value_output": ("value", "attention_output"),
    "up": ("up",),
    "down": ("down",),
}
WORTHWHILE = 0.9
"""Ranks from this part of the break-even on gain too little, and are not used."""

RIDGE = 1e-6
"""Added to the second moments of inputs, relative to their mean, so that unseen directions can be inverted."""

MULTIPLES = (1, 4, 8, 16, 32)
USUAL_RATIO, USUAL_MULTIPLE = 0.4, 16

NEED_EXAMPLES = ("activation_aware", "fisher_weighted")


class Factors(NamedTuple):
    """L (out, r) and R (r, in)."""

    left: Tensor
    right: Tensor


class LowRank(Method):
    """Thinner matrices in place of whole ones; both are quantized where whole ones would be."""

    stage = Stage.FACTORIZATION

    def search_space(self, teacher: Subject) -> Mapping[str, Dim]:
        """Which maps, and how much of each stays: a part of the break-even rank, or of the spectrum's energy."""
        targets = tuple(TARGETS)
        return {
            "targets": Dim.choice(targets, "ffn", usual=("ffn", "attention", "all")),
            "rank_ratio": Dim.real(0.1, 0.9, USUAL_RATIO, when={"rank_mode": ("ratio",)}),
            "rank_mode": Dim.choice(("ratio", "energy"), "ratio", expert=True),
            "energy": Dim.real(0.8, 0.999, 0.98, when={"rank_mode": ("energy",)}, expert=True),
            "decomposition": Dim.choice(("svd", *NEED_EXAMPLES), "activation_aware", expert=True),
            "examples": Dim.integer(32, 2048, 256, when={"decomposition": NEED_EXAMPLES}, expert=True),
            "rank_multiple": Dim.choice(MULTIPLES, usual_multiple(teacher), expert=True),
            "recover": Dim.choice(("none", "kd"), "none", expert=True),
            "learning_rate": Dim.real(1e-6, 1e-2, 5e-5, log=True, when={"recover": ("kd",)}, expert=True),
        }

    def unsupported(self, subject: Subject) -> str | None:
        """Products of matrices, and matrices whose zeros must stay."""
        if "recurrent" in subject.traits:
            return "it has no transformer layers"
        if "sparse" in subject.traits:
            return "its matrices have zeros that must stay, and a product of two would fill them"
        return "its matrices are products of two already" if "low-rank" in subject.traits else None

    def effective(self, subject: Subject, params: Params) -> Params:
        """The ratio that the first target's rank really is of its break-even; as asked where all stay whole."""
        if params["rank_mode"] != "ratio" or self.faults(subject, params):
            return params
        out, within = shapes(subject)[TARGETS[str(params["targets"])][0]]
        ratio = rank_of(out, within, params) * (out + within) / max(1.0, out * within)
        return {**params, "rank_ratio": min(max(ratio, 0.1), 0.9)}

    def faults(self, subject: Subject, params: Params) -> Mapping[str, str]:
        """Ranks at which every target would stay whole."""
        return useless(subject, params)

    def after(self, subject: Subject, params: Params) -> Subject:
        """The ranks in closed form; estimated where layers differ (a mean one's) or spectra decide (the most)."""
        found = shapes(subject)
        ranks = tuple(useful_rank(*found[part], params) if part in _targets(params) else 0 for part in PARTS)
        if not any(ranks):
            return subject
        by_weights = ["non-uniform", "estimated"] if params["rank_mode"] == "energy" else []
        by_layers = ["estimated"] if "non-uniform" in subject.traits else []
        return subject.having("low-rank", "lossy", *by_weights, *by_layers, ranks=ranks)

    def trains(self, params: Params) -> bool:
        """Only where it recovers by itself."""
        return params["recover"] == "kd"

    def apply(self, candidate: Candidate, params: Params, context: Context) -> Candidate:
        """Factor every target, a shared one once for all its places, and recover if asked to."""
        candidate, params = candidate.copy(), self.effective(candidate.subject, params)
        for name, fault in self.faults(candidate.subject, params).items():
            raise TrialError(f"{name}: {fault}")
        network = candidate.network.to(context.device)
        for linear, factors in list(decomposed(network, params, context)):
            replace(network, linear, LowRankLinear(*factors, linear.bias))
        if self.trains(params):
            loss = soft_target_loss(context, candidate.subject.task)
            context.fit(network, loss=loss, learning_rate=float(params["learning_rate"]))
        promised = self.after(candidate.subject, params)
        return candidate.replace(network=network, subject=as_found(promised, network))

    def evaluate(self, candidate: Candidate, context: Context) -> Mapping[str, float]:
        """``factored``: how many distinct matrices are products of two; the spectra may leave none."""
        maps = {getattr(parts(layer), part) for layer in layers(candidate.network) for part in PARTS}
        return {"factored": float(sum(isinstance(linear, LowRankLinear) for linear in maps))}


def as_found(promised: Subject, network: nn.Module) -> Subject:
    """What was promised with the ranks that the network has; no product at all is none."""
    ranks = subject_of(network, promised.task).ranks
    return promised.having(ranks=ranks).without("estimated", *(() if ranks else ("low-rank",)))


# --- ranks ------------------------------------------------------------------------------------------------------


def shapes(subject: Subject) -> dict[str, tuple[float, float]]:
    """(out, in) of each part; means where layers differ."""
    width, hidden, neurons = subject.heads * subject.head_dim, subject.hidden, subject.intermediate
    wide, back = (width, hidden), (hidden, width)
    return dict(zip(PARTS, (wide, wide, wide, back, (neurons, hidden), (hidden, neurons)), strict=True))


def break_even(out: float, within: float) -> float:
    """The rank at which two factors have as many weights as the whole: out·in/(out + in)."""
    return out * within / (out + within) if out and within else 0.0


def rank_of(out: float, within: float, params: Params) -> int:
    """The rank that a ratio means, to the nearest multiple, at least one."""
    multiple = int(params["rank_multiple"])
    return multiple * max(1, round(float(params["rank_ratio"]) * break_even(out, within) / multiple))


def useful_rank(out: float, within: float, params: Params) -> int:
    """The rank to factor at, 0 to leave the map whole; where the spectrum decides, the largest there can be."""
    multiple, limit = int(params["rank_multiple"]), WORTHWHILE * break_even(out, within)
    if params["rank_mode"] == "energy":
        return max(0, math.ceil(limit / multiple) - 1) * multiple
    rank = rank_of(out, within, params)
    return rank if rank < limit else 0


def useless(subject: Subject, params: Params) -> dict[str, str]:
    """The dimension for which no target has a useful rank, with what would do; nothing where one has."""
    targets = [shapes(subject)[part] for part in _targets(params)]
    if any(useful_rank(*shape, params) for shape in targets):
        return {}
    multiple, widest = int(params["rank_multiple"]), max(targets, key=lambda shape: break_even(*shape))
    limit = WORTHWHILE * break_even(*widest)
    gains = f"a rank gains something below {limit:.4g}"
    if multiple >= limit:
        fitting = [str(other) for other in MULTIPLES if other < limit]
        expected = f"one of {', '.join(fitting)}" if fitting else "other targets"
        return {"rank_multiple": f"{multiple}, and {gains}: expected {expected}"}
    rank, most = rank_of(*widest, params), max(largest_ratio(*shape, multiple) for shape in targets)
    return {
        "rank_ratio": f"{float(params['rank_ratio']):.3g} is rank {rank}, and {gains}: expected at most {most:g}"
    }


def largest_ratio(out: float, within: float, multiple: int) -> float:
    """The largest ratio, to two decimals, whose rank to the nearest multiple is useful."""
    even = break_even(out, within)
    if not even:
        return 0.0
    units = math.ceil(WORTHWHILE * even / multiple) - 1
    return math.floor(100 * (units + 0.5) * multiple / even - 1e-6) / 100


def usual_multiple(teacher: Subject) -> int:
    """The usual multiple, or a smaller one for feed-forward maps too small for it."""
    usual: Params = {"rank_mode": "ratio", "rank_ratio": USUAL_RATIO, "targets": "ffn"}
    fitting = [m for m in MULTIPLES if m <= USUAL_MULTIPLE and not useless(teacher, {**usual, "rank_multiple": m})]
    return max(fitting, default=MULTIPLES[0])


def energy_rank(spectrum: Tensor, energy: float, multiple: int) -> int:
    """The smallest multiple at which the largest σ² make up the part ``energy`` of their sum; σ (n,) falling."""
    kept = spectrum.square().cumsum(0)
    rank = int((kept < energy * kept[-1]).sum()) + 1
    return -(-rank // multiple) * multiple


# --- decompositions ---------------------------------------------------------------------------------------------


def decomposed(network: nn.Module, params: Params, context: Context) -> Iterator[tuple[nn.Linear, Factors]]:
    """The distinct maps that are to be factored, with their factors; of the right shapes only in a dry run.

    Where spectra decide on shapes, a dry run takes those of the weights that there are.
    """
    linears = targets_of(network, params)
    if not linears:  # the mean of the layers' shapes has a useful rank, and none of them has
        return
    importances: Sequence[Tensor | None] = [None] * len(linears)
    examples, by_shape = int(params.get("examples", 0)), context.dry and params["rank_mode"] == "ratio"
    if not by_shape and params["decomposition"] == "activation_aware":
        importances = second_moments(network, linears, context.calibration(examples))
    elif not by_shape and params["decomposition"] == "fisher_weighted":
        importances = row_weights(network, linears, context.calibration(examples, batch_size=8), context.task_loss)
    for linear, importance in zip(linears, importances, strict=True):
        weight = linear.weight.detach()
        factors = placeholder(weight, params) if by_shape else factored(weight, importance, params)
        if factors:
            yield linear, factors


def targets_of(network: nn.Module, params: Params) -> list[nn.Linear]:
    """The distinct maps that the targets name, without those too small for any useful rank."""
    named = [getattr(parts(layer), part) for layer in layers(network) for part in _targets(params)]
    useful = [linear for linear in named if useful_rank(linear.out_features, linear.in_features, params)]
    return list({id(linear): linear for linear in useful}.values())


def _targets(params: Params) -> tuple[str, ...]:
    return TARGETS[str(params["targets"])]


def factored(weight: Tensor, importance: Tensor | None, params: Params) -> Factors | None:
    """Factors of a matrix at the rank it is to have; None where that gains too little.

    Args:
        weight: W (out, in).
        importance: as :func:`decompose` takes it.
        params: the method's.
    """
    found, (out, within) = decompose(weight, importance), weight.shape
    rank = useful_rank(out, within, params)
    if params["rank_mode"] == "energy":
        rank = energy_rank(found.spectrum, float(params["energy"]), int(params["rank_multiple"]))
        if rank >= WORTHWHILE * break_even(out, within):
            return None
    return found.cut(rank, like=weight)


def placeholder(weight: Tensor, params: Params) -> Factors:
    """Factors of the rank there would be, with finite weights that mean nothing."""
    out, within = weight.shape
    rank = useful_rank(out, within, params)
    return Factors(weight[:, :rank].clone(), weight[:rank].clone())


class Decomposition(NamedTuple):
    """W = left · diag(spectrum) · right: (out, n), (n,) falling, and (n, in), all in float64."""

    left: Tensor
    spectrum: Tensor
    right: Tensor

    def cut(self, rank: int, like: Tensor) -> Factors:
        """The first ``rank`` terms, √σ to either side, in another tensor's dtype."""
        root = self.spectrum[:rank].sqrt()
        left, right = self.left[:, :rank] * root, root[:, None] * self.right[:rank]
        return Factors(left.to(like).contiguous(), right.to(like).contiguous())


def decompose(weight: Tensor, importance: Tensor | None = None) -> Decomposition:
    """Terms of W (out, in), of which the first r are the best approximation of rank r in the sense of importance.

    Args:
        weight: W.
        importance: None, for ‖W − Ŵ‖²; second moments C = E[x·xᵀ] (in, in), for E‖W·x − Ŵ·x‖²; or weights d (out,)
            of the rows, for ‖diag(d)·(W − Ŵ)‖².
    """
    weight = weight.double()
    if importance is None:
        return Decomposition(*torch.linalg.svd(weight, full_matrices=False))
    importance = importance.double()
    if importance.dim() == 1:
        scale = importance.clamp(min=RIDGE * max(float(importance.max()), RIDGE))[:, None]
        left, spectrum, right = torch.linalg.svd(scale * weight, full_matrices=False)
        return Decomposition(left / scale, spectrum, right)
    mean = float(importance.diagonal().mean()) or 1.0
    lower = torch.linalg.cholesky(importance + RIDGE * mean * torch.eye(len(importance)).to(importance))
    left, spectrum, right = torch.linalg.svd(weight @ lower, full_matrices=False)
    return Decomposition(left, spectrum, torch.linalg.solve_triangular(lower, right, upper=False, left=False))


# --- what matters, on training examples -------------------------------------------------------------------------


def second_moments(network: nn.Module, linears: Sequence[nn.Linear], batches: Iterable[Batch]) -> list[Tensor]:
    """E[x·xᵀ] (in, in) of each map's inputs over all places it is used at and all tokens that are no padding."""
    totals = [linear.weight.new_zeros(linear.in_features, linear.in_features).double() for linear in linears]
    mask, tokens = torch.empty(0), 0

    def add_to(total: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            # in double from here on: of fewer tokens than inputs, float32's rounding outweighs the ridge
            inputs = args[0][mask].double()
            total.add_(inputs.T @ inputs)

        return hook

    hooks = [linear.register_forward_pre_hook(add_to(total)) for linear, total in zip(linears, totals, strict=True)]
    try:
        with torch.no_grad():
            for batch in batches:
                mask = batch["attention_mask"].bool()
                tokens += int(mask.sum())
                network(**{name: tensor for name, tensor in batch.items() if name not in ("labels", "index")})
    finally:
        for handle in hooks:
            handle.remove()
    return [total / max(1, tokens) for total in totals]


def row_weights(
    network: nn.Module, linears: Sequence[nn.Linear], batches: Iterable[Batch], loss: Loss
) -> list[Tensor]:
    """√Σg² (out,) over a row's weights and the batches: the root of the row's empirical Fisher information."""
    totals = [linear.weight.new_zeros(linear.out_features) for linear in linears]
    weights = [linear.weight for linear in linears]
    for batch in batches:
        gradients = torch.autograd.grad(loss(network, batch), weights)
        for total, gradient in zip(totals, gradients, strict=True):
            total.add_(gradient.square().sum(1))
    return [total.sqrt() for total in totals]


def replace(network: nn.Module, linear: nn.Linear, factors: LowRankLinear) -> None:
    """Put the factors in the map's place, wherever the network has it."""
    paths = [path for path, module in network.named_modules(remove_duplicate=False) if module is linear]
    for path in paths:
        network.set_submodule(path, factors)

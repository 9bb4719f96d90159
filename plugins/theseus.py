"""BERT-of-Theseus: single layers take over from blocks of layers, gradually, under the task's loss alone.

The model to compress (the predecessor) is cut into blocks; each gets one new layer (its successor). Stage 1
trains the successors inside the predecessor, a gate per block saying how much of which branch is used; stage 2
trains the successors on their own, and they alone are left. Owns blocks, gates and schedules; how layers of a
family are called is the family's own business, since a block stands in a layer's place.

Source: Xu et al. 2020, BERT-of-Theseus: Compressing BERT by Progressive Module Replacing (sections in brackets).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from itertools import accumulate, pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from compress_search import Batch, Candidate, Context, Dim, Method, Params, Stage, Subject, TrialError
from compress_search.encoders import backbone, embeddings, head, layers, set_layers

from .distillation import layer_maps
from .distillation.soft_targets import SoftTerm, crf_missing, crf_space, crf_target, soft_target_loss

INITS = ("first_k", "every_nth", "last_of_block", "first_of_block", "random")
STARTS = ("first_k", "last_of_block")
"""Those that are searched unless a study names others (decision 0028)."""
MIXINGS = ("bernoulli", "uniform", "deterministic")
DEFAULT_FULL_REPLACEMENT = 0.5


def block_sizes(depth: int, params: Params) -> list[int]:
    """How many of the predecessor's layers each successor layer replaces, first block first.

    Raises:
        TrialError: ``block_size`` does not divide the depth.
    """
    if params.get("partition", "uniform") == "custom":
        cuts = [layer for layer in range(1, depth) if params.get(f"cut_after_{layer}")]
        return [end - start for start, end in pairwise([0, *cuts, depth])]
    size = int(params["block_size"])
    if size < 1 or depth % size:
        allowed = ", ".join(map(str, divisors(depth)))
        raise TrialError(f"block_size {size} does not divide {depth} layers: expected one of {allowed}")
    return [size] * (depth // size)


def divisors(depth: int) -> list[int]:
    """Sizes of two layers or more that blocks of equal size can have."""
    return [size for size in range(2, depth + 1) if depth % size == 0]


def source_layers(init: str, sizes: Sequence[int]) -> list[int]:
    """Which of the predecessor's layers (0-based) each successor starts as a copy of.

    ``first_k`` and ``random``: the bottom ones, which the paper finds best for a truncated network;
    ``every_nth``: evenly spread with both ends, 0, 2, 4, 7, 9, 11 for six of twelve; ``first_of_block`` and
    ``last_of_block``: of its own block.
    """
    ends = list(accumulate(sizes))
    if init == "first_of_block":
        return [end - size for end, size in zip(ends, sizes, strict=True)]
    if init == "last_of_block":
        return [end - 1 for end in ends]
    return layer_maps.source_layers("spread" if init == "every_nth" else "first", len(sizes), ends[-1])


def replacing_rate(progress: float, schedule: str, base: float, full_at: float) -> float:
    """The probability that a block is replaced, at this fraction of stage 1 [3.3].

    ``constant`` stays at ``base``; ``linear`` goes from ``base`` to exactly 1 at ``full_at`` and stays there;
    ``anti_linear`` is 1 minus that.
    """
    if schedule == "constant":
        return base
    rate = 1.0 if progress >= full_at else min(1.0, base + (1 - base) * progress / full_at)
    return 1 - rate if schedule == "anti_linear" else rate


def draw_gates(
    mixing: str, rate: float, shape: tuple[int, ...], generator: torch.Generator, *, redraw_empty: bool = True
) -> Tensor:
    """Gates in [0, 1], 1 = replaced, of shape (blocks,) or (blocks, B), on the CPU.

    ``bernoulli``: independent, 1 with probability ``rate``, with ``redraw_empty`` under the condition that not all
    are 0, for then a step would have no gradient at all; ``uniform``: uniform with mean ``rate`` on the widest
    interval there is; ``deterministic``: the rate itself.
    """
    if mixing == "deterministic":
        return torch.full(shape, rate)
    if mixing == "uniform":
        low, high = max(0.0, 2 * rate - 1), min(1.0, 2 * rate)
        return low + (high - low) * torch.rand(shape, generator=generator)
    gates = (torch.rand(shape, generator=generator) < rate).float().flatten()
    if not redraw_empty:
        return gates.view(shape)
    # the first 1 is at i with probability ∝ (1 − rate)^i; what follows it is free
    weights = torch.full((gates.numel(),), 1 - rate, dtype=torch.float64) ** torch.arange(gates.numel())
    first = int(torch.multinomial(weights, 1, generator=generator))
    gates[:first], gates[first] = 0, 1
    return gates.view(shape)


class Gates:
    """The gates as they are now, shared by all blocks of a hybrid: (blocks,) or (blocks, B)."""

    def __init__(self, blocks: int) -> None:
        self.values = torch.zeros(blocks)


def mix(gate: Tensor, successor: Callable[[], Tensor], predecessor: Callable[[], Tensor]) -> Tensor:
    """r·successor + (1 − r)·predecessor for a gate () or (B,) and branches (B, …).

    A branch that a single gate shuts is not run.
    """
    if gate.ndim == 0 and gate in (0, 1):
        return successor() if gate == 1 else predecessor()
    new = successor()
    gate = gate.to(new).reshape(-1, *[1] * (new.ndim - 1))
    return gate * new + (1 - gate) * predecessor()


class Block(nn.Module):
    """Stands where its predecessor stood and mixes the two branches; both read the same input.

    The predecessor stays in evaluation mode, without dropout: what it says should not be noisy.
    """

    def __init__(self, predecessor: nn.Module, successor: nn.Module, gates: Gates, index: int) -> None:
        super().__init__()
        self.predecessor, self.successor = predecessor, successor
        self.gates, self.index = gates, index

    def train(self, mode: bool = True) -> Block:
        """Set the mode of the successor alone."""
        super().train(mode)
        self.predecessor.eval()
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Called as a layer, or as the embeddings, of the family."""
        return mix(
            self.gates.values[self.index],
            lambda: self.successor(*args, **kwargs),
            lambda: self.predecessor(*args, **kwargs),
        )


class Stack(nn.ModuleList):
    """Layers called one after the other as if they were one."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Hidden states (B, S, H) to hidden states; what else a layer gets, all get."""
        for layer in self:
            hidden_states = layer(hidden_states, *args, **kwargs)
        return hidden_states


def make_hybrid(
    network: nn.Module, sizes: Sequence[int], sources: Sequence[int], gates: Gates, *, with_embeddings: bool = False
) -> nn.Module:
    """A copy of the network with a block in place of every ``sizes[i]`` layers; successors copy ``sources``.

    With embeddings, these are replaced too, under the first block's gate.
    """
    hybrid = deepcopy(network)
    old, start = list(layers(hybrid)), 0
    blocks = []
    for index, (size, source) in enumerate(zip(sizes, sources, strict=True)):
        blocks.append(Block(Stack(old[start : start + size]), deepcopy(old[source]), gates, index))
        start += size
    set_layers(hybrid, blocks)
    if with_embeddings:
        table = embeddings(hybrid)
        backbone(hybrid).embeddings = Block(table, deepcopy(table), gates, 0)
    return hybrid


def successors(hybrid: nn.Module) -> list[nn.Module]:
    """The modules that are to stay, embeddings first where they are replaced."""
    blocks = [embeddings(hybrid), *layers(hybrid)]
    return [block.successor for block in blocks if isinstance(block, Block)]


def release(hybrid: nn.Module) -> nn.Module:
    """Drop the predecessor, in place: an ordinary network of the family is left."""
    if isinstance(block := embeddings(hybrid), Block):
        backbone(hybrid).embeddings = block.successor
    set_layers(hybrid, successors(hybrid))
    return hybrid


def reinitialise(module: nn.Module, std: float, generator: torch.Generator) -> None:
    """Fresh weights as BERT has them before training: N(0, std²), no bias, norms of the identity."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            part.weight.data = (torch.randn(part.weight.shape, generator=generator) * std).to(part.weight)
            nn.init.zeros_(part.bias)
        elif isinstance(part, nn.LayerNorm):
            part.reset_parameters()


class Theseus(Method):
    """Fewer layers by progressive module replacing, without any distillation term by default."""

    stage = Stage.STUDENT

    def search_space(self, teacher: Subject) -> Mapping[str, Dim]:
        """``block_size`` layers become one; a custom partition cuts after the layers (1-based) it names.

        Size 1, only for a study that names it, replaces each layer by an equal one: the control that says what
        replacing is worth by itself.
        """
        sizes = divisors(teacher.layers) or [2]
        random = {"mixing": ("bernoulli", "uniform")}
        cuts = {
            f"cut_after_{layer}": Dim.flag(False, when={"partition": ("custom",)}, expert=True)
            for layer in range(1, teacher.layers)
        }
        return {
            "partition": Dim.choice(("uniform", "custom"), "uniform", expert=True),
            "block_size": Dim.choice([1, *sizes], sizes[0], when={"partition": ("uniform",)}, usual=sizes),
            **cuts,
            "successor_init": Dim.choice(INITS, "first_k", usual=STARTS),
            "mixing": Dim.choice(MIXINGS, "bernoulli", expert=True),
            "sample_granularity": Dim.choice(("batch", "example"), "batch", when=random, expert=True),
            "redraw_empty": Dim.flag(True, when={"mixing": ("bernoulli",)}, expert=True),
            # a deterministic mixture only ends as the successor if it is a ramp, so it is always linear
            "schedule": Dim.choice(("linear", "constant"), "linear", when=random),
            "base_rate": Dim.real(0.1, 0.9, 0.3),
            "full_replacement_at": Dim.real(0.2, 0.9, DEFAULT_FULL_REPLACEMENT, expert=True),
            "anti_linear": Dim.flag(False, when={"schedule": ("linear",)}, expert=True),
            "constant_rate": Dim.real(0.1, 0.9, 0.5, when={"schedule": ("constant",)}),
            "replace_embeddings": Dim.flag(False, expert=True),
            "train_head_in_stage1": Dim.flag(False, expert=True),
            "stage1_fraction": Dim.real(0.3, 0.9, 2 / 3, expert=True),
            "kd_in_stage2": Dim.flag(False, expert=True),
            **crf_space(teacher, when={"kd_in_stage2": (True,)}),
            "learning_rate": Dim.real(1e-6, 1e-2, 5e-5, log=True, expert=True),
        }

    def unsupported(self, subject: Subject) -> str | None:
        """Blocks need at least two layers, all alike, each with weights of its own."""
        if subject.layers < 2:
            return f"{subject.layers} layer cannot be grouped into blocks: at least 2 are needed"
        if "shared" in subject.traits:
            return "its layers share weights, which copies of them would not"
        if "non-uniform" in subject.traits:
            return "its layers differ in shape"
        return None

    def missing(self, teacher: Subject) -> Mapping[str, str]:
        """A CRF to learn from."""
        return crf_missing(teacher)

    def effective(self, subject: Subject, params: Params) -> Params:
        """Without a ramp where the rate is constant, and with the first name that the successors' layers have."""
        init, sizes = str(params["successor_init"]), block_sizes(subject.layers, params)
        if init != "random":
            wanted = source_layers(init, sizes)
            params = {**params, "successor_init": next(n for n in INITS if source_layers(n, sizes) == wanted)}
        idle = {"base_rate", "full_replacement_at"} if params.get("schedule") == "constant" else set()
        return {name: value for name, value in params.items() if name not in idle}

    def after(self, subject: Subject, params: Params) -> Subject:
        """A layer for every block."""
        return subject.having("lossy", layers=len(block_sizes(subject.layers, params)))

    def trains(self, params: Params) -> bool:
        """Always: both stages."""
        return True

    def apply(self, candidate: Candidate, params: Params, context: Context) -> Candidate:
        """Both stages, on ``stage1_fraction`` of the budget and on the rest."""
        generator = torch.Generator().manual_seed(context.seed)
        sizes = block_sizes(candidate.subject.layers, params)
        gates = Gates(len(sizes))
        init = str(params["successor_init"])
        hybrid = make_hybrid(
            candidate.network,
            sizes,
            source_layers(init, sizes),
            gates,
            with_embeddings=bool(params["replace_embeddings"]),
        )
        if init == "random":
            std = float(cast(Any, hybrid.config).initializer_range)
            for layer in successors(hybrid)[-len(sizes) :]:
                reinitialise(layer, std, generator)
        _replace(hybrid, gates, generator, params, context)
        network = release(hybrid)
        _fine_tune(network, candidate.subject.task, params, context)
        return candidate.replace(network=network, subject=self.after(candidate.subject, params))


def _replace(hybrid: nn.Module, gates: Gates, generator: torch.Generator, params: Params, context: Context) -> None:
    """Stage 1: only the successors learn, and the head if asked to. Its scores would be the predecessor's."""
    blocks, mixing = len(gates.values), str(params["mixing"])
    per_example, redraw = params.get("sample_granularity") == "example", bool(params.get("redraw_empty", True))
    schedule = "anti_linear" if params.get("anti_linear") else str(params.get("schedule", "linear"))
    base = float(params["constant_rate" if schedule == "constant" else "base_rate"])
    full_at = float(params.get("full_replacement_at", DEFAULT_FULL_REPLACEMENT))
    rate = base

    def on_step(step: int, steps: int) -> None:
        nonlocal rate
        rate = replacing_rate(step / steps, schedule, base, full_at)

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        shape = (blocks, len(batch["input_ids"])) if per_example else (blocks,)
        gates.values = draw_gates(mixing, rate, shape, generator, redraw_empty=redraw)
        value = context.task_loss(network, batch)
        # where every gate is shut no weight has a gradient, and none moves, not by its momentum either
        return value if value.requires_grad else value.requires_grad_()

    learning = successors(hybrid) + (head(hybrid) if params["train_head_in_stage1"] else [])
    parameters = [parameter for module in learning for parameter in module.parameters()]
    kept = {id(parameter) for parameter in parameters}
    frozen = [p for p in hybrid.parameters() if p.requires_grad and id(p) not in kept]
    for parameter in frozen:
        parameter.requires_grad_(False)
    context.fit(
        hybrid,
        loss=loss,
        scored=False,
        share=float(params["stage1_fraction"]),
        parameters=parameters,
        learning_rate=float(params["learning_rate"]),
        on_step=on_step,
    )
    for parameter in frozen:
        parameter.requires_grad_(True)


def _fine_tune(network: nn.Module, task: str, params: Params, context: Context) -> None:
    """Stage 2: the successor on its own, all of it [3.2]; a finer step, for it is nearly there."""
    term = SoftTerm(task, crf_target=crf_target(params))
    context.fit(
        network,
        loss=soft_target_loss(context, term) if params["kd_in_stage2"] else None,
        share=1 - float(params["stage1_fraction"]),
        learning_rate=float(params["learning_rate"]) / 2,
    )

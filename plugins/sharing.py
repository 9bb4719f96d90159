"""Cross-layer parameter sharing: the layers of a group use one set of weights, where each had its own.

Takes memory and disk, and no time: as many layers run as before. Owns which layers form a group, what their common
weights start as and how the network gets used to them. That the shared modules are one and the same, when copied,
saved and exported too, is the engine's.

Sources: Lan et al. 2020, ALBERT: A Lite BERT for Self-supervised Learning of Language Representations (what is
shared, groups), which trains from scratch; the conversion of a trained network is our own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from compress_search import Batch, Candidate, Context, Dim, Loss, Method, ParameterGroup, Params, Stage, Subject
from compress_search.encoders import layers, parts, share_parts

from .alignment import align
from .distillation.imitation import imitation_loss
from .distillation.soft_targets import soft_target_loss

ATTENTION = ("query", "key", "value", "attention_output", "attention_norm")
FEED_FORWARD = ("up", "down", "output_norm")
MODES = {"all": ATTENTION + FEED_FORWARD, "attention": ATTENTION, "ffn": FEED_FORWARD}
INITS = ("average", "first", "last", "middle", "best_of")
TRAINED = ("layer_match", "kd")

Group = Sequence[int]
"""Layers, counted from 0, that are to share weights."""


def group_counts(depth: int) -> list[int]:
    """In how many equal groups of two layers or more a depth can be cut."""
    return [count for count in range(1, depth) if depth % count == 0]


def groups_of(depth: int, count: int) -> list[list[int]]:
    """Consecutive layers, layer i in group ⌊i·count/depth⌋."""
    return [[layer for layer in range(depth) if layer * count // depth == group] for group in range(count)]


def shared_names(params: Params) -> tuple[str, ...]:
    """The parts of a layer that these parameters share; norms follow their blocks unless told otherwise."""
    names = MODES[str(params["mode"])]
    return names if params.get("share_layernorm", True) else tuple(n for n in names if not n.endswith("norm"))


def middle(group: Group) -> int:
    """The middle layer, the lower one of two."""
    return group[(len(group) - 1) // 2]


def tie_means(network: nn.Module, names: Sequence[str], groups: Iterable[Group]) -> None:
    """Share parts in place, each set of weights the mean of its group's."""
    for group in groups:
        with torch.no_grad():
            for weights in zip(*(_weights(network, names, layer) for layer in group), strict=True):
                weights[0].copy_(torch.stack(weights).mean(0))
        share_parts(network, names, dict.fromkeys(group, group[0]))


def best_sources(
    network: nn.Module, names: Sequence[str], groups: Iterable[Group], loss: Callable[[nn.Module], float]
) -> dict[int, int]:
    """For each group the layer whose weights, used throughout it, give the least loss; the first wins a tie.

    Groups are decided one after the other from the bottom, those above as they were: as many losses as layers.
    """
    sources: dict[int, int] = {}
    for group in groups:
        losses = {}
        for layer in group:
            repeated = deepcopy(network)
            share_parts(repeated, names, sources | dict.fromkeys(group, layer))
            losses[layer] = loss(repeated)
        sources |= dict.fromkeys(group, min(group, key=losses.__getitem__))
    return sources


def disagreement(network: nn.Module, names: Sequence[str], groups: Sequence[Group]) -> Tensor:
    """Σᵢ‖θᵢ − θ̄‖²/‖θ̄‖² over the layers i of a group, θ̄ their mean; the mean over groups.

    No gradient flows through ‖θ̄‖², which could else be made large instead.
    """
    total = torch.zeros(())
    for group in groups:
        apart, size = torch.zeros(()), torch.zeros(())
        for weights in zip(*(_weights(network, names, layer) for layer in group), strict=True):
            stacked = torch.stack(weights)
            mean = stacked.mean(0)
            apart = apart.to(mean) + (stacked - mean).square().sum()
            size = size.to(mean) + mean.detach().square().sum()
        total = total.to(apart) + apart / size
    return total / len(groups)


def _weights(network: nn.Module, names: Sequence[str], layer: int) -> list[nn.Parameter]:
    """The parameters of the named parts of a layer, in an order that is the same for all layers."""
    found = parts(layers(network)[layer])
    return [parameter for name in names for parameter in getattr(found, name).parameters()]


class Sharing(Method):
    """One set of attention, feed-forward or all weights for a group of layers."""

    stage = Stage.SHARING

    def search_space(self, teacher: Subject) -> Mapping[str, Dim]:
        """What is shared, by how many groups, and how a trained network gets there.

        Layers become one of theirs, or their mean, which on few steps is the worse start by far (decision 0032).
        ``tie_warmup`` is the part of the training in which layers are still apart and drawn towards their mean, by
        ``tie_penalty`` at its end. ``learning_rate`` is that of weights used once: what n layers share learns at
        1/√n of it.
        """
        counts = group_counts(teacher.layers) or [1]
        trained, means = {"recover": TRAINED}, {"convert_init": ("average",)}
        drawn = {"convert_init": ("average",), "recover": TRAINED}
        return {
            "mode": Dim.choice(tuple(MODES), "all"),
            "groups": Dim.choice(counts, 1),
            "share_layernorm": Dim.flag(True, when={"mode": ("all",)}, expert=True),
            "convert_init": Dim.choice(INITS, "first", expert=True),
            "align": Dim.flag(True, when=means, expert=True),
            "calib_examples": Dim.choice((256, 512, 1024), 512, when={"convert_init": ("best_of",)}, expert=True),
            "recover": Dim.choice((*TRAINED, "none"), "layer_match", expert=True),
            "hidden_weight": Dim.real(0.01, 10.0, 1.0, log=True, when={"recover": ("layer_match",)}, expert=True),
            "tie_warmup": Dim.real(0.0, 0.6, 0.0, when=drawn, expert=True),
            "tie_penalty": Dim.real(0.01, 10.0, 1.0, log=True, when=drawn, expert=True),
            "learning_rate": Dim.real(1e-6, 1e-2, 1e-4, log=True, when=trained, expert=True),
        }

    def unsupported(self, subject: Subject) -> str | None:
        """At least two layers of equal shape, each with weights of its own."""
        if "recurrent" in subject.traits:
            return "it has no transformer layers"
        if subject.layers < 2:
            return f"{subject.layers} layer has no other to share with"
        if "shared" in subject.traits:
            return "its layers share weights already"
        return "its layers differ in shape" if "non-uniform" in subject.traits else None

    def effective(self, subject: Subject, params: Params) -> Params:
        """As many groups as the layers left can be cut into, at most as many as asked for."""
        fitting = [count for count in group_counts(subject.layers) if count <= int(params["groups"])]
        rounded = {**params, "groups": max(fitting, default=1)}
        if not params.get("tie_warmup"):
            rounded.pop("tie_penalty", None)
        return rounded

    def after(self, subject: Subject, params: Params) -> Subject:
        """As many layers as before, on fewer weights."""
        names, sets = shared_names(params), int(self.effective(subject, params)["groups"])
        norms = sum(sets if norm in names else subject.layers for norm in ("attention_norm", "output_norm"))
        return subject.having(
            "shared",
            "lossy",
            attention_sets=sets if "query" in names else 0,
            ffn_sets=sets if "up" in names else 0,
            norm_sets=norms if norms < 2 * subject.layers else 0,
        )

    def trains(self, params: Params) -> bool:
        """Unless recovery is left to another step."""
        return params["recover"] != "none"

    def apply(self, candidate: Candidate, params: Params, context: Context) -> Candidate:
        """Bring the layers together, tie them, and train what they share."""
        given, params = candidate.subject, self.effective(candidate.subject, params)
        network = candidate.copy().network.to(context.device)
        names, groups = shared_names(params), groups_of(given.layers, int(params["groups"]))
        loss = _recovery_loss(candidate, params, context) if self.trains(params) else None
        warmup = float(params.get("tie_warmup", 0.0))
        if params.get("align") and not context.dry:
            _align_groups(network, names, groups)
        if loss and warmup:
            _draw_together(network, names, groups, loss, params, context)
        _tie(network, names, groups, params, context)
        if loss:
            rate = float(params["learning_rate"])
            slower = _slower(network, names, groups, rate)
            context.fit(network, loss=loss, share=1 - warmup, learning_rate=rate, parameters=slower)
        return candidate.replace(network=network, subject=self.after(given, params))


def _align_groups(network: nn.Module, names: Sequence[str], groups: Iterable[Group]) -> None:
    for group in groups:
        for layer in group:
            if layer != middle(group):
                align(network, layer, middle(group), heads="query" in names, neurons="up" in names)


def _slower(
    network: nn.Module, names: Sequence[str], groups: Sequence[Group], rate: float
) -> list[nn.Parameter | ParameterGroup]:
    """All parameters, those that n layers share at 1/√n of the rate: they get n layers' gradients."""
    tied = {parameter: None for group in groups for parameter in _weights(network, names, group[0])}
    apart = ParameterGroup(list(tied), rate / math.sqrt(len(groups[0])))
    return [*(parameter for parameter in network.parameters() if parameter not in tied), apart]


def _draw_together(
    network: nn.Module,
    names: Sequence[str],
    groups: Sequence[Group],
    recovery: Loss,
    params: Params,
    context: Context,
) -> None:
    """Train with a penalty on :func:`disagreement` that rises linearly; not scored, for it is not tied yet."""
    penalty = 0.0

    def on_step(step: int, steps: int) -> None:
        nonlocal penalty
        penalty = float(params["tie_penalty"]) * step / steps

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        return recovery(network, batch) + penalty * disagreement(network, names, groups)

    context.fit(
        network,
        loss=loss,
        scored=False,
        share=float(params["tie_warmup"]),
        learning_rate=float(params["learning_rate"]),
        on_step=on_step,
    )


def _tie(
    network: nn.Module, names: Sequence[str], groups: Sequence[Group], params: Params, context: Context
) -> None:
    init = str(params["convert_init"])
    if init == "average":
        tie_means(network, names, groups)
    elif init == "best_of" and not context.dry:
        examples = int(params["calib_examples"])
        share_parts(network, names, best_sources(network, names, groups, lambda n: _loss(n, examples, context)))
    else:
        place = {"last": lambda group: group[-1], "middle": middle}.get(init, lambda group: group[0])
        share_parts(network, names, {layer: place(group) for group in groups for layer in group})


def _loss(network: nn.Module, examples: int, context: Context) -> float:
    """The task's mean loss over calibration batches."""
    with torch.no_grad():
        losses = [context.task_loss(network.eval(), batch) for batch in context.calibration(examples)]
    return float(torch.stack(losses).mean())


def _recovery_loss(candidate: Candidate, params: Params, context: Context) -> Loss:
    task = candidate.subject.task
    if params["recover"] == "kd":
        return soft_target_loss(context, task)
    original = candidate.copy().network.to(context.device).eval().requires_grad_(False)
    states = [f"hidden.{layer + 1}" for layer in range(candidate.subject.layers)]
    return imitation_loss(context, task, original, states, float(params["hidden_weight"]))

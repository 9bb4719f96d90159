"""Students cut out of their teacher: fewer of its layers, and of its channels those that matter most.

Owns how a network of smaller width takes over weights of a larger one. Trains nothing, and does not decide how
small a student is to be.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from compress_search import Candidate, Dim, Params, Subject
from compress_search.encoders import (
    attach_crf,
    backbone,
    crf_of,
    embeddings,
    family,
    head_linears,
    keep_layers,
    layers,
    parts,
)

WIDTHS = (1.0, 0.75, 0.5, 0.25)
"""The parts of a teacher's width that are searched unless a study names others."""
LEAST_WIDTH = 0.1
NARROW = "none, and the student's states are narrower than its teacher's: expected one, or width 1"
"""What is wrong with such a projection."""


def sizes(teacher: Subject) -> list[int]:
    """The hidden sizes that a student can have, rising: those that leave every head a whole size."""
    heads = round(teacher.heads)
    least = max(1, math.ceil(LEAST_WIDTH * teacher.hidden / heads)) * heads
    # where tables of another width are projected, a student of just that width would have no projection to cut
    untied = teacher.embedding_size not in (0, teacher.hidden)
    return [n for n in range(least, teacher.hidden + 1, heads) if not (untied and n == teacher.embedding_size)]


def widths(teacher: Subject) -> list[float]:
    """Those of :data:`WIDTHS` that leave heads of whole, even size."""
    possible = sizes(teacher)
    even = [part for part in WIDTHS if (teacher.hidden * part / teacher.heads) % 2 == 0]
    return [part for part in even if teacher.hidden * part in possible] or [1.0]


def whole_width(teacher: Subject, width: float) -> float:
    """The part of the teacher's width nearest to this one that is one of :func:`sizes`; never all unless asked."""
    narrower = [size for size in sizes(teacher) if size < teacher.hidden]
    if width == 1 or not narrower:
        return 1.0
    return min(narrower, key=lambda size: abs(size - teacher.hidden * width)) / teacher.hidden


def settled_width(teacher: Subject, params: Params) -> dict[str, int | float | str]:
    """The parameters with a width, where they have one, that leaves whole heads; for ``Method.effective``."""
    found = dict(params)
    return {**found, "width": whole_width(teacher, float(found["width"]))} if "width" in found else found


def width_dim(teacher: Subject, when: Mapping[str, tuple[str, ...]] | None = None, *, expert: bool = False) -> Dim:
    """The part of the teacher's width that is *kept*: one of :func:`widths`, or what a study names.

    To be put through :func:`whole_width`; TinyBERT's 312 of 768 is 0.40625.
    """
    least, usual = sizes(teacher)[0] / teacher.hidden, widths(teacher)
    return Dim.real(least, 1.0, 1.0, when=when, expert=expert, usual=usual)


def depth_dim(teacher: Subject, when: Mapping[str, tuple[str, ...]] | None = None) -> Dim:
    """How many layers a student has; all of them only where it can be narrower (:func:`same_shape`)."""
    fewer, default = list(range(1, teacher.layers)) or [1], max(1, teacher.layers // 2)
    options = list(range(1, teacher.layers + 1)) if len(sizes(teacher)) > 1 else fewer
    return Dim.choice(options, default, when=when, usual=options if len(widths(teacher)) > 1 else fewer)


def same_shape(teacher: Subject, depth: int, width: float) -> str | None:
    """What is wrong with a student as deep and as wide as its teacher; None where it is smaller."""
    if depth < teacher.layers or width < 1:
        return None
    return f"{depth} at the teacher's width is the teacher's own shape: expected fewer layers, or a width below 1"


def unfit(subject: Subject) -> str | None:
    """Why no student can be cut out of such a model; None when one can."""
    if subject.layers < 2:
        return f"{subject.layers} layer leaves nothing to choose from: at least 2 are needed"
    if "shared" in subject.traits:
        return "its layers share weights, which a student of some of them would not"
    return "its layers differ in shape" if "non-uniform" in subject.traits else None


def student_subject(teacher: Subject, depth: int, width: float) -> Subject:
    """The shapes of :func:`cut_student`'s result."""
    hidden = round(teacher.hidden * width)
    tied = teacher.embedding_size in (0, teacher.hidden)
    return teacher.having(
        "lossy",
        layers=depth,
        hidden=hidden,
        head_dim=round(hidden / teacher.heads),
        intermediate=_part(round(teacher.intermediate), width),
        embedding_size=hidden if tied and teacher.embedding_size else teacher.embedding_size,
    )


def cut_student(candidate: Candidate, sources: Sequence[int], width: float) -> Candidate:
    """A candidate of its own with copies of these layers, at this part of the width, not yet trained.

    All heads stay, each with a part of its size.
    """
    student = candidate.copy()
    keep_layers(student.network, sources)
    subject = student_subject(candidate.subject, len(sources), width)
    if width < 1:
        student = student.replace(network=narrowed(student.network, subject.hidden, round(subject.intermediate)))
    return student.replace(subject=subject)


def narrowed(network: nn.Module, hidden: int, neurons: int) -> nn.Module:
    """A new network of smaller width with what matters most of the old one's channels and neurons.

    Channels are kept by the norm of what the word embeddings put there, the same ones everywhere; within a head
    by the product of the norms of what multiplies there, queries with keys, values with the output; neurons by the
    product of the norms of their two vectors.

    Args:
        network: all layers alike, no masks.
        hidden: the new width, a multiple of the number of heads.
        neurons: the new width of the feed-forward blocks.
    """
    small = _blank(network, hidden, neurons)
    channels = _largest(_norms(_table(network), 0 if _tied(network) else 1), hidden)
    with torch.no_grad():
        _copy_embeddings(small, network, channels)
        for ours, theirs in zip(layers(small), layers(network), strict=True):
            _copy_layer(ours, theirs, channels)
        _copy_head(small, network, channels)
    return small.eval()


def _part(size: int, width: float) -> int:
    return max(1, round(size * width))


def _blank(network: nn.Module, hidden: int, neurons: int) -> nn.Module:
    config = deepcopy(cast(Any, network).config)
    names = ("dim", "hidden_dim") if family(network) == "distilbert" else ("hidden_size", "intermediate_size")
    for name, size in zip(names, (hidden, neurons), strict=True):
        setattr(config, name, size)
    if _tied(network) and hasattr(config, "embedding_size"):
        config.embedding_size = hidden
    parameter = next(network.parameters())
    with no_init_weights():
        small: nn.Module = type(network)(config)  # type: ignore[call-arg]
    attach_crf(small)
    return small.to(parameter.device, parameter.dtype)


def _tied(network: nn.Module) -> bool:
    """Whether the embedding tables have the network's width; in ELECTRA they may have another, and be projected."""
    return not hasattr(backbone(network), "embeddings_project")


def _table(network: nn.Module) -> Any:
    """What brings words into the network's channels."""
    return embeddings(network).word_embeddings if _tied(network) else backbone(network).embeddings_project


def _norms(module: Any, dim: int) -> Tensor:
    size: Tensor = torch.linalg.vector_norm(module.weight, dim=dim)
    return size


def _largest(importance: Tensor, count: int) -> Tensor:
    """Indices of the largest entries, in rising order."""
    return importance.topk(count).indices.sort().values


def _copy_embeddings(small: nn.Module, network: nn.Module, channels: Tensor) -> None:
    ours, theirs = dict(embeddings(small).named_modules()), dict(embeddings(network).named_modules())
    tied = _tied(network)
    for name, module in theirs.items():
        if isinstance(module, nn.Embedding):
            ours[name].weight.copy_(module.weight[:, channels] if tied else module.weight)  # type: ignore[operator]
        elif isinstance(module, nn.LayerNorm):
            _copy_norm(ours[name], module, channels if tied else slice(None))
    if not tied:  # the tables stay as they are
        _copy_linear(
            backbone(small).embeddings_project, backbone(network).embeddings_project, channels, slice(None)
        )


def _copy_layer(small: nn.Module, layer: nn.Module, channels: Tensor) -> None:
    ours, theirs = parts(small), parts(layer)
    inner = ours.head_dim

    def rows(first: Tensor, second: Tensor) -> Tensor:
        """The dimensions of each head that stay, by importances (A·d,) of the two maps that meet there."""
        importance = (first * second).view(theirs.heads, theirs.head_dim)
        kept = importance.topk(inner, dim=1).indices.sort(dim=1).values
        offsets = torch.arange(theirs.heads, device=kept.device)[:, None] * theirs.head_dim
        flat: Tensor = (kept + offsets).flatten()
        return flat

    asked = rows(_norms(theirs.query, 1), _norms(theirs.key, 1))
    told = rows(_norms(theirs.value, 1), _norms(theirs.attention_output, 0))
    neurons = _largest(_norms(theirs.up, 1) * _norms(theirs.down, 0), ours.neurons)
    _copy_linear(ours.query, theirs.query, asked, channels)
    _copy_linear(ours.key, theirs.key, asked, channels)
    _copy_linear(ours.value, theirs.value, told, channels)
    _copy_linear(ours.attention_output, theirs.attention_output, channels, told)
    _copy_linear(ours.up, theirs.up, neurons, channels)
    _copy_linear(ours.down, theirs.down, channels, neurons)
    _copy_norm(ours.attention_norm, theirs.attention_norm, channels)
    _copy_norm(ours.output_norm, theirs.output_norm, channels)


def _copy_head(small: nn.Module, network: nn.Module, channels: Tensor) -> None:
    """The linear maps after the last layer: all have the network's width, but for the last one's outputs.

    A CRF has no width, and stays as it is.
    """
    ours, theirs = head_linears(small), head_linears(network)
    for mine, old in zip(ours[:-1], theirs[:-1], strict=True):
        _copy_linear(mine, old, channels, channels)
    _copy_linear(ours[-1], theirs[-1], slice(None), channels)
    if (blank := crf_of(small)) and (crf := crf_of(network)):
        blank.load_state_dict(crf.state_dict())


def _copy_linear(to: Any, of: Any, rows: Tensor | slice, columns: Tensor | slice) -> None:
    to.weight.copy_(of.weight[rows][:, columns])
    to.bias.copy_(of.bias[rows])


def _copy_norm(to: Any, of: Any, channels: Tensor | slice) -> None:
    to.weight.copy_(of.weight[channels])
    to.bias.copy_(of.bias[channels])

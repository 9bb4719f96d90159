"""A student that is no transformer: the teacher's word embeddings under a bidirectional LSTM or GRU.

It learns from the teacher's logits, and from the labels where asked to. Owns the student's size and how it takes
over the embeddings; the network itself is of :mod:`compress_search.encoders`. For short texts and small models;
nothing that needs transformer layers can follow.

Source: Tang et al. 2019, Distilling Task-Specific Knowledge from BERT into Simple Neural Networks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from compress_search import Candidate, Context, Dim, Method, Params, Stage, Subject
from compress_search.encoders import RecurrentConfig, crf_of, embeddings, new_recurrent

from .distillation.soft_targets import SoftTerm, crf_missing, idle_soft, soft_space, soft_target_loss

UNITS = (32, 64, 128, 256, 512)


class BiLstm(Method):
    """Word embeddings, one or more recurrent layers and a linear head, trained by the teacher's logits."""

    stage = Stage.STUDENT

    def search_space(self, teacher: Subject) -> Mapping[str, Dim]:
        """``units`` of one direction; ``embedding_ratio`` is the part of the teacher's word table's width kept.

        ``rate_factor`` multiplies the study's learning rate: cells start from random weights, and learn at rates at
        which a pretrained encoder would forget. ``alpha`` weighs the soft term.
        """
        space = {
            "cell": Dim.choice(("lstm", "gru"), "lstm"),
            "units": Dim.choice(UNITS, 128),
            "layers": Dim.integer(1, 3, 1, expert=True),
            "embedding_ratio": Dim.choice((1.0, 0.75, 0.5, 0.25), 0.5),
            "freeze_embeddings": Dim.flag(False, expert=True),
            "dropout": Dim.real(0.0, 0.5, 0.1, expert=True),
            "alpha": Dim.real(0.0, 1.0, 1.0, expert=True),
            **soft_space(teacher),
            "learning_rate": Dim.real(1e-6, 1e-2, 5e-5, log=True, expert=True),
            "rate_factor": Dim.real(1.0, 100.0, 20.0, log=True, expert=True),
        }
        if teacher.task != "token-classification":
            space["pooling"] = Dim.choice(("max", "mean"), "max", expert=True)
        return space

    def missing(self, teacher: Subject) -> Mapping[str, str]:
        """A CRF to learn from."""
        return crf_missing(teacher)

    def effective(self, subject: Subject, params: Params) -> Params:
        """Without what is said of a soft term that has no weight."""
        idle = idle_soft(subject, params)
        return {name: value for name, value in params.items() if name not in idle}

    def after(self, subject: Subject, params: Params) -> Subject:
        """No transformer any more: recurrent layers, ``hidden`` being the width of both directions."""
        return subject.having(
            "lossy",
            "recurrent",
            family=f"bi{params['cell']}",
            layers=int(params["layers"]),
            heads=0,
            head_dim=0,
            hidden=2 * int(params["units"]),
            intermediate=0,
            positions=0,
            token_types=0,
            pooler=False,
            embedding_size=table_width(subject, float(params["embedding_ratio"])),
            word_rank=0,
        ).without("non-uniform", "shared")

    def trains(self, params: Params) -> bool:
        """Always."""
        return True

    def apply(self, candidate: Candidate, params: Params, context: Context) -> Candidate:
        """A new network on the whole share of the budget."""
        subject = self.after(candidate.subject, params)
        network = make_student(candidate, subject, params, context.seed).to(context.device)
        alpha = float(params["alpha"])
        loss = soft_target_loss(context, SoftTerm.of(subject.task, params), alpha=lambda: alpha)
        table = network.word_embeddings.weight
        table.requires_grad_(not params["freeze_embeddings"])
        context.fit(network, loss=loss, learning_rate=float(params["learning_rate"]) * float(params["rate_factor"]))
        table.requires_grad_(True)
        return candidate.replace(network=network, subject=subject)


def table_width(subject: Subject, ratio: float) -> int:
    """How many columns of the word table are kept, at least one."""
    return max(1, round((subject.embedding_size or subject.hidden) * ratio))


def make_student(candidate: Candidate, subject: Subject, params: Params, seed: int) -> Any:
    """The student of these shapes: the candidate's word embeddings and CRF; the rest has random weights."""
    teacher: Any = candidate.network.config
    crf, words = crf_of(candidate.network), embeddings(candidate.network).word_embeddings
    config = RecurrentConfig(
        vocab_size=cast(Any, words).num_embeddings,  # a subject's vocabulary may be an upper bound
        embedding_size=subject.embedding_size,
        units=subject.hidden // 2,
        num_layers=subject.layers,
        cell=cast(Any, params["cell"]),
        pooling=cast(Any, params.get("pooling", "max")),
        dropout=float(params["dropout"]),
        id2label=teacher.id2label,
        label2id=teacher.label2id,
        pad_token_id=teacher.pad_token_id,
        **({"crf": True} if crf else {}),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = new_recurrent(config, tokens=subject.task == "token-classification").eval()
    if crf and (own := crf_of(network)):
        own.load_state_dict(crf.state_dict())
    with torch.no_grad():
        network.word_embeddings.weight.copy_(principal(word_table(cast(nn.Module, words)), subject.embedding_size))
    return network


def word_table(words: nn.Module) -> Tensor:
    """The embeddings of all pieces, (V, E), whatever module looks them up."""
    count = cast(int, words.num_embeddings)
    table: Tensor = words(torch.arange(count, device=next(words.parameters()).device))
    return table.detach()


def principal(table: Tensor, width: int) -> Tensor:
    """(V, E) -> (V, width): the coordinates along the directions in which the rows are largest.

    No table of this width loses less of the rows' squared lengths. What reads it learns its own weights, so the
    rotation costs nothing. At its whole width the table stays as it is.
    """
    if width == table.shape[1]:
        return table
    _, vectors = torch.linalg.eigh((table.T @ table).double())
    rotated: Tensor = table @ vectors[:, -width:].flip(1).to(table)
    return rotated

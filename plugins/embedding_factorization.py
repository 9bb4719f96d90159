"""The word table (V, H) as the product of a narrow one (V, E) and a projection (E, H).

Where layers are few the table is most of a model, and takes no time: a row is looked up. Owns the decomposition and
the ranks worth having. Tables of positions and segments stay whole: they are small, and the sum with them is taken
after the projection, so that at full rank nothing changes.

Sources: Lan et al. 2020, ALBERT: A Lite BERT for Self-supervised Learning of Language Representations, section 3.1
(the factorization, trained from scratch); Eckart and Young 1936 (the best one of a trained table).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from compress_search import Batch, Candidate, Context, Dim, Method, Params, Stage, Subject, TrialError
from compress_search.encoders import FactoredEmbedding, embeddings

from .distillation.imitation import imitation_loss
from .distillation.soft_targets import soft_target_loss

SIZES = (16, 32, 64, 96, 128, 192, 256)
TRAINED = ("embedding_match", "kd")


def factorize(table: Tensor, rank: int, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A (V, E) and B (H, E) that minimise Σᵢ wᵢ‖tableᵢ − (A·Bᵀ)ᵢ‖²; B has orthonormal columns.

    These are the first E right singular vectors of the rows scaled by √wᵢ, and the table's coordinates in them.

    Args:
        table: (V, H).
        rank: E, from 1 to min(V, H).
        weights: (V,), none negative; all alike by default.

    Raises:
        TrialError: there is no such rank.
    """
    if not 1 <= rank <= min(table.shape):
        raise TrialError(
            f"a table of shape {tuple(table.shape)} has no rank {rank}: expected 1 to {min(table.shape)}"
        )
    rows = table.double()
    scaled = rows if weights is None else rows * weights.to(rows).sqrt()[:, None]
    # (H, H) is far smaller than (V, H), and its eigenvectors are the same vectors
    basis = torch.linalg.eigh(scaled.T @ scaled).eigenvectors.flip(1)[:, :rank]
    return (rows @ basis).to(table), basis.to(table).contiguous()


def token_counts(batches: Iterable[Batch], vocabulary: int) -> Tensor:
    """How often each token occurs, (V,), and once more, so that none is given up for not being seen."""
    counts = torch.ones(vocabulary, dtype=torch.double)
    for batch in batches:
        ids = batch["input_ids"][batch["attention_mask"].bool()]
        counts += torch.bincount(ids.flatten().cpu(), minlength=vocabulary)
    return counts


def break_even(subject: Subject) -> float:
    """The rank V·H/(V + H) at which the two tables are as large as the one."""
    width = subject.embedding_size or subject.hidden
    return subject.vocabulary * width / (subject.vocabulary + width)


def sizes(subject: Subject) -> list[int]:
    """The ranks that make this model's word table smaller."""
    return [size for size in SIZES if size < break_even(subject)]


class EmbeddingFactorization(Method):
    """A word table of low rank, by a singular value decomposition of the trained one."""

    stage = Stage.FACTORIZATION

    def search_space(self, teacher: Subject) -> Mapping[str, Dim]:
        """``embedding_size`` is the rank E; ``weighted_svd`` keeps best the rows of the most frequent tokens."""
        fitting = sizes(teacher) or SIZES[:1]
        trained = {"recover": TRAINED}
        return {
            "embedding_size": Dim.choice(fitting, max(size for size in fitting if size <= 128)),
            "embedding_init": Dim.choice(("svd", "weighted_svd"), "svd"),
            "calib_examples": Dim.choice(
                (512, 2048, 8192), 2048, when={"embedding_init": ("weighted_svd",)}, expert=True
            ),
            "recover": Dim.choice((*TRAINED, "none"), "embedding_match", expert=True),
            "hidden_weight": Dim.real(
                0.01, 10.0, 1.0, log=True, when={"recover": ("embedding_match",)}, expert=True
            ),
            "learning_rate": Dim.real(1e-6, 1e-2, 5e-5, log=True, when=trained, expert=True),
        }

    def unsupported(self, subject: Subject) -> str | None:
        """A whole word table, large enough for two to be smaller."""
        if "recurrent" in subject.traits:
            return "it has no transformer layers"
        if subject.word_rank:
            return f"its word table is factored already, with rank {subject.word_rank}"
        if not sizes(subject):
            return f"factors of rank {SIZES[0]} or more are no smaller than its word table"
        return None

    def effective(self, subject: Subject, params: Params) -> Params:
        """The largest offered rank up to the one asked for that still saves something."""
        asked = int(params["embedding_size"])
        fitting = [size for size in sizes(subject) if size <= asked]
        return {**params, "embedding_size": max(fitting, default=asked)}

    def after(self, subject: Subject, params: Params) -> Subject:
        """The same shapes around a word table of this rank.

        Raises:
            TrialError: it would be no smaller.
        """
        rank, largest = int(params["embedding_size"]), math.ceil(break_even(subject)) - 1
        if not 1 <= rank <= largest:
            raise TrialError(f"embedding_size {rank} saves nothing: expected a rank from 1 to {largest}")
        return subject.having("lossy", word_rank=rank)

    def trains(self, params: Params) -> bool:
        """Unless recovery is left to another step."""
        return params["recover"] != "none"

    def apply(self, candidate: Candidate, params: Params, context: Context) -> Candidate:
        """Decompose the table of a copy, then train the copy to look things up as before."""
        subject = self.after(candidate.subject, params)
        network = candidate.copy().network.to(context.device)
        weights = None
        if params["embedding_init"] == "weighted_svd" and not context.dry:
            batches = context.calibration(int(params["calib_examples"]))
            # of the table itself: a subject's vocabulary may be an upper bound
            weights = token_counts(batches, _words(network).num_embeddings)
        factorize_words(network, subject.word_rank, weights)
        if self.trains(params):
            _recover(network, candidate, params, context)
        return candidate.replace(network=network, subject=subject)


def factorize_words(network: nn.Module, rank: int, weights: Tensor | None = None) -> None:
    """Put a :class:`FactoredEmbedding` in place of a network's word table; ``weights`` as for :func:`factorize`."""
    words = _words(network)
    rows, projection = factorize(words.weight.detach(), rank, weights)
    embeddings(network).word_embeddings = FactoredEmbedding(rows, projection, words.padding_idx)


def _words(network: nn.Module) -> nn.Embedding:
    """A word table that is whole."""
    words = embeddings(network).word_embeddings
    assert isinstance(words, nn.Embedding)
    return words


def _recover(network: nn.Module, candidate: Candidate, params: Params, context: Context) -> None:
    task = candidate.subject.task
    if params["recover"] == "kd":
        loss = soft_target_loss(context, task)
    else:
        original = candidate.copy().network.to(context.device).eval().requires_grad_(False)
        loss = imitation_loss(context, task, original, ["hidden.0"], float(params["hidden_weight"]))
    context.fit(network, loss=loss, learning_rate=float(params["learning_rate"]))

"""What a task is: its labels, its loss, its metrics and how far those can be trusted.

Owns the arithmetic from logits and labels to a loss, to scores and to bootstrap intervals. Knows nothing of
files, tokenizers or networks, and imports torch only for the loss, so that scoring never loads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from compress_search.errors import NotFinite
from compress_search.study.goals import METRICS, TaskName

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100
"""The label of a position that has none: padding, special tokens, all but the first piece of a word."""

RESAMPLES = 1000
"""Bootstrap resamples behind an interval."""

Array = NDArray[Any]
Examples = Sequence[Any] | Array
"""One entry per example, an array or a number."""
Metric = Callable[[Array], Array]
"""(R, N) weights, how often each of N examples counts in each of R resamples -> (R,) values."""


@dataclass(frozen=True)
class Task:
    """A task head: ``labels`` in the order of the logits (none for regression); ``entities`` for BIO tags.

    ``numbered`` says that the order is the data set's own, and not only that of the alphabet.
    """

    name: str
    labels: tuple[str, ...] = ()
    entities: bool = False
    numbered: bool = False

    @property
    def tokens(self) -> bool:
        """Whether there is a label for each token, and not for the whole text."""
        return self.name == "token-classification"

    @property
    def outputs(self) -> int:
        """The number of logits, C."""
        return len(self.labels) or 1

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics, the primary one first; entity F1 exists for BIO tags only."""
        return tuple(
            name
            for name in METRICS[cast(TaskName, self.name)]
            if self.entities or not (self.tokens and name == "f1")
        )

    @property
    def primary(self) -> str:
        """The metric that stands for the task where only one is asked for."""
        return self.metrics[0]

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean loss as a scalar: cross-entropy, or the squared error for regression.

        Args:
            logits: (B, C), or (B, S, C) for token tasks.
            labels: (B,), or (B, S) with ``IGNORED`` where there is none.
        """
        from torch.nn import functional as F

        if not self.labels:
            return F.mse_loss(logits.float().squeeze(-1), labels.float())
        labels = labels.flatten()
        total = F.cross_entropy(logits.float().flatten(0, -2), labels, ignore_index=IGNORED, reduction="sum")
        # a batch may hold no label at all, when every word was cut off
        return total / (labels != IGNORED).sum().clamp(min=1)

    def unpad(self, logits: Array, labels: Array) -> tuple[list[Array], list[Array]]:
        """One entry per example of a batch, as :meth:`score` takes them; token tasks keep labelled positions."""
        if not self.tokens:
            return list(logits), list(labels)
        real = labels != IGNORED
        rows = range(len(labels))
        return [logits[row, real[row]] for row in rows], [labels[row, real[row]] for row in rows]

    def score(self, logits: Examples, labels: Examples) -> dict[str, float]:
        """Every metric of the task.

        Args:
            logits: per example (C,), or (S_i, C) for the S_i labelled positions of a token task; or their classes
                (S_i,), where a CRF has chosen them.
            labels: per example a class, a number, or (S_i,) classes.

        Raises:
            NotFinite: a logit is infinite or not a number.
        """
        once = np.ones((1, len(labels)))
        return {name: float(metric(once)[0]) for name, metric in self._metrics(logits, labels).items()}

    def resampled(self, logits: Examples, labels: Examples, seed: int = 0) -> dict[str, Array]:
        """(``RESAMPLES``,) values of every metric over bootstrap resamples of whole examples (sequences of tokens).

        Of so many examples a seed draws the same ones for any model.
        """
        metrics = self._metrics(logits, labels)
        drawn: dict[str, list[Array]] = {name: [] for name in metrics}
        for weights in _resamples(len(labels), seed):
            for name, metric in metrics.items():
                drawn[name].append(metric(weights))
        return {name: np.concatenate(values) for name, values in drawn.items()}

    def constant_score(self, labels: Examples) -> dict[str, float]:
        """The scores of the best predictor that ignores its input: the most frequent class, or any number."""
        if not self.labels:
            return self.score(np.zeros((len(labels), 1)), labels)
        flat = np.concatenate(labels) if self.tokens else np.asarray(labels)
        constant = np.eye(self.outputs)[np.bincount(flat, minlength=self.outputs).argmax()]
        if not self.tokens:
            return self.score([constant] * len(labels), labels)
        return self.score([np.tile(constant, (len(row), 1)) for row in labels], labels)

    def _metrics(self, logits: Examples, labels: Examples) -> dict[str, Metric]:
        _check_finite(logits)
        if not self.labels:
            return _correlations(np.asarray(logits).squeeze(-1), np.asarray(labels))
        decoded = self.tokens and all(row.ndim == 1 for row in logits)
        chosen = list(logits) if decoded else [row.argmax(-1) for row in logits]
        if not self.tokens:
            return _classification(np.array(chosen), np.asarray(labels))
        return {**(_entity_f1(chosen, labels, self.labels) if self.entities else {}), **_token(chosen, labels)}

    def to_dict(self) -> dict[str, Any]:
        """Plain data, the inverse of :meth:`from_dict`."""
        plain = {**asdict(self), "labels": list(self.labels)}
        if not self.numbered:  # as if there were no such field: what was cached before it stays
            del plain["numbered"]
        return plain

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Task:
        """Rebuild a task from :meth:`to_dict`'s output."""
        return cls(**{**data, "labels": tuple(data["labels"])})


def is_bio(tags: Sequence[str]) -> bool:
    """Whether the tags mark entities: all are O, B-<type> or I-<type>, and not all are O."""
    return all(tag == "O" or tag[:2] in ("B-", "I-") for tag in tags) and set(tags) != {"O"}


def _classification(chosen: Array, classes: Array) -> dict[str, Metric]:
    right = (chosen == classes).astype(float)
    return {"accuracy": lambda w: w @ right / w.sum(1), "macro_f1": lambda w: macro_f1(chosen, classes, w)}


def _correlations(predicted: Array, gold: Array) -> dict[str, Metric]:
    x, y = predicted.astype(float), gold.astype(float)
    return {"pearson": lambda w: pearson(x, y, w), "spearman": lambda w: spearman(x, y, w)}


def _token(chosen: Examples, labels: Examples) -> dict[str, Metric]:
    right = np.array([(a == b).sum() for a, b in zip(chosen, labels, strict=True)], dtype=float)
    lengths = np.array([len(row) for row in labels], dtype=float)
    return {"accuracy": lambda w: _ratio(w @ right, w @ lengths)}


def _entity_f1(chosen: Examples, labels: Examples, tags: Sequence[str]) -> dict[str, Metric]:
    counts = entity_counts(chosen, labels, tags)
    return {"f1": lambda w: micro_f1(w @ counts)}


def macro_f1(predicted: Array, gold: Array, weights: Array) -> Array:
    """(R,) unweighted means of the per-class F1, over the classes that occur in a resample at all."""
    classes = np.union1d(predicted, gold)
    is_predicted, is_gold = predicted[:, None] == classes, gold[:, None] == classes
    hits = weights @ (is_predicted & is_gold)
    either = weights @ is_predicted.astype(float) + weights @ is_gold.astype(float)
    return _ratio(_ratio(2 * hits, either).sum(1), (either > 0).sum(1))


def entity_counts(predicted: Examples, gold: Examples, tags: Sequence[str]) -> Array:
    """(N, 3) entities found rightly, predicted, and truly there, in each of N sequences of BIO tags."""
    found = zip(_entities(predicted, tags), _entities(gold, tags), strict=True)
    return np.array([(len(a & b), len(a), len(b)) for a, b in found], dtype=float)


def _entities(rows: Examples, tags: Sequence[str]) -> list[set[tuple[str, int, int]]]:
    from seqeval.metrics.sequence_labeling import get_entities

    return [set(get_entities([tags[i] for i in row])) for row in rows]


def micro_f1(counts: Array) -> Array:
    """(R,) F1 from (R, 3) sums of :func:`entity_counts`; 0 where there is no entity at all."""
    right, predicted, gold = counts.T
    return _ratio(2 * right, predicted + gold)


def pearson(x: Array, y: Array, weights: Array) -> Array:
    """(R,) correlations of x and y, each (N,) or (R, N); 0 where either does not vary."""
    x, y = _centred(x, weights), _centred(y, weights)
    covariance = (weights * x * y).sum(1)
    return _ratio(covariance, np.sqrt((weights * x * x).sum(1) * (weights * y * y).sum(1)))


def spearman(x: Array, y: Array, weights: Array) -> Array:
    """(R,) rank correlations of x and y, each (N,); every resample is ranked anew, ties sharing their mean rank."""
    return pearson(_ranks(x, weights), _ranks(y, weights), weights)


def _centred(x: Array, weights: Array) -> Array:
    mean = (weights * x).sum(1, keepdims=True) / weights.sum(1, keepdims=True)
    centred: Array = x - mean
    # what rounding leaves of a constant is no variation
    return np.where(abs(centred) > 1e-12 * np.abs(x).max(), centred, 0.0)


def _ranks(x: Array, weights: Array) -> Array:
    _, group = np.unique(x, return_inverse=True)
    counts = np.zeros((len(weights), group.max() + 1))
    np.add.at(counts.T, group, weights.T)
    below = counts.cumsum(1) - counts
    return (below + (counts + 1) / 2)[:, group]


def _ratio(numerator: Array, denominator: Array) -> Array:
    """Element-wise quotient, 0 where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.zeros(numerator.shape), where=denominator != 0)


def bounds(drawn: Mapping[str, Array], level: float = 0.95) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap intervals: the middle part of each series of resampled values.

    Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    tails = ((1 - level) / 2, (1 + level) / 2)
    found = {name: np.quantile(values, tails) for name, values in drawn.items()}
    return {name: (float(low), float(high)) for name, (low, high) in found.items()}


def losses(reference: Mapping[str, Array], ours: Mapping[str, Array]) -> dict[str, Array]:
    """How far every metric lies below a reference's in each resample, as ``<metric>_drop``.

    Both are of the same examples, so that what both get wrong does not count: models that err alike differ by less
    than either's own interval suggests. Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 8.
    """
    return {f"{name}_drop": reference[name] - values for name, values in ours.items()}


def _resamples(size: int, seed: int) -> Iterator[Array]:
    """Weights of ``RESAMPLES`` bootstrap resamples of N examples, in blocks (r, N) of bounded memory."""
    generator = np.random.default_rng(seed)
    block = int(np.clip(2_000_000 // size, 1, RESAMPLES))
    for start in range(0, RESAMPLES, block):
        rows = min(block, RESAMPLES - start)
        drawn = generator.integers(size, size=(rows, size)) + size * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * size).reshape(rows, size).astype(float)


def _check_finite(logits: Examples) -> None:
    bad = sum(not np.isfinite(row).all() for row in logits)
    if bad:
        raise NotFinite(f"the network's logits are not finite for {bad} of {len(logits)} examples")

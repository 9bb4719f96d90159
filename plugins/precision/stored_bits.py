"""The size of a quantized network in closed form: mean stored bits of a weight, from shapes alone.

Owns the counting of matrices. Knows nothing of weights or files; what a matrix of a format takes is the grid's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from compress_search import Subject

from .number_formats import FEW_ROWS, TABLE_GROUP, Setting


@dataclass(frozen=True)
class Matrix:
    """``count`` weight matrices of so many inputs and outputs; ``kept`` of them stay in float32."""

    outputs: float
    inputs: float
    count: float
    kept: float = 0

    @property
    def weights(self) -> float:
        """Of all of them."""
        return self.outputs * self.inputs * self.count

    def bits(self, setting: Setting, spared: float = 0) -> float:
        """Stored bits; ``spared`` is the part of the quantized ones that has a higher precision."""
        number = self.outputs * self.inputs
        if setting.grid is None:
            return self.weights * setting.format.bits
        spare = setting.spare_grid
        small = setting.grid.stored_bits(self.outputs, self.inputs)
        large = spare.stored_bits(self.outputs, self.inputs) if spare else 32 * number
        return self.kept * number * 32 + (self.count - self.kept) * (spared * large + (1 - spared) * small)


def stored_bits(subject: Subject, setting: Setting) -> tuple[float, float]:
    """Mean stored bits of an encoder or head parameter, and of an embedding parameter.

    Biases and norms stay in float32, and so do matrices that are excluded; of a 16-bit network all are 16. Which
    layers keep a higher precision depends on weights: a mean one stands for them.
    """
    if setting.format.bits == 16:
        return 16.0, 16.0
    maps = _maps(subject, setting.excluded)
    quantized = sum(m.count - m.kept for m in (*maps, *_projections(subject)))
    spared = min(1.0, setting.high_precision_layers / quantized) if quantized else 0.0
    parameters = subject.encoder_parameters + subject.head_parameters
    rest = parameters - sum(m.weights for m in maps)
    bits = sum(m.bits(setting, spared) for m in maps) + 32 * rest
    return bits / parameters, _embedding_bits(subject, setting, spared) / subject.embedding_parameters


def _maps(subject: Subject, excluded: tuple[str, ...]) -> list[Matrix]:
    """The matrices of the layers and of the head."""
    hidden = subject.hidden
    ending = [Matrix(subject.labels, hidden, 1, float("classifier" in excluded))]
    if subject.pooler:
        ending.append(Matrix(hidden, hidden, 1, float("pooler" in excluded)))
    return _layer_maps(subject, excluded) + ending


def _layer_maps(subject: Subject, excluded: tuple[str, ...]) -> list[Matrix]:
    """Query, key, value, attention output, up and down: a matrix each, or the two of a product."""
    hidden, width, neurons = subject.hidden, subject.heads * subject.head_dim, subject.intermediate
    shapes = [(width, hidden)] * 3 + [(hidden, width), (neurons, hidden), (hidden, neurons)]
    attention, ffn = subject.attention_sets or subject.layers, subject.ffn_sets or subject.layers
    counts = [attention] * 4 + [ffn] * 2
    ends = sum(end in excluded for end in ("first_layer", "last_layer"))
    named = {3: "attention_output", 5: "ffn_down"}
    found = []
    for place, ((outputs, inputs), count, rank) in enumerate(
        zip(shapes, counts, subject.ranks or [0] * 6, strict=True)
    ):
        kept = count if named.get(place) in excluded else min(ends, count)
        factors = [(outputs, rank), (rank, inputs)] if rank else [(outputs, inputs)]
        found += [Matrix(*shape, count, kept) for shape in factors]
    return found


def _projections(subject: Subject) -> list[Matrix]:
    """The matrices that widen word embeddings, and then all embeddings."""
    width, hidden, rank = subject.embedding_size or subject.hidden, subject.hidden, subject.word_rank
    found = [Matrix(width, rank, 1)] if rank else []
    return found + ([Matrix(hidden, width, 1)] if width != hidden else [])


def _embedding_bits(subject: Subject, setting: Setting, spared: float) -> float:
    """Stored bits of the tables, of what projects them, and of the norm in float32."""
    width, projections = subject.embedding_size or subject.hidden, _projections(subject)
    words = (subject.vocabulary, subject.word_rank or width)
    tables = [words, (subject.positions, width), (subject.token_types, width)]
    counted = sum(rows * size for rows, size in tables) + sum(m.weights for m in projections)
    bits = sum(rows * _row_bits(rows, size, setting.embedding_bits) for rows, size in tables)
    return bits + sum(m.bits(setting, spared) for m in projections) + 32 * (subject.embedding_parameters - counted)


def _row_bits(rows: int, width: int, bits: int) -> float:
    """Bits of one row of a table: 8-bit rows have a float32 scale each, 4-bit ones a scale per group."""
    if rows <= FEW_ROWS:
        return 32 * width
    scales = {8: 1, 4: math.ceil(width / TABLE_GROUP)}.get(bits, 0)
    return width * bits + 32 * scales

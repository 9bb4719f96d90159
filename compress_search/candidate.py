"""The model under compression: its weights-free description (Subject) and the thing itself (Candidate).

Owns which facts about a model methods may decide on, and the closed forms for its size. Knows nothing of
methods, studies or how a model is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

Lowering = Callable[[Path, Path], None]
"""A file-level transform: reads the ONNX file at the first path and writes the second."""


GATES = {"bilstm": 4, "bigru": 3}
"""Families that are no transformers, with the gates of their cells: no heads, no positions, ``hidden`` of both
directions together."""


@dataclass(frozen=True)
class Subject:
    """What a step may know of the model it would be applied to: shapes and traits, no weights.

    ``heads`` and ``intermediate`` are means over the layers, which a pruning step can make unequal.
    ``bits`` are the stored bits of an encoder or head weight, ``embedding_bits`` those of an embedding weight.
    ``embedding_size`` is the width of the embedding tables, projected onto ``hidden`` where they differ (0: same);
    ``word_rank`` the inner width of a word table that is a product of two matrices (0: it is a single one).
    ``attention_sets``, ``ffn_sets`` and ``norm_sets`` count the distinct weights of the layers' blocks and norms
    where layers share them (0: each layer has its own; of norms, two).

    ``density`` is the part of the weights of the layers' matrices that are not zero.

    ``ranks`` are the inner widths of maps that are products of two matrices, in the order query, key, value,
    attention output, up, down (0: a single matrix; (): all are); where layers differ, means with which r·(out + in)
    is still the number of weights.

    ``alphabet`` counts the pieces without which the tokenizer could not spell every text (0: unknown).

    ``threads`` are those that models are timed with unless a step says otherwise, ``cpus`` the cores of a trial.

    Traits the engine itself sets on the teacher: ``"timed"`` and ``"sized"`` (an objective or constraint depends
    on running time, so only real kernels count, or on the stored size), ``"tokenizer:<kind>"`` (as the
    ``tokenizers`` library calls it, or ``ByteLevelBPE``), ``"kernel:<name>"`` for each kernel that a probe found
    to be real on this machine (``kernel:int8``, ``kernel:bf16``, ``kernel:weight-only``), ``"unlabelled"`` (the
    study names text without labels), ``"auxiliary"`` (it names further tasks), ``"masked-lm"`` (it names a masked
    language model), ``"masked-lm:<shape>"`` (of that a shape, such as ``layers=3``, which is not the teacher's),
    ``"student-start"`` (it names a small network to start from) and ``"student-start:<shape>"`` likewise,
    ``"all-tagged"`` (no tag is O), ``"pairs"`` (examples, or those of a further task, are two texts) and
    ``"came-trained"`` (nothing is known of its start). Steps add theirs, such as ``"lossy"`` (training could win
    back accuracy), ``"non-uniform"`` (layers differ in shape; with ``"neurons:<n>"``, n divides the neurons of
    each), ``"shared"``, ``"low-rank"`` (matrices that are products of two), ``"sparse"`` (zeros that must stay:
    nothing may rebuild the matrices), ``"recurrent"`` (no transformer layers: nothing to cut, share or replace),
    ``"crf"`` (tags are a CRF's best path), ``"data-sized"`` (the vocabulary is an upper bound), ``"estimated"`` (a
    promise whose ranks only weights can tell: see :meth:`keeps`), ``"onnx-only"`` and ``"torch-only"``.
    """

    family: str
    task: str
    layers: int
    heads: float
    head_dim: int
    hidden: int
    intermediate: float
    vocabulary: int
    positions: int
    token_types: int
    labels: int
    pooler: bool = True
    device: str = "cpu"
    threads: int = 1
    cpus: int = 1
    bits: float = 32
    embedding_bits: float = 32
    embedding_size: int = 0
    word_rank: int = 0
    attention_sets: int = 0
    ffn_sets: int = 0
    norm_sets: int = 0
    ranks: tuple[float, ...] = ()
    alphabet: int = 0
    density: float = 1.0
    traits: frozenset[str] = frozenset()

    def having(self, *traits: str, **changes: Any) -> Subject:
        """A copy with the given fields changed and traits added."""
        return replace(self, traits=self.traits | set(traits), **changes)

    def without(self, *traits: str) -> Subject:
        """A copy without the given traits."""
        return replace(self, traits=self.traits - set(traits))

    def keeps(self, promised: Subject) -> bool:
        """Whether a step left this where it promised that; of a promise that is ``"estimated"`` not the ranks.

        What follows from ranks may then differ too: the mean bits, and whether any matrix is a product at all.
        """
        if "estimated" not in promised.traits:
            return self == promised
        open_ones: dict[str, Any] = {"ranks": (), "bits": 0.0, "embedding_bits": 0.0}
        traits = promised.traits - {"estimated", "low-rank"} | (self.traits & {"low-rank"})
        return replace(self, **open_ones) == replace(promised, traits=traits, **open_ones)

    @property
    def embedding_parameters(self) -> int:
        """(V + P + token types)·E weights, the LayerNorm's 2·E and, where E is not H, E·H + H to project.

        A word table of inner width r has V·r + r·E in place of V·E.
        """
        width = self.embedding_size or self.hidden
        projection = 0 if width == self.hidden else width * self.hidden + self.hidden
        if self.family in GATES:
            return self.vocabulary * width
        words = self.word_rank * (self.vocabulary + width) if self.word_rank else self.vocabulary * width
        return words + (self.positions + self.token_types) * width + 2 * width + projection

    @property
    def _block_weights(self) -> tuple[float, float]:
        """4·k·d·H weights of a layer's attention and 2·f·H of its feed-forward; of rank r, r·(out + in) each."""
        shapes = [(self.heads * self.head_dim, self.hidden)] * 4 + [(self.intermediate, self.hidden)] * 2
        ranks = self.ranks or (0,) * len(shapes)
        counts = [rank * (a + b) if rank else a * b for (a, b), rank in zip(shapes, ranks, strict=True)]
        return sum(counts[:4]), sum(counts[4:])

    @property
    def encoder_parameters(self) -> int:
        """Per layer 4·k·d·H + 3·k·d + 2·f·H + f + 6·H for k heads of width d and f neurons.

        That is 4·k·d·H + 3·k·d + H of attention, 2·f·H + f + H of feed-forward and 2·H for each of two norms; what
        layers share counts once.
        """
        if self.family in GATES:
            return self._recurrent_weights + 2 * self.layers * GATES[self.family] * self.hidden
        width = self.heads * self.head_dim
        attention, feed_forward = self._block_weights
        attention += 3 * width + self.hidden
        feed_forward += self.intermediate + self.hidden
        blocks = (self.attention_sets or self.layers) * attention + (self.ffn_sets or self.layers) * feed_forward
        return round(blocks + (self.norm_sets or 2 * self.layers) * 2 * self.hidden)

    @property
    def _recurrent_weights(self) -> int:
        """Weights of both directions of u = H/2 units with g gates: 2·g·u·(in + u), in = E, then H, then H."""
        units = self.hidden // 2
        inputs = (self.embedding_size or self.hidden) + (self.layers - 1) * self.hidden
        return 2 * GATES[self.family] * units * (inputs + self.layers * units)

    @property
    def linear_parameters(self) -> int:
        """The weights of the layers' matrices, which can be sparse: 4·k·d·H + 2·f·H per layer, shared ones once."""
        attention, feed_forward = self._block_weights
        return round(
            (self.attention_sets or self.layers) * attention + (self.ffn_sets or self.layers) * feed_forward
        )

    @property
    def head_parameters(self) -> int:
        """The pooler, where there is one, and one linear layer onto the labels."""
        pooler = self.hidden * self.hidden + self.hidden if self.pooler else 0
        return pooler + self.hidden * self.labels + self.labels

    @property
    def crf_parameters(self) -> int:
        """C² transitions and 2·C for both ends of a CRF over C labels; stored beside the model, in 32 bits."""
        return self.labels * (self.labels + 2) if "crf" in self.traits else 0

    @property
    def parameters(self) -> int:
        """All parameters, in closed form."""
        return self.embedding_parameters + self.encoder_parameters + self.head_parameters + self.crf_parameters

    @property
    def megabytes(self) -> float:
        """Size of the stored weights in MB of 10⁶ bytes, scales and file overhead aside."""
        encoder = (self.encoder_parameters + self.head_parameters) * self.bits
        encoder -= self.linear_parameters * (self.bits - packed_bits(self.bits, self.density))
        return (encoder + self.embedding_parameters * self.embedding_bits) / 8e6

    def macs(self, length: int) -> float:
        """Multiply-accumulates of the encoder for one example of ``length`` tokens: L·(S·(4kdH + 2fH) + 2S²kd)."""
        if self.family in GATES:
            return length * self._recurrent_weights
        width = self.heads * self.head_dim
        linear = length * sum(self._block_weights)
        return self.layers * (linear + 2 * length**2 * width)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, the inverse of :meth:`from_dict`."""
        return {**asdict(self), "ranks": list(self.ranks), "traits": sorted(self.traits)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Subject:
        """Rebuild a subject from :meth:`to_dict`'s output."""
        known = {f.name for f in fields(cls)}
        plain = {name: value for name, value in data.items() if name in known}
        return cls(**{**plain, "ranks": tuple(data.get("ranks", ())), "traits": frozenset(data["traits"])})


def packed_bits(bits: float, density: float) -> float:
    """Mean stored bits of a weight of so many bits where the part ``density``, at random places, is not zero.

    That is b, or each weight that is not zero with its distance from the one before in w = 4 or 8 bits. Distances
    have a geometric distribution: δ·(w + b) / (1 − (1 − δ)^(2^w − 1)), what bridges wider gaps included. Weights
    below 8 bits share bytes, of which those are left out that hold nothing but zeros. See encoders.sparse_storage.
    """
    unit = max(8.0, bits)
    filled = float(1 - (1 - density) ** (unit / bits))
    if not filled:
        return 0.0
    forms = [filled * (width + unit) / (1 - (1 - filled) ** (2**width - 1)) for width in (4, 8)]
    return bits / unit * min(unit, *forms)


@dataclass
class Candidate:
    """A network with all that is needed to save, lower and run it.

    ``network`` is a torch module called as ``network(input_ids=…, attention_mask=…, [token_type_ids=…])`` and
    returning an object with ``.logits`` of shape (B, C), or (B, S, C) for token tasks. Its shapes are read off
    the network itself when it is saved, so a step that changes shapes leaves nothing else to update but
    ``subject``. ``lowering`` is applied in order to the exported ONNX file; ``runtime`` names how the result
    is run (``engine``: ``"onnxruntime"``, ``"torch"`` or ``"compile"``, and options: see compress_search.runtimes).
    ``simulated`` marks arithmetic that no engine has a kernel for: its latency means nothing. ``notes`` is plain
    data by method, for its own ``evaluate``; times that were measured with other notes of a method of the precision
    or the runtime stage are not this candidate's.
    """

    network: nn.Module
    tokenizer: PreTrainedTokenizerBase
    subject: Subject
    lowering: tuple[Lowering, ...] = ()
    runtime: Mapping[str, Any] = field(default_factory=dict)
    simulated: bool = False
    notes: Mapping[str, Any] = field(default_factory=dict)

    def copy(self) -> Candidate:
        """A candidate that owns a deep copy of the network; aliased (shared) layers stay aliased."""
        from copy import deepcopy

        return replace(self, network=deepcopy(self.network))

    def replace(self, **changes: Any) -> Candidate:
        """The same candidate with some fields changed; the network is not copied."""
        return replace(self, **changes)

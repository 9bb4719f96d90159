"""The ways of storing weights that a study can choose from, as a table: what each needs, and what settles it.

Owns which parameters mean something together, and which kernel each format asks of a machine. Knows no network, and
nothing of how a file is written.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, Literal, Self

from compress_search import Params, Subject

from .bits import Grid, Share

BLOCKS = (16, 32, 64, 128, 256)
"""Weights that may share a scale in a packed matrix. Blocks of 512 decode to zeros (onnxruntime issue 28551)."""

TABLE_GROUP = 32
"""Weights that share a scale in a 4-bit embedding table."""

FEW_ROWS = 16
"""Tables of no more rows, as those of token types, are stored as the float32 values of their grid: the bytes saved
would cost nodes at every pass."""

EXCLUDABLE = ("pooler", "classifier", "first_layer", "last_layer", "attention_output", "ffn_down")
"""Parts that can be left in float32, each by a parameter ``exclude_<part>``."""

LEVELS = (4, 0)
"""Arithmetic inside the kernel for packed matrices: 4 rounds activations to int8, 0 decodes weights to float32."""

Features = Literal["none", "last_hidden", "two_stage"]
"""What of the network before rounding the rounded one learns from beside the teacher's logits: see ``qat``."""

_MAPS = ("embedding_bits", "high_precision_layers", "calibration_examples", *(f"exclude_{p}" for p in EXCLUDABLE))
_TRAINING = ("qat_kd", "qat_features", "learning_rate")


@dataclass(frozen=True)
class Format:
    """One row: a name, and what is true of every matrix stored so.

    ``kernel`` is what the machine must have where time counts (None: it has). ``simulated`` formats have no kernel
    anywhere: the weights are small in the file and decoded to float32 when it is loaded. ``spare`` are the bits of
    those few layers that are to keep a higher precision. ``trained``: whether quantization-aware training precedes
    it. ``uses`` are the parameters that mean something here.
    """

    name: str
    bits: int
    kernel: str | None
    uses: tuple[str, ...]
    blocks: tuple[int, ...] = ()
    levels: tuple[int, ...] = ()
    spare: Literal[32, 8] = 32
    trained: Literal["never", "may", "always"] = "never"
    simulated: bool = False

    @property
    def engine(self) -> str:
        """The trait that says which engine alone runs it."""
        return "torch-only" if self.bits == 16 else "onnx-only"

    def offered(self, subject: Subject) -> bool:
        """Any format will do where only size counts; where time counts its kernel must be a real one."""
        if "timed" not in subject.traits:
            return True
        return not self.simulated and (self.kernel is None or f"kernel:{self.kernel}" in subject.traits)


_INT8 = (*_MAPS, "granularity", "reduce_range", "qat", *_TRAINING)
_PACKED = (*_MAPS, "group_size", "symmetric", "accuracy_level", "qat", *_TRAINING)
_CODEBOOK = (*_MAPS, "granularity", "activation_bits", *_TRAINING)

FORMATS = (
    Format("dynamic_int8", 8, "int8", _INT8, trained="may"),
    Format("static_int8", 8, "int8", (*_INT8, "calibration"), trained="may"),
    Format("weight_only", 8, "weight-only", _PACKED, BLOCKS, LEVELS, trained="may"),
    Format("bf16", 16, "bf16", ()),
    Format("fp16", 16, "fp16", ()),
    Format("packed", 4, "weight-only", (*_PACKED, "activation_bits"), BLOCKS, LEVELS, spare=8, trained="may"),
    # without int8 activations the kernel decodes to float32 first, and is slower than float32 itself
    Format("uniform", 2, "weight-only-2", _PACKED, (32, 64, 128), (4,), spare=8, trained="may"),
    Format("ternary", 2, None, _CODEBOOK, spare=8, trained="always", simulated=True),
    Format("binary", 1, None, _CODEBOOK, spare=8, trained="always", simulated=True),
    Format("float32", 32, None, ("embedding_bits",)),
)
"""Preferred ones first. ``float32`` is for embeddings alone to be quantized."""

SELECTOR = {8: "scheme", 16: "float_type", 2: "codebook"}
"""The parameter that chooses between formats of equal ``weight_bits``."""


def offered(subject: Subject) -> tuple[Format, ...]:
    """The formats this machine and study have a use for; none where none would shrink a matrix."""
    found = tuple(format for format in FORMATS if format.offered(subject))
    return found if any(format.bits < 32 for format in found) else ()


def format_of(params: Params) -> Format:
    """The format that parameters choose; without a word on it, the first of these bits.

    Raises:
        KeyError: there is none of these bits, or of this name.
    """
    bits = params["weight_bits"]
    names = {format.name: format for format in FORMATS if format.bits == bits}
    chosen = params.get(SELECTOR.get(int(bits), ""), next(iter(names), ""))
    return names[str(chosen)]


def settled(params: Params) -> dict[str, Any]:
    """Only what the format has a use for."""
    format = format_of(params)
    kept = {name: value for name, value in params.items() if name in _used(format, params)}
    if kept.get("qat_features") == "auto":
        kept["qat_features"] = "two_stage" if format.trained == "always" else "last_hidden"
    if format.bits == 32 and kept.get("embedding_bits") == 32:
        kept["embedding_bits"] = 16  # else nothing would be quantized at all
    return kept


def without_kernel(params: Params) -> dict[str, str]:
    """The parameters that the kernels of the chosen format do not take, each with those that they do."""
    format = format_of(params)
    taken = {"group_size": format.blocks, "accuracy_level": format.levels}
    return {
        name: f"{params[name]} has no kernel at {format.bits} bits: expected {_one_of(values)}"
        for name, values in taken.items()
        if values and params.get(name, values[0]) not in values
    }


def _one_of(values: tuple[int, ...]) -> str:
    return f"one of {', '.join(map(str, values))}" if len(values) > 1 else str(values[0])


def _used(format: Format, params: Params) -> set[str]:
    """Names of the parameters that have an effect."""
    used = {"weight_bits", *format.uses}
    if sum(other.bits == format.bits for other in FORMATS) > 1:
        used.add(SELECTOR[format.bits])
    if format.trained == "may" and not params.get("qat"):
        used -= set(_TRAINING)
    if not params.get("qat_kd", True):
        used.discard("qat_features")
    if format.name != "static_int8" and not params.get("high_precision_layers"):
        used.discard("calibration_examples")
    return used


@dataclass(frozen=True)
class Setting:
    """The parameters of one step as its parts take them; what a study leaves out has its default."""

    format: Format
    group_size: int = 32
    symmetric: bool = True
    granularity: Literal["per_channel", "per_tensor"] = "per_channel"
    embedding_bits: int = 8
    excluded: tuple[str, ...] = ()
    high_precision_layers: int = 0
    calibration: Literal["minmax", "percentile", "entropy"] = "minmax"
    calibration_examples: int = 128
    accuracy_level: int = 4
    reduce_range: bool = False
    qat: bool = False
    qat_kd: bool = True
    qat_features: Features = "last_hidden"
    activation_bits: int = 32
    learning_rate: float = 2e-5

    @classmethod
    def of(cls, params: Params) -> Self:
        """From parameters, which need not be settled yet."""
        found = settled(params)
        known = {field.name for field in fields(cls)}
        excluded = tuple(part for part in EXCLUDABLE if found.get(f"exclude_{part}"))
        given = {name: value for name, value in found.items() if name in known}
        return cls(format_of(params), excluded=excluded, **given)

    @property
    def trains(self) -> bool:
        """Whether quantization-aware training comes first."""
        return self.qat or self.format.trained == "always"

    @property
    def simulated(self) -> bool:
        """Whether no kernel computes so: on weights of two or three values, or on activations that nodes round."""
        return self.format.simulated or self.activation_bits < 32

    @property
    def rounded_activations(self) -> int | None:
        """To how many bits what the maps read is rounded, as integer kernels do by themselves; None: not at all."""
        if self.format.kernel == "int8":
            return 8
        return self.activation_bits if self.activation_bits < 32 else None

    @property
    def grid(self) -> Grid | None:
        """Where the weights of most matrices lie; None for floats."""
        bits = self.format.bits
        if self.format.name in ("ternary", "binary"):
            return Grid(self.format.name, bits, self._share)  # type: ignore[arg-type]
        if self.format.blocks:
            return Grid(self._packed, bits, self.group_size)
        return Grid("signed", bits, self._share, self.reduce_range) if bits == 8 else None

    @property
    def spare_grid(self) -> Grid | None:
        """Where those of the layers with a higher precision lie; None for float32."""
        return Grid(self._packed, 8, self.group_size) if self.format.spare == 8 else None

    @property
    def table_grid(self) -> Grid | None:
        """Where embedding tables lie; None for floats."""
        grids = {8: Grid("signed", 8), 4: Grid("block", 4, TABLE_GROUP)}
        return grids.get(self.embedding_bits) if self.format.bits != 16 else None

    @property
    def _packed(self) -> Literal["block", "affine"]:
        return "block" if self.symmetric else "affine"

    @property
    def _share(self) -> Share:
        return "tensor" if self.granularity == "per_tensor" else "channel"


def bits_of(formats: Iterable[Format]) -> tuple[int, ...]:
    """Their bits, each once, in order."""
    return tuple(dict.fromkeys(format.bits for format in formats))

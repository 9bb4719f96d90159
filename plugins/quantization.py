"""Fewer bits for weights, and for activations where integer kernels exist, after all other training.

Sixteen bits: the whole network in bfloat16 or float16, run by torch. Eight: ONNX Runtime's integer matrix products
with activation ranges found at run time (``dynamic_int8``) or on training examples beforehand (``static_int8``), or
packed weights alone (``weight_only``), as four and two bits always are. Ternary and binary weights are decoded from
the file when it is loaded: they are small, and never faster.

Rounding is to nearest; on request the network is first trained with rounded weights (``qat``), as it always is for
ternary and binary ones: on labels, the teacher's logits and its own states before it was rounded. Activations of 4
or 8 bits beside weights of 4 or fewer are simulated. What can be combined is a table in ``number_formats``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from compress_search import Batch, Candidate, Context, Dim, Method, Params, Stage, Subject, TrialError

from .precision.bits import CODEBOOK, Grid
from .precision.number_formats import (
    BLOCKS,
    EXCLUDABLE,
    LEVELS,
    SELECTOR,
    Format,
    Setting,
    bits_of,
    format_of,
    offered,
    settled,
    without_kernel,
)
from .precision.onnx_activations import round_activations
from .precision.onnx_codebooks import encode_weights
from .precision.onnx_quantizers import (
    Inputs,
    Transform,
    pack_weights,
    prepare,
    quantize_dynamic,
    quantize_static,
)
from .precision.onnx_tables import quantize_embeddings
from .precision.qat import objectives, train_rounded
from .precision.stored_bits import stored_bits
from .precision.weight_maps import excluded_maps, linear_maps, most_sensitive, node_patterns


class Quantization(Method):
    """Storage in fewer bits; owns its backend, and so narrows the engines that can follow."""

    stage = Stage.PRECISION

    def search_space(self, teacher: Subject) -> Mapping[str, Dim]:
        """Bits and what belongs to them, out of the formats that this machine and study have a use for."""
        formats = offered(teacher)
        if not formats:
            return {}
        found = {"weight_bits": _bits(formats, teacher), **_selectors(formats)}
        for name, dim in _dimensions(teacher, formats).items():
            if users := [format for format in formats if name in format.uses]:
                found[name] = replace(dim, when=_when(users, formats))
        return found

    def missing(self, teacher: Subject) -> Mapping[str, str]:
        """Kernels, where time counts: for what there would be if it did not."""
        need = "a kernel that is real here, as time counts: see compress-search doctor"
        found, whole = self.search_space(teacher), self.search_space(teacher.without("timed"))
        return {
            **dict.fromkeys(whole.keys() - found.keys(), need),
            **{f"{name}: {choice}": need for name in found for choice in lacking(found[name], whole[name])},
        }

    def unsupported(self, subject: Subject) -> str | None:
        """Whether any kernel for fewer bits is real here."""
        if "recurrent" in subject.traits:
            return "its weights are those of recurrent cells, and only linear maps have a smaller form"
        return None if offered(subject) else "no kernel for fewer bits is as fast as float32 on this machine"

    def effective(self, subject: Subject, params: Params) -> Params:
        """Without what the format has no use for."""
        return settled(params)

    def faults(self, subject: Subject, params: Params) -> Mapping[str, str]:
        """Group sizes and arithmetic that no kernel has at these bits."""
        return without_kernel(params)

    def after(self, subject: Subject, params: Params) -> Subject:
        """The mean stored bits, scales and what stays in float32 included; which engine is left."""
        setting = Setting.of(params)
        bits, embedding_bits = stored_bits(subject, setting)
        density = 1.0 if setting.format.name == "binary" else subject.density  # nothing binary is zero
        return subject.having(setting.format.engine, bits=bits, embedding_bits=embedding_bits, density=density)

    def trains(self, params: Params) -> bool:
        """Only with rounded weights in the loop."""
        return Setting.of(params).trains

    def apply(self, candidate: Candidate, params: Params, context: Context) -> Candidate:
        """Convert to 16 bits at once, or add the rewriting of the ONNX file to the candidate's lowering."""
        if fault := self.refusal(candidate.subject, params):
            raise TrialError(fault)
        setting, subject = Setting.of(params), self.after(candidate.subject, params)
        result = _halved(candidate, setting) if setting.format.bits == 16 else _lowered(candidate, setting, context)
        return result.replace(subject=subject, simulated=candidate.simulated or setting.simulated)

    def refusal(self, subject: Subject, params: Params) -> str | None:
        """What cannot be done to such a model in such a study, in one line; None when all can be done."""
        space = self.search_space(subject)
        for name, value in sorted(params.items(), key=lambda item: item[0] != "weight_bits"):
            if name not in space:
                return f"{name} means nothing here: expected some of {', '.join(space)}"
            if not space[name].contains(value):
                return f"{name} is {value!r}: expected {space[name].describe()}"
        chosen = format_of(params)
        if chosen not in offered(subject):
            return f"{chosen.name} has no kernel that is real on this machine"
        return next((f"{name}: {fault}" for name, fault in self.faults(subject, params).items()), None)


# --- the space -------------------------------------------------------------------------------------------------


def _bits(formats: tuple[Format, ...], teacher: Subject) -> Dim:
    """All bits there are; searched are those that no others beat in size, time and accuracy at once."""
    options = bits_of(formats)
    if _integers_are_best(formats, teacher):
        usual: tuple[int, ...] = (8,)
    elif "timed" not in teacher.traits or _has_integer_kernel(formats):
        usual = tuple(bits for bits in (8, 4) if bits in options)
    else:
        usual = tuple(bits for bits in options if bits in (16, 8, 4))
    return Dim.choice(options, usual[0], usual=usual)


def _integers_are_best(formats: tuple[Format, ...], teacher: Subject) -> bool:
    """Whether int8 arithmetic is all that is worth trying: it is the fastest, and packed weights only smaller."""
    timed = "timed" in teacher.traits and "sized" not in teacher.traits
    return timed and _has_integer_kernel(formats)


def _has_integer_kernel(formats: tuple[Format, ...]) -> bool:
    return any(format.kernel == "int8" for format in formats)


def lacking(dim: Dim, whole: Dim) -> list[Any]:
    """The choices of another dimension that this one has not."""
    return [choice for choice in getattr(whole.distribution, "choices", ()) if not dim.contains(choice)]


def _selectors(formats: tuple[Format, ...]) -> dict[str, Dim]:
    """A choice between the formats of the same bits, for each number of bits that has several."""
    found = {}
    for bits, name in SELECTOR.items():
        names = [format.name for format in formats if format.bits == bits]
        if not names:
            continue
        integer = [format.name for format in formats if format.bits == bits and format.kernel == "int8"]
        found[name] = Dim.choice(
            names, names[0], when={"weight_bits": (bits,)}, usual=integer, expert=name == "float_type"
        )
    return found


def _when(users: list[Format], formats: tuple[Format, ...]) -> dict[str, tuple[int | str, ...]]:
    """When a parameter of these formats is active: by their bits, or by name where not all of these bits use it."""
    bits = bits_of(users)
    if len(bits) == 1 and any(format.bits == bits[0] and format not in users for format in formats):
        return {SELECTOR[bits[0]]: tuple(format.name for format in users)}
    return {"weight_bits": bits}


def _dimensions(teacher: Subject, formats: tuple[Format, ...]) -> dict[str, Dim]:
    """What is chosen within a format. Group sizes are searched where packed weights are."""
    kernels = {"kernel:int8": True, "kernel:int8-exact": False}
    saturates = {name: name in teacher.traits for name in kernels} == kernels
    return {
        "group_size": Dim.choice(BLOCKS, 32, usual=(32, 64, 128), expert=_integers_are_best(formats, teacher)),
        "symmetric": Dim.flag(True, expert=True),
        "embedding_bits": Dim.choice((32, 16, 8, 4), 8, usual=(32, 8, 4)),
        "granularity": Dim.choice(("per_channel", "per_tensor"), "per_channel", expert=True),
        **{f"exclude_{part}": Dim.flag(False, expert=True) for part in EXCLUDABLE},
        "high_precision_layers": Dim.integer(0, 8, 0, expert=True),
        "calibration": Dim.choice(("minmax", "percentile", "entropy"), "minmax", expert=True),
        "calibration_examples": Dim.integer(32, 512, 128, expert=True),
        "accuracy_level": Dim.choice(LEVELS, 4, expert=True),
        "reduce_range": Dim.flag(saturates, expert=True),
        **({} if "timed" in teacher.traits else {"activation_bits": Dim.choice((32, 8, 4), 32, expert=True)}),
        "qat": Dim.flag(False, expert=True),
        "qat_kd": Dim.flag(True, expert=True),
        "qat_features": Dim.choice(("auto", "none", "last_hidden", "two_stage"), "auto", expert=True),
        "learning_rate": Dim.real(1e-6, 1e-2, 2e-5, log=True, expert=True),
    }


# --- applying it -----------------------------------------------------------------------------------------------


def _halved(candidate: Candidate, setting: Setting) -> Candidate:
    converted = candidate.copy()
    converted.network.half() if setting.format.name == "fp16" else converted.network.bfloat16()
    return converted


def _lowered(candidate: Candidate, setting: Setting, context: Context) -> Candidate:
    """Rank the layers, train if asked to, and say how the exported file is to be rewritten."""
    network = candidate.network
    left = excluded_maps(network, setting.excluded)
    grids = {path: setting.grid for path in linear_maps(network) if path not in left} if setting.grid else {}
    count = setting.calibration_examples
    examples = list(context.calibration(count)) if setting.high_precision_layers else []
    spared = most_sensitive(network, grids, setting.high_precision_layers, examples, context)
    if setting.trains:
        candidate = _trained(candidate, setting, _with_spared(grids, spared, setting.spare_grid), context)
    # one at a time: ranges are of what texts hold, and not of padding
    ranged = context.calibration(count, batch_size=1) if setting.format.name == "static_int8" else ()
    inputs = tuple(map(_inputs, ranged))
    scopes = [node_patterns(network, paths) for paths in (left, spared)]
    notes = {**candidate.notes, "quantization": {"high_precision": spared}} if spared else candidate.notes
    return candidate.replace(lowering=candidate.lowering + lowering(setting, inputs, *scopes), notes=notes)


def _trained(candidate: Candidate, setting: Setting, grids: Mapping[str, Grid], context: Context) -> Candidate:
    """A copy that has learnt with rounded weights what the candidate, the teacher and the labels say."""
    original = candidate.copy().network.to(context.device).eval().requires_grad_(False)
    candidate, task = candidate.copy(), candidate.subject.task
    stages = objectives(original, context, task=task, distil=setting.qat_kd, features=setting.qat_features)
    train_rounded(
        candidate.network,
        grids,
        setting.table_grid,
        stages,
        learning_rate=setting.learning_rate,
        activation_bits=setting.rounded_activations,
    )
    return candidate


def _with_spared(grids: Mapping[str, Grid], spared: Sequence[str], grid: Grid | None) -> dict[str, Grid]:
    """The grids with another one for the spared maps, or none where they stay in float32."""
    rest = {path: own for path, own in grids.items() if path not in spared}
    return rest | (dict.fromkeys(spared, grid) if grid else {})


def _inputs(batch: Batch) -> Inputs:
    return {name: tensor.cpu().numpy() for name, tensor in batch.items() if name not in ("labels", "index")}


def lowering(
    setting: Setting, examples: Sequence[Inputs], left: Sequence[str], spared: Sequence[str]
) -> tuple[Transform, ...]:
    """The file-level steps: prepare, embeddings, then weights, so that calibration sees the final embeddings.

    Args:
        setting: of a format that ONNX Runtime runs.
        examples: arrays (B, S) for static ranges.
        left: patterns of the nodes that stay in float32.
        spared: patterns of those that get more bits.
    """
    return (prepare, *_tables(setting), *_weights(setting, examples, tuple(left), tuple(spared)))


def _tables(setting: Setting) -> tuple[Transform, ...]:
    if setting.embedding_bits == 32:
        return ()
    return (partial(quantize_embeddings, grid=setting.table_grid),)


def _weights(
    setting: Setting, examples: Sequence[Inputs], left: tuple[str, ...], spared: tuple[str, ...]
) -> tuple[Transform, ...]:
    kind, grid = setting.format, setting.grid
    if grid is None:
        return ()
    if kind.kernel == "int8":
        dynamic = kind.name == "dynamic_int8"
        static = partial(quantize_static, examples=examples, calibration=setting.calibration)
        per_channel = setting.granularity == "per_channel"
        quantize = partial(quantize_dynamic if dynamic else static, excluded=left + spared)
        return (partial(quantize, per_channel=per_channel, reduce_range=setting.reduce_range),)
    kept = left if kind.spare == 8 else left + spared
    return (*_activations(setting, kept), *_packed(setting, grid, kept, spared))


def _activations(setting: Setting, kept: tuple[str, ...]) -> tuple[Transform, ...]:
    """Nodes that round what the maps read, where there is no kernel that would."""
    if setting.activation_bits == 32:
        return ()
    return (partial(round_activations, bits=setting.activation_bits, excluded=kept),)


def _packed(setting: Setting, grid: Grid, kept: tuple[str, ...], spared: tuple[str, ...]) -> tuple[Transform, ...]:
    pack = partial(
        pack_weights,
        group_size=setting.group_size,
        accuracy_level=setting.accuracy_level,
        symmetric=setting.symmetric,
    )
    first = (partial(pack, bits=8, only=spared),) if setting.format.spare == 8 and spared else ()
    if grid.kind in CODEBOOK:
        return (*first, partial(encode_weights, grid=grid, excluded=kept))
    return (*first, partial(pack, bits=grid.bits, excluded=kept))

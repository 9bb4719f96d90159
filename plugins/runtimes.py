"""How the result is run: the engine, its threads, the longest input it reads and the widths it pads to.

What each gains depends on the machine, the shapes and the lengths of the data, so all of it is measured, nothing
assumed. ``coverage`` is the part of the training examples that are read whole: longer inputs are cut to the length
that holds so many of them, which is often the cheapest compression there is. A cut input of a token task would
leave words without a label, so such tasks are offered no cut.

With ``buckets`` inputs are padded to that many widths, those that cost least over the training lengths. Engines
that take any width only lose by it; torch.compile specialises for each of the widths, and compiles once for all
where there are none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from compress_search import Candidate, Context, Dim, Method, Params, Stage, Subject

from .buckets import optimal_buckets, quantile_length

ONNX, TORCH, COMPILE = "onnxruntime", "torch", "compile"
SHORTEST = 8
"""Tokens that inputs can be cut to at least; fewer come to these."""
UNLIMITED = 0
"""The ``max_length`` of inputs that are cut by ``coverage`` alone, or not at all."""

NEEDS = {
    COMPILE: "what torch.compile lacks here: see compress-search doctor",
    ONNX: "ONNX Runtime's CUDA provider: see compress-search doctor",
}
UNCUT = "a task on whole texts: a cut would leave words of this one without a label"

_TORCH_ONLY = ("attention", "freezing", "max_autotune")


class Runtimes(Method):
    """The engine and how it is fed, where an earlier step has left a choice."""

    stage = Stage.RUNTIME

    def search_space(self, teacher: Subject) -> Mapping[str, Dim]:
        """The engines that are real here, the part of the inputs that is read, and the experts' dimensions.

        Compiling takes minutes a trial for large networks, so that a study has to name ``compile``.
        """
        engines = _engines(teacher)
        both = {"engine": [engine for engine in engines if engine != ONNX]}
        compiled = {"engine": (COMPILE,)}
        space = {"engine": Dim.choice(engines, _default(teacher), usual=[e for e in engines if e != COMPILE])}
        if teacher.task != "token-classification":
            parts = (1.0, 0.99, 0.95, 0.9, 0.75, 0.5)
            space["coverage"] = Dim.choice(parts, 1.0, usual=parts[:4])
            space["max_length"] = Dim.integer(UNLIMITED, teacher.positions, UNLIMITED, expert=True)
        if len(threads := _threads(teacher)) > 1:
            space["threads"] = Dim.choice(threads, teacher.threads)
        space["buckets"] = Dim.choice((0, 1, 2, 4, 8), 0, expert=True)
        space["attention"] = Dim.choice(("sdpa", "eager"), "sdpa", when=both, expert=True)
        if COMPILE in engines:
            space["max_autotune"] = Dim.flag(False, when=compiled, expert=True)
            if teacher.device == "cpu":
                space["freezing"] = Dim.flag(True, when=compiled, expert=True)
        return space

    def missing(self, teacher: Subject) -> Mapping[str, str]:
        """Whole texts for a cut, cores for threads, and what an engine runs with."""
        found = {f"engine: {name}": need for name, need in NEEDS.items() if name not in _engines(teacher)}
        if teacher.task == "token-classification":
            found |= dict.fromkeys(("coverage", "max_length"), UNCUT)
        if len(_threads(teacher)) == 1:
            found["threads"] = f"more cores than the {teacher.cpus} of a trial: see cluster.cpus_per_trial"
        return found

    def unsupported(self, subject: Subject) -> str | None:
        """Whether an engine is there for what the precision step leaves."""
        if "onnx-only" in subject.traits and ONNX not in _engines(subject):
            return f"ONNX Runtime, which this precision needs, cannot run on {subject.device} here"
        return None

    def effective(self, subject: Subject, params: Params) -> Params:
        """With the engine that the precision step has settled, if it has, and that engine's options alone."""
        engine = _settled(subject, cast(str, params["engine"]))
        options = {"attention": "sdpa"} if engine != ONNX else {}
        kept = {name: value for name, value in params.items() if engine == COMPILE or name not in _TORCH_ONLY[1:]}
        if engine == ONNX:
            kept.pop("attention", None)
        if kept.get("max_length", UNLIMITED) != UNLIMITED:
            kept["max_length"] = max(SHORTEST, cast(int, kept["max_length"]))
        return {**options, **kept, "engine": engine}

    def changes_nothing(self, subject: Subject, params: Params) -> bool:
        """Whether this is how the candidate would be run without the step."""
        return _options(subject, params) == {"engine": _default(subject)} and not _cuts(params)

    def apply(self, candidate: Candidate, params: Params, context: Context) -> Candidate:
        """Name the engine and its options; nothing about the network changes."""
        subject, options = candidate.subject, _options(candidate.subject, params)
        count = options.pop("buckets", 0)
        if count or _cuts(params):
            lengths = training_lengths(context)
            cap = longest_input(lengths, params)
            if cap < lengths.max():
                options["max_length"] = cap
            if count:
                options["buckets"] = optimal_buckets(np.minimum(lengths, cap), count, subject.macs)
        return candidate.replace(runtime={**candidate.runtime, **options})


def longest_input(lengths: NDArray[np.int64], params: Params) -> int:
    """Tokens of the longest input that is read whole; the longest training example where nothing is cut."""
    covered = quantile_length(lengths, cast(float, params.get("coverage", 1.0)))
    asked = cast(int, params.get("max_length", UNLIMITED)) or covered
    return max(min(SHORTEST, int(lengths.max())), min(covered, asked))


def training_lengths(context: Context) -> NDArray[np.int64]:
    """(N,) tokens of each training example."""
    batches = context.calibration(context.examples, batch_size=512)
    return np.concatenate([batch["attention_mask"].sum(dim=1).cpu().numpy() for batch in batches])


def _options(subject: Subject, params: Params) -> dict[str, Any]:
    """The engine and what differs from its defaults, the cut aside; ``buckets`` as their number."""
    usual = {"threads": subject.threads, "buckets": 0, "attention": "sdpa", "freezing": True, "max_autotune": False}
    named = {name: params[name] for name, value in usual.items() if params.get(name, value) != value}
    return {"engine": params["engine"], **named}


def _cuts(params: Params) -> bool:
    return params.get("max_length", UNLIMITED) != UNLIMITED or params.get("coverage", 1.0) != 1.0


def _engines(subject: Subject) -> tuple[str, ...]:
    """On the CPU both run everything; elsewhere ONNX Runtime needs a provider. Torch compiles where it can."""
    onnx = (ONNX,) if subject.device == "cpu" or "kernel:onnx-cuda" in subject.traits else ()
    return (*onnx, TORCH, *((COMPILE,) if "kernel:compile" in subject.traits else ()))


def _default(subject: Subject) -> str:
    """The engine of a candidate that names none."""
    return _settled(subject, ONNX if subject.device == "cpu" else TORCH)


def _settled(subject: Subject, engine: str) -> str:
    """The engine that runs where another was asked for which cannot."""
    if "onnx-only" in subject.traits:
        return ONNX
    return TORCH if "torch-only" in subject.traits and engine == ONNX else engine


def _threads(subject: Subject) -> list[int]:
    """Powers of two up to a trial's cores, and the number that the study measures with."""
    powers = {2**power for power in range(subject.cpus.bit_length())}
    return sorted(powers | {subject.threads, subject.cpus})

"""The engine is a choice where a step has left one; what changes nothing is no step; buckets are optimal."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compress_search_plugins.buckets import optimal_buckets, quantile_length
from compress_search_plugins.quantization import Quantization
from compress_search_plugins.runtimes import Runtimes, training_lengths
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from compress_search.candidate import Candidate, Subject
from compress_search.recipe import Recipe, Step, settle
from compress_search.runtimes import Artifact, load_runner
from compress_search.runtimes.lowering import default_engine, lower
from compress_search.space import defaults, fix_experts
from compress_search.tasks import Task
from compress_search.testing import tiny_batches, tiny_candidate, tiny_context

METHOD = Runtimes()
TASK = Task("text-classification", ("first", "second"))
CPU = tiny_candidate().subject


def space_of(subject: Subject) -> dict[str, Any]:
    return {name: dim.distribution.choices for name, dim in fix_experts(METHOD.search_space(subject)).items()}


def applied(candidate: Candidate, **params: Any) -> Candidate:
    given = {**defaults(METHOD.search_space(candidate.subject)), **params}
    return METHOD.apply(candidate, METHOD.effective(candidate.subject, given), tiny_context(candidate))


def settled(candidate: Candidate, *steps: Step) -> Recipe:
    methods = {"runtimes": METHOD, "quantization": Quantization()}
    return settle(Recipe(steps), methods, candidate.subject)[0]


# which choices there are


def test_engines_are_those_that_are_real_here_and_compiling_has_to_be_asked_for() -> None:
    compiles = CPU.having("kernel:compile")
    assert METHOD.search_space(CPU)["engine"].distribution.choices == ("onnxruntime", "torch")
    assert METHOD.search_space(compiles)["engine"].distribution.choices == ("onnxruntime", "torch", "compile")
    assert space_of(compiles)["engine"] == ("onnxruntime", "torch")
    cuda = CPU.having(device="cuda")
    assert METHOD.search_space(cuda)["engine"].distribution.choices == ("torch",)
    assert space_of(cuda.having("kernel:onnx-cuda"))["engine"] == ("onnxruntime", "torch")


@pytest.mark.parametrize("traits", [(), ("onnx-only",), ("torch-only",)])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_default_is_the_engine_that_runs_without_the_step(device: str, traits: tuple[str, ...]) -> None:
    subject = CPU.having(*traits, "kernel:onnx-cuda", device=device)
    params = METHOD.effective(subject, defaults(METHOD.search_space(CPU.having("kernel:onnx-cuda", device=device))))
    assert params["engine"] == default_engine(subject)
    assert METHOD.changes_nothing(subject, params)


def test_threads_go_up_to_the_cores_of_a_trial() -> None:
    assert "threads" not in METHOD.search_space(CPU), "there is nothing to choose on one core"
    assert METHOD.missing(CPU)["threads"] == "more cores than the 1 of a trial: see cluster.cpus_per_trial"
    assert "threads" not in METHOD.missing(CPU.having(cpus=2))
    space = METHOD.search_space(CPU.having(cpus=6, threads=3))
    assert space["threads"].distribution.choices == (1, 2, 3, 4, 6)
    assert space["threads"].default == 3


def test_a_token_task_is_offered_no_cut() -> None:
    names = METHOD.search_space(tiny_candidate("bert", "token-classification").subject)
    assert {"coverage", "max_length"} & names.keys() == set()
    needs = METHOD.missing(CPU.having(task="token-classification"))
    assert needs["coverage"] == needs["max_length"]
    assert "a cut would leave words of this one without a label" in needs["coverage"]
    assert METHOD.missing(CPU).keys() & {"coverage", "max_length"} == set()


def test_precision_that_needs_onnx_runtime_is_refused_where_there_is_no_provider() -> None:
    cuda = CPU.having("onnx-only", device="cuda")
    assert METHOD.unsupported(cuda) == "ONNX Runtime, which this precision needs, cannot run on cuda here"
    assert METHOD.unsupported(cuda.having("kernel:onnx-cuda")) is None
    assert METHOD.unsupported(CPU) is None


# which recipes are the same


def test_all_defaults_are_no_step() -> None:
    candidate = tiny_candidate()
    step = Step.of("runtimes", defaults(METHOD.search_space(CPU)))
    assert settled(candidate, step) == Recipe()
    threaded = candidate.replace(subject=CPU.having(threads=2, cpus=4))
    assert settled(threaded, Step.of("runtimes", {**step.params, "threads": 2})) == Recipe()
    other = Step.of("runtimes", {**step.params, "threads": 4})
    assert settled(threaded, other).methods == ("runtimes",)


def test_the_defaults_are_no_step_after_a_student_that_reads_any_length_either() -> None:
    params = defaults(METHOD.search_space(CPU))
    for subject in (CPU.having("recurrent", positions=0), CPU.having(positions=CPU.positions // 2)):
        assert METHOD.changes_nothing(subject, METHOD.effective(subject, params))


def test_a_cut_leaves_the_shortest_input_and_says_so() -> None:
    params = {**defaults(METHOD.search_space(CPU)), "max_length": 3}
    assert METHOD.effective(CPU, params)["max_length"] == 8


@pytest.mark.parametrize("changes", [{"engine": "torch"}, {"coverage": 0.9}, {"max_length": 16}, {"buckets": 2}])
def test_whatever_differs_from_the_defaults_is_a_step(changes: dict[str, Any]) -> None:
    step = Step.of("runtimes", {**defaults(METHOD.search_space(CPU)), **changes})
    assert settled(tiny_candidate(), step).methods == ("runtimes",)


@pytest.mark.parametrize(
    ("bits", "wish", "engine"),
    [
        ({"weight_bits": 16}, "onnxruntime", "torch"),
        ({"weight_bits": 4, "group_size": 32, "embedding_bits": 8}, "torch", "onnxruntime"),
    ],
)
def test_precision_settles_the_engine_and_leaves_the_rest(bits: dict[str, int], wish: str, engine: str) -> None:
    whole = {**defaults(METHOD.search_space(CPU)), "engine": wish}
    precision = Step.of("quantization", bits)
    assert settled(tiny_candidate(), precision, Step.of("runtimes", whole)).methods == ("quantization",)
    cut = settled(tiny_candidate(), precision, Step.of("runtimes", {**whole, "coverage": 0.9})).steps[-1]
    assert (cut.method, cut.params["engine"], cut.params["coverage"]) == ("runtimes", engine, 0.9)


def test_options_of_other_engines_make_no_other_recipe() -> None:
    given = {"engine": "torch", "coverage": 1.0, "buckets": 0, "freezing": False, "max_autotune": True}
    assert METHOD.effective(CPU, given) == METHOD.effective(CPU, {"engine": "torch", "coverage": 1.0, "buckets": 0})


# what is left behind


@pytest.mark.parametrize("engine", ["onnxruntime", "torch"])
def test_the_artefact_runs_on_the_chosen_engine(engine: str, tmp_path: Path) -> None:
    candidate = tiny_candidate()
    result = applied(candidate, engine=engine)
    assert candidate.runtime == {}
    lower(result, tmp_path / "artifact", TASK)
    assert Artifact.read(tmp_path / "artifact").engine == engine
    batch = {name: tensor.numpy() for name, tensor in next(tiny_batches(candidate)).items()}
    assert np.isfinite(load_runner(tmp_path / "artifact", 1)(batch)).all(), "labels and index are ignored"


def test_the_longest_input_covers_so_many_training_examples() -> None:
    candidate = tiny_candidate()
    lengths = training_lengths(tiny_context(candidate))
    assert len(lengths) == tiny_context(candidate).examples
    cut = applied(candidate, coverage=0.75).runtime["max_length"]
    assert np.mean(lengths <= cut) >= 0.75 > np.mean(lengths < cut)
    assert "max_length" not in applied(candidate, engine="torch").runtime
    assert applied(candidate, coverage=0.75, max_length=9).runtime["max_length"] == 9


def test_costs_may_be_whole_numbers() -> None:
    assert optimal_buckets(np.array([4, 4, 5, 9]), 2, lambda width: 3 * width) == (5, 9)


def test_buckets_are_optimal_for_the_lengths_that_are_left() -> None:
    candidate = tiny_candidate()
    lengths = training_lengths(tiny_context(candidate))
    runtime = applied(candidate, buckets=2, max_length=10).runtime
    assert runtime["buckets"] == optimal_buckets(np.minimum(lengths, 10), 2, candidate.subject.macs)
    assert runtime["buckets"][-1] == runtime["max_length"] == 10


# which buckets

histograms = st.lists(st.integers(1, 30), min_size=1, max_size=40).map(np.array)


def quadratic(width: int) -> float:
    return 3.0 * width + 0.5 * width * width


def padding_cost(lengths: NDArray[np.int64], buckets: tuple[int, ...], cost: Callable[[int], float]) -> float:
    """Mean cost of an input when each is padded to the first bucket that holds it: Σ P(len) · cost(bucket(len)).

    Lengths beyond the last bucket run as they are.
    """
    widths = np.asarray(sorted(buckets))
    places = np.searchsorted(widths, lengths)
    padded = np.where(places < len(widths), widths[np.minimum(places, len(widths) - 1)], lengths)
    return float(np.mean([cost(int(width)) for width in padded]))


@given(histograms, st.integers(1, 4))
def test_no_set_of_widths_is_better(lengths: Any, count: int) -> None:
    widths = np.unique(lengths).tolist()
    found = optimal_buckets(lengths, count, quadratic)
    assert found == tuple(sorted(set(found)))
    assert len(found) <= count
    assert found[-1] == max(widths)
    sets = [(*some, widths[-1]) for size in range(count) for some in combinations(widths[:-1], size)]
    best = min(padding_cost(lengths, buckets, quadratic) for buckets in sets)
    assert padding_cost(lengths, found, quadratic) == pytest.approx(best)


@given(histograms)
def test_more_buckets_never_cost_more_and_enough_of_them_pad_nothing(lengths: Any) -> None:
    costs = [padding_cost(lengths, optimal_buckets(lengths, count, quadratic), quadratic) for count in range(1, 31)]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] == pytest.approx(np.mean([quadratic(length) for length in lengths]))


def test_a_cost_by_hand() -> None:
    lengths = np.array([3, 3, 3, 10])
    assert optimal_buckets(lengths, 1, float) == (10,)
    assert optimal_buckets(lengths, 2, float) == (3, 10)
    assert padding_cost(lengths, (4, 10), float) == (3 * 4 + 10) / 4
    assert padding_cost(lengths, (4,), float) == (3 * 4 + 10) / 4, "beyond the last bucket nothing is padded"


@given(histograms, st.floats(0.01, 1.0))
def test_a_quantile_is_the_least_length_that_covers(lengths: Any, part: float) -> None:
    length = quantile_length(lengths, part)
    assert np.mean(lengths <= length) >= part - 1e-12
    assert np.mean(lengths < length) < part + 1e-12

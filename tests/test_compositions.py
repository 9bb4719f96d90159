"""Whatever the search can propose is legal: random recipes of all methods apply, train, save, reload and lower.

The recipes are drawn as the search draws them: out of what studies search by default, and out of what a study can
open, every dimension of every method in its whole range. So an illegal combination that a method's ``unsupported``,
``effective``, ``faults`` or ``after`` lets through fails here, whichever methods it is made of.

``COMPOSITIONS=300`` draws so many recipes of each kind in place of a few; ``HYPOTHESIS_PROFILE=explore`` draws
others.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from compress_search_plugins.precision.number_formats import format_of
from compress_search_plugins.pruning.sparse_masks import density
from hypothesis import HealthCheck, Phase, assume, given, note, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution

from compress_search import training
from compress_search.candidate import Candidate, Subject
from compress_search.data import training_batches
from compress_search.driver import prepare
from compress_search.encoders import describe, load_network, shape_key, subject_of
from compress_search.encoders.sparse_storage import LEAST_ELEMENTS
from compress_search.errors import TrialError
from compress_search.method import Batch, Stage
from compress_search.pipeline import run_recipe
from compress_search.plan import Plan
from compress_search.recipe import Recipe, Step, settle
from compress_search.runtimes import load_runner, sparse_onnx
from compress_search.runtimes.engines import COMPILE
from compress_search.runtimes.lowering import lower
from compress_search.space import Dim, defaults, fix_experts, narrow, unmet
from compress_search.study import load_study
from compress_search.workbench import Workbench
from tests import tiny
from tests.stored import Stored, arrays_of

Outputs = np.ndarray[Any, Any]
PRIMARY = {"text-classification": "accuracy", "text-regression": "pearson", "token-classification": "f1"}
GRAPH = 6000
"""Bytes of the constants in an ONNX file's graph at most, a codebook's bytes among them."""
SIMULATED = {"ternary", "binary", "rounded activations"}
"""Arithmetic that no kernel has: of use where no clock runs."""
ENDS = ("exclude_first_layer", "exclude_last_layer")
CLOSED = {("runtimes", "engine"): (COMPILE,)}
"""Choices that stay out, for they take minutes a recipe."""

optuna.logging.set_verbosity(optuna.logging.ERROR)
pytestmark = pytest.mark.slow


def draws(few: int) -> Any:
    """So many seeds, or as many as the environment says."""
    return settings(
        max_examples=int(os.environ.get("COMPOSITIONS", few)),
        deadline=None,
        phases=[Phase.explicit, Phase.generate],  # no seed is simpler than another
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


seeds = st.integers(0, 10**9)


class EndsToo(optuna.samplers.RandomSampler):
    """Draws at random, and every fourth time an end of the range."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed=seed)
        self.coin = np.random.default_rng(seed)

    def sample_independent(self, study: Any, trial: Any, name: str, distribution: Any) -> Any:
        if not isinstance(distribution, CategoricalDistribution) and self.coin.random() < 0.25:
            return distribution.low if self.coin.random() < 0.5 else distribution.high
        return super().sample_independent(study, trial, name, distribution)


def opened(method: str, name: str, dim: Dim) -> list[Any] | dict[str, float]:
    """What a study writes to have all of a dimension searched."""
    distribution: Any = dim.distribution
    if isinstance(distribution, CategoricalDistribution):
        return [choice for choice in distribution.choices if choice not in CLOSED.get((method, name), ())]
    return {"low": distribution.low, "high": distribution.high}


class Ground:
    """Tiny studies of all methods, and what a worker would have made of them."""

    def __init__(self, folder: Path, kind: str, family: str, precision: str, *, timed: bool, crf: bool) -> None:
        # size always counts, so that nothing is held back that makes a model smaller
        objectives = [PRIMARY[tiny.task_of(kind)], *(["latency_ms"] if timed else []), "size_mb"]
        self.folder = folder
        sections = {
            "objectives": objectives,
            "training": {"epochs": 0.34, "batch_size": 32, "precision": precision},
            "teacher": {"fine_tune": {"epochs": 0.1, "crf": crf}, "masked_lm": "language_model"},
            "data": {"unlabeled": "data/test.jsonl"},
            "auxiliary": {
                "more_of_it": {
                    "task": tiny.task_of(kind),
                    "teacher": {"model": "./teacher"},
                    "data": {"train": "data/validation.jsonl"},
                }
            },
        }
        save_language_model(folder / "language_model", kind, family)
        tiny.tiny_teacher(folder / "teacher", kind, family, layers=4)
        usual = self._prepare(kind, family, sections, "all")
        self.bench = Workbench(usual.brief)
        materials = self.bench.materials
        self.bench.materials = replace(materials, layer_latency=in_proportion)
        self.usual, self.open = usual.plan, self._prepare(kind, family, sections, opened_methods(usual.plan)).plan

    def _prepare(self, kind: str, family: str, sections: Mapping[str, Any], methods: Any) -> Any:
        model = {**sections["teacher"], "model": "./teacher"}  # of four layers, and not tiny_study's own of two
        path = tiny.tiny_study(self.folder, kind, family, **{**sections, "teacher": model, "methods": methods})
        return prepare(load_study(path))

    def apply(self, recipe: Recipe, *, dry: bool = False) -> Candidate:
        """The recipe carried out on the tiny teacher."""
        scratch = self.folder / "scratch"
        return run_recipe(recipe, self.bench.registry, self.bench.materials, seed=1, scratch=scratch, dry=dry)[0]

    def lower(self, candidate: Candidate, name: str) -> Path:
        """Its artefact."""
        directory = self.folder / "artifacts" / name
        lower(candidate, directory, self.bench.materials.task)
        return directory

    def batch(self, directory: Path) -> Batch:
        """A few examples as an artefact reads them."""
        return self.bench.as_read(directory, "validation").batch(range(3))


def save_language_model(folder: Path, kind: str, family: str) -> None:
    from transformers import AutoModelForMaskedLM

    with torch.random.fork_rng():
        torch.manual_seed(1)
        AutoModelForMaskedLM.from_config(tiny.tiny_config(kind, family, layers=3)).save_pretrained(folder)
    tiny.tiny_tokenizer(family).save_pretrained(folder)


def opened_methods(plan: Plan) -> dict[str, dict[str, Any]]:
    """What a study writes to search all there is of all methods."""
    found = {}
    for method in plan.methods:
        space = plan.registry[method].search_space(plan.teacher)
        whole = {name: opened(method, name, dim) for name, dim in space.items() if not dim.fixed}
        left = {name: narrow(dim, whole[name]) if name in whole else dim for name, dim in space.items()}
        found[method] = {name: values for name, values in whole.items() if not unmet(left, name)}
    return found


def in_proportion(subject: Subject) -> Any:
    """Milliseconds of a layer without a clock, so that equal seeds cut equally much."""
    return lambda heads, neurons: subject.having(layers=1, heads=heads, intermediate=neurons).macs(8) / 1e6


def propose(plan: Plan, seed: int) -> Recipe:
    """What the search would propose."""
    return plan.propose(optuna.create_study(sampler=EndsToo(seed)).ask())


def outputs(directory: Path, batch: Batch) -> Outputs:
    """Logits of an artefact; a function by itself so that a process that has seen nothing else can call it."""
    return np.asarray(load_runner(directory, threads=1)({name: tensor.numpy() for name, tensor in batch.items()}))


@pytest.fixture(scope="module")
def clean_process() -> Iterator[ProcessPoolExecutor]:
    """One that only ever sees what is on disk."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


GROUNDS = [
    ("text-classification", "bert", "fp32", "timed"),
    ("pairs", "bert", "bf16", ""),
    ("token-classification", "bert", "fp32", ""),
    ("text-regression", "distilbert", "bf16", "timed"),
    ("text-classification", "roberta", "fp32", ""),
    ("token-classification", "electra", "bf16", "timed-crf"),
]


def make_ground(folder: Path, kind: str, family: str, precision: str, more: str) -> Ground:
    return Ground(folder, kind, family, precision, timed="timed" in more, crf="crf" in more)


@pytest.fixture(scope="module", params=GROUNDS, ids=lambda param: "-".join(filter(None, param)))
def ground(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    made = make_ground(tmp_path_factory.mktemp("ground"), *request.param)
    yield made
    made.bench.close()


@draws(3)
@given(seed=seeds)
def test_every_recipe_that_is_proposed_by_default_is_legal(
    ground: Ground, clean_process: ProcessPoolExecutor, seed: int
) -> None:
    recipe = propose(ground.usual, seed)
    note(str(recipe))
    candidate = carried_out(ground, ground.usual, recipe, clean_process)
    assert not candidate.simulated, "simulated arithmetic is an expert's choice"


@draws(7)
@given(seed=seeds)
def test_every_recipe_that_a_study_can_open_is_legal(
    ground: Ground, clean_process: ProcessPoolExecutor, seed: int
) -> None:
    recipe = propose(ground.open, seed)
    note(str(recipe))
    candidate = carried_out(ground, ground.open, recipe, clean_process)
    assert candidate.simulated == bool(simulated(recipe))


def test_simulated_arithmetic_is_proposed_where_no_clock_runs_and_legal_there(
    ground: Ground, clean_process: ProcessPoolExecutor
) -> None:
    recipes = [propose(ground.open, seed) for seed in range(200)]
    found = {name: recipe for recipe in recipes for name in simulated(recipe)}
    assert found.keys() == (set() if "timed" in ground.open.teacher.traits else SIMULATED)
    assert not any(simulated(propose(ground.usual, seed)) for seed in range(200)), "experts' choices"
    for recipe in found.values():
        assert carried_out(ground, ground.open, recipe, clean_process).simulated


def simulated(recipe: Recipe) -> set[str]:
    """The kinds of arithmetic in a recipe that no kernel has."""
    params = next((step.params for step in recipe.steps if step.method == "quantization"), {"weight_bits": 32})
    codebook = {format_of(params).name} & SIMULATED
    return codebook | ({"rounded activations"} if params.get("activation_bits", 32) < 32 else set())


def carried_out(ground: Ground, plan: Plan, recipe: Recipe, clean_process: ProcessPoolExecutor) -> Candidate:
    """Carry a recipe out and hold what comes of it to all that the engine relies on."""
    settled, promised = settle(recipe, plan.registry, plan.teacher)
    assert settled == recipe, "what it was settled to once it stays"
    try:
        candidate, dry = ground.apply(recipe), ground.apply(recipe, dry=True)
    except TrialError as error:
        assume("milliseconds" not in str(error))  # what layers can be cut to by the clock is known to workers only
        raise
    assert candidate.subject.keeps(promised), "what the steps said they would leave"
    has_the_shapes(candidate, promised)
    if "non-uniform" not in promised.traits:
        assert shape_key(describe(dry.network)) == shape_key(describe(candidate.network)), "as measured before"

    directory = ground.lower(candidate, recipe.key[:12])
    batch = ground.batch(directory)
    here = outputs(directory, batch)
    assert np.isfinite(here).all()
    elsewhere = clean_process.submit(outputs, directory, batch).result()
    np.testing.assert_array_equal(elsewhere, here)
    holds_the_bytes(directory, plan, recipe, candidate)

    if not late_steps(plan, recipe):
        reloads_as_it_was(candidate, directory, batch)
        trains_on(ground, candidate)
        quantizes(ground, plan, recipe)
    return candidate


def late_steps(plan: Plan, recipe: Recipe) -> tuple[Step, ...]:
    """Those after all training, which leave the network's shapes alone."""
    return tuple(step for step in recipe.steps if plan.registry[step.method].stage >= Stage.PRECISION)


def as_it_is(candidate: Candidate, promised: Subject) -> Subject:
    """The shapes that the network has, with what only the steps know."""
    known = ("device", "threads", "cpus", "bits", "embedding_bits", "alphabet", "density", "traits")
    found = subject_of(candidate.network, promised.task)
    return replace(found, **{name: getattr(promised, name) for name in known})


def has_the_shapes(candidate: Candidate, promised: Subject) -> None:
    """The promised ones, but for what the steps say that only weights or data tell; and so many parameters."""
    found = as_it_is(candidate, promised)
    assert sum(parameter.numel() for parameter in candidate.network.parameters()) == found.parameters
    if "sparse" in promised.traits and "non-uniform" not in promised.traits and promised.bits == 32:
        assert density(candidate.network) == pytest.approx(promised.density, abs=1e-9)
    forecast = {"vocabulary"} if "data-sized" in promised.traits else set()
    forecast |= {"heads", "intermediate", "ranks"} if "non-uniform" in promised.traits else set()
    assert replace(found, **{name: getattr(promised, name) for name in forecast}) == promised


def reloads_as_it_was(candidate: Candidate, directory: Path, batch: Batch) -> None:
    """The network itself, its reloaded weights and its artefact agree."""
    logits = training.forward(candidate.network, batch).detach().numpy()
    again = load_network(directory / "weights")
    assert describe(again) == describe(candidate.network)
    np.testing.assert_array_equal(training.forward(again, batch).detach().numpy(), logits)
    np.testing.assert_allclose(outputs(directory, batch), logits, atol=1e-4)


def trains_on(ground: Ground, candidate: Candidate) -> None:
    """One more optimizer step on the labels changes the weights and breaks nothing."""
    network, materials = candidate.copy().network, ground.bench.materials.read_by(candidate.tokenizer)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    training.fit(
        network,
        training_batches(materials.train, 8, seed=0),
        1,
        training.task_loss(materials.task),
        learning_rate=1e-3,
        warmup=0.0,
        weight_decay=0.0,
        device=materials.device,
        seed=0,
    )
    assert any((new != old).any() for new, old in zip(network.parameters(), before, strict=True))


def quantizes(ground: Ground, plan: Plan, recipe: Recipe) -> None:
    """Dynamic int8 may follow, runs, and makes the file smaller."""
    method = plan.registry["quantization"]
    subject = settle(recipe, plan.registry, plan.teacher)[1]
    if method.unsupported(subject):
        return
    step = Step.of("quantization", defaults(fix_experts(method.search_space(plan.teacher))))
    longer, after = settle(Recipe((*recipe.steps, step)), plan.registry, plan.teacher)
    candidate = ground.apply(longer)
    directory = ground.lower(candidate, longer.key[:12])
    assert np.isfinite(outputs(directory, ground.batch(directory))).all()
    assert after.megabytes < subject.megabytes
    holds_the_bytes(directory, plan, longer, candidate)


def closed_forms(plan: Plan, recipe: Recipe, candidate: Candidate) -> list[Subject]:
    """Of the network as it is; several where which maps have a higher precision is not told by a mean layer.

    Where weights decide it none and all have it; where unequal layers are left in float32 none and all are.
    """
    late = late_steps(plan, recipe)
    early = Recipe(tuple(step for step in recipe.steps if step not in late))
    found = [as_it_is(candidate, settle(early, plan.registry, plan.teacher)[1])]
    for step in late:
        before, after = found, plan.registry[step.method].after
        found = [after(subject, params) for subject in before for params in precisions(step)]
        left = {name for name in ENDS if step.params.get(name)}
        if left and "non-uniform" in candidate.subject.traits:
            found += [replace(found[0], bits=32.0), after(before[0], step.params | dict.fromkeys(left, False))]
    return found


def precisions(step: Step) -> list[dict[str, Any]]:
    """The parameters; with none and with all of the maps spared, where some are."""
    spared = (0, 10**6) if step.params.get("high_precision_layers") else ()
    return [step.params | {"high_precision_layers": number} for number in spared] or [step.params]


def holds_the_bytes(directory: Path, plan: Plan, recipe: Recipe, candidate: Candidate) -> None:
    """All arrays together weigh whole what the closed form says, and each one what its zeros leave of it.

    Where bits are mixed, the closed form of what zeros leave of the file takes their mean for those of each.
    """
    arrays, subjects = arrays_of(directory), closed_forms(plan, recipe, candidate)
    whole = [replace(subject, density=1.0).megabytes * 1e6 for subject in subjects]
    crf = 4 * subjects[0].crf_parameters  # beside an ONNX file, in one of weights
    constants, nodes = (GRAPH, sparse_onnx.OVERHEAD) if (directory / "model.onnx").exists() else (crf + 8, 0)
    found = sum(array.whole for array in arrays)
    assert 0.99 * min(whole) - constants <= found <= 1.01 * max(whole) + constants
    if "sparse" not in candidate.subject.traits:
        return
    in_blocks = any(str(step.params.get("pattern")).startswith("block") for step in recipe.steps)
    for array in arrays:
        assert array.nbytes <= array.whole
        if array.bits > 8 and not in_blocks:
            is_packed_where_it_pays(array, nodes)
    if candidate.subject.bits in (16, 32) and not in_blocks:
        unpacked = sum(array.whole - array.closed for array in arrays if not array.packed)
        promised = max(subject.megabytes for subject in subjects) * 1e6 + unpacked + constants
        assert sum(array.nbytes for array in arrays) <= 1.01 * promised


def is_packed_where_it_pays(array: Stored, nodes: int) -> None:
    """Zeros at random places leave of an array what the closed form says, if that saves more than its nodes cost.

    Blocks leave wider gaps, and so do codes that are filled up to whole groups.
    """
    if array.packed:
        assert array.nbytes == pytest.approx(array.closed, rel=0.1, abs=16)
    elif array.elements >= LEAST_ELEMENTS:
        assert array.whole - array.closed <= 1.1 * nodes + 0.02 * array.whole

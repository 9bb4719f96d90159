"""Whatever the search can propose is legal: random recipes of all methods apply, train, save, reload and lower.

The recipes are drawn as the search draws them, so an illegal combination that a method's ``unsupported`` or
``after`` lets through fails here, whichever methods it is made of.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import optuna
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compress_search import training
from compress_search.candidate import Candidate, Subject
from compress_search.data import training_batches
from compress_search.driver import prepare
from compress_search.encoders import describe, load_network
from compress_search.method import Batch, Stage
from compress_search.pipeline import run_recipe
from compress_search.plan import Plan, make_plan
from compress_search.recipe import Recipe, Step, settle
from compress_search.runtimes import load_runner, lower, size_mb
from compress_search.space import defaults, fix_experts
from compress_search.study import load_study
from compress_search.workbench import Workbench
from tests import tiny

Outputs = np.ndarray[Any, Any]
PRIMARY = {"text-classification": "accuracy", "text-regression": "pearson", "token-classification": "f1"}
OVERHEAD = 0.012
"""MB of tensors beyond the closed form: scales, zero points and constants, which weigh in so small a model."""

optuna.logging.set_verbosity(optuna.logging.ERROR)
pytestmark = pytest.mark.slow


class Ground:
    """A tiny study of all methods, and what a worker would have made of it."""

    def __init__(self, folder: Path, kind: str, family: str, precision: str) -> None:
        # whatever depends on speed or size counts, so that nothing is held back
        objectives = [PRIMARY[tiny.task_of(kind)], "latency_ms", "size_mb"]
        training = {"epochs": 0.34, "batch_size": 32, "precision": precision}
        path = tiny.tiny_study(folder, kind, family, methods="all", objectives=objectives, training=training)
        tiny.tiny_teacher(folder / "teacher", kind, family, layers=4)
        self.folder = folder
        prepared = prepare(load_study(path))
        self.bench = Workbench(prepared.brief)
        self.plans = [self._plan(prepared.study, prepared.plan.teacher, timed) for timed in (True, False)]

    def _plan(self, study: Any, teacher: Any, timed: bool) -> Plan:
        """Without a clock simulated arithmetic is proposed as well."""
        return make_plan(study, self.bench.registry, teacher if timed else teacher.without("timed"))

    def recipe(self, seed: int) -> tuple[Recipe, Plan]:
        """What the search would propose."""
        plan = self.plans[seed % len(self.plans)]
        trials = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
        return plan.propose(trials.ask()), plan

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


def outputs(directory: Path, batch: Batch) -> Outputs:
    """Logits of an artefact; a function by itself so that a process that has seen nothing else can call it."""
    return np.asarray(load_runner(directory, threads=1)({name: tensor.numpy() for name, tensor in batch.items()}))


@pytest.fixture(scope="module")
def clean_process() -> Iterator[ProcessPoolExecutor]:
    """One that only ever sees what is on disk."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.fixture(
    scope="module",
    params=[
        ("text-classification", "bert", "fp32"),
        ("pairs", "bert", "bf16"),
        ("token-classification", "bert", "fp32"),
        ("text-regression", "distilbert", "bf16"),
        ("text-classification", "roberta", "fp32"),
        ("token-classification", "electra", "bf16"),
    ],
    ids=lambda param: "-".join(param),
)
def ground(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    made = Ground(tmp_path_factory.mktemp("ground"), *request.param)
    yield made
    made.bench.close()


@settings(
    max_examples=8,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(seed=st.integers(0, 10**9))
def test_every_recipe_the_search_can_propose_is_legal(
    ground: Ground, clean_process: ProcessPoolExecutor, seed: int
) -> None:
    recipe, plan = ground.recipe(seed)
    candidate = ground.apply(recipe)
    promised = settle(recipe, plan.registry, plan.teacher)[1]
    assert candidate.subject.keeps(promised.having(*candidate.subject.traits)), "what the steps said they'd leave"

    directory = ground.lower(candidate, recipe.key[:12])
    batch = ground.batch(directory)
    here = outputs(directory, batch)
    assert np.isfinite(here).all()
    elsewhere = clean_process.submit(outputs, directory, batch).result()
    np.testing.assert_array_equal(elsewhere, here)
    holds_the_bytes(directory, candidate.subject)

    if not any(plan.registry[name].stage >= Stage.PRECISION for name in recipe.methods):
        reloads_as_it_was(candidate, directory, batch)
        trains_on(ground, candidate)
        quantizes(ground, plan, recipe)


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
    holds_the_bytes(directory, after)


def holds_the_bytes(directory: Path, subject: Subject) -> None:
    """The tensors of the file an engine loads weigh what the closed form says; the graph around them aside.

    Matrices as small as these are stored dense where packing their zeros would not pay.
    """
    found, most = stored_megabytes(directory), replace(subject, density=1.0).megabytes
    assert found <= 1.02 * most + OVERHEAD, (found, most)
    if subject.density == 1:
        assert found >= 0.98 * most - OVERHEAD, (found, most)


def stored_megabytes(directory: Path) -> float:
    """MB of tensors in the file that is deployed."""
    model = directory / "model.onnx"
    if not model.exists():
        return size_mb(directory)
    graph = onnx.load(str(model)).graph
    constants = [a.t for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.TENSOR]
    return sum(tensor.ByteSize() for tensor in (*graph.initializer, *constants)) / 1e6

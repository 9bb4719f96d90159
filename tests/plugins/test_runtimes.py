"""The engine is a choice only where an earlier step has left one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from compress_search_plugins.quantization import Quantization
from compress_search_plugins.runtimes import Runtimes

from compress_search.recipe import Recipe, Step, settle
from compress_search.runtimes import ENGINES, Artifact, load_runner, lower
from compress_search.tasks import Task
from compress_search.testing import tiny_batches, tiny_candidate, tiny_context

METHOD = Runtimes()


def test_every_engine_is_offered() -> None:
    space = METHOD.search_space(tiny_candidate().subject)
    assert space["engine"].distribution.choices == ENGINES


@pytest.mark.parametrize("engine", ENGINES)
def test_the_artefact_runs_on_the_chosen_engine(engine: str, tmp_path: Path) -> None:
    candidate = tiny_candidate()
    result = METHOD.apply(candidate, {"engine": engine}, tiny_context(candidate))
    assert candidate.runtime == {}
    lower(result, tmp_path / "artifact", Task("text-classification", ("first", "second")))
    assert Artifact.read(tmp_path / "artifact").engine == engine
    batch = {name: tensor.numpy() for name, tensor in next(tiny_batches(candidate)).items()}
    assert np.isfinite(load_runner(tmp_path / "artifact", 1)(batch)).all(), "labels and index are ignored"


@pytest.mark.parametrize(
    ("bits", "engine"), [({"weight_bits": 16}, "torch"), ({"weight_bits": 4, "group_size": 32}, "ONNX Runtime")]
)
def test_precision_settles_the_engine(bits: dict[str, int], engine: str) -> None:
    methods = {"quantization": Quantization(), "runtimes": METHOD}
    recipe = Recipe(
        (Step.of("runtimes", {"engine": "torch"}), Step.of("quantization", bits | {"embedding_bits": 8}))
    )
    with pytest.raises(Exception, match=f"only {engine} runs what the precision step leaves"):
        settle(recipe, methods, tiny_candidate().subject)
    assert METHOD.unsupported(tiny_candidate().subject) is None

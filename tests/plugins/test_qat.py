"""Training with rounded weights, and the ranking of layers by what their rounding costs."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compress_search_plugins.distillation.soft_targets import soft_target_loss
from compress_search_plugins.precision.bits import Grid
from compress_search_plugins.precision.number_formats import Setting
from compress_search_plugins.precision.qat import inner_matches, objectives, rounded_inputs, train_rounded
from compress_search_plugins.precision.weight_maps import linear_maps, most_sensitive
from torch.nn.utils import parametrize

from compress_search import Candidate, Params
from compress_search.encoders import layers, parts, prune_heads, read_features, set_layers, subject_of
from compress_search.losses import hidden_mse
from compress_search.runtimes import load_runner
from compress_search.runtimes.lowering import lower
from compress_search.testing import TinyContext, tiny_batches, tiny_candidate, tiny_context
from tests.quantized import (
    CLASSIFICATION,
    METHOD,
    argmax_agreement,
    distinct,
    feed_of,
    model_of,
    operators,
    params,
    quantize,
    reference,
    tensors,
)

QAT = {
    "dynamic_int8": {"qat": True},
    "static_int8": {"qat": True},
    "weight_only 8": {"qat": True},
    "weight_only 4": {"qat": True},
    "weight_only 2": {"qat": True, "embedding_bits": 4},
    "ternary": {},
    "binary": {},
}
every_trained = pytest.mark.parametrize("name", QAT)


def trained(name: str, **changes: Any) -> Params:
    return params(name, **{**QAT[name], "learning_rate": 1e-3, **changes})


@cache
def teacher() -> Candidate:
    """Two layers that have learnt the tiny task."""
    candidate = tiny_candidate(layers=2, hidden=64, intermediate=128)
    for parameter in candidate.network.parameters():
        if parameter.dim() > 1:
            parameter.data *= 0.1  # from wide weights it would learn slowly
    tiny_context(candidate, steps=100, batch_size=32).fit(candidate.network, learning_rate=3e-3)
    return candidate


# --- what training leaves --------------------------------------------------------------------------------------


@every_trained
def test_the_trained_weights_lie_on_their_grids(name: str) -> None:
    candidate, chosen = distinct(layers=1), trained(name)
    context = tiny_context(candidate, steps=3)
    result = METHOD.apply(candidate, chosen, context)
    assert len(context.fits) == 1
    assert not any(parametrize.is_parametrized(module) for module in result.network.modules())
    setting = Setting.of(chosen)
    assert setting.grid is not None
    assert setting.table_grid is not None
    for module in result.network.modules():
        weight = getattr(module, "weight", None)
        grid = setting.table_grid if isinstance(module, torch.nn.Embedding) else setting.grid
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            torch.testing.assert_close(grid.round(weight.data), weight.data, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["dynamic_int8", "weight_only 4"])
def test_the_exported_file_has_the_scales_that_were_trained_with(name: str, tmp_path: Path) -> None:
    candidate, chosen = distinct(layers=1), trained(name, embedding_bits=32)
    result = METHOD.apply(candidate, chosen, tiny_context(candidate, steps=3))
    lower(result, tmp_path / "artifact", CLASSIFICATION)
    up = parts(layers(result.network)[0]).up.weight.data
    codes, scales = Setting.of(chosen).grid.encode(up)  # type: ignore[union-attr]
    found = tensors(model_of(tmp_path / "artifact"))
    if name == "dynamic_int8":
        same = [v for v in found.values() if v.shape == up.T.shape and np.array_equal(v, codes.numpy().T)]
    else:
        stored = {v.ravel().tobytes() for v in found.values() if v.dtype == np.float32}
        same = [True] if scales.numpy().ravel().tobytes() in stored else []
    assert len(same) == 1


@pytest.mark.parametrize("name", ["weight_only 4", "ternary", "binary"])
def test_the_file_answers_as_the_trained_network_does(name: str, tmp_path: Path) -> None:
    """Rounding once more changes nothing, and without int8 activations there is nothing else between the two."""
    candidate = distinct(layers=2)
    result = METHOD.apply(candidate, trained(name, accuracy_level=0), tiny_context(candidate, steps=3))
    artifact = tmp_path / "artifact"
    lower(result, artifact, CLASSIFICATION)
    feed = feed_of(candidate)
    np.testing.assert_allclose(load_runner(artifact, 1)(feed), reference(result, feed), atol=1e-4)


def test_zeros_stay_zero_through_training() -> None:
    candidate = distinct(layers=1)
    up = parts(layers(candidate.network)[0]).up.weight
    up.data[:, ::2] = 0
    for name in ("dynamic_int8", "weight_only 4", "ternary"):
        result = METHOD.apply(candidate, trained(name), tiny_context(candidate, steps=3))
        weight = parts(layers(result.network)[0]).up.weight
        assert (weight[:, ::2] == 0).all()
        assert not torch.equal(weight, up), "the others have moved"


def test_zeros_stay_in_the_maps_that_are_left_alone() -> None:
    candidate = distinct(layers=1)
    down = parts(layers(candidate.network)[0]).down.weight
    down.data[:, ::2] = 0
    result = METHOD.apply(candidate, trained("ternary", exclude_ffn_down=True), tiny_context(candidate, steps=3))
    weight = parts(layers(result.network)[0]).down.weight
    assert (weight[:, ::2] == 0).all()
    assert not torch.equal(weight, down), "the others have moved"


def test_shared_layers_stay_shared_through_training() -> None:
    candidate = distinct(layers=3)
    set_layers(candidate.network, [layers(candidate.network)[0]] * 3)
    candidate = candidate.replace(subject=subject_of(candidate.network, "text-classification"))
    result = METHOD.apply(candidate, trained("weight_only 4"), tiny_context(candidate, steps=2))
    assert len({id(layer) for layer in layers(result.network)}) == 1
    assert subject_of(result.network, "text-classification").parameters == candidate.subject.parameters


def test_excluded_maps_and_the_argument_stay_as_they_were() -> None:
    candidate = distinct(layers=2)
    before = deepcopy(candidate.network.state_dict())
    chosen = trained("weight_only 2", exclude_pooler=True)
    result = METHOD.apply(candidate, chosen, tiny_context(candidate, steps=2))
    assert all(torch.equal(value, before[name]) for name, value in candidate.network.state_dict().items())
    pooler = result.network.bert.pooler.dense.weight.data
    assert not torch.equal(Grid("block", 2, 32).round(pooler), pooler), "trained, and not rounded"


@pytest.mark.parametrize("name", ["weight_only 4", "binary"])
def test_a_dry_run_has_the_same_file(name: str, tmp_path: Path) -> None:
    candidate, files = distinct(layers=1), []
    for dry in (True, False):
        made = METHOD.apply(candidate, trained(name), tiny_context(candidate, dry=dry, steps=2))
        assert made.subject == METHOD.after(candidate.subject, trained(name))
        lower(made, tmp_path / str(dry), CLASSIFICATION)
        model = model_of(tmp_path / str(dry))
        files.append((operators(model), sorted((t.data_type, tuple(t.dims)) for t in model.graph.initializer)))
    assert files[0] == files[1]


# --- what it is good for ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dynamic_int8", "static_int8", "weight_only 8"])
def test_a_trained_model_keeps_its_answers_in_int8(name: str, tmp_path: Path) -> None:
    assert argmax_agreement(teacher(), quantize(teacher(), params(name), tmp_path / "artifact")) >= 0.99


@pytest.mark.parametrize("distil", [True, False])
def test_training_wins_back_what_binary_weights_lose(distil: bool) -> None:
    batch = next(tiny_batches(teacher(), batch_size=200, seed=77))
    feed = {name: value.numpy() for name, value in batch.items() if name not in ("labels", "index")}

    def loss(candidate: Candidate) -> float:
        logits = torch.as_tensor(reference(candidate, feed))
        return float(torch.nn.functional.cross_entropy(logits, batch["labels"]))

    chosen = trained("binary", qat_kd=distil)
    rounded = METHOD.apply(teacher(), chosen, tiny_context(teacher(), dry=True))
    learnt = METHOD.apply(teacher(), chosen, tiny_context(teacher(), steps=40, batch_size=32))
    assert loss(rounded) > 2 * loss(teacher()), "rounding alone costs something"
    assert loss(learnt) < 0.5 * loss(rounded)


def test_the_teacher_is_asked_only_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    original = TinyContext.teacher_logits
    monkeypatch.setattr(TinyContext, "teacher_logits", lambda self, batch: asked.append(1) or original(self, batch))
    for distil in (False, True):
        METHOD.apply(teacher(), trained("weight_only 4", qat_kd=distil), tiny_context(teacher(), steps=1))
        assert bool(asked) == distil


@pytest.mark.parametrize("features", ["none", "last_hidden", "two_stage"])
def test_stages_learn_from_the_network_before_it_was_rounded(features: Any) -> None:
    """Beside labels and the teacher's logits in equal parts, which no stage of inner states sees."""
    original, context = teacher().network, tiny_context(teacher())
    stages = objectives(original, context, task="text-classification", distil=True, features=features)
    assert [(stage.soft_weight, stage.hard_weight) for stage in stages][-1] == (0.5, 0.5)
    assert [stage.answers for stage in stages] == ([False, True] if features == "two_stage" else [True])
    matched = [match.student[0] for stage in stages for match in stage.matching.matches]
    inner = ["hidden.0", "hidden.1", "hidden.2", "scores.0", "scores.1"]
    assert matched == {"none": [], "last_hidden": ["hidden.2"], "two_stage": inner}[features]
    assert [match.student for stage in stages for match in stage.matching.matches] == [
        match.teacher for stage in stages for match in stage.matching.matches
    ]


def test_what_is_learnt_from_inner_states_is_zero_at_the_original_and_not_after_rounding() -> None:
    context, original = tiny_context(teacher()), teacher().network
    first = objectives(original, context, task="text-classification", distil=True, features="two_stage")[0]
    rounded, batch = deepcopy(original), next(context.training_batches())
    for module in linear_maps(rounded).values():
        module.weight.data = Grid("ternary", 2).round(module.weight.data)
    assert float(first(original, batch).detach()) == 0
    terms = [float(first(rounded, batch).detach()), *first.report().values()]
    assert all(term > 0 for term in terms)
    assert set(first.report()) == {"hidden", "attention_scores"}


def test_the_last_hidden_states_count_beside_labels_and_logits() -> None:
    context, original = tiny_context(teacher()), teacher().network
    batch, rounded = next(context.training_batches()), deepcopy(original)
    for module in linear_maps(rounded).values():
        module.weight.data = Grid("block", 2, 32).round(module.weight.data)
    losses = {}
    for features in ("none", "last_hidden"):
        (stage,) = objectives(original, context, task="text-classification", distil=True, features=features)
        losses[features] = float(stage(rounded, batch).detach())
    plain = float(soft_target_loss(context, "text-classification")(rounded, batch).detach())
    with torch.no_grad():
        ours, theirs = (read_features(network, batch, ["hidden.2"])["hidden.2"] for network in (rounded, original))
    distance = float(hidden_mse(ours, theirs, batch["attention_mask"]))
    assert losses["none"] == pytest.approx(plain, rel=1e-5)
    assert losses["last_hidden"] == pytest.approx(plain + distance, rel=1e-5)


def test_two_stages_share_the_budget_and_inner_states_come_first() -> None:
    candidate, fits = teacher(), []

    class Watching(TinyContext):
        def fit(self, network: torch.nn.Module, **options: Any) -> None:  # type: ignore[override]
            fits.append((options["share"], options["scored"]))
            super().fit(network, **options)

    METHOD.apply(candidate, trained("ternary", qat_features="two_stage"), Watching(candidate, Path(), steps=6))
    assert fits == [(0.5, False), (0.5, True)]


def test_layers_without_heads_have_no_scores_to_learn() -> None:
    candidate = distinct(layers=2)
    prune_heads(candidate.network, {0: []})
    assert [match.student[0] for match in inner_matches(candidate.network)] == [
        *("hidden.0", "hidden.1", "hidden.2"),
        "scores.1",
    ]
    candidate = candidate.replace(subject=subject_of(candidate.network, "text-classification"))
    context = tiny_context(candidate, steps=2)
    result = METHOD.apply(candidate, trained("binary", qat_features="two_stage"), context)
    assert context.fits == [1, 1]
    assert np.isfinite(reference(result, feed_of(candidate))).all()


@pytest.mark.parametrize("features", ["last_hidden", "two_stage"])
def test_a_student_narrower_than_the_studys_teacher_learns_from_its_own_states(features: str) -> None:
    student = tiny_candidate(layers=1, hidden=16, intermediate=32)
    context = tiny_context(teacher(), steps=4)
    result = METHOD.apply(student, trained("weight_only 4", qat_features=features), context)
    assert sum(context.fits) == 4
    assert not torch.equal(parts(layers(result.network)[0]).up.weight, parts(layers(student.network)[0]).up.weight)


def test_activations_are_rounded_while_integer_kernels_will_round_them() -> None:
    candidate = distinct(layers=1)
    seen: list[bool] = []

    class Watching(TinyContext):
        def fit(self, network: torch.nn.Module, **options: Any) -> None:  # type: ignore[override]
            seen.append(bool(parts(layers(network)[0]).up._forward_pre_hooks))

    for name in ("dynamic_int8", "weight_only 4"):
        result = METHOD.apply(candidate, trained(name), Watching(candidate, Path()))
        assert not parts(layers(result.network)[0]).up._forward_pre_hooks
    assert seen == [True, False]


def test_rounded_inputs_have_256_values_and_a_gradient() -> None:
    linear, x = torch.nn.Linear(400, 1), torch.linspace(0, 1, 400, requires_grad=True)
    read: list[torch.Tensor] = []
    linear.register_forward_hook(lambda module, arguments, output: read.append(arguments[0]))
    with rounded_inputs([linear]):
        linear(x).sum().backward()
    assert len(read[0].unique()) == 256
    assert x.grad is not None
    torch.testing.assert_close(x.grad, linear.weight[0].detach())


def test_nothing_but_the_named_maps_is_rounded() -> None:
    candidate = distinct(layers=1)
    network, path = deepcopy(candidate.network), "bert.pooler.dense"
    before = deepcopy(network.state_dict())
    context = tiny_context(candidate, dry=True)
    stages = objectives(candidate.network, context, task="text-classification", distil=True, features="none")
    train_rounded(network, {path: Grid("binary", 1)}, None, stages, learning_rate=1e-3, activation_bits=None)
    changed = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"{path}.weight"}


# --- mixed precision -------------------------------------------------------------------------------------------


def test_the_layers_that_lose_most_are_kept() -> None:
    candidate = teacher().copy()
    grids = {path: Grid("block", 2, 32) for path in linear_maps(candidate.network)}
    context = tiny_context(candidate)
    batches = list(context.calibration(64))

    def loss(network: torch.nn.Module) -> float:
        with torch.no_grad():
            return sum(float(context.task_loss(network, batch)) for batch in batches)

    losses = {}
    for path, grid in grids.items():
        network = deepcopy(candidate.network)
        module = network.get_submodule(path)
        module.weight.data = grid.round(module.weight.data)
        losses[path] = loss(network)
    before = deepcopy(candidate.network.state_dict())
    found = most_sensitive(candidate.network, grids, 3, batches, context)
    assert found == sorted(losses, key=lambda path: -losses[path])[:3]
    assert all(torch.equal(value, before[name]) for name, value in candidate.network.state_dict().items())
    dry = most_sensitive(candidate.network, grids, 2, [], tiny_context(candidate, dry=True))
    sizes = {path: candidate.network.get_submodule(path).weight.numel() for path in grids}
    assert sorted(sizes[path] for path in dry) == sorted(sizes.values())[:2], "what these exceed, all others do"


@pytest.mark.parametrize("name", ["dynamic_int8", "static_int8", "weight_only 4", "ternary"])
def test_kept_layers_have_a_higher_precision_in_the_file(name: str, tmp_path: Path) -> None:
    candidate = distinct(layers=2)
    plain, mixed = (params(name, high_precision_layers=k, calibration_examples=32) for k in (0, 3))
    model = model_of(quantize(candidate, mixed, tmp_path / "artifact"))
    found, total = operators(model), 6 * 2 + 2
    eight_bits = [a.i for n in model.graph.node for a in n.attribute if a.name == "bits" and a.i == 8]
    if name == "dynamic_int8":
        assert (found["MatMulInteger"], found["MatMul"]) == (total - 3, 4 + 3)
    elif name == "static_int8":
        rounded = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
        assert sum(n.op_type == "MatMul" and n.input[1] in rounded for n in model.graph.node) == total - 3
    else:
        assert len(eight_bits) == 3
        assert found["MatMulNBits"] == (total if name == "weight_only 4" else 3)
    assert METHOD.after(candidate.subject, mixed).bits > METHOD.after(candidate.subject, plain).bits


def test_keeping_the_worst_layers_helps(tmp_path: Path) -> None:
    feed = feed_of(teacher(), size=64)

    def error(number: int) -> float:
        chosen = params("weight_only 2", high_precision_layers=number, calibration_examples=64, embedding_bits=32)
        answers = load_runner(quantize(teacher(), chosen, tmp_path / "artifact"), 1)(feed)
        return float(np.abs(answers - reference(teacher(), feed)).mean())

    assert error(8) < error(0)

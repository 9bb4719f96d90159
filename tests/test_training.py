import math

import numpy as np
import pytest
import torch
from torch import nn

from compress_search import training
from compress_search.data import read, tokenize, training_batches
from compress_search.encoders.features import recording
from compress_search.errors import NotFinite, TrialError
from compress_search.study import load_study
from compress_search.tasks import Task
from compress_search.training import evaluate, fit, forward, planned_steps, schedule, task_loss
from tests import tiny

SETTINGS = {"learning_rate": 1e-3, "warmup": 0.1, "weight_decay": 0.01, "device": "cpu", "seed": 0}


def weights_of(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def toy(tiny_study, tmp_path):
    """``toy(kind)``: an untrained network, its splits and its task."""

    def materials(kind="text-classification"):
        study = load_study(tiny_study(kind))
        raw, task = read(study)
        splits = tokenize(raw, tiny.tiny_tokenizer(), study, task, tmp_path / "cache")
        return tiny.tiny_network(kind), splits, task

    return materials


def line():
    """Batches of a regression y = 2x for networks that are a single linear map."""
    generator = torch.Generator().manual_seed(0)
    while True:
        x = torch.randn(8, 4, generator=generator)
        yield {"input_ids": x, "labels": 2 * x.sum(1)}


def squared_error(network, batch):
    return ((network(batch["input_ids"]).squeeze(-1) - batch["labels"]) ** 2).mean()


class TestFit:
    @pytest.mark.parametrize(
        ("kind", "metric", "least"),
        [
            ("text-classification", "accuracy", 0.9),
            ("pairs", "accuracy", 0.9),
            ("text-regression", "pearson", 0.8),
            ("token-classification", "f1", 0.9),
            ("pos", "accuracy", 0.9),
        ],
    )
    def test_it_learns_every_task(self, toy, kind, metric, least):
        network, splits, task = toy(kind)
        before = task.score(*evaluate(network, splits["validation"], task))[metric]
        batches = training_batches(splits["train"], 16, 0)
        fit(network, batches, 150, task_loss(task), **{**SETTINGS, "learning_rate": 3e-3})
        assert before < least <= task.score(*evaluate(network, splits["validation"], task))[metric]

    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    def test_only_forward_passes_are_in_less_than_32_bits(self, toy, precision):
        network, splits, task = toy()
        inner, seen = [], []
        linear = next(module for module in network.modules() if isinstance(module, nn.Linear))
        linear.register_forward_hook(lambda module, args, output: inner.append(output.dtype))

        def loss(network, batch):
            with recording(network, ["hidden.1", "scores.0", "pooled"]) as features:
                logits = forward(network, batch)
            seen.extend(value.dtype for value in (*features.values(), logits))
            return task.loss(logits, batch["labels"])

        fit(network, training_batches(splits["train"], 16, 0), 2, loss, **SETTINGS, precision=precision)
        assert set(inner) == {torch.float32 if precision == "fp32" else torch.bfloat16}
        assert set(seen) == {torch.float32}
        assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
        evaluate(network, splits["validation"], task)
        assert inner[-1] == torch.float32, "scores are computed in full"

    def test_16_bits_learn_as_much(self, toy):
        network, splits, task = toy()
        settings = {**SETTINGS, "learning_rate": 3e-3, "precision": "bf16"}
        fit(network, training_batches(splits["train"], 16, 0), 150, task_loss(task), **settings)
        assert task.score(*evaluate(network, splits["validation"], task))["accuracy"] >= 0.9

    def test_a_pass_that_raises_leaves_no_precision_behind(self):
        def broken(network, batch):
            network(batch["input_ids"])

        with pytest.raises(RuntimeError):
            fit(nn.Linear(5, 1), line(), 1, broken, **SETTINGS, precision="bf16")
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32

    def test_the_same_seed_gives_the_same_weights(self, toy):
        _, splits, task = toy()

        def trained(seed):
            network = tiny.tiny_network()
            fit(network, training_batches(splits["train"], 16, 0), 4, task_loss(task), **{**SETTINGS, "seed": seed})
            return weights_of(network)

        torch.manual_seed(5)
        first = trained(1)
        torch.manual_seed(6)
        assert same(first, trained(1))
        # dropout is all that the seed decides here, so this also says that it is on
        assert not same(first, trained(2))

    def test_the_callers_random_state_stays(self, toy):
        network, splits, task = toy()
        torch.manual_seed(3)
        expected = torch.rand(3)
        torch.manual_seed(3)
        fit(network, training_batches(splits["train"], 16, 0), 2, task_loss(task), **SETTINGS)
        assert torch.equal(torch.rand(3), expected)

    def test_no_steps_leave_every_weight(self, toy):
        network, splits, task = toy()
        before = weights_of(network)
        network.train()
        fit(network, training_batches(splits["train"], 16, 0), 0, task_loss(task), **SETTINGS)
        assert same(before, weights_of(network))
        assert not network.training

    def test_it_trains_with_dropout_and_ends_without(self):
        network, modes = nn.Sequential(nn.Linear(4, 1), nn.Dropout(0.1)), []

        def loss(network, batch):
            modes.append(network[1].training)
            return squared_error(network, batch)

        fit(network, line(), 3, loss, **SETTINGS)
        assert modes == [True] * 3
        assert not network[1].training

    def test_hooks_are_called_around_every_step(self):
        calls = []
        fit(
            nn.Linear(4, 1),
            line(),
            3,
            squared_error,
            **SETTINGS,
            on_step=lambda step, steps: calls.append((step, steps)),
            on_progress=calls.append,
        )
        assert calls == [(0, 3), 1, (1, 3), 2, (2, 3), 3]

    def test_what_a_hook_raises_ends_the_training_in_order(self):
        network = nn.Linear(4, 1)

        def stop(done):
            if done == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fit(network, line(), 10, squared_error, **SETTINGS, on_progress=stop)
        assert not network.training
        assert network.weight.grad is None

    def test_only_the_named_parameters_are_trained(self):
        network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
        outside = nn.Linear(1, 1)
        before, outside_before = weights_of(network), weights_of(outside)

        def loss(network, batch):
            return ((outside(network(batch["input_ids"])).squeeze(-1) - batch["labels"]) ** 2).mean()

        fit(network, line(), 3, loss, **SETTINGS, parameters=[*network[1].parameters(), *outside.parameters()])
        after = weights_of(network)
        assert torch.equal(before["0.weight"], after["0.weight"])
        assert not torch.equal(before["1.weight"], after["1.weight"])
        assert not same(outside_before, weights_of(outside))

    def test_frozen_and_unused_parameters_are_no_obstacle(self):
        network = nn.ModuleDict({"used": nn.Linear(4, 1), "unused": nn.Linear(4, 1), "frozen": nn.Linear(1, 1)})
        network["frozen"].requires_grad_(False)
        before = weights_of(network)

        def loss(network, batch):
            return ((network["frozen"](network["used"](batch["input_ids"])).squeeze(-1)) ** 2).mean()

        fit(network, line(), 3, loss, **SETTINGS)
        after = weights_of(network)
        changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
        assert changed == {"used"}

    def test_nothing_to_train_is_an_error(self):
        with pytest.raises(TrialError, match="nothing to train"):
            fit(nn.Linear(4, 1).requires_grad_(False), line(), 1, squared_error, **SETTINGS)

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_a_loss_that_is_not_finite_names_the_step(self, bad):
        network, seen = nn.Linear(4, 1), []

        def loss(network, batch):
            seen.append(1)
            return squared_error(network, batch) * (bad if len(seen) == 3 else 1)

        with pytest.raises(NotFinite, match=f"loss is {bad} at step 2"):
            fit(network, line(), 5, loss, **SETTINGS)
        assert torch.isfinite(network.weight).all()


class TestOptimizer:
    def test_the_learning_rate_is_the_one_given(self):
        """Adam's first step moves every weight by the learning rate itself."""
        network = nn.Linear(4, 1)
        before = network.weight.detach().clone()
        fit(
            network, line(), 1, squared_error, **{**SETTINGS, "learning_rate": 0.01, "warmup": 0, "weight_decay": 0}
        )
        torch.testing.assert_close((network.weight - before).abs(), torch.full((1, 4), 0.01), rtol=1e-4, atol=1e-7)

    def test_matrices_decay_and_vectors_do_not(self):
        network = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        before = weights_of(network)
        fit(
            network,
            line(),
            1,
            lambda network, batch: sum(p.sum() * 0 for p in network.parameters()),
            **{**SETTINGS, "learning_rate": 0.1, "warmup": 0, "weight_decay": 0.5},
        )
        after = weights_of(network)
        torch.testing.assert_close(after["0.weight"], before["0.weight"] * (1 - 0.1 * 0.5))
        for name in ("0.bias", "1.weight", "1.bias"):
            assert torch.equal(after[name], before[name]), name

    def test_gradients_are_clipped(self, monkeypatch):
        norms = []

        class Recording(training.AdamW):
            def step(self, *args):
                gradients = [p.grad for group in self.param_groups for p in group["params"]]
                norms.append(torch.cat([g.flatten() for g in gradients]).norm().item())
                return super().step(*args)

        monkeypatch.setattr(training, "AdamW", Recording)
        fit(nn.Linear(4, 1), line(), 2, lambda *a: 1e3 * squared_error(*a), **SETTINGS)
        assert norms == pytest.approx([1, 1], rel=1e-4)


class TestSchedule:
    def test_up_then_down_to_zero(self):
        factors = [schedule(step, 100, 0.1) for step in range(101)]
        assert factors[10] == max(factors) == 1
        assert np.diff(factors[:11]) == pytest.approx(1 / 11)
        assert np.diff(factors[10:]) == pytest.approx(-1 / 90)
        assert factors[100] == 0

    @pytest.mark.parametrize(("steps", "warmup"), [(1, 0.0), (1, 0.9), (2, 0.5), (7, 0.99), (1000, 0.06)])
    def test_every_step_learns(self, steps, warmup):
        factors = [schedule(step, steps, warmup) for step in range(steps)]
        assert min(factors) > 0
        assert max(factors) <= 1

    def test_without_warmup_it_starts_at_the_peak(self):
        assert [schedule(step, 4, 0) for step in range(5)] == [1, 0.75, 0.5, 0.25, 0]

    def test_the_loop_follows_it(self):
        seen, network = [], nn.Linear(4, 1)
        before = network.weight.detach().clone()

        def record(_):
            nonlocal before
            seen.append((network.weight - before).abs().max().item())
            before = network.weight.detach().clone()

        def constant_gradient(network, batch):
            return network.weight.sum() + network.bias.sum()

        options = {**SETTINGS, "learning_rate": 0.01, "warmup": 0.5, "weight_decay": 0}
        fit(network, line(), 4, constant_gradient, **options, on_progress=record)
        # Adam's steps under a constant gradient are the learning rate itself
        assert seen == pytest.approx([0.01 * schedule(step, 4, 0.5) for step in range(4)], rel=1e-3)

    @pytest.mark.parametrize(
        ("examples", "batch_size", "epochs", "steps"),
        [(96, 16, 3, 18), (97, 16, 1, 7), (96, 16, 0.5, 3), (5, 32, 0.1, 1)],
    )
    def test_steps_of_a_budget(self, examples, batch_size, epochs, steps):
        assert planned_steps(examples, batch_size, epochs) == steps


class TestEvaluate:
    @pytest.mark.parametrize("kind", list(tiny.ROWS))
    def test_it_is_a_forward_of_each_row_in_order(self, toy, kind):
        network, splits, task = toy(kind)
        split = splits["validation"]
        logits, labels = evaluate(network, split, task, batch_size=7)
        for row in (0, 13, 31):
            batch = split.batch([row])
            with torch.no_grad():
                expected, truth = task.unpad(forward(network, batch).numpy(), batch["labels"].numpy())
            np.testing.assert_allclose(logits[row], expected[0], atol=1e-5)
            np.testing.assert_array_equal(labels[row], truth[0])

    def test_labels_are_the_splits_own(self, toy):
        network, splits, task = toy("token-classification")
        _, labels = evaluate(network, splits["validation"], task)
        assert [row.tolist() for row in labels] == [row.tolist() for row in splits["validation"].labels]

    def test_it_leaves_every_modules_mode(self, toy):
        network, splits, task = toy()
        network.train()
        network.classifier.eval()
        evaluate(network, splits["validation"], task)
        assert network.training
        assert network.bert.training
        assert not network.classifier.training

    def test_dropout_is_off(self, toy):
        network, splits, task = toy()
        network.train()
        first, again = (evaluate(network, splits["validation"], task)[0] for _ in range(2))
        np.testing.assert_array_equal(first, again)

    def test_nothing_that_is_no_number_is_scored(self, toy):
        network, splits, task = toy()
        with torch.no_grad():
            network.classifier.bias.fill_(math.nan)
        with pytest.raises(NotFinite, match="32 of 32"):
            task.score(*evaluate(network, splits["validation"], task))


def test_the_task_loss_is_the_tasks_own(toy):
    network, splits, task = toy()
    batch = splits["train"].batch([0, 1, 2])
    expected = Task.loss(task, forward(network, batch), batch["labels"])
    assert torch.equal(task_loss(task)(network, batch), expected)

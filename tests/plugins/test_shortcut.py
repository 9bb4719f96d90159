"""Shortcuts: the map that stands for layers, the head that takes it in, and which layers stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from compress_search_plugins.distillation.shortcuts import (
    DAMPING,
    LinearMap,
    Moments,
    best_cut,
    blocks_out,
    take_in,
)
from compress_search_plugins.distillation.students import cut_student
from compress_search_plugins.shortcut import Shortcut
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from compress_search import Batch, Candidate
from compress_search.encoders import FAMILIES, layers, parts, read_features
from compress_search.losses import IGNORED
from compress_search.space import active, defaults
from compress_search.testing import tiny_batches, tiny_candidate, tiny_context
from compress_search.training import forward

TASKS = ("text-classification", "text-regression", "token-classification")


def parameters(candidate: Candidate, **changes: Any) -> dict[str, Any]:
    space = Shortcut().search_space(candidate.subject)
    params = defaults(space) | changes
    return {name: value for name, value in params.items() if active(space[name], params)}


def solved(inputs: torch.Tensor, targets: torch.Tensor, pieces: int = 3) -> LinearMap:
    moments = Moments()
    for x, y in zip(inputs.chunk(pieces), targets.chunk(pieces), strict=True):
        moments.add(x, y)
    return moments.solve()


def silenced(candidate: Candidate, *which: int) -> Candidate:
    """A copy in which these layers add nothing to what passes, so that only their norms are left of them."""
    copied = candidate.copy()
    for index in which:
        view = parts(layers(copied.network)[index])
        for linear in (view.attention_output, view.down):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
    return copied


def batches(candidate: Candidate, count: int = 6, seed: int = 99) -> list[Batch]:
    """Others than those that a context calibrates on."""
    stream = tiny_batches(candidate, seed=seed)
    return [next(stream) for _ in range(count)]


class TestMap:
    def test_it_is_ridge_regression(self) -> None:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(90, 5, generator=generator) @ torch.randn(5, 5, generator=generator) + 3
        y = x @ torch.randn(5, 5, generator=generator) + torch.randn(90, 5, generator=generator) - 1
        found = solved(x, y)
        design, wanted = (np.asarray(z.double() - z.double().mean(0)) for z in (x, y))
        strength = DAMPING * np.mean(np.sum(wanted**2, axis=0))
        # ridge is least squares with rows that hold every coefficient at 0
        rows = np.vstack([design, np.sqrt(strength) * np.eye(5)])
        expected = np.linalg.lstsq(rows, np.vstack([wanted, np.zeros((5, 5))]), rcond=None)[0]
        np.testing.assert_allclose(found.weight.T, expected, rtol=1e-7)
        said = np.asarray(x.double() @ found.weight.T + found.bias)
        np.testing.assert_allclose(said.mean(0), np.asarray(y.double().mean(0)), rtol=1e-8)
        left = ((said - np.asarray(y.double())) ** 2).sum() / (wanted**2).sum()
        smoother = design @ np.linalg.solve(design.T @ design + strength * np.eye(5), design.T)
        free = 1 - (1 + np.trace(smoother)) / 90
        assert found.unexplained == pytest.approx(left / free**2, rel=1e-7)

    def test_what_it_leaves_is_what_it_leaves_of_other_examples(self) -> None:
        generator = torch.Generator().manual_seed(0)
        width, ratios, naive = 40, [], []
        truth = torch.randn(width, width, generator=generator) / width**0.5
        for _ in range(10):
            (x, y), (others, wanted) = (
                (z, z @ truth + torch.randn(len(z), width, generator=generator))
                for z in (torch.randn(count, width, generator=generator) for count in (100, 4000))
            )
            found = solved(x, y)
            weight, bias = found.weight.float(), found.bias.float()
            variance = wanted.var(0).sum()
            left = ((others @ weight.T + bias - wanted) ** 2).sum(1).mean() / variance
            ratios.append(float(found.unexplained / left))
            naive.append(float(((x @ weight.T + bias - y) ** 2).sum(1).mean() / y.var(0).sum() / left))
        assert 0.9 < np.mean(ratios) < 1.1
        assert np.mean(naive) < 0.5  # of the examples it was fitted on it leaves far less

    @given(st.integers(1, 6), st.integers(1, 60), st.integers(0, 2**16), st.sampled_from([0.0, 1e-7, 1.0]))
    def test_it_is_finite_whatever_it_is_fitted_on(self, width: int, count: int, seed: int, spread: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        x, y = (0.1 + spread * torch.randn(count, width, generator=generator) for _ in range(2))
        found = solved(x, y, pieces=1)
        assert found.weight.isfinite().all()
        assert found.bias.isfinite().all()
        assert found.unexplained > -1e-9
        assert found.unexplained < 1e12 or found.unexplained == float("inf")

    def test_states_that_never_change_tell_the_mean_alone(self) -> None:
        found = solved(torch.full((21, 3), 0.1), torch.arange(21.0)[:, None].expand(21, 3))
        torch.testing.assert_close(
            found.bias + found.weight @ torch.full((3,), 0.1).double(), torch.full((3,), 10.0).double()
        )
        assert found.unexplained == pytest.approx((21 / 20) ** 2, rel=1e-3)

    def test_states_that_hardly_change_are_not_amplified(self) -> None:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(500, 4, generator=generator)
        found = solved(1e-3 * x, x)
        assert found.weight.norm() < 1
        assert found.unexplained > 0.9
        assert solved(x, x).unexplained < 1e-3


class TestHead:
    @pytest.mark.parametrize("task", TASKS)
    @pytest.mark.parametrize("family", FAMILIES)
    def test_it_answers_as_if_it_read_the_maps_states(self, family: str, task: str) -> None:
        candidate = tiny_candidate(family, task)
        batch, width = batches(candidate, 1)[0], candidate.subject.hidden
        generator = torch.Generator().manual_seed(1)
        weight = torch.randn(width, width, generator=generator, dtype=torch.float64)
        found = LinearMap(weight, torch.randn(width, generator=generator, dtype=torch.float64), 0.0)
        mapped, taken = candidate.copy().network.eval(), candidate.copy().network.eval()

        def through(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
            return (output.double() @ weight.T + found.bias).float()

        layers(mapped)[-1].register_forward_hook(through)
        take_in(taken, found)
        with torch.no_grad():
            torch.testing.assert_close(forward(taken, batch), forward(mapped, batch), rtol=1e-4, atol=1e-4)
            assert not torch.allclose(forward(taken, batch), forward(candidate.network.eval(), batch), atol=1e-3)


class TestLayers:
    @given(st.integers(1, 12).flatmap(lambda depth: st.tuples(st.just(depth), st.integers(1, depth))))
    def test_one_block_goes(self, sizes: tuple[int, int]) -> None:
        depth, count = sizes
        ways = blocks_out(depth, count)
        assert ways[0] == list(range(count))
        assert ways[-1] == list(range(depth - count, depth))
        assert len(ways) == count + 1
        for way in ways:
            gone = sorted(set(range(depth)) - set(way))
            assert (len(way), way) == (count, sorted(set(way)))
            assert gone == list(range(gone[0], gone[0] + depth - count)) if gone else way == list(range(depth))

    @pytest.mark.parametrize("silent", [(0, 1), (1, 2), (2, 3)])
    @pytest.mark.parametrize("task", TASKS)
    def test_layers_that_say_nothing_go_and_nothing_is_lost(self, task: str, silent: tuple[int, ...]) -> None:
        candidate = silenced(tiny_candidate("bert", task, layers=4), *silent)
        context = tiny_context(candidate)
        params = parameters(candidate, layers=2, trained=False)
        student = Shortcut().apply(candidate, params, context)
        assert context.fits == []
        assert Shortcut().evaluate(student, context)["unexplained"] < 1e-2
        batch, stays = batches(candidate, 1)[0], [layer for layer in range(4) if layer not in silent]
        with torch.no_grad():
            said, expected = forward(student.network, batch), forward(candidate.network, batch)
        real = batch["labels"] != IGNORED if task == "token-classification" else ...
        assert F.mse_loss(said[real], expected[real]) < 1e-2 * expected[real].var()
        found, kept = (
            [parts(layer).query.weight for layer in layers(network)]
            for network in (student.network, cut_student(candidate, stays, 1.0).network)
        )
        assert all(map(torch.equal, found, kept))

    @pytest.mark.parametrize("task", TASKS)
    def test_that_way_is_taken_which_alone_leaves_least_unexplained(self, task: str) -> None:
        candidate = tiny_candidate("bert", task, layers=4)
        examples, pooled = batches(candidate), task != "token-classification"
        network = candidate.network.eval()
        ways = blocks_out(4, 2)
        alone = [best_cut(network, [way], examples, pooled=pooled)[1].unexplained for way in ways]
        assert len(set(alone)) == len(ways)
        kept, found = best_cut(network, ways, examples, pooled=pooled)
        assert kept == ways[alone.index(min(alone))]
        assert found.unexplained == pytest.approx(min(alone))
        for init, way in (("first", ways[0]), ("last", ways[-1]), ("spread", [0, 3])):
            params = parameters(candidate, layers=2, init=init, trained=False)
            student = Shortcut().apply(candidate, params, tiny_context(candidate))
            wanted = [parts(layers(candidate.network)[index]).up.weight for index in way]
            assert all(map(torch.equal, [parts(layer).up.weight for layer in layers(student.network)], wanted))

    @pytest.mark.parametrize("family", FAMILIES)
    def test_layers_that_ways_share_are_run_once(self, family: str) -> None:
        candidate = tiny_candidate(family, "token-classification", layers=4)
        examples, network = batches(candidate, 2), candidate.network.eval()
        stack, runs = list(layers(network)), [0] * 4
        for place, layer in enumerate(stack):
            layer.register_forward_hook(lambda *_, place=place: runs.__setitem__(place, runs[place] + 1))
        taken, found = best_cut(network, blocks_out(4, 2), examples, pooled=False)
        # 0 1, 0 3 and 2 3 are the ways; whole, then what stands above the lowest layers that stay
        assert runs == [2 * (1 + 0), 2 * (1 + 0), 2 * (1 + 1), 2 * (1 + 2)]
        moments, student = Moments(), cut_student(candidate, taken, 1.0).network.eval()
        with torch.no_grad():
            for batch in examples:
                real = batch["labels"] != IGNORED
                ours = read_features(student, batch, ["hidden.2"])["hidden.2"][real]
                moments.add(ours, read_features(network, batch, ["hidden.4"])["hidden.4"][real])
        torch.testing.assert_close(found.weight, moments.solve().weight)

    def test_of_whole_texts_only_the_first_tokens_state_counts(self) -> None:
        candidate = tiny_candidate(layers=3)
        examples = batches(candidate)
        network, stack = candidate.network.eval(), list(layers(candidate.network))
        _, found = best_cut(network, [[0]], examples, pooled=True)
        moments = Moments()
        student = cut_student(candidate, [0], 1.0).network.eval()
        assert list(layers(network)) == stack
        with torch.no_grad():
            for batch in examples:
                ours = read_features(student, batch, ["hidden.1"])["hidden.1"][:, 0]
                moments.add(ours, read_features(network, batch, ["hidden.3"])["hidden.3"][:, 0])
        torch.testing.assert_close(found.weight, moments.solve().weight)

    def test_of_tags_only_states_with_a_label_count(self) -> None:
        candidate = tiny_candidate("bert", "token-classification", layers=3)
        examples, network = batches(candidate), candidate.network.eval()
        _, found = best_cut(network, [[0, 1]], examples, pooled=False)
        fewer = [
            {**batch, "labels": batch["labels"].masked_fill(batch["labels"] == 1, IGNORED)} for batch in examples
        ]
        _, other = best_cut(network, [[0, 1]], fewer, pooled=False)
        assert not torch.allclose(found.weight, other.weight)
        assert any(
            bool(((batch["labels"] == IGNORED) & batch["attention_mask"].bool()).any()) for batch in examples
        )
        moments, student = Moments(), cut_student(candidate, [0, 1], 1.0).network.eval()
        with torch.no_grad():
            for batch in examples:
                pair = read_features(student, batch, ["hidden.2"]), read_features(network, batch, ["hidden.3"])
                moments.add(*(next(iter(each.values()))[batch["labels"] != IGNORED] for each in pair))
        torch.testing.assert_close(found.weight, moments.solve().weight)


class TestStudent:
    @pytest.mark.parametrize("task", TASKS)
    def test_untrained_it_is_nearer_to_its_teacher_than_the_same_layers_alone(self, task: str) -> None:
        candidate = tiny_candidate("bert", task, layers=4)
        context = tiny_context(candidate)
        student = Shortcut().apply(candidate, parameters(candidate, layers=2, init="first", trained=False), context)
        bare = cut_student(candidate, [0, 1], 1.0)
        far = {"student": 0.0, "bare": 0.0}
        with torch.no_grad():
            for batch in batches(candidate):
                real = batch["labels"] != IGNORED if task == "token-classification" else ...
                wanted = forward(candidate.network.eval(), batch)[real]
                for name, model in (("student", student), ("bare", bare)):
                    far[name] += float(F.mse_loss(forward(model.network.eval(), batch)[real], wanted))
        assert far["student"] < 0.7 * far["bare"]
        assert student.subject == Shortcut().after(candidate.subject, parameters(candidate, layers=2))

    def test_it_is_trained_by_answers_and_labels_on_all_of_its_share(self) -> None:
        candidate = tiny_candidate(layers=3)
        context = tiny_context(candidate)
        asked: list[dict[str, Any]] = []
        context.fit = lambda network, **options: asked.append(options | {"network": network})  # type: ignore[method-assign]
        for alpha in (0.0, 1.0):
            Shortcut().apply(candidate, parameters(candidate, alpha=alpha, learning_rate=2e-4), context)
        hard, soft = asked
        batch = batches(candidate, 1)[0]
        assert hard["loss"](hard["network"], batch) == context.task_loss(hard["network"], batch)
        said = forward(soft["network"], batch) / 2
        wanted = (context.teacher_logits(batch) / 2).softmax(-1)
        expected = 4 * F.kl_div(said.log_softmax(-1), wanted, reduction="batchmean")
        torch.testing.assert_close(soft["loss"](soft["network"], batch), expected)
        assert (hard["learning_rate"], hard.get("share", 1.0)) == (2e-4, 1.0)

    def test_answers_without_weight_have_no_temperature_and_layers_one_name(self) -> None:
        subject = tiny_candidate("bert", "token-classification", layers=3).subject.having("crf")
        method, space = Shortcut(), Shortcut().search_space(subject)
        params = defaults(space) | {"alpha": 0.0}
        assert {"temperature", "crf_target"} <= params.keys()
        assert not {"temperature", "crf_target"} & method.effective(subject, params).keys()
        told = [
            method.effective(subject, params | {"layers": 1, "init": init})["init"]
            for init in ("fitted", "spread", "first", "last")
        ]
        assert told == ["fitted", "spread", "spread", "last"]
        assert not method.trains({**params, "trained": False})

    def test_a_dry_run_reads_nothing(self) -> None:
        candidate = tiny_candidate(layers=3)
        context = tiny_context(candidate, dry=True)
        context.calibration = lambda *_, **__: pytest.fail("examples were read")  # type: ignore[method-assign]
        student = Shortcut().apply(candidate, parameters(candidate, layers=2), context)
        assert len(layers(student.network)) == 2

    def test_as_many_examples_are_read_as_it_is_told(self) -> None:
        candidate = tiny_candidate(layers=3)
        context, asked = tiny_context(candidate), []
        draw = context.calibration
        context.calibration = lambda count: (asked.append(count), draw(count))[1]  # type: ignore[method-assign]
        Shortcut().apply(candidate, parameters(candidate, calib_examples=512, trained=False), context)
        assert asked == [512]

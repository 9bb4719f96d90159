"""Every student layer learning from every teacher layer, by the plan that moves all knowledge at the least cost."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from compress_search_plugins.distillation.layer_maps import transport
from compress_search_plugins.distillation.matches import Match
from compress_search_plugins.distillation.matching import Matching
from compress_search_plugins.distillation.objective import Objective, transported
from compress_search_plugins.distillation.strategies import EARTH_MOVER, FEATURES, strategic
from compress_search_plugins.layer_match import LayerMatch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog

from compress_search import Subject
from compress_search.encoders import read_features
from compress_search.errors import NotFinite
from compress_search.space import defaults, fix_experts, narrow
from compress_search.testing import tiny_batches, tiny_candidate, tiny_context

METHOD = LayerMatch()
BERT = Subject("bert", "text-classification", 12, 12, 64, 768, 3072, 30522, 512, 2, 2)
DEPTHS = st.integers(1, 12)
SEEDS = st.integers(0, 10_000)
MASK = torch.ones(2, 3, dtype=torch.long)


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def params_for(subject: Subject, **changes):
    space = METHOD.search_space(subject)
    return METHOD.effective(subject, {**defaults(space), "strategy": EARTH_MOVER, **changes})


def applied(candidate, context, **changes):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return METHOD.apply(candidate, params_for(candidate.subject, **changes), context)


def all_pairs(student: int, teacher: int) -> Matching:
    """Matches of hidden states as the strategy writes them, outputs of layers only."""
    return Matching(strategic(params_for(BERT, features="hidden"), student, teacher))


def states(values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Hidden states (n, B, S, H) under the names of n layers."""
    return {f"hidden.{number}": value for number, value in enumerate(values, start=1)}


class TestPlan:
    @given(DEPTHS, DEPTHS, SEEDS)
    def test_moves_all_mass_of_every_layer(self, teacher, student, seed):
        plan = transport(random(seed, teacher, student))
        assert plan.min() >= 0
        torch.testing.assert_close(plan.sum(1), torch.full((teacher,), 1 / teacher, dtype=torch.float64))
        torch.testing.assert_close(plan.sum(0), torch.full((student,), 1 / student, dtype=torch.float64))

    @given(DEPTHS, DEPTHS, SEEDS)
    def test_costs_what_the_linear_programme_does(self, teacher, student, seed):
        costs = random(seed, teacher, student)
        rows = np.kron(np.eye(teacher), np.ones(student))
        columns = np.kron(np.ones(teacher), np.eye(student))
        masses = np.r_[np.full(teacher, 1 / teacher), np.full(student, 1 / student)]
        least = linprog(costs.flatten().numpy(), A_eq=np.vstack([rows, columns]), b_eq=masses)
        assert (transport(costs) * costs).sum().item() == pytest.approx(least.fun, abs=1e-9)

    @given(DEPTHS, DEPTHS, SEEDS)
    def test_costs_no_more_than_the_uniform_plan(self, teacher, student, seed):
        costs = random(seed, teacher, student)
        assert (transport(costs) * costs).sum() <= costs.mean() + 1e-12

    @given(st.integers(1, 4), st.integers(1, 4), SEEDS, st.randoms(use_true_random=False))
    def test_costs_no_more_than_any_fixed_map_of_the_same_masses(self, student, each, seed, shuffler):
        teacher = student * each
        costs = random(seed, teacher, student)
        # each student layer learns from as many of the teacher's, whichever these are
        learners = [layer % student for layer in range(teacher)]
        shuffler.shuffle(learners)
        fixed = costs[torch.arange(teacher), torch.tensor(learners)].mean()
        assert (transport(costs) * costs).sum() <= fixed + 1e-12

    @given(DEPTHS, SEEDS)
    def test_of_equal_depth_is_the_permutation(self, depth, seed):
        layers = random(seed, depth, 8)
        order = torch.randperm(depth, generator=torch.Generator().manual_seed(seed))
        plan = transport(torch.cdist(layers[order], layers))
        torch.testing.assert_close(plan, torch.eye(depth, dtype=torch.float64)[order] / depth)

    @given(DEPTHS, DEPTHS, SEEDS, st.sampled_from([1e-12, 1e-3, 1e6]))
    def test_is_the_same_for_costs_of_any_size(self, teacher, student, seed, factor):
        costs = random(seed, teacher, student)
        assert torch.equal(transport(costs * factor), transport(costs))

    def test_a_layer_is_split_where_depths_are_no_multiples(self):
        # thirds onto halves: the middle one goes to both
        costs = torch.tensor([[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]])
        expected = torch.tensor([[1 / 3, 0], [1 / 6, 1 / 6], [0, 1 / 3]], dtype=torch.float64)
        torch.testing.assert_close(transport(costs), expected)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_costs_that_are_no_numbers_make_a_plan_all_the_same(self, value):
        assert transport(torch.full((3, 2), value)).sum().item() == pytest.approx(1)


class TestMatches:
    def test_are_of_every_pair_of_layers(self):
        matches = strategic(params_for(BERT, features="embedding+hidden+attention"), 4, 12)
        found = [(m.feature, m.student_layer, m.teacher_layer) for m in matches]
        assert found == [
            ("embedding", 0, 0),
            *(("hidden", s, t) for s, t in product(range(1, 5), range(1, 13))),
            *(("attention_scores", s, t) for s, t in product(range(4), range(12))),
        ]

    def test_are_chosen_by_a_study_and_not_by_default(self):
        dim = METHOD.search_space(BERT)["strategy"]
        assert EARTH_MOVER not in fix_experts({"strategy": dim})["strategy"].distribution.choices
        assert narrow(dim, ["uniform", EARTH_MOVER]).distribution.choices == ("uniform", EARTH_MOVER)

    def test_none_is_left_out_by_chance(self):
        assert params_for(BERT, features="attention", layer_dropout=0.3)["layer_dropout"] == 0

    @pytest.mark.parametrize(
        ("shared", "names"), [(True, {"hidden"}), (False, {"hidden 0", "hidden 1", "hidden 2", "hidden 3"})]
    )
    def test_projections_are_one_for_all_or_one_for_each_student_layer(self, shared, names):
        params = params_for(BERT, width=0.5, features="embedding+hidden+attention", shared_projection=shared)
        assert {m.proj.shared for m in strategic(params, 3, 12) if m.proj} == names


class TestShares:
    def test_a_student_that_is_its_teacher_in_another_order_is_recognised_and_has_nothing_to_learn(self):
        theirs, order = random(0, 4, 2, 3, 8), [2, 0, 3, 1]
        matching, ours = all_pairs(4, 4), states(theirs[order])
        shares = transported(matching, ours, states(theirs), MASK)
        pairs = {(matching.matches[n].student_layer - 1, matching.matches[n].teacher_layer - 1) for n in shares}
        assert pairs == set(enumerate(order))
        assert set(shares.values()) == {0.25}
        assert all(matching.term(n, ours, states(theirs), MASK) == 0 for n in shares)

    def test_layers_of_a_teacher_that_repeat_the_students_cost_nothing_and_others_do(self):
        ours = random(0, 3, 2, 3, 8)
        matching, student = all_pairs(3, 6), states(ours)

        def cost(teacher):
            shares = transported(matching, student, teacher, MASK)
            return sum(share * matching.term(n, student, teacher, MASK) for n, share in shares.items())

        repeated = ours[[2, 0, 1, 1, 2, 0]]
        assert cost(states(repeated)) == 0
        # the student's layers are still among the teacher's, but the mass of the others is to be moved as well
        assert cost(states(torch.cat([ours, random(1, 3, 2, 3, 8)]))) > 0.01

    def test_are_made_anew_for_what_the_models_compute(self):
        theirs = random(0, 2, 2, 3, 8)
        matching = all_pairs(2, 2)
        straight, crossed = (
            transported(matching, states(theirs[o]), states(theirs), MASK) for o in ([0, 1], [1, 0])
        )
        assert (set(straight), set(crossed)) == ({0, 3}, {1, 2})

    def test_hidden_states_and_attention_have_plans_of_their_own(self):
        params = params_for(BERT, features="hidden+attention")
        matching = Matching(strategic(params, 2, 2))
        hidden, scores = random(0, 2, 2, 3, 8), random(1, 2, 2, 4, 3, 3)
        teacher = {**states(hidden), "scores.0": scores[0], "scores.1": scores[1]}
        student = {**states(hidden), "scores.0": scores[1], "scores.1": scores[0]}
        shares = transported(matching, student, teacher, MASK)
        found = {(m.feature, m.student_layer, m.teacher_layer) for m in map(matching.matches.__getitem__, shares)}
        straight = {("hidden", 1, 1), ("hidden", 2, 2)}
        assert found == straight | {("attention_scores", 0, 1), ("attention_scores", 1, 0)}
        assert set(shares.values()) == {0.5}


class TestObjective:
    def models(self):
        teacher, student = tiny_candidate(layers=3), tiny_candidate(layers=2, seed=5)
        params = params_for(teacher.subject, layers=2, features="hidden+attention", hidden_weight=2.0)
        matching = Matching.between(strategic(params, 2, 3), student.network, teacher.network, seed=0)
        objective = Objective(tiny_context(teacher), matching, choose=transported)
        return objective, student.network.eval(), teacher.network, next(tiny_batches(teacher))

    def planned(self, objective, student, teacher, batch):
        """The loss under the plans that this step makes, which are then plain numbers."""
        matching, mask = objective.matching, batch["attention_mask"]
        ours = read_features(student, batch, matching.student_features)
        with torch.no_grad():
            theirs = read_features(teacher, batch, matching.teacher_features)
        total = 0.0
        for feature in ("hidden", "attention_scores"):
            matches = [(n, m) for n, m in enumerate(matching.matches) if m.feature == feature]
            terms = [matching.term(n, ours, theirs, mask) for n, _ in matches]  # student layers × teacher layers
            costs = torch.stack(terms).view(2, 3).T
            total = total + matches[0][1].weight * (transport(costs).float() * costs).sum()
        return total

    def test_is_the_plan_times_the_losses_of_the_pairs(self):
        objective, student, teacher, batch = self.models()
        total = objective(student, batch)
        torch.testing.assert_close(total, self.planned(objective, student, teacher, batch))
        terms = objective.report()
        assert total.item() == pytest.approx(2 * terms["hidden"] + terms["attention_scores"], rel=1e-5)

    def test_gradients_flow_through_the_losses_and_not_through_the_plan(self):
        objective, student, teacher, batch = self.models()
        weights = [p for name, p in student.named_parameters() if "layer." in name]
        ours = torch.autograd.grad(objective(student, batch), weights, allow_unused=True)
        expected = torch.autograd.grad(self.planned(objective, student, teacher, batch), weights, allow_unused=True)
        assert any(gradient is not None and gradient.abs().max() > 0 for gradient in ours)
        torch.testing.assert_close(ours, expected)

    def test_every_student_layer_learns_from_some(self):
        objective, student, _, batch = self.models()
        objective.matching = Matching(
            tuple(m for m in objective.matching.matches if m.feature == "attention_scores")
        )
        objective(student, batch).backward()
        queries = [p for name, p in student.named_parameters() if name.endswith("query.weight")]
        assert [query.grad.abs().max().item() > 0 for query in queries] == [True, True]

    def test_a_loss_that_is_no_number_ends_training(self):
        teacher = tiny_candidate()
        student = tiny_candidate(layers=2, seed=5).network
        with torch.no_grad():
            next(student.parameters()).fill_(math.nan)
        matches = [Match(student_layer=s, teacher_layer=t) for s, t in product((1, 2), (1, 2, 3, 4))]
        matching = Matching.between(matches, student, teacher.network, seed=0)
        with pytest.raises(NotFinite):
            Objective(tiny_context(teacher), matching, choose=transported).fit(student, learning_rate=1e-3)


class TestTraining:
    @pytest.mark.parametrize("width", [1.0, 0.5])
    @pytest.mark.parametrize("features", FEATURES)
    def test_of_every_feature_at_every_width(self, width, features):
        candidate = tiny_candidate()
        context = tiny_context(candidate)
        found = METHOD.evaluate(applied(candidate, context, width=width, features=features, layers=3), context)
        kinds = {kind.replace("attention", "attention_scores") for kind in features.split("+")}
        assert set(found) == kinds | {"soft", "hard"}

    def test_brings_the_student_nearer_to_all_of_its_teachers_layers(self):
        candidate = tiny_candidate()
        batch = next(tiny_batches(candidate, batch_size=128, seed=999))
        changes = {"features": "hidden", "layers": 2, "hidden_weight": 10.0, "learning_rate": 3e-3}
        matching = all_pairs(2, 4)

        def cost(student):
            with torch.no_grad():
                ours = read_features(student.network, batch, matching.student_features)
                theirs = read_features(candidate.network, batch, matching.teacher_features)
                shares = transported(matching, ours, theirs, batch["attention_mask"])
                terms = {
                    n: share * matching.term(n, ours, theirs, batch["attention_mask"])
                    for n, share in shares.items()
                }
                return sum(terms.values()).item()

        start = applied(candidate, tiny_context(candidate, dry=True), **changes)
        trained = applied(candidate, tiny_context(candidate, steps=60, batch_size=16), **changes)
        assert cost(trained) < 0.8 * cost(start)

"""TinyBERT against its paper's equations, written out here a second time and plainly."""

from __future__ import annotations

import json
import math

import pytest
import torch
from compress_search_plugins.distillation.matches import parse_matches
from compress_search_plugins.distillation.matching import Matching
from compress_search_plugins.distillation.soft_targets import SoftTerm, soft_target_loss
from compress_search_plugins.distillation.strategies import strategic
from compress_search_plugins.tinybert import TinyBert, pairs, prediction, start, tinybert_matches
from torch.nn import functional as F

from compress_search import Subject, TrialError
from compress_search.encoders import head, layers, read_features
from compress_search.space import defaults, narrow
from compress_search.testing import tiny_batches, tiny_candidate, tiny_context
from compress_search.testing.rehearsal import fingerprint
from compress_search.training import forward

METHOD = TinyBert()
BERT = Subject("bert", "text-classification", 12, 12, 64, 768, 3072, 30522, 512, 2, 2)


def settled(candidate, **changes):
    space = METHOD.search_space(candidate.subject)
    return METHOD.effective(candidate.subject, {**defaults(space), **changes})


def applied(candidate, context=None, **changes):
    return METHOD.apply(candidate, settled(candidate, **changes), context or tiny_context(candidate))


def pair(width=16, depth=2):
    teacher = tiny_candidate()
    student = tiny_candidate(layers=depth, hidden=width, intermediate=2 * width, seed=1)
    return student.network, teacher.network, next(tiny_batches(teacher))


def matching_of(student, teacher, **changes):
    params = settled(tiny_candidate(), width=0.5, **changes)
    matches = tinybert_matches(params, pairs(params, len(layers(teacher))))
    return Matching.between(matches, student, teacher, seed=0)


def terms_of(matching, student, teacher, batch):
    ours = read_features(student, batch, matching.student_features)
    with torch.no_grad():
        theirs = read_features(teacher, batch, matching.teacher_features)
    return [matching.term(n, ours, theirs, batch["attention_mask"]) for n in range(len(matching.matches))]


def loss_of(matching, student, teacher, batch):
    return matching.loss(dict(enumerate(terms_of(matching, student, teacher, batch))))


class TestMaps:
    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"layers": 4}, [3, 6, 9, 12]),
            ({"layers": 6}, [2, 4, 6, 8, 10, 12]),
            ({"layers": 4, "layer_map": "top"}, [9, 10, 11, 12]),
            ({"layers": 4, "layer_map": "bottom"}, [1, 2, 3, 4]),
            ({"custom_map": "1, 5,12"}, [1, 5, 12]),
        ],
    )
    def test_of_twelve_layers(self, changes, expected):
        params = METHOD.effective(BERT, {**defaults(METHOD.search_space(BERT)), **changes})
        assert pairs(params, 12) == list(enumerate(expected, start=1))
        assert METHOD.after(BERT, params).layers == len(expected)

    def test_attention_learns_from_the_layer_that_gives_the_hidden_state(self):
        params = METHOD.effective(BERT, {**defaults(METHOD.search_space(BERT)), "layers": 4})
        matches = tinybert_matches(params, pairs(params, 12))
        found = {
            feature: [(match.student_layer, match.teacher_layer) for match in matches if match.feature == feature]
            for feature in ("embedding", "hidden", "attention_scores")
        }
        # hidden states count from the embeddings, n·m; attention from the first layer, n·m + n − 1
        assert found == {
            "embedding": [(0, 0)],
            "hidden": [(1, 3), (2, 6), (3, 9), (4, 12)],
            "attention_scores": [(0, 2), (1, 5), (2, 8), (3, 11)],
        }

    @pytest.mark.parametrize("text", ["3,2", "0,4", "13", "2,2", "a", "3,,6", "1.5", "-1"])
    def test_a_wrong_map_is_one_line_of_the_study(self, text):
        with pytest.raises(ValueError, match="expected rising numbers from 1 to 12 with commas between, got"):
            narrow(METHOD.search_space(BERT)["custom_map"], text)

    def test_a_written_map_leaves_nothing_to_choose(self):
        space = METHOD.search_space(BERT)
        written = {**space, "custom_map": narrow(space["custom_map"], "3,6,9,12")}
        assert not {"layers", "layer_map"} & defaults(written).keys()

    def test_a_student_starts_as_the_layers_it_learns_from(self):
        candidate = tiny_candidate()
        student = start(candidate, settled(candidate, layers=2), seed=0)
        for ours, theirs in ((0, 1), (1, 3)):
            mine, other = (
                layers(each.network)[n].state_dict() for each, n in ((student, ours), (candidate, theirs))
            )
            assert all(torch.equal(mine[name], other[name]) for name in mine)


class TestLosses:
    def test_the_sum_of_the_papers_equations(self):
        student, teacher, batch = pair()
        matching = matching_of(student, teacher, layers=2, embedding_weight=2.0, hidden_weight=0.5)
        inputs = {name: tensor for name, tensor in batch.items() if name not in ("labels", "index")}
        hidden = [net(**inputs, output_hidden_states=True).hidden_states for net in (student, teacher)]
        [shared] = matching.projections.values()
        mask = batch["attention_mask"].bool()

        def states(ours, theirs):
            return ((shared(hidden[0][ours]) - hidden[1][theirs]) ** 2)[mask].mean()

        expected = 2.0 * states(0, 0) + 0.5 * (states(1, 2) + states(2, 4))
        for ours, theirs in ((0, 1), (1, 3)):
            expected = expected + attention(student, teacher, hidden, ours, theirs, mask)
        torch.testing.assert_close(loss_of(matching, student, teacher, batch), expected, atol=1e-6, rtol=1e-5)

    def test_is_what_layer_match_makes_of_the_same_matches(self):
        student, teacher, batch = pair()
        mine = matching_of(
            student, teacher, layers=2, hidden_weight=0.3, attention_weight=2.0, embedding_weight=0.3
        )
        preset = strategic(
            {
                "strategy": "uniform",
                "features": "embedding+hidden+attention",
                "hidden_loss": "hidden_mse",
                "hidden_weight": 0.3,
                "attention_loss": "attention_mse",
                "attention_weight": 2.0,
                "projection": "linear",
                "projection_learning_rate": 1e-3,
                "shared_projection": True,
                "phases": "two_phase",
            },
            2,
            4,
        )
        written = [
            {"feature": "embedding", "weight": 0.3, "proj": {"shared": "one"}},
            {"student_layer": 1, "teacher_layer": 2, "weight": 0.3, "proj": {"shared": "one"}},
            {"student_layer": 2, "teacher_layer": 4, "weight": 0.3, "proj": {"shared": "one"}},
            {"layer_S": 0, "layer_T": 1, "feature": "attention", "loss": "attention_mse", "weight": 2},
            {"layer_S": 1, "layer_T": 3, "feature": "attention", "loss": "attention_mse", "weight": 2},
        ]
        expected = loss_of(mine, student, teacher, batch)
        for matches in (preset, parse_matches(json.dumps(written))):
            other = Matching.between(matches, student, teacher, seed=0)
            torch.testing.assert_close(loss_of(other, student, teacher, batch), expected, atol=1e-6, rtol=0)

    @pytest.mark.parametrize("projection", ["shared", "per_layer", "none"])
    @pytest.mark.parametrize("target", ["scores", "probabilities"])
    def test_equal_models_have_nothing_to_learn(self, projection, target):
        _, teacher, batch = pair()
        params = {**settled(tiny_candidate(), custom_map="1,2,3,4"), "attention_target": target}
        params |= {"projection": projection, "projection_learning_rate": 1e-3}
        matching = Matching.between(tinybert_matches(params, pairs(params, 4)), teacher, teacher, seed=0)
        terms = terms_of(matching, teacher, teacher, batch)
        assert len(terms) == 1 + 4 + 4
        assert all(term.item() == 0 for term in terms)
        sum(terms).backward()
        trained = [*teacher.parameters(), *matching.projections.parameters()]
        assert all(parameter.grad is None or not parameter.grad.any() for parameter in trained)

    def test_what_lies_at_padding_changes_nothing(self):
        student, teacher, batch = pair()
        assert (batch["attention_mask"] == 0).any()
        matching = matching_of(student, teacher, layers=2)
        other = torch.where(batch["attention_mask"].bool(), batch["input_ids"], 17)
        first, second = (
            terms_of(matching, student, teacher, {**batch, "input_ids": ids}) for ids in (batch["input_ids"], other)
        )
        torch.testing.assert_close(first, second, atol=1e-6, rtol=0)

    def test_attention_that_is_not_there_is_an_error_and_no_zero(self):
        student, teacher, batch = pair()
        matching = matching_of(student, teacher, layers=2)
        layers(student)[1].attention.self.forward = lambda states, *a, **k: (states, None)
        with pytest.raises(TrialError, match=r"key.1 was computed 0 times"):
            terms_of(matching, student, teacher, batch)

    @pytest.mark.parametrize("task", ["text-classification", "text-regression", "token-classification"])
    def test_the_second_phase_is_distillation_without_labels(self, task):
        candidate, student = tiny_candidate("bert", task), tiny_candidate("bert", task, layers=2, seed=4).network
        context, batch = tiny_context(candidate), next(tiny_batches(candidate))
        params = settled(candidate)
        soft = soft_target_loss(context, SoftTerm.of(task, params), alpha=lambda: 1.0)
        expected = soft(student, batch)
        torch.testing.assert_close(prediction(task, params, context)(student, batch), expected)
        mixed = soft_target_loss(context, SoftTerm.of(task, params), alpha=lambda: 0.7)
        found = prediction(task, {**params, "hard_weight": 0.3}, context)(student, batch)
        torch.testing.assert_close(found, mixed(student, batch))


def attention(student, teacher, hidden, ours, theirs, mask):
    """Mean squared difference of Q·Kᵀ/√d over heads and pairs of tokens, text by text, without padding."""
    scores = []
    for network, states, index in ((student, hidden[0][ours], ours), (teacher, hidden[1][theirs], theirs)):
        block = layers(network)[index].attention.self
        query, key = (
            getattr(block, name)(states).unflatten(-1, (4, -1)).transpose(1, 2) for name in ("query", "key")
        )
        scores.append(query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]))
    total, count = 0.0, 0
    for row, length in enumerate(mask.sum(1).tolist()):
        difference = scores[0][row, :, :length, :length] - scores[1][row, :, :length, :length]
        total, count = total + (difference**2).sum(), count + difference.numel()
    return total / count


class TestTraining:
    def watched(self, context):
        """Fingerprints of the head before and after each phase, and whether it was scored."""
        seen, original = [], context.fit

        def fit(network, **options):
            before = [fingerprint(module) for module in head(network)]
            original(network, **options)
            after = [fingerprint(module) for module in head(network)]
            seen.append((options.get("scored", True), before != after))

        context.fit = fit
        return seen

    @pytest.mark.parametrize("task", ["text-classification", "text-regression", "token-classification"])
    def test_the_first_phase_leaves_pooler_and_classifier_alone_and_is_not_scored(self, task):
        candidate = tiny_candidate("bert", task)
        context = tiny_context(candidate)
        seen = self.watched(context)
        applied(candidate, context, width=0.5)
        assert seen == [(False, False), (True, True)]

    def test_the_phases_share_the_budget(self):
        candidate = tiny_candidate()
        context = tiny_context(candidate, steps=10)
        applied(candidate, context, intermediate_fraction=0.3)
        assert context.fits == [3, 7]

    def test_all_terms_are_reported(self):
        candidate = tiny_candidate()
        context = tiny_context(candidate)
        result = applied(candidate, context, hard_weight=0.1)
        assert set(METHOD.evaluate(result, context)) == {"embedding", "hidden", "attention_scores", "soft", "hard"}

    @pytest.mark.parametrize("width", [1.0, 0.5])
    def test_nothing_of_the_training_stays_in_the_student(self, width):
        candidate = tiny_candidate()
        result = applied(candidate, width=width)
        assert sum(p.numel() for p in result.network.parameters()) == result.subject.parameters
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in result.network.modules())

    def test_projections_have_no_say_in_the_logits(self, monkeypatch):
        candidate, batch = tiny_candidate(), next(tiny_batches(tiny_candidate()))
        made, original = [], Matching.between.__func__

        def between(cls, *args):
            made.append(original(cls, *args))
            return made[-1]

        monkeypatch.setattr(Matching, "between", classmethod(between))
        result = applied(candidate, width=0.5)
        before = forward(result.network, batch)
        with torch.no_grad():
            [parameter.zero_() for parameter in made[0].projections.parameters()]
        assert torch.equal(forward(result.network, batch), before)

    @pytest.mark.parametrize("width", [1.0, 0.5])
    def test_layers_come_nearer_than_they_were(self, width):
        candidate = tiny_candidate()
        before, after = (
            METHOD.evaluate(
                applied(candidate, tiny_context(candidate, steps=steps, batch_size=16), width=width, **self.FAST),
                tiny_context(candidate),
            )
            for steps in (4, 80)
        )
        assert after["attention_scores"] < 0.8 * before["attention_scores"]
        assert after["hidden"] < 0.8 * before["hidden"]

    FAST = {"learning_rate": 5e-3, "projection_learning_rate": 1e-2, "intermediate_fraction": 0.9}  # noqa: RUF012

    def test_the_teachers_layers_are_a_better_start_than_none(self):
        candidate = tiny_candidate()
        held_out = next(tiny_batches(candidate, batch_size=64, seed=999))

        def distance(begin):
            params = settled(candidate, layers=3, start=begin)
            network = start(candidate, params, seed=3).network
            matching = Matching.between(
                tinybert_matches(params, pairs(params, 4)), network, candidate.network, seed=0
            )
            return loss_of(matching, network, candidate.network, held_out).item()

        assert distance("teacher") < 0.8 * distance("random")

    def test_random_students_depend_on_the_seed_alone(self):
        candidate = tiny_candidate()
        params = settled(candidate, start="random", width=0.5)
        first, same, other = (fingerprint(start(candidate, params, seed).network) for seed in (1, 1, 2))
        assert first == same != other


class TestText:
    """What the student learns from besides the training rows."""

    def literate(self, *traits):
        candidate = tiny_candidate()
        return candidate.replace(subject=candidate.subject.having(*traits))

    def watched(self, context):
        """The options of every phase."""
        seen, original = [], context.fit

        def fit(network, **options):
            seen.append(options)
            original(network, **options)

        context.fit = fit
        return seen

    def test_other_words_are_searched_where_there_is_a_language_model_that_spells_words(self):
        found = {
            traits: METHOD.search_space(self.literate(*traits).subject).get("augment")
            for traits in ((), ("masked-lm",), ("masked-lm", "tokenizer:WordPiece"), ("masked-lm", "tokenizer:BPE"))
        }
        assert [dim and (dim.default, dim.expert) for dim in found.values()] == [
            (False, True),
            (True, False),
            (True, False),
            None,
        ]

    @pytest.mark.parametrize("hard", [0.0, 0.3])
    def test_both_phases_train_on_them(self, hard):
        candidate = self.literate("masked-lm")
        context = tiny_context(candidate)
        seen = self.watched(context)
        applied(candidate, context, hard_weight=hard)
        assert [options["batches"] is not None for options in seen] == [True, True]
        batch = next(seen[1]["batches"])
        assert "index" not in batch
        if hard:
            assert torch.equal(batch["labels"], context.teacher_logits(batch).argmax(-1))

    def test_without_a_language_model_they_are_refused_before_any_training(self):
        candidate = tiny_candidate()
        context = tiny_context(candidate)
        context.masked_lm = lambda: None
        with pytest.raises(TrialError, match="augmentation needs a masked language model: name one under"):
            applied(candidate, context, augment=True, variants=10)
        assert context.fits == []

    def test_the_language_is_learnt_first_and_from_the_language_model(self):
        candidate = self.literate("unlabelled")
        context = tiny_context(candidate, steps=20)
        seen = self.watched(context)
        result = applied(candidate, context, general_fraction=0.5, intermediate_fraction=0.6)
        assert context.fits == [10, 6, 4]
        general = seen[0]
        assert "labels" not in next(general["batches"])
        assert not general["scored"]
        batch = next(tiny_batches(candidate))
        found = general["loss"].teacher(batch, ["hidden.4"])["hidden.4"]
        expected = read_features(context.masked_lm(), batch, ["hidden.4"])["hidden.4"]
        torch.testing.assert_close(found, expected)
        assert {"general_hidden", "hidden", "soft"} <= METHOD.evaluate(result, context).keys()

    def test_without_a_language_model_it_is_learnt_from_the_teacher(self):
        candidate = self.literate("unlabelled")
        context = tiny_context(candidate)
        context.masked_lm = lambda: None
        seen = self.watched(context)
        applied(candidate, context, general_fraction=0.5)
        assert seen[0]["loss"].teacher is None

    def test_a_language_model_of_another_depth_is_refused(self):
        candidate = self.literate("unlabelled")
        context = tiny_context(candidate)
        context.masked_lm = tiny_context(tiny_candidate(layers=3)).masked_lm
        with pytest.raises(TrialError, match="the language model has 3 layers: expected the teacher's 4"):
            applied(candidate, context, general_fraction=0.5)
        assert context.fits == []


def test_a_single_output_has_no_temperature():
    subject = tiny_candidate("bert", "text-regression").subject
    assert "temperature" not in METHOD.search_space(subject)


def test_softened_answers_are_those_of_the_paper():
    candidate, batch = tiny_candidate(), next(tiny_batches(tiny_candidate()))
    context, student = tiny_context(candidate), tiny_candidate(seed=5).network
    params = settled(candidate, temperature=2.0)
    ours, theirs = forward(student, batch) / 2, forward(candidate.network, batch) / 2
    cross = -(theirs.softmax(-1) * ours.log_softmax(-1)).sum(-1).mean()
    entropy = -(theirs.softmax(-1) * F.log_softmax(theirs, -1)).sum(-1).mean()
    found = prediction("text-classification", params, context)(student, batch)
    torch.testing.assert_close(found, 4 * (cross - entropy), atol=1e-5, rtol=1e-4)

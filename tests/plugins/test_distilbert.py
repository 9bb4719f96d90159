"""DistilBERT: which layers it starts from, what folding leaves as it was, and its losses written out plainly."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from compress_search_plugins.distilbert import (
    DistilBert,
    fold_token_types,
    labels_objective,
    sources,
    task_objective,
    triple_loss,
)
from compress_search_plugins.distillation.language_models import language_model, started_from, under_language_head
from compress_search_plugins.distillation.masked_text import hide, prediction_loss
from compress_search_plugins.distillation.matches import parse_matches
from compress_search_plugins.distillation.matching import Matching
from compress_search_plugins.distillation.objective import Objective
from compress_search_plugins.distillation.soft_targets import SoftTerm, soft_target_loss
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from compress_search import Subject, TrialError
from compress_search.encoders import backbone, embeddings, inputs, keep_layers, layers, read_features, subject_of
from compress_search.losses import cos, in_blocks, kl
from compress_search.space import defaults, narrow
from compress_search.testing import tiny_batches, tiny_candidate, tiny_context
from compress_search.testing.rehearsal import fingerprint
from compress_search.training import forward

METHOD = DistilBert()
BERT = Subject("bert", "text-classification", 12, 12, 64, 768, 3072, 30522, 512, 2, 2)


def settled(subject, **changes):
    return METHOD.effective(subject, {**defaults(METHOD.search_space(subject)), **changes})


def applied(candidate, context=None, **changes):
    return METHOD.apply(candidate, settled(candidate.subject, **changes), context or tiny_context(candidate))


def literate(*traits):
    """A candidate of a study with a language model."""
    candidate = tiny_candidate()
    return candidate.replace(subject=candidate.subject.having("masked-lm", *traits))


def masked(candidate, probability=0.3, seed=0, batch=None):
    tokenizer = candidate.tokenizer
    return hide(
        batch or next(tiny_batches(candidate)),
        tokenizer.mask_token_id,
        set(tokenizer.all_special_ids),
        len(tokenizer),
        probability,
        torch.Generator().manual_seed(seed),
    )


class TestLayers:
    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"layers": 6}, [0, 2, 4, 7, 9, 11]),
            ({"layers": 6, "init_layers": "every_other"}, [0, 2, 4, 6, 8, 10]),
            ({"layers": 3, "init_layers": "every_other"}, [0, 4, 8]),
            ({"layers": 3, "init_layers": "first"}, [0, 1, 2]),
            ({"layers": 2, "init_layers": "last"}, [10, 11]),
            ({"custom_layers": "0, 5, 11"}, [0, 5, 11]),
        ],
    )
    def test_of_twelve(self, changes, expected):
        params = settled(BERT, **changes)
        assert sources(params, 12) == expected
        assert METHOD.after(BERT, params).layers == len(expected)

    def test_the_student_has_half_the_encoder_and_a_token_type_less(self):
        after = METHOD.after(BERT, settled(BERT))
        assert after.encoder_parameters == 6 * 7_087_872
        assert BERT.embedding_parameters - after.embedding_parameters == 768

    def test_the_copies_are_those_layers(self):
        candidate = tiny_candidate()
        student = applied(candidate, tiny_context(candidate, dry=True), custom_layers="1,3")
        for ours, theirs in ((0, 1), (1, 3)):
            mine, other = (
                layers(each.network)[n].state_dict() for each, n in ((student, ours), (candidate, theirs))
            )
            assert all(torch.equal(mine[name], other[name]) for name in mine)

    def test_wrong_layers_are_one_line_of_the_study(self):
        with pytest.raises(
            ValueError, match="expected rising numbers from 0 to 11 with commas between, got '3,12'"
        ):
            narrow(METHOD.search_space(BERT)["custom_layers"], "3,12")


class TestTokenTypes:
    @pytest.mark.parametrize("family", ["bert", "electra"])
    @pytest.mark.parametrize("hidden", [32, 64])
    def test_all_layers_with_folded_types_compute_what_the_teacher_does(self, family, hidden):
        candidate = tiny_candidate(family, hidden=hidden)
        folded = candidate.copy().network
        fold_token_types(folded)
        batch = next(tiny_batches(candidate))
        names = [f"hidden.{n}" for n in range(5)]
        ours, theirs = (read_features(network, batch, names) for network in (folded, candidate.network))
        mask = batch["attention_mask"].bool()
        assert all((ours[name] - theirs[name])[mask].abs().max() < 1e-5 for name in names)
        assert inputs(folded) == ("input_ids", "attention_mask")
        assert subject_of(folded, "text-classification").token_types == 1

    def test_dropping_without_folding_is_something_else(self):
        candidate = tiny_candidate()
        dropped = candidate.copy().network
        with torch.no_grad():
            embeddings(dropped).token_type_embeddings.weight.zero_()
        batch = next(tiny_batches(candidate))
        assert (forward(dropped, batch) - forward(candidate.network, batch)).abs().max() > 0.01

    def test_pairs_keep_them(self):
        subject = tiny_candidate().subject.having("pairs")
        params = settled(subject, drop_token_type=True)
        assert not params["drop_token_type"]
        assert METHOD.after(subject, params).token_types == 2

    @pytest.mark.parametrize(("family", "expected"), [("roberta", 1), ("distilbert", 0), ("bert", 1)])
    def test_only_where_there_are_several_one_less_is_left(self, family, expected):
        candidate = tiny_candidate(family)
        result = applied(candidate)
        assert result.subject.token_types == expected
        assert sum(p.numel() for p in result.network.parameters()) == result.subject.parameters


class TestHiding:
    def test_only_words_are_hidden_and_labels_are_what_was_there(self):
        candidate = tiny_candidate()
        batch = next(tiny_batches(candidate, batch_size=64))
        found = masked(candidate, 0.5, batch=batch)
        special = torch.isin(batch["input_ids"], torch.tensor(candidate.tokenizer.all_special_ids))
        hidden = found["labels"] != -100
        assert not (hidden & (special | (batch["attention_mask"] == 0))).any()
        assert torch.equal(found["labels"][hidden], batch["input_ids"][hidden])
        assert torch.equal(found["input_ids"][~hidden], batch["input_ids"][~hidden])
        assert set(found) == {"input_ids", "token_type_ids", "attention_mask", "labels"}

    def test_of_those_eight_in_ten_are_masks_and_one_is_another(self):
        candidate = tiny_candidate()
        batch = next(tiny_batches(candidate, batch_size=2000))
        found = masked(candidate, 0.15, batch=batch)
        hidden = found["labels"] != -100
        words = batch["attention_mask"].sum() - 2 * len(batch["input_ids"])
        shown = found["input_ids"][hidden]
        assert hidden.sum() / words == pytest.approx(0.15, abs=0.01)
        assert (shown == candidate.tokenizer.mask_token_id).float().mean() == pytest.approx(0.8, abs=0.03)
        assert (shown == found["labels"][hidden]).float().mean() == pytest.approx(0.1, abs=0.03)

    def test_each_time_others(self):
        candidate = tiny_candidate()
        batch, generator = next(tiny_batches(candidate)), torch.Generator().manual_seed(0)
        first, second = (hide(batch, 4, {0, 1, 2, 3, 4}, 90, 0.15, generator)["labels"] for _ in range(2))
        assert not torch.equal(first, second)

    def test_a_step_trains_on_other_holes_each_epoch(self, monkeypatch):
        candidate, seen = literate(), []
        context = tiny_context(candidate)
        monkeypatch.setattr(context, "training_batches", lambda: iter([next(tiny_batches(candidate))] * 9))
        original = context.fit

        def fit(network, **options):
            batches = options.get("batches")
            if batches:
                seen.extend(next(batches)["labels"] for _ in range(2))
            original(network, **options)

        monkeypatch.setattr(context, "fit", fit)
        applied(candidate, context)
        assert len(seen) == 2
        assert not torch.equal(seen[0], seen[1])


class TestLosses:
    def both(self):
        candidate = literate()
        context = tiny_context(candidate)
        model = context.masked_lm()
        network = candidate.copy().network
        keep_layers(network, [0, 3])
        return under_language_head(network, model), model, masked(candidate)

    def test_the_triple_loss_is_the_weighted_sum_of_the_papers_terms(self):
        student, model, batch = self.both()
        params = settled(literate().subject)
        assert (params["ce_weight"], params["mlm_weight"], params["cos_weight"]) == (5, 2, 1)
        given = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
        ours, theirs = (net(**given, output_hidden_states=True) for net in (student, model))
        mask, labels = batch["attention_mask"].bool(), batch["labels"]
        soft = [(output.logits[mask] / 2).log_softmax(-1) for output in (ours, theirs)]
        ce = 4 * (soft[1].exp() * (soft[1] - soft[0])).sum(-1).mean()
        hidden = labels != -100
        mlm = -ours.logits[hidden].log_softmax(-1).gather(-1, labels[hidden][:, None]).mean()
        angle = (F.normalize(ours.hidden_states[-1], dim=-1) * F.normalize(theirs.hidden_states[-1], dim=-1)).sum(
            -1
        )
        expected = 5 * ce + 2 * mlm + (1 - angle)[mask].mean()
        loss = triple_loss(student, model, params, tiny_context(literate()))
        torch.testing.assert_close(loss(student, batch), expected, atol=1e-5, rtol=1e-5)
        terms = loss.report()
        assert expected.item() == pytest.approx(5 * terms["logits"] + 2 * terms["hard"] + terms["hidden"], rel=1e-5)

    def test_only_the_hidden_tokens_count_where_it_is_restricted_to_them(self):
        student, model, batch = self.both()
        params = {**settled(literate().subject), "restrict_ce_to_mask": True}
        loss = triple_loss(student, model, params, tiny_context(literate()))
        loss(student, batch)
        ours, theirs = (read_features(net, batch, ["logits"])["logits"] for net in (student, model))
        expected = kl(ours, theirs, 2.0, batch["labels"] != -100).item()
        assert loss.report()["logits"] == pytest.approx(expected, rel=1e-5)

    @settings(max_examples=20, deadline=None)
    @given(st.integers(0, 1000), st.integers(1, 4), st.integers(1, 70), st.floats(1, 8))
    def test_a_few_rows_at_a_time_are_all_of_them_gradient_included(self, seed, texts, length, temperature):
        generator = torch.Generator().manual_seed(seed)
        theirs, ours = (torch.randn(texts, length, 5, generator=generator, dtype=torch.float64) for _ in range(2))
        mask = torch.rand(texts, length, generator=generator) < 0.7
        gradients, values = [], []
        for block in (1, 40, 10_000):
            logits = ours.clone().requires_grad_()
            value = in_blocks(partial(kl, temperature=temperature), logits, theirs, mask, block=block)
            value.backward()
            values.append(value.detach())
            gradients.append(logits.grad)
        for found in (values, gradients):
            torch.testing.assert_close(found[0], found[2])
            torch.testing.assert_close(found[1], found[2])
        torch.testing.assert_close(values[2], kl(ours, theirs, temperature, mask))

    def test_nothing_hidden_is_nothing_to_predict(self):
        logits = torch.randn(2, 3, 7, requires_grad=True)
        value = prediction_loss(logits, torch.full((2, 3), -100))
        value.backward()
        assert value.item() == 0
        assert not logits.grad.any()

    @settings(max_examples=20, deadline=None)
    @given(st.integers(0, 1000), st.floats(1e-2, 1e2))
    def test_the_direction_alone_counts(self, seed, scale):
        states, others = torch.randn(2, 2, 5, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        mask = torch.ones(2, 5)
        torch.testing.assert_close(cos(scale * states, others, mask), cos(states, others, mask))
        assert cos(states, scale * states, mask).item() == pytest.approx(0, abs=1e-9)
        assert cos(states, -states, mask).item() == pytest.approx(2)

    def test_without_a_language_model_it_is_what_layer_match_makes_of_the_same_matches(self):
        candidate, student = tiny_candidate(), tiny_candidate(layers=2, seed=1)
        context, batch = tiny_context(candidate), next(tiny_batches(candidate))
        written = [{"student_layer": 2, "teacher_layer": 4, "loss": "cos", "weight": 1}]
        preset = Matching.between(parse_matches(json.dumps(written)), student.network, candidate.network, seed=0)
        expected = Objective(context, preset, SoftTerm("text-classification", temperature=2.0), 5.0)
        found = task_objective(student, settled(candidate.subject), context)
        torch.testing.assert_close(
            found(student.network, batch), expected(student.network, batch), atol=1e-6, rtol=0
        )

    @pytest.mark.parametrize(("second", "alpha"), [(True, 0.5), (False, 0.0)])
    def test_the_second_distillation_is_half_the_answers_and_half_the_labels(self, second, alpha):
        candidate, student = tiny_candidate(), tiny_candidate(layers=2, seed=1).network
        context, batch = tiny_context(candidate), next(tiny_batches(candidate))
        params = settled(candidate.subject, second_distillation=second)
        term = SoftTerm("text-classification", temperature=2.0)
        expected = soft_target_loss(context, term, alpha=lambda: alpha)(student, batch)
        found = labels_objective("text-classification", params, context)(student, batch)
        torch.testing.assert_close(found, expected)


class TestLanguage:
    def test_the_encoder_under_the_language_head_is_the_students_own(self):
        candidate = literate()
        model, network = tiny_context(candidate).masked_lm(), candidate.copy().network
        made = under_language_head(network, model)
        assert layers(made)[0] is layers(network)[0]
        assert made.get_output_embeddings().weight is embeddings(network).word_embeddings.weight
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert all(parameter.requires_grad for parameter in made.parameters())

    @pytest.mark.parametrize("family", ["bert", "roberta", "electra", "distilbert"])
    def test_with_all_layers_it_is_the_language_model(self, family):
        candidate = tiny_candidate(family)
        model = tiny_context(candidate).masked_lm()
        made = under_language_head(started_from(candidate, model).network, model)
        batch = next(tiny_batches(candidate))
        torch.testing.assert_close(forward(made, batch), forward(model, batch))

    def test_the_student_starts_from_the_language_models_layers(self):
        candidate = literate()
        context = tiny_context(candidate, dry=True)
        student, model = applied(candidate, context, layers=2), context.masked_lm()
        for ours, theirs in ((0, 0), (1, 3)):
            mine, other = (
                layers(network)[n].state_dict() for network, n in ((student.network, ours), (model, theirs))
            )
            assert all(torch.equal(mine[name], other[name]) for name in mine)
        # the head is the teacher's own
        assert torch.equal(student.network.classifier.weight, candidate.network.classifier.weight)

    def test_the_first_phase_trains_the_encoder_alone_and_is_not_scored(self):
        candidate, seen = literate("unlabelled"), []
        context = tiny_context(candidate, steps=10)
        original, drawn, bodies = context.fit, [], []
        context.unlabelled = lambda size: (drawn.append(size), type(context).unlabelled(context, size))[1]

        def fit(network, **options):
            bodies.append(fingerprint(backbone(network).encoder))
            original(network, **options)
            bodies.append(fingerprint(backbone(network).encoder))
            seen.append((type(network).__name__, options.get("scored", True)))

        context.fit = fit
        result = applied(candidate, context, distillation_fraction=0.3)
        assert seen == [("BertForMaskedLM", False), ("BertForSequenceClassification", True)]
        cut, general, taught, end = bodies
        assert cut != general == taught != end == fingerprint(backbone(result.network).encoder)
        assert context.fits == [3, 7]
        assert drawn == [32]
        terms = METHOD.evaluate(result, context)
        assert set(terms) == {"language_ce", "language_mlm", "language_cos", "soft", "hard"}
        assert sum(p.numel() for p in result.network.parameters()) == result.subject.parameters

    def test_the_language_is_learnt(self):
        candidate = literate()
        before, after = (
            METHOD.evaluate(
                applied(candidate, tiny_context(candidate, steps=steps, batch_size=16), **self.FAST),
                tiny_context(candidate),
            )
            for steps in (2, 100)
        )
        assert after["language_ce"] < 0.7 * before["language_ce"]
        assert after["language_cos"] < 0.7 * before["language_cos"]

    FAST = {"learning_rate": 3e-3, "distillation_fraction": 0.9}  # noqa: RUF012

    def test_without_one_it_is_a_line_before_any_training(self):
        candidate = literate()
        context = tiny_context(candidate)
        context.masked_lm = lambda: None
        with pytest.raises(TrialError, match=r"name one under teacher\.masked_lm"):
            applied(candidate, context)
        assert context.fits == []

    def test_one_of_another_width_is_a_line_before_any_training(self):
        candidate = literate()
        context = tiny_context(candidate)
        context.masked_lm = tiny_context(tiny_candidate(hidden=16)).masked_lm
        with pytest.raises(
            TrialError, match=r"word_embeddings.weight has shape .*, 16\), expected the teacher's .*32"
        ):
            language_model(candidate, context)


class TestTask:
    @pytest.mark.parametrize("task", ["text-classification", "text-regression", "token-classification"])
    @pytest.mark.parametrize("text", [True, False])
    def test_every_task_with_and_without_text(self, task, text):
        candidate = tiny_candidate("bert", task)
        candidate = candidate.replace(subject=candidate.subject.having("unlabelled"))
        context = tiny_context(candidate, steps=10)
        result = applied(candidate, context, distillation_fraction=0.4, unlabelled_text=text)
        assert context.fits == [4, 6]
        assert set(METHOD.evaluate(result, context)) == {"first_ce", "cos", "soft", "hard"}
        assert forward(result.network, next(tiny_batches(candidate))).isfinite().all()

    @pytest.mark.parametrize("frozen", [True, False])
    @pytest.mark.parametrize("make", [tiny_candidate, literate])
    def test_positions_stand_still_in_the_first_phase_alone(self, make, frozen):
        candidate, moved = make(), []
        context = tiny_context(candidate)
        original = context.fit

        def fit(network, **options):
            table = embeddings(network).position_embeddings
            before = table.weight.clone()
            original(network, **options)
            moved.append(not torch.equal(before, table.weight))

        context.fit = fit
        applied(candidate, context, freeze_positions=frozen)
        assert moved == [not frozen, True]

    def test_frozen_positions_get_no_gradient(self):
        candidate, student = tiny_candidate(), tiny_candidate(layers=2, seed=1)
        table = embeddings(student.network).position_embeddings.requires_grad_(False)
        objective = task_objective(student, settled(candidate.subject), tiny_context(candidate))
        objective(student.network, next(tiny_batches(candidate))).backward()
        assert table.weight.grad is None
        assert embeddings(student.network).word_embeddings.weight.grad.any()

    def test_a_student_comes_nearer_to_its_teacher(self):
        candidate = tiny_candidate()
        held_out = next(tiny_batches(candidate, batch_size=128, seed=999))

        def distance(result):
            with torch.no_grad():
                ours, theirs = (forward(network, held_out) for network in (result.network, candidate.network))
                return (ours.softmax(-1) - theirs.softmax(-1)).abs().mean().item()

        changes = {"learning_rate": 3e-3, "layers": 1, "second_alpha": 1.0}
        start = applied(candidate, tiny_context(candidate, dry=True), **changes)
        trained = applied(candidate, tiny_context(candidate, steps=60, batch_size=16), **changes)
        assert distance(trained) < 0.8 * distance(start)

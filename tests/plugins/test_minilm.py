"""MiniLM against its papers' formulas, written out here a second time and plainly."""

from __future__ import annotations

import json
import math

import pytest
import torch
from compress_search_plugins import minilm
from compress_search_plugins.distillation.matches import parse_matches
from compress_search_plugins.distillation.matching import Matching
from compress_search_plugins.minilm import MiniLM, default_heads, minilm_matches, relation_heads
from torch import nn
from torch.nn import functional as F

from compress_search import Subject, TrialError
from compress_search.encoders import layers, prune_heads, read_features, set_attention
from compress_search.space import defaults
from compress_search.testing import tiny_batches, tiny_candidate, tiny_context

METHOD = MiniLM()
BERT = Subject("bert", "text-classification", 12, 12, 64, 768, 3072, 30522, 512, 2, 2)
V1 = {"version": "v1", "attention_weight": 1.0, "value_weight": 1.0}
V2 = {**V1, "version": "v2", "relations": "qq+kk+vv", "relation_heads": 8}


def pair(width=32, layers=2):
    teacher = tiny_candidate()
    student = tiny_candidate(layers=layers, hidden=width, intermediate=2 * width, seed=1)
    return student.network, teacher.network, next(tiny_batches(teacher))


def loss_of(params, student, teacher, batch, layer=3):
    matches = minilm_matches(params, len(layers(student)) - 1, layer)
    matching = Matching.between(matches, student, teacher, seed=0)
    with torch.no_grad():
        theirs = read_features(teacher, batch, matching.teacher_features)
    return matching(read_features(student, batch, matching.student_features), theirs, batch["attention_mask"])


def projections(network, batch, layer):
    """Queries, keys and values of a layer, (B, S, H), by hooks of this test's own."""
    seen = {}
    module = layers(network)[layer].attention.self
    handles = [
        getattr(module, name).register_forward_hook(lambda m, a, out, name=name: seen.__setitem__(name, out))
        for name in ("query", "key", "value")
    ]
    network(**{name: tensor for name, tensor in batch.items() if name not in ("labels", "index")})
    for handle in handles:
        handle.remove()
    return seen


def heads_of(states, heads):
    return states.unflatten(-1, (heads, -1)).transpose(1, 2)


def divergence(ours, theirs, mask):
    """Mean over texts' valid queries and heads of KL(theirs ‖ ours), one text at a time, without its padding."""
    total, rows = 0.0, 0
    for text in range(len(mask)):
        n = int(mask[text].sum())
        p, q = (F.softmax(each[text, :, :n, :n], dim=-1) for each in (theirs, ours))
        total = total + (p * (p / q).log()).sum()
        rows += n * ours.shape[1]
    return total / rows


class TestFormulas:
    def test_version_1(self):
        student, teacher, batch = pair(16)
        ours, theirs = projections(student, batch, 1), projections(teacher, batch, 3)
        expected = 0.0
        for left, right in (("query", "key"), ("value", "value")):
            relations = [
                heads_of(each[left], 4) @ heads_of(each[right], 4).transpose(-1, -2) / math.sqrt(width / 4)
                for each, width in ((ours, 16), (theirs, 32))
            ]
            expected = expected + divergence(*relations, batch["attention_mask"])
        torch.testing.assert_close(loss_of(V1, student, teacher, batch), expected, atol=1e-6, rtol=1e-5)

    @pytest.mark.parametrize("heads", [1, 2, 8, 16])
    def test_version_2(self, heads):
        student, teacher, batch = pair(16)
        ours, theirs = projections(student, batch, 1), projections(teacher, batch, 3)
        expected = 0.0
        for name in ("query", "key", "value"):
            relations = [
                heads_of(each[name], heads)
                @ heads_of(each[name], heads).transpose(-1, -2)
                / math.sqrt(width / heads)
                for each, width in ((ours, 16), (theirs, 32))
            ]
            expected = expected + divergence(*relations, batch["attention_mask"])
        found = loss_of({**V2, "relation_heads": heads}, student, teacher, batch)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)

    def test_version_1_written_as_matches_is_the_same(self):
        student, teacher, batch = pair(16)
        items = [
            {"teacher_layer": 3, "student_layer": 1, "feature": "attention_scores", "loss": "relation_kl_rows"},
            {"teacher_layer": 3, "student_layer": 1, "feature": "value_relation", "loss": "value_relation_kl"},
        ]
        matching = Matching.between(parse_matches(json.dumps(items)), student, teacher, seed=0)
        written = matching(
            read_features(student, batch, matching.student_features),
            read_features(teacher, batch, matching.teacher_features),
            batch["attention_mask"],
        )
        torch.testing.assert_close(loss_of(V1, student, teacher, batch), written, atol=1e-6, rtol=0)

    def test_scores_are_the_softmax_of_eager_attention(self):
        student, teacher, batch = pair()
        only_attention = loss_of({**V1, "value_weight": 1e-9}, student, teacher, batch)
        for network in (student, teacher):
            set_attention(network, "eager")
        inputs = {name: tensor for name, tensor in batch.items() if name not in ("labels", "index")}
        q, p = (net(**inputs, output_attentions=True).attentions[-1] for net in (student, teacher))
        mask = batch["attention_mask"]
        rows = torch.special.xlogy(p, p) - torch.special.xlogy(p, q)
        expected = rows.sum(-1).transpose(1, 2)[mask.bool()].mean()
        torch.testing.assert_close(only_attention, expected, atol=1e-5, rtol=1e-4)


class TestProperties:
    @pytest.mark.parametrize("params", [V1, V2, {**V2, "relation_heads": 4, "relations": "qk+vv"}])
    def test_equal_models_have_nothing_to_learn(self, params):
        _, teacher, batch = pair()
        assert loss_of(params, teacher, teacher, batch).item() == pytest.approx(0, abs=1e-7)

    @pytest.mark.parametrize("params", [V1, V2])
    def test_padding_changes_nothing(self, params):
        student, teacher, batch = pair(16)
        pad = {"input_ids": 0}
        wide = {n: F.pad(t, (0, 6), value=pad.get(n, 0)) if t.ndim == 2 else t for n, t in batch.items()}
        first, second = (loss_of(params, student, teacher, each) for each in (batch, wide))
        torch.testing.assert_close(first, second, atol=1e-6, rtol=0)

    @pytest.mark.parametrize("params", [V1, V2])
    def test_only_what_leads_to_the_last_layers_projections_gets_a_gradient(self, params):
        student, teacher, batch = pair(16)
        loss_of(params, student, teacher, batch).backward()
        without = {name for name, parameter in student.named_parameters() if parameter.grad is None}
        last = "bert.encoder.layer.1."
        above = ("attention.output", "intermediate", "output")
        expected = {
            name
            for name, _ in student.named_parameters()
            if name.startswith(tuple(last + part for part in above)) or "pooler" in name or "classifier" in name
        }
        assert without == expected
        assert all(parameter.grad is None for parameter in teacher.parameters())

    def test_version_1_needs_equal_heads_and_version_2_does_not(self):
        student, teacher, batch = pair()
        prune_heads(student, {1: [0, 1]})
        with pytest.raises(TrialError, match="cannot compare 2 heads with 4"):
            loss_of(V1, student, teacher, batch)
        assert loss_of(V2, student, teacher, batch) > 0

    def test_relation_heads_must_divide(self):
        student, teacher, batch = pair(16)
        with pytest.raises(TrialError, match="relation_kl:32 needs a width that 32 divides, got 16"):
            loss_of({**V2, "relation_heads": 32}, student, teacher, batch)


class TestSpace:
    def test_relation_heads_are_those_that_divide_both_widths(self):
        assert relation_heads(768, 384, 12) == [12, 24, 48, 64]
        assert relation_heads(768, 576, 12) == [12, 24, 48, 64]
        assert relation_heads(1024, 512, 16) == [16, 64]
        assert relation_heads(312, 312, 12) == [12, 24]
        cases = (([12, 24, 48, 64], 384), ([16, 64], 1024), ([2, 64], 128), ([12, 24], 96))
        assert [default_heads(heads, width) for heads, width in cases] == [48, 64, 2, 12]

    def test_the_default_of_bert_base_is_the_papers(self):
        params = METHOD.effective(BERT, defaults(METHOD.search_space(BERT)))
        assert (params["version"], params["relation_heads"], params["teacher_layer"]) == ("v2", 48, 12)

    @pytest.mark.parametrize(("layers", "init", "expected"), [(6, "first", "first"), (1, "first", "spread")])
    def test_layers_to_start_as_have_one_name(self, layers, init, expected):
        asked = {**defaults(METHOD.search_space(BERT)), "layers": layers, "init": init}
        assert METHOD.effective(BERT, asked)["init"] == expected

    @pytest.mark.parametrize(
        ("layers", "width", "expected"),
        [(6, 0.5, "always"), (6, 1.0, "never"), (8, 0.5, "never"), (3, 0.25, "always")],
    )
    def test_an_assistant_helps_those_of_half_the_depth_and_width(self, layers, width, expected):
        asked = {**defaults(METHOD.search_space(BERT)), "layers": layers, "width": width}
        assert METHOD.effective(BERT, asked)["assistant"] == expected

    @pytest.mark.parametrize(
        ("relations", "idle"),
        [
            ("qk", {"relation_heads", "value_weight"}),
            ("qq+kk+vv", set()),
            ("vv", {"attention_weight"}),
            ("qq", {"value_weight"}),
        ],
    )
    def test_relations_that_are_not_compared_have_neither_heads_nor_weight(self, relations, idle):
        asked = {**defaults(METHOD.search_space(BERT)), "relations": relations}
        named = {"relation_heads", "value_weight", "attention_weight"}
        assert named - METHOD.effective(BERT, asked).keys() == idle


class TestTraining:
    def applied(self, candidate, context, **changes):
        space = METHOD.search_space(candidate.subject)
        params = METHOD.effective(candidate.subject, {**defaults(space), **changes})
        return METHOD.apply(candidate, params, context)

    @pytest.mark.parametrize(
        ("changes", "fits"),
        [
            ({"width": 0.5, "layers": 2}, [3, 3, 6]),
            ({"layers": 2}, [6, 6]),
            ({"width": 0.5, "layers": 3, "assistant": "always"}, [3, 3, 6]),
            ({"assistant": "always"}, [6, 6]),  # as wide as the teacher, it would be the teacher
            ({"assistant": "always", "teacher_layer": 3}, [3, 3, 6]),
        ],
    )
    def test_the_hops_share_the_budget(self, changes, fits):
        candidate = tiny_candidate()
        context = tiny_context(candidate, steps=12)
        self.applied(candidate, context, **changes)
        assert context.fits == fits

    def test_the_assistant_is_as_deep_as_the_teacher_and_as_narrow_as_the_student(self, monkeypatch):
        candidate = tiny_candidate()
        context, seen = tiny_context(candidate), []
        original = context.fit

        def watched(network: nn.Module, **options):
            seen.append((len(layers(network)), network.config.hidden_size, options.get("scored", True)))
            original(network, **options)

        monkeypatch.setattr(context, "fit", watched)
        result = self.applied(candidate, context, width=0.5, layers=2)
        assert seen == [(4, 16, False), (2, 16, False), (2, 16, True)]
        assert set(METHOD.evaluate(result, context)) == {"q", "k", "v", "soft", "hard"}

    def test_the_student_learns_from_the_assistant_and_that_from_the_chosen_layer(self, monkeypatch):
        candidate, hops = tiny_candidate(), []
        context, relate = tiny_context(candidate), minilm._relate

        def watched(student, teacher, layer, *rest):
            hops.append((student, teacher, layer))
            return relate(student, teacher, layer, *rest)

        monkeypatch.setattr(minilm, "_relate", watched)
        result = self.applied(candidate, context, width=0.5, layers=2, teacher_layer=3)
        (assistant, *first), (student, *second) = hops
        assert (first, second) == ([context.teacher, 2], [assistant, 3])
        assert student is result.network

    def test_the_language_is_learnt_from_the_language_model_and_answers_from_the_teacher(self, monkeypatch):
        candidate, hops = self.having("masked-lm", "unlabelled"), []
        context, relate = tiny_context(candidate), minilm._relate
        model = context.masked_lm()
        context.masked_lm = lambda: model

        def watched(student, teacher, layer, *rest):
            hops.append((teacher, layer, next(rest[-1])))
            return relate(student, teacher, layer, *rest)

        monkeypatch.setattr(minilm, "_relate", watched)
        result = self.applied(candidate, context, layers=2, general=True, unlabelled_text=True)
        [(teacher, layer, batch)] = hops
        assert (teacher, layer) == (model, 3)
        assert not {"labels", "index"} & batch.keys()
        assert {"q", "k", "v", "soft", "hard"} == set(METHOD.evaluate(result, context))

    def test_a_language_model_unlike_the_teacher_is_refused(self):
        subject = self.having("masked-lm", "masked-lm:layers=3", "masked-lm:token_types=1").subject
        params = METHOD.effective(subject, {**defaults(METHOD.search_space(subject)), "general": True})
        fault = {"general": "true, and the masked language model is unlike the teacher: layers 3 and not 4"}
        assert METHOD.faults(subject, params) == fault
        assert METHOD.faults(subject, params | {"general": False}) == {}
        context = tiny_context(tiny_candidate())
        context.masked_lm = lambda: None
        with pytest.raises(TrialError, match="needs a masked language model: name one"):
            METHOD.apply(tiny_candidate(), params, context)

    def test_relations_are_learnt_on_other_words_too_and_answers_on_the_examples(self, monkeypatch):
        candidate, seen = self.having("masked-lm"), []
        context = tiny_context(candidate)
        original = context.fit

        def watched(network: nn.Module, **options):
            seen.append(options.get("batches"))
            original(network, **options)

        monkeypatch.setattr(context, "fit", watched)
        self.applied(candidate, context, layers=2, augment=True, variants=10)
        words, plain = seen
        assert plain is None
        assert "index" not in next(words)

    def having(self, *traits: str):
        candidate = tiny_candidate()
        return candidate.replace(subject=candidate.subject.having(*traits))

    def test_relations_come_nearer(self):
        candidate = tiny_candidate()
        held_out = next(tiny_batches(candidate, batch_size=64, seed=999))
        results = [
            self.applied(
                candidate,
                tiny_context(candidate, dry=dry, steps=30, batch_size=16),
                layers=2,
                relation_fraction=0.9,
                learning_rate=5e-3,
            )
            for dry in (True, False)
        ]
        params = {**V2, "relation_heads": 4}
        before, after = (loss_of(params, r.network, candidate.network, held_out).item() for r in results)
        assert after < 0.5 * before

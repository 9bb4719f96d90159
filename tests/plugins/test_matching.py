"""Matches as data: what they accept, what is wrong with them, and that their losses are those of the papers."""

from __future__ import annotations

import json
from copy import deepcopy

import pytest
import torch
from compress_search_plugins.distillation.comparable import Shapes, check_depths, check_matches
from compress_search_plugins.distillation.layer_maps import layer_pairs
from compress_search_plugins.distillation.matches import Match, parse_matches
from compress_search_plugins.distillation.matching import Matching
from compress_search_plugins.distillation.objective import Objective
from torch import nn
from torch.nn import functional as F

from compress_search import TrialError
from compress_search.encoders import keep_layers, prune_heads, read_features, recording
from compress_search.testing import tiny_batches, tiny_candidate, tiny_context

TINYBERT = [
    {"teacher_layer": 0, "student_layer": 0, "feature": "embedding", "proj": {"shared": "fit"}},
    *({"teacher_layer": 2 * m, "student_layer": m, "proj": {"shared": "fit"}} for m in (1, 2)),
    *(
        {"teacher_layer": t, "student_layer": s, "feature": "attention_scores", "loss": "attention_mse"}
        for s, t in ((0, 1), (1, 3))
    ),
]
KNOWLEDGE_DISTILLATION = [
    {"feature": "embedding", "loss": "mse_with_mask"},
    {"teacher_layer": 4, "student_layer": 2, "feature": "hidden", "loss": "mse_with_mask"},
    {"teacher_layer": 3, "student_layer": 1, "feature": "attention_scores", "loss": "attention_mse_with_mask"},
    {"feature": "pooled", "loss": "mse"},
]
"""The four kinds of matches of the KnowledgeDistillation library's own example."""


def networks(width: int = 32, layers: int = 2):
    teacher = tiny_candidate()
    student = tiny_candidate(layers=layers, hidden=width, intermediate=2 * width, seed=1)
    return student.network, teacher.network, next(tiny_batches(teacher))


def features(matching, student, teacher, batch):
    found = read_features(student, batch, matching.student_features)
    with torch.no_grad():
        return found, read_features(teacher, batch, matching.teacher_features)


def value(items, student, teacher, batch, **options):
    matching = Matching.between(parse_matches(json.dumps(items)), student, teacher, seed=0)
    return matching(*features(matching, student, teacher, batch), batch["attention_mask"], **options), matching


class TestForm:
    def test_yaml_says_the_same_as_json(self):
        text = "- {layer_T: 4, layer_S: 2, loss: cos, weight: 2}\n- feature: logits\n  loss: kd_ce:4\n"
        items = [
            {"teacher_layer": 4, "student_layer": 2, "loss": "cos", "weight": 2},
            {"feature": "logits", "loss": "kd_ce:4"},
        ]
        assert parse_matches(text) == parse_matches(json.dumps(items))

    def test_a_loss_may_have_the_name_that_a_library_gives_it(self):
        student, teacher, batch = networks()
        for theirs, ours in (("cross_entropy", "kd_ce"), ("cross_entropy:4", "kd_ce:4")):
            both = [
                value([{"feature": "logits", "loss": name}], student, teacher, batch)[0] for name in (theirs, ours)
            ]
            assert both[0] == both[1] > 0

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("- {loss: 'mse:2'}", "no loss is called 'mse:2'"),
            ("", "expected a list of matches"),
            ("[]", "expected a list of matches"),
            ("a: b", "expected a list of matches"),
            ("- [", "not a list of matches: .*line"),
            ("- 3", "match 1: Input should be"),
            ("- {feature: hiden}", "match 1.feature: Input should be 'hidden'"),
            ("- {loss: mse2}", "match 1: no loss is called 'mse2': expected one of mse, hidden_mse"),
            (
                "- {match_weghts: 1}",
                "match 1.match_weghts: unknown key, expected one of teacher_layer, student",
            ),
            (
                "- {proj: {kindd: relu}}",
                "match 1.proj.kindd: unknown key, expected one of kind, widths",
            ),
            (
                "- {proj: {shared: a}}\n- {proj: {shared: b}}\n- {proj: {shared: a, lr: 0.1}}",
                "match 3.proj: 'a' is another one in match 1",
            ),
            ("- {}\n- {weight: -1}", "match 2.weight: Input should be greater than 0"),
            ("- {weight: .nan}", "match 1.weight: Input should be"),
            ("- {feature: q, loss: cos}", "cos compares hidden, embedding, not q"),
            ("- {loss: nst}", "nst takes two layers, teacher_layer is 0"),
            ("- {teacher_layer: [1, 2], student_layer: 1}", "hidden_mse takes a layer, teacher_layer is"),
            ("- {teacher_layer: -1}", "teacher_layer: expected 0 or more, got -1"),
            ("- {teacher_layer: top}", "match 1.teacher_layer: expected a layer's number, last, or a list of two"),
            ("- {teacher_layer: true}", "match 1.teacher_layer: expected a layer's number, last, or a list of two"),
            (
                "- {feature: pooled, loss: mse, teacher_layer: last}",
                "teacher_layer: pooled has no layers, got last",
            ),
            ("- {feature: logits, loss: kd_ce, student_layer: 1}", "student_layer: logits has no layers, got 1"),
            ("- {feature: logits, loss: kd_ce, proj: linear}", "proj: only hidden, embedding and pooled"),
            ("- {proj: conv}", "match 1.proj.kind: Input should be 'linear'"),
            ("- {proj: [linear, 16]}", "match 1.proj: Input should be"),
            ("- {phase: 3}", "match 1.phase.0: Input should be 'general', 1, 2 or 'all'"),
            ("- {phase: [1, later]}", "match 1.phase.1: Input should be 'general', 1, 2 or 'all'"),
            ("- {phase: []}", "match 1.phase: "),
            ("- {token_scope: attended}", "token_scope: only logits have one, of hidden all but padding counts"),
            ("- {loss: 'relation_kl:0', feature: q}", "expected relation_kl:<heads>"),
            ("- {loss: 'relation_kl:inf', feature: q}", "expected relation_kl:<heads>, a number above 0, got"),
            ("- {loss: 'kd_ce:nan', feature: logits}", "expected kd_ce:<temperature>, a number above 0, got"),
            ("- {loss: 'kd_mse:inf', feature: logits}", "expected kd_mse:<temperature>, a number above 0, got"),
        ],
    )
    def test_what_is_wrong_is_one_line(self, text, message):
        with pytest.raises(ValueError, match=message) as caught:
            parse_matches(text)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("item", "message"),
        [
            (
                {"teacher_layer": 5},
                "match 1: teacher_layer 5 does not exist: hidden of its 4 layers counts from 0 to 4",
            ),
            (
                {"student_layer": 3},
                "match 1: student_layer 3 does not exist: hidden of its 2 layers counts from 0 to 2",
            ),
            ({"teacher_layer": 4, "feature": "q", "loss": "relation_kl:4"}, "q of its 4 layers counts from 0 to 3"),
        ],
    )
    def test_matches_outside_the_models_are_refused(self, item, message):
        student, teacher, _ = networks()
        with pytest.raises(TrialError, match=message):
            check_matches([Match.model_validate(item)], *map(Shapes.read, (student, teacher)))
        with pytest.raises(ValueError, match=message):
            check_depths([Match.model_validate(item)], teacher=4, student=2)

    @pytest.mark.parametrize(
        ("item", "message"),
        [
            ({}, "hidden_mse cannot compare widths 16 and 32: add proj: linear, or use nst"),
            ({"proj": ["linear", 32, 16]}, r"proj maps \[32, 16\], and the widths are \[16, 32\]"),
            ({"feature": "k", "loss": "mse"}, "cannot compare heads of size 4 and 8: use relation_kl"),
            ({"feature": "k", "loss": "relation_kl:32"}, "relation_kl:32 needs a width that 32 divides, got 16"),
        ],
    )
    def test_widths_that_do_not_fit_are_refused(self, item, message):
        student, teacher, _ = networks(16)
        with pytest.raises(TrialError, match=message):
            check_matches([Match.model_validate(item)], *map(Shapes.read, (student, teacher)))

    def test_heads_that_do_not_fit_are_refused_and_what_would_do_is_named(self):
        student, teacher, batch = networks()
        prune_heads(student, {1: [0, 2]})
        item = {"teacher_layer": 3, "student_layer": 1, "feature": "attention_scores"}
        with pytest.raises(
            TrialError, match="2 heads with 4: use attention_mse_sum, attention_ce_mean or relation_kl"
        ):
            value([item | {"loss": "attention_mse"}], student, teacher, batch)
        for loss in ("attention_mse_sum", "attention_ce_mean"):
            assert value([item | {"loss": loss}], student, teacher, batch)[0] > 0
        assert value([item | {"feature": "v", "loss": "relation_kl:2"}], student, teacher, batch)[0] > 0

    @pytest.mark.parametrize("loss", ["kd_ce", "kd_kl:4"])
    def test_classes_are_not_compared_where_there_are_none(self, loss):
        candidate = tiny_candidate(task="text-regression")
        for shapes in (Shapes.read(candidate.network), Shapes.described(candidate.subject)):
            with pytest.raises(TrialError, match=f"match 1: {loss} compares classes, .*: use kd_mse"):
                check_matches([Match(feature="logits", loss=loss)], shapes, shapes)
            check_matches([Match(feature="logits", loss="kd_mse")], shapes, shapes)

    def test_another_vocabulary_is_refused(self):
        student, teacher, _ = networks()
        student.resize_token_embeddings(80)
        with pytest.raises(TrialError, match=r"vocabularies of 80 and \d+ pieces"):
            check_matches([Match()], *map(Shapes.read, (student, teacher)))


class TestLosses:
    @pytest.mark.parametrize("items", [TINYBERT, KNOWLEDGE_DISTILLATION], ids=["tinybert", "library"])
    def test_a_student_that_is_its_teacher_has_nothing_to_learn(self, items):
        _, teacher, batch = networks()
        plain = [{**item, "proj": None, "student_layer": item.get("teacher_layer", 0)} for item in items]
        loss, _ = value(plain, deepcopy(teacher), teacher, batch)
        assert loss.item() == pytest.approx(0, abs=1e-9)

    def test_tinybert_as_matches_is_tinyberts_loss(self):
        student, teacher, batch = networks(16)
        loss, matching = value(TINYBERT, student, teacher, batch)
        (fit,) = matching.projections.values()
        mask = batch["attention_mask"].bool()
        inputs = {name: tensor for name, tensor in batch.items() if name not in ("labels", "index")}
        ours = student(**inputs, output_hidden_states=True).hidden_states
        theirs = teacher(**inputs, output_hidden_states=True).hidden_states
        expected = sum(F.mse_loss(fit(ours[m])[mask], theirs[2 * m][mask]) for m in range(3))
        pairs = (mask[:, None, :, None] & mask[:, None, None, :]).expand(-1, 4, -1, -1)
        for s, t in ((0, 1), (1, 3)):
            a = read_features(student, batch, [f"scores.{s}"])[f"scores.{s}"]
            b = read_features(teacher, batch, [f"scores.{t}"])[f"scores.{t}"]
            expected = expected + F.mse_loss(a[pairs], b[pairs])
        torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)

    def test_pkd_as_matches_is_pkds_loss(self):
        student, teacher, batch = networks()
        items = [{"student_layer": s, "teacher_layer": t, "loss": "pkd"} for s, t in layer_pairs("skip", 2, 4)]
        loss, _ = value(items, student, teacher, batch)
        ours = read_features(student, batch, ["hidden.1"])["hidden.1"][:, 0]
        theirs = read_features(teacher, batch, ["hidden.2"])["hidden.2"][:, 0]
        expected = ((F.normalize(ours, dim=-1) - F.normalize(theirs, dim=-1)) ** 2).sum(-1).mean()
        torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)

    def test_distilberts_cosine_as_a_match(self):
        student, teacher, batch = networks()
        loss, _ = value([{"student_layer": 2, "teacher_layer": 4, "loss": "cos"}], student, teacher, batch)
        mask = batch["attention_mask"].bool()
        ours = read_features(student, batch, ["hidden.2"])["hidden.2"][mask]
        theirs = read_features(teacher, batch, ["hidden.4"])["hidden.4"][mask]
        expected = F.cosine_embedding_loss(ours, theirs, torch.ones(len(ours)))
        torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)

    def test_the_loss_is_linear_in_a_weight_and_a_match_less_is_its_term_less(self):
        student, teacher, batch = networks()
        one = {"student_layer": 2, "teacher_layer": 4}
        other = {"student_layer": 1, "teacher_layer": 1, "feature": "attention_scores", "loss": "attention_mse"}
        first, second = (value([item], student, teacher, batch)[0] for item in (one, other))
        both = value([one | {"weight": 3.0}, other | {"weight": 0.5}], student, teacher, batch)[0]
        torch.testing.assert_close(both, 3 * first + 0.5 * second)

    @pytest.mark.parametrize(
        ("schedule", "progress", "part"),
        [("const", 0.3, 1.0), ("linear_decay", 0.25, 0.75), ("linear_growth", 0.25, 0.25), ("linear_growth", 0, 0)],
    )
    def test_schedules_scale_the_weight(self, schedule, progress, part):
        assert Match(weight=2.0, schedule=schedule).scheduled(progress) == pytest.approx(2 * part)

    def test_without_a_mask_padding_counts(self):
        student, teacher, batch = networks()
        item = {"student_layer": 2, "teacher_layer": 4}
        masked, unmasked, plain = (
            value([item | more], student, teacher, batch)[0] for more in ({}, {"mask": False}, {"loss": "mse"})
        )
        torch.testing.assert_close(unmasked, plain)
        assert (masked - unmasked).abs() > 1e-4

    @pytest.mark.parametrize("more", [{"mask": False}, {"loss": "mse"}])
    def test_padding_that_counts_is_never_what_a_disk_leaves_out(self, more):
        candidate = tiny_candidate()
        context, batch = tiny_context(candidate), next(tiny_batches(candidate))
        assert not batch["attention_mask"].all()

        def from_disk(asked, names):
            found = read_features(context.teacher, asked, names)
            mask = asked["attention_mask"].unsqueeze(-1) if "index" in asked else 1
            return {name: tensor.detach() * mask for name, tensor in found.items()}

        context.teacher_outputs = from_disk
        objective = Objective(context, Matching((Match(student_layer=2, teacher_layer=2, **more),)))
        assert objective(candidate.network.eval(), batch) == 0

    def test_padded_words_change_nothing(self):
        student, teacher, batch = networks()
        other = {name: tensor.clone() for name, tensor in batch.items()}
        other["input_ids"][~batch["attention_mask"].bool()] = 20
        assert not torch.equal(other["input_ids"], batch["input_ids"])
        items = [item for item in TINYBERT if "proj" not in item] + [{"student_layer": 2, "teacher_layer": 4}]
        first, second = (value(items, student, teacher, each)[0] for each in (batch, other))
        torch.testing.assert_close(first, second, atol=1e-6, rtol=1e-6)


class TestProjections:
    def test_shared_and_one_a_match(self):
        _, shared = value(TINYBERT, *networks(16))
        assert list(shared.projections) == ["shared fit"]
        apart = [{**item, "proj": "linear"} if "proj" in item else item for item in TINYBERT]
        _, own = value(apart, *networks(16))
        assert len(own.projections) == 3

    def test_start_small_without_bias_and_by_the_seed(self):
        _, matching = value([{"proj": "linear"}], *networks(16))
        linear = matching.projections["0"][0]
        assert isinstance(linear, nn.Linear)
        assert not linear.bias.any()
        assert 0.015 < linear.weight.std() < 0.025
        _, again = value([{"proj": "linear"}], *networks(16))
        assert torch.equal(linear.weight, again.projections["0"][0].weight)

    def test_the_identity_changes_nothing_at_equal_width(self):
        student, teacher, batch = networks()
        plain, _ = value([{}], student, teacher, batch)
        projected, _ = value([{"proj": "identity"}], student, teacher, batch)
        torch.testing.assert_close(projected, plain)

    @pytest.mark.parametrize(("kind", "low", "high"), [("relu", 0, 1e9), ("tanh", -1, 1)])
    def test_activations(self, kind, low, high):
        _, matching = value([{"proj": kind}], *networks(16))
        out = matching.projections["0"](100 * torch.randn(50, 16))
        assert out.min() >= low
        assert out.max() <= high
        assert out.shape == (50, 32)

    def test_learn_at_their_own_rates(self):
        _, matching = value([{"proj": ["linear", 16, 32, {"lr": 0.01}]}, {"proj": "relu"}], *networks(16))
        assert [group.learning_rate for group in matching.groups()] == [0.01, None]
        named = [id(p) for group in matching.groups() for p in group.parameters]
        assert sorted(named) == sorted(id(p) for p in matching.projections.parameters())

    def test_are_no_part_of_the_student(self):
        student, teacher, batch = networks(16)
        names = set(student.state_dict())
        value(TINYBERT, student, teacher, batch)
        assert set(student.state_dict()) == names

    def test_phases_share_them(self):
        student, teacher, _ = networks(16)
        items = [{"proj": {"shared": "a"}, "phase": 1}, {"proj": "linear"}, {"proj": {"shared": "a"}, "phase": 2}]
        matching = Matching.between(parse_matches(json.dumps(items)), student, teacher, seed=0)
        first, second = matching.only(1), matching.only(2)
        assert [len(phase.matches) for phase in (first, second)] == [2, 2]
        assert first.projections["shared a"] is second.projections["shared a"]
        assert first.projections["1"] is second.projections["0"] is matching.projections["1"]


def test_gradients_reach_what_a_match_reads_and_nothing_above():
    student, teacher, batch = networks()
    matching = Matching.between([Match(student_layer=1, teacher_layer=2)], student, teacher, seed=0)
    keep_layers(student, [0, 1])
    with recording(student, matching.student_features) as found:
        student(**{name: tensor for name, tensor in batch.items() if name not in ("labels", "index")})
    with torch.no_grad():
        theirs = read_features(teacher, batch, matching.teacher_features)
    matching(found, theirs, batch["attention_mask"]).backward()
    assert student.bert.encoder.layer[0].output.dense.weight.grad.abs().sum() > 0
    assert student.bert.encoder.layer[1].output.dense.weight.grad is None
    assert student.classifier.weight.grad is None
    assert all(parameter.grad is None for parameter in teacher.parameters())

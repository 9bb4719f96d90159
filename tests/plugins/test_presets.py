"""TinyBERT, DistilBERT and MiniLM as what a study can write for ``layer_match``: the same losses, phase by phase,
and in the end the same student.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compress_search_plugins import distilbert, minilm, tinybert
from compress_search_plugins.distillation.general import general_objective
from compress_search_plugins.distillation.language_models import under_language_head, with_holes
from compress_search_plugins.distillation.matching import Matching
from compress_search_plugins.distillation.objective import Objective
from compress_search_plugins.distillation.soft_targets import SoftTerm
from compress_search_plugins.layer_match import LayerMatch, _matches, objectives

from compress_search import TrialError
from compress_search.space import defaults, narrow
from compress_search.testing import tiny_batches, tiny_candidate, tiny_context

METHOD = LayerMatch()
DISTILBERT = """
- {student_layer: 2, teacher_layer: 4, loss: cos, weight: 0.7, phase: 1}
- {feature: logits, loss: "kd_kl:2", weight: 5, phase: 1}
"""
LANGUAGE = """
- {{student_layer: last, teacher_layer: last, loss: cos, weight: 0.7, phase: general}}
- {{feature: logits, loss: "kd_kl:2", weight: 5, phase: general, token_scope: {scope}}}
"""
MINILM = {
    "v1": """
- {student_layer: 1, teacher_layer: 3, feature: attention_scores, loss: relation_kl_rows, phase: 1}
- {student_layer: 1, teacher_layer: 3, feature: value_relation, loss: value_relation_kl, phase: 1}
""",
    "v2": """
- {student_layer: 1, teacher_layer: 3, feature: q, loss: "relation_kl:4", phase: 1}
- {student_layer: 1, teacher_layer: 3, feature: k, loss: "relation_kl:4", phase: 1}
- {student_layer: 1, teacher_layer: 3, feature: v, loss: "relation_kl:4", phase: 1}
""",
}


def settled(method, candidate, **written):
    """The parameters of a study that writes these dimensions."""
    space = method.search_space(candidate.subject)
    fixed = {name: narrow(dim, written[name]) if name in written else dim for name, dim in space.items()}
    assert written.keys() <= space.keys()
    return method.effective(candidate.subject, defaults(fixed))


class Case:
    """A teacher, a student of two of its four layers, and a batch."""

    def __init__(self, task="text-classification", width=16):
        self.teacher = tiny_candidate(task=task)
        self.student = tiny_candidate(task=task, layers=2, hidden=width, intermediate=2 * width, seed=1)
        self.context, self.batch = tiny_context(self.teacher), next(tiny_batches(self.teacher))
        self.task = task

    def written(self, **changes):
        """The phases that ``layer_match`` makes of such dimensions."""
        params = settled(METHOD, self.teacher, layers=2, **changes)
        matching = self.matching(_matches(params, 4, 2))
        return objectives(self.student, matching, params, self.context)

    def matching(self, matches):
        return Matching.between(matches, self.student.network, self.teacher.network, self.context.seed)

    def same(self, phases, expected):
        """Each phase has the same value as it should, and the same gradients."""
        assert len(phases) == len(expected)
        for phase, other in zip(phases, expected, strict=True):
            found, wanted = (self.value(each) for each in (phase, other))
            torch.testing.assert_close(found[0], wanted[0], atol=1e-6, rtol=1e-6)
            assert found[0] > 1e-3
            for mine, theirs in zip(found[1], wanted[1], strict=True):
                torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)

    def value(self, objective):
        self.student.network.zero_grad()
        loss = objective(self.student.network, self.batch)
        loss.backward()
        parameters = self.student.network.parameters()
        return loss.detach(), [torch.zeros(1) if p.grad is None else p.grad.clone() for p in parameters]


@pytest.mark.parametrize("task", ["text-classification", "token-classification", "text-regression"])
@pytest.mark.parametrize(
    ("width", "changes"), [(16, {"width": 0.5}), (32, {"projection": "identity", "phases": "two_phase"})]
)
def test_tinybert_is_two_phases_of_matches_and_of_logits_alone(task, width, changes):
    case, own = Case(task, width), tinybert.TinyBert()
    params = settled(own, case.teacher, layers=2, width=changes.get("width", 1.0), attention_weight=2.0)
    matches = tinybert.tinybert_matches(params, tinybert.pairs(params, 4))
    expected = [
        Objective(case.context, case.matching(matches)),
        tinybert.prediction(task, params, case.context),
    ]
    tempered = {} if task == "text-regression" else {"temperature": 1.0}
    phases = case.written(
        strategy="uniform",
        features="embedding+hidden+attention",
        attention_weight=2.0,
        logit_weight=1.0,
        hard_weight=0.0,
        **changes,
        **tempered,
    )
    case.same(phases, expected)


@pytest.mark.parametrize(("second", "weights"), [(True, (0.5, 0.5)), (False, (0.0, 1.0))])
@pytest.mark.parametrize("task", ["text-classification", "token-classification"])
def test_distilbert_is_answers_and_direction_and_then_answers_and_labels(task, second, weights):
    case, own = Case(task, 32), distilbert.DistilBert()
    params = settled(own, case.teacher, layers=2, cos_weight=0.7, second_distillation=second)
    expected = [
        distilbert.task_objective(case.student, params, case.context),
        distilbert.labels_objective(task, params, case.context),
    ]
    logits, labels = weights
    case.same(case.written(matches=DISTILBERT, logit_weight=logits, hard_weight=labels), expected)


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("width", [16, 32])
def test_minilm_is_the_relations_of_one_layer_and_then_answers_and_labels(version, width):
    case, own = Case(width=width), minilm.MiniLM()
    params = settled(own, case.teacher, layers=2, width=width / 32, version=version)
    matches = minilm.minilm_matches(params, 1, 3)
    soft = SoftTerm.of(case.task, params)
    expected = [Objective(case.context, case.matching(matches)), Objective(case.context, Matching(()), soft, 1, 1)]
    case.same(case.written(matches=MINILM[version]), expected)


class TestUnderTheLanguageHead:
    """DistilBERT's first phase with a language model, as ``layer_match`` writes it."""

    def phase(self, restricted, task="text-classification", **changes):
        """The two objectives, the student under the language model's head, and texts with holes."""
        case, own = Case(task, 32), distilbert.DistilBert()
        teacher = case.teacher.replace(subject=case.teacher.subject.having("masked-lm"))
        model = case.context.masked_lm()
        scope = "labelled" if restricted else "attended"
        text = LANGUAGE.format(scope=scope)
        written = settled(METHOD, teacher, layers=2, matches=text, general="masked_text", **changes)
        matching = Matching.between(
            _matches(written, 4, 2), case.student.network, case.teacher.network, 0, language=model
        )
        found = general_objective(matching, model, written, case.context)
        params = settled(own, teacher, layers=2, cos_weight=0.7, restrict_ce_to_mask=restricted, **changes)
        expected = distilbert.triple_loss(case.student.network, model, params, case.context)
        case.student = case.student.replace(network=under_language_head(case.student.network, model))
        case.batch = next(with_holes(iter([case.batch]), case.teacher.tokenizer, 0.3, seed=0))
        return case, found, expected

    @pytest.mark.parametrize("restricted", [True, False])
    @pytest.mark.parametrize("task", ["text-classification", "token-classification", "text-regression"])
    def test_is_a_match_of_logits_a_match_of_the_last_layers_and_the_hidden_words(self, restricted, task):
        case, found, expected = self.phase(restricted, task, mlm_weight=2.0)
        case.same([found], [expected])
        assert set(found.report()) == {"hidden", "logits", "hard"}

    def test_which_logits_count_and_what_the_hidden_words_weigh_is_seen(self):
        case, *phases = self.phase(False, mlm_weight=2.0)
        other, *restricted = self.phase(True, mlm_weight=2.0)
        _, lighter, _ = self.phase(False, mlm_weight=1.0)
        values = [case.value(each)[0] for each in (phases[0], lighter)] + [other.value(restricted[0])[0]]
        assert min(abs(values[0] - value) for value in values[1:]) > 1e-2


WHOLE = {
    "distilbert": (
        distilbert.DistilBert(),
        {"drop_token_type": False, "freeze_positions": False, "cos_weight": 0.7, "distillation_fraction": 0.4},
        {
            "start": "masked_lm",
            "general": "masked_text",
            "matches": LANGUAGE.format(scope="attended"),
            "mlm_weight": 2.0,
            "logit_weight": 0.5,
            "hard_weight": 0.5,
        },
    ),
    "tinybert": (
        tinybert.TinyBert(),
        {"layer_map": "top", "width": 0.5, "augment": False, "general_fraction": 0.4, "intermediate_fraction": 0.5},
        {
            "init": "last",
            "strategy": "last",
            "width": 0.5,
            "features": "embedding+hidden+attention",
            "projection": "identity",
            "general": "text",
            "logit_weight": 1.0,
            "hard_weight": 0.0,
            "temperature": 1.0,
        },
    ),
    "minilm": (
        minilm.MiniLM(),
        {"general": True, "unlabelled_text": True, "relation_fraction": 0.4, "relation_heads": 4},
        {"general": "text", "matches": MINILM["v2"].replace("phase: 1", "phase: general")},
    ),
}
"""A method, what a study writes for it, and what the study writes for ``layer_match`` instead."""


@pytest.mark.parametrize("name", WHOLE)
def test_whole_recipes_with_a_phase_in_general_train_the_same_student(name):
    own, theirs, ours = WHOLE[name]
    candidate = tiny_candidate()
    candidate = candidate.replace(subject=candidate.subject.having("masked-lm", "unlabelled"))
    students, steps = [], []
    for method, written in ((own, theirs), (METHOD, {**ours, "general_fraction": 0.4})):
        context = tiny_context(candidate, steps=10)
        params = settled(method, candidate, layers=2, learning_rate=1e-3, **written)
        assert not method.faults(candidate.subject, params)
        students.append(method.apply(candidate, params, context).network.state_dict())
        steps.append(context.fits)
    assert steps[0] == steps[1]
    assert len(steps[0]) > 1
    start = candidate.network.state_dict()
    for key, tensor in students[0].items():
        torch.testing.assert_close(tensor, students[1][key], atol=1e-6, rtol=1e-5)
    words = next(key for key in start if key.endswith("word_embeddings.weight"))
    assert start[words].shape != students[0][words].shape or (start[words] - students[0][words]).abs().max() > 1e-3


def test_of_tokens_a_match_of_logits_counts_those_that_have_a_label():
    case = Case("token-classification", 32)
    matches = '- {feature: logits, loss: "kd_kl:2", phase: 1}'
    everywhere = matches.replace("phase", "token_scope: attended, phase")
    first, last = case.written(matches=matches, logit_weight=1.0, hard_weight=0.0, temperature=2.0)
    case.same([first], [last])
    attended = Objective(case.context, Matching(()), replace(last.soft, scope="attended"), 1.0)
    assert abs(case.value(first)[0] - case.value(attended)[0]) > 1e-4
    case.same(case.written(matches=everywhere, logit_weight=0.0, hard_weight=0.0), [attended])
    # text without labels: all of it counts but padding
    case.batch = {name: tensor for name, tensor in case.batch.items() if name != "labels"}
    case.same([first], [attended])


class TestWeightsOfZero:
    def applied(self, method, context=None, **changes):
        candidate = tiny_candidate()
        context = context or tiny_context(candidate, steps=10)
        result = method.apply(candidate, settled(method, candidate, **changes), context)
        return method.evaluate(result, context), context

    @pytest.mark.parametrize("task", ["text-classification", "text-regression", "token-classification"])
    @pytest.mark.parametrize("method", [METHOD, minilm.MiniLM()])
    def test_how_soft_logits_are_says_nothing_where_they_have_no_weight(self, method, task):
        candidate = tiny_candidate(task=task)
        soft = set(settled(method, candidate)) - set(settled(method, candidate, logit_weight=0.0))
        assert soft == (set() if task == "text-regression" else soft | {"temperature", "soft_loss"})

    def test_the_libraries_default_has_no_labels(self):
        terms, context = self.applied(METHOD, hard_weight=0.0)
        assert set(terms) == {"hidden", "attention_scores", "soft"}
        assert context.fits == [10]

    @pytest.mark.parametrize("width", [1.0, 0.5])
    def test_without_logits_and_labels_matches_are_all_there_is_and_no_score_means_anything(self, width):
        context, scored = tiny_context(tiny_candidate(), steps=10), []
        original = context.fit
        context.fit = lambda *a, **options: (scored.append(options["scored"]), original(*a, **options))
        terms, _ = self.applied(METHOD, context, width=width, hard_weight=0.0, logit_weight=0.0)
        assert set(terms) == {"hidden", "attention_scores"}
        assert context.fits == [10]
        assert scored == [False]

    def test_relations_too_can_be_all_there_is(self):
        changes = {"hard_weight": 0.0, "logit_weight": 0.0}
        terms, context = self.applied(minilm.MiniLM(), **changes)
        assert set(terms) == {"q", "k", "v"}
        assert context.fits == [10]
        assert "relation_fraction" not in settled(minilm.MiniLM(), tiny_candidate(), **changes)

    def test_distilberts_first_phase_can_do_without_either_but_not_without_both(self):
        method = distilbert.DistilBert()
        assert set(self.applied(method, cos_weight=0.0)[0]) == {"first_ce", "soft", "hard"}
        assert set(self.applied(method, ce_weight=0.0)[0]) == {"cos", "soft", "hard"}
        context = tiny_context(tiny_candidate())
        with pytest.raises(TrialError, match="every weight of the first phase is 0: expected one above"):
            self.applied(method, context, cos_weight=0.0, ce_weight=0.0)
        assert context.fits == []

    def test_of_the_triple_loss_what_has_no_weight_is_not_computed(self):
        candidate = tiny_candidate()
        model, batch = tiny_context(candidate).masked_lm(), next(tiny_batches(candidate))
        hidden = {**batch, "labels": torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)}
        params = {"ce_weight": 0.0, "mlm_weight": 2.0, "cos_weight": 0.0, "temperature": 2.0}
        params["restrict_ce_to_mask"] = False
        loss = distilbert.triple_loss(candidate.network, model, params, tiny_context(candidate))
        assert loss(model, hidden).item() == pytest.approx(2 * loss.report()["hard"])
        assert set(loss.report()) == {"hard"}

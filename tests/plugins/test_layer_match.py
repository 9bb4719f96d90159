"""A student that learns from its teacher's layers: what it learns from, when, and that it does."""

from __future__ import annotations

import pytest
import torch
from compress_search_plugins.distillation.language_models import under_language_head
from compress_search_plugins.distillation.matches import Match
from compress_search_plugins.distillation.matching import Matching
from compress_search_plugins.distillation.objective import Objective, aligned, some, transported
from compress_search_plugins.distillation.soft_targets import SoftTerm
from compress_search_plugins.distillation.strategies import ALIGNED, EARTH_MOVER, FEATURES, strategic
from compress_search_plugins.layer_match import LayerMatch, _matches, objectives
from compress_search_plugins.minilm import MiniLM
from compress_search_plugins.tinybert import TinyBert

from compress_search import Params, StudyError, Subject, TrialError
from compress_search.driver import prepare
from compress_search.encoders import read_features, subject_of
from compress_search.space import defaults, narrow
from compress_search.study import load_study
from compress_search.testing import tiny_batches, tiny_candidate, tiny_context
from compress_search.training import forward

METHOD = LayerMatch()
BERT = Subject("bert", "text-classification", 12, 12, 64, 768, 3072, 30522, 512, 2, 2)


def params_for(subject: Subject, **changes) -> Params:
    space = METHOD.search_space(subject)
    return METHOD.effective(subject, {**defaults(space), **changes})


def settled(method, subject: Subject, **written) -> Params:
    """The parameters of a study that writes these dimensions, on which others may depend."""
    space = method.search_space(subject)
    assert written.keys() <= space.keys()
    fixed = {name: narrow(dim, written[name]) if name in written else dim for name, dim in space.items()}
    return method.effective(subject, defaults(fixed))


def applied(candidate, context=None, **changes):
    context = context or tiny_context(candidate)
    params = params_for(candidate.subject, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return METHOD.apply(candidate, params, context)


def shown(matches):
    return [(m.feature, m.student_layer, m.teacher_layer, m.loss, m.weight) for m in matches]


class TestStrategies:
    def test_uniform_with_all_features_is_tinyberts_map(self):
        params = params_for(BERT, layers=4, features="embedding+hidden+attention", width=0.5)
        found = shown(strategic(params, 4, 12))
        assert found == [
            ("embedding", 0, 0, "hidden_mse", 1.0),
            *(("hidden", m, 3 * m, "hidden_mse", 1.0) for m in (1, 2, 3, 4)),
            *(("attention_scores", m - 1, 3 * m - 1, "attention_mse", 1.0) for m in (1, 2, 3, 4)),
        ]

    @pytest.mark.parametrize(
        ("depth", "starts", "ends"),
        [
            (6, [0, 2, 4, 6, 8, 10], [2, 4, 6, 8, 10, 12]),
            (5, [0, 2, 5, 7, 10], [2, 5, 7, 10, 12]),
            (12, list(range(12)), list(range(1, 13))),
            (1, [0], [12]),
        ],
    )
    def test_mirrored_theseus_attends_as_a_blocks_first_layer_and_says_what_its_last_does(
        self, depth, starts, ends
    ):
        params = params_for(BERT, strategy="mirror_theseus", layers=depth, width=0.5)
        found = strategic(params, depth, 12)
        pairs = {
            feature: [(m.student_layer, m.teacher_layer) for m in found if m.feature == feature]
            for feature in ("hidden", "attention_scores")
        }
        assert pairs == {"hidden": list(enumerate(ends, 1)), "attention_scores": list(enumerate(starts))}

    def test_mirrored_theseus_without_attention_is_the_uniform_map(self):
        params = [params_for(BERT, strategy=name, features="hidden") for name in ("mirror_theseus", "uniform")]
        assert params[0] == params[1]

    @pytest.mark.parametrize("features", FEATURES)
    def test_features_are_those_asked_for(self, features):
        matches = strategic(params_for(BERT, features=features), 6, 12)
        assert {m.feature.removesuffix("_scores") for m in matches} == set(features.split("+"))

    def test_weights_are_of_their_kind(self):
        params = params_for(BERT, hidden_weight=0.5, attention_weight=3.0)
        weights = {m.feature: m.weight for m in strategic(params, 6, 12)}
        assert weights == {"hidden": 0.5, "attention_scores": 3.0}

    def test_narrow_students_are_projected_and_matched_before_they_are_taught(self):
        params = params_for(BERT, width=0.5)
        assert (params["projection"], params["phases"]) == ("linear", "two_phase")
        matches = strategic(params, 6, 12)
        assert all(m.phases == {"general", 1} for m in matches)
        assert {m.proj.shared for m in matches if m.proj} == {"hidden"}

    def test_students_of_full_width_are_not(self):
        params = params_for(BERT)
        assert (params["projection"], params["phases"]) == ("none", "joint")
        assert not any(m.proj for m in strategic(params, 6, 12))

    @pytest.mark.parametrize(
        ("changes", "absent"),
        [
            ({}, {"matches", "matching_fraction", "shared_projection", "projection_learning_rate"}),
            ({"features": "attention"}, {"hidden_weight", "hidden_loss"}),
            ({"features": "hidden"}, {"attention_weight", "attention_loss"}),
        ],
    )
    def test_what_says_nothing_is_no_part_of_a_recipe(self, changes, absent):
        assert not absent & set(params_for(BERT, **changes))

    def test_alignment_picks_one_student_layer_for_each_of_a_few_of_the_teachers(self):
        teacher = tiny_candidate(layers=6)
        # the student's layers are the teacher's 2nd, 4th and 6th, so hidden states differ least there by order
        params = params_for(teacher.subject, layers=3, strategy=ALIGNED, features="hidden")
        matches = strategic(params, 3, 6)
        assert len(matches) == 9
        student = tiny_candidate(layers=3, seed=5)
        matching = Matching.between(matches, student.network, teacher.network, seed=0)
        batch = next(tiny_batches(teacher))
        ours = read_features(student.network, batch, matching.student_features)
        theirs = read_features(teacher.network, batch, matching.teacher_features)
        # two of the teacher's states are made to be the student's own: these are found, and the rest in order
        theirs |= {"hidden.4": ours["hidden.2"], "hidden.6": ours["hidden.3"]}
        chosen = aligned(matching, ours, theirs, batch["attention_mask"])
        pairs = [(matches[n].teacher_layer, matches[n].student_layer) for n in chosen]
        assert pairs == [(2, 1), (4, 2), (6, 3)]

    def test_dropout_leaves_out_matches_but_never_all(self):
        matching = Matching(tuple(Match(teacher_layer=n) for n in range(4)))
        choose = some(0.5, seed=0)
        drawn = [choose(matching, {}, {}, torch.ones(1)) for _ in range(400)]
        assert min(map(len, drawn)) == 1
        assert max(map(len, drawn)) == 4
        assert 0.45 < sum(map(len, drawn)) / 1600 < 0.6
        again = some(0.5, seed=0)
        assert [again(matching, {}, {}, torch.ones(1)) for _ in range(400)] == drawn


class TestWrittenMatches:
    TEXT = (
        "- {teacher_layer: 4, student_layer: 1, loss: cos}\n- {teacher_layer: 3, feature: q, loss: 'relation_kl:4'}"
    )

    def study(self, tiny_study, matches, **narrowing):
        return load_study(tiny_study(methods={"layer_match": {"matches": matches, **narrowing}}))

    def test_a_study_writes_them(self, tiny_study):
        text = "- {teacher_layer: 2, student_layer: 1, loss: cos}"
        plan = prepare(self.study(tiny_study, text, use=True)).plan
        recipe, point = plan.at_defaults({"layer_match"})
        assert recipe.steps[0].params["matches"] == text
        assert "strategy" not in recipe.steps[0].params
        assert not any("strategy" in name or "weight" in name for name in point)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("- {teacher_layer: 9}", "teacher_layer 9 does not exist: hidden of its 2 layers counts from 0 to 2"),
            ("- {loss: mse2}", "no loss is called 'mse2'"),
            ("nothing", "expected a list of matches"),
        ],
    )
    def test_what_is_wrong_is_said_before_anything_runs(self, tiny_study, text, message):
        with pytest.raises(StudyError, match=f"methods.layer_match.matches: .*{message}"):
            prepare(self.study(tiny_study, text))

    def test_they_are_what_is_trained_on(self):
        candidate = tiny_candidate()
        result = applied(candidate, matches=self.TEXT, layers=1)
        assert set(METHOD.evaluate(result, tiny_context(candidate))) == {"hidden", "q", "soft", "hard"}

    @pytest.mark.parametrize(("layers", "numbers"), [(1, [1, 0, [1, 1]]), (3, [3, 2, [1, 3]])])
    def test_the_last_layer_is_that_of_any_student(self, layers, numbers):
        text = """
        - {teacher_layer: last, student_layer: last, loss: cos}
        - {teacher_layer: last, student_layer: last, feature: q, loss: mse}
        - {teacher_layer: [2, last], student_layer: [1, last], loss: nst}
        """
        params = params_for(BERT, matches=text, layers=layers)
        found = _matches(params, 12, layers)
        assert [match.student_layer for match in found] == numbers
        assert [match.teacher_layer for match in found] == [12, 11, [2, 12]]
        assert not METHOD.faults(BERT, params)

    def test_a_layer_the_student_has_not_is_refused_before_any_training(self):
        candidate = tiny_candidate()
        context = tiny_context(candidate, dry=True)
        with pytest.raises(TrialError, match="student_layer 2 does not exist"):
            applied(candidate, context, matches="- {student_layer: 2}", layers=1)
        assert context.fits == []

    PHASED = "- {teacher_layer: 4, student_layer: 2, phase: 1}\n- {teacher_layer: 2, student_layer: 1, phase: 2}"

    @pytest.mark.parametrize("width", [1.0, 0.5])
    @pytest.mark.parametrize("phases", ["auto", "two_phase"])
    def test_their_phases_are_kept_to_at_any_width(self, phases, width):
        candidate, matches = tiny_candidate(), self.PHASED
        if width < 1:
            matches = matches.replace("phase", "proj: linear, phase")
        context = tiny_context(candidate, steps=10)
        result = applied(candidate, context, matches=matches, phases=phases, width=width, layers=2)
        assert context.fits == [5, 5]
        assert set(METHOD.evaluate(result, context)) == {"hidden", "soft", "hard"}

    def test_without_phases_of_their_own_they_go_by_the_width(self):
        assert params_for(BERT, matches="- {}")["phases"] == "joint"
        assert params_for(BERT, matches="- {proj: linear}", width=0.5)["phases"] == "two_phase"

    def test_phases_are_not_silently_joined(self):
        candidate = tiny_candidate()
        context = tiny_context(candidate, dry=True)
        with pytest.raises(
            TrialError, match="match 1 is of phase 1, and phases is joint: expected auto or two_phase"
        ):
            applied(candidate, context, matches=self.PHASED, phases="joint", layers=2)
        assert context.fits == []

    @pytest.mark.parametrize("phase", [1, 2])
    def test_a_phase_without_a_term_is_none(self, phase):
        candidate = tiny_candidate()
        context = tiny_context(candidate, steps=10)
        nothing = {"hard_weight": 0.0, "logit_weight": 0.0, "layers": 2}
        params = params_for(candidate.subject, matches=f"- {{phase: {phase}}}", **nothing)
        assert "matching_fraction" not in params
        METHOD.apply(candidate, params, context)
        assert context.fits == [10]

    def test_text_is_any_text_that_its_check_lets_pass(self):
        dim = METHOD.search_space(BERT)["matches"]
        assert narrow(dim, self.TEXT).default == self.TEXT
        with pytest.raises(ValueError, match="expected text"):
            narrow(dim, 3)


def test_what_cannot_be_trained_on_is_a_fault_of_the_matches():
    subject = tiny_candidate().subject
    for changes, told in (
        (
            {"matches": "- {teacher_layer: 4, student_layer: 2, phase: 1}", "phases": "joint"},
            "match 1 is of phase 1",
        ),
        ({"matches": "- {teacher_layer: 4, student_layer: 3}"}, "student_layer 3 does not exist"),
        ({"matches": "- {teacher_layer: 5, student_layer: 2}"}, "teacher_layer 5 does not exist"),
    ):
        fault = METHOD.faults(subject, params_for(subject, **changes))
        assert fault.keys() == {"matches"}
        assert told in fault["matches"]


class TestInGeneral:
    """What a phase before the task is settled to, and which language models it refuses."""

    SPOKEN = "- {student_layer: 2, teacher_layer: 4, phase: general}"

    def subject(self, *traits, family="bert"):
        return tiny_candidate(family).subject.having("masked-lm", "unlabelled", *traits)

    def faults(self, subject, **changes):
        return METHOD.faults(subject, settled(METHOD, subject, layers=2, **changes))

    def test_each_phase_has_its_own_matches_and_its_part_of_the_budget(self):
        candidate = tiny_candidate().replace(subject=self.subject())
        context = tiny_context(candidate, steps=20)
        matches = """
        - {feature: q, loss: mse, phase: general}
        - {student_layer: 2, teacher_layer: 4, phase: 1}
        - {feature: v, loss: mse, phase: [general, 2]}
        """
        written = {"general": "text", "general_fraction": 0.5, "matching_fraction": 0.4}
        params = settled(METHOD, candidate.subject, layers=2, matches=matches, **written)
        terms = METHOD.evaluate(METHOD.apply(candidate, params, context), context)
        assert set(terms) == {"general_q", "general_v", "hidden", "v", "soft", "hard"}
        assert context.fits == [10, 4, 6]

    @pytest.mark.parametrize(
        ("traits", "written", "drawn"),
        [
            (("masked-lm",), {}, "training_batches"),
            (("unlabelled",), {}, "unlabelled"),
            (("masked-lm", "unlabelled"), {}, "unlabelled"),
            (("masked-lm", "unlabelled"), {"general_unlabelled": False}, "training_batches"),
        ],
    )
    def test_it_is_on_text_without_labels_where_there_is_some_and_no_label_is_seen(self, traits, written, drawn):
        candidate = tiny_candidate()
        candidate = candidate.replace(subject=candidate.subject.having(*traits))
        context, asked, seen = tiny_context(candidate), [], []
        if "masked-lm" not in traits:
            context.masked_lm = lambda: None
        for name in ("unlabelled", "training_batches"):
            own = getattr(context, name)
            setattr(context, name, lambda *size, own=own, name=name: (asked.append(name), own(*size))[1])
        fit = context.fit

        def watched(network, **options):
            seen.append(options["batches"] and next(options["batches"]))
            fit(network, **options)

        context.fit = watched
        METHOD.apply(candidate, settled(METHOD, candidate.subject, general="text", **written), context)
        assert asked == [drawn]
        assert set(seen[0]) == {"input_ids", "attention_mask", "token_type_ids"}

    def test_alone_it_has_the_whole_budget(self):
        candidate = tiny_candidate().replace(subject=self.subject())
        context = tiny_context(candidate, steps=10)
        nothing = {"hard_weight": 0.0, "logit_weight": 0.0}
        params = settled(METHOD, candidate.subject, layers=2, general="text", matches=self.SPOKEN, **nothing)
        assert not {"general_fraction", "matching_fraction"} & params.keys()
        assert METHOD.evaluate(METHOD.apply(candidate, params, context), context).keys() == {"general_hidden"}
        assert context.fits == [10]

    @pytest.mark.parametrize("rate", [0.0, 0.5])
    def test_matches_are_left_out_there_too(self, rate):
        candidate = tiny_candidate().replace(subject=self.subject())
        context, losses = tiny_context(candidate), []
        fit = context.fit
        context.fit = lambda network, **options: (losses.append(options["loss"]), fit(network, **options))
        params = settled(METHOD, candidate.subject, layers=2, general="text", layer_dropout=rate)
        METHOD.apply(candidate, params, context)
        assert [loss.choose is not None for loss in losses] == [bool(rate)] * 2

    @pytest.mark.parametrize(("general", "computed"), [("text", False), ("masked_text", True)])
    def test_a_vocabularys_logits_are_computed_where_a_term_is_of_them(self, general, computed):
        candidate = tiny_candidate().replace(subject=self.subject())
        context, calls = tiny_context(candidate), []
        models = [context.masked_lm()]
        models[0].get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))
        context.masked_lm = lambda: models[0]
        METHOD.apply(candidate, settled(METHOD, candidate.subject, layers=2, general=general), context)
        assert bool(calls) == computed

    def test_classes_of_a_vocabulary_are_there_where_the_task_has_none(self):
        candidate = tiny_candidate(task="text-regression")
        candidate = candidate.replace(subject=candidate.subject.having("masked-lm"))
        answers = "- {feature: logits, loss: kd_kl, phase: PHASE}"
        for phase, fault in (("general", None), ("all", "kd_kl compares classes, and the task has none")):
            matches = answers.replace("PHASE", phase)
            params = settled(METHOD, candidate.subject, layers=2, general="text", matches=matches)
            assert (fault or "") in METHOD.faults(candidate.subject, params).get("matches", "")
            assert bool(METHOD.faults(candidate.subject, params)) == bool(fault)
            if not fault:
                METHOD.apply(candidate, params, tiny_context(candidate))

    def test_a_language_model_that_cannot_be_compared_is_refused_before_any_training(self):
        candidate = tiny_candidate().replace(subject=self.subject())
        context = tiny_context(candidate)
        context.masked_lm = tiny_context(tiny_candidate(hidden=16)).masked_lm
        with pytest.raises(TrialError, match="match 1: hidden_mse cannot compare widths 32 and 16"):
            METHOD.apply(candidate, settled(METHOD, candidate.subject, layers=2, general="text"), context)
        assert context.fits == []

    def test_where_no_match_is_of_the_task_its_phases_are_one(self):
        found = [
            settled(METHOD, self.subject(), general="text", matches=self.SPOKEN, phases=phases, width=width)
            for width in (1.0, 0.5)
            for phases in ("auto", "joint", "two_phase")
        ]
        assert {params["phases"] for params in found} == {"joint"}
        assert found[0] == found[1] == found[2]

    def test_matches_alone_are_one_phase_unless_the_first_has_other_text(self):
        nothing = {"hard_weight": 0.0, "logit_weight": 0.0, "phases": "two_phase"}
        assert settled(METHOD, self.subject(), **nothing) == settled(
            METHOD, self.subject(), **{**nothing, "phases": "joint"}
        )
        assert settled(METHOD, self.subject(), **nothing, unlabelled_text=True)["phases"] == "two_phase"

    def test_a_phase_without_a_term_is_left_out(self):
        matches = "- {student_layer: 2, teacher_layer: 4, phase: 1}"
        assert settled(METHOD, self.subject(), general="text", matches=matches)["general"] == "none"
        words = settled(METHOD, self.subject(), general="masked_text", matches=matches)
        assert (words["general"], words["mlm_weight"]) == ("masked_text", 1.0)

    @pytest.mark.parametrize(
        ("changes", "rate"),
        [
            ({"matches": "- {}"}, 0.0),
            ({"matches": "- {}\n- {}"}, 0.5),
            ({"matches": "- {phase: 1}\n- {phase: 2}"}, 0.0),
            ({"matches": "- {phase: 1}\n- {phase: [1, 2]}"}, 0.5),
            ({"matches": "- {}\n- {phase: general}", "general": "text"}, 0.5),
            ({"matches": "- {phase: [1, 2]}\n- {phase: general}", "general": "text"}, 0.0),
            ({"layers": 1, "features": "hidden"}, 0.0),
            ({"layers": 1}, 0.5),
        ],
    )
    def test_the_only_match_of_a_step_is_never_left_out(self, changes, rate):
        assert settled(METHOD, self.subject(), layer_dropout=0.5, **changes)["layer_dropout"] == rate

    def test_a_language_model_of_another_family_has_no_head_for_the_student(self):
        subject = self.subject("masked-lm:family=roberta")
        assert not self.faults(subject, general="text")
        assert not self.faults(subject, general="masked_text", mlm_weight=0.0)
        assert "unlike the teacher: family roberta" in self.faults(subject, general="masked_text")["general"]
        answers = "- {feature: logits, loss: kd_kl, phase: general}"
        assert "general" in self.faults(subject, general="text", matches=answers)

    def test_nor_has_one_of_other_words(self):
        subject = self.subject("masked-lm:embedding_size=16", family="electra")
        assert not self.faults(subject, general="text")
        assert "embedding_size 16 and not 32" in self.faults(subject, general="masked_text")["general"]
        small = self.subject("student-start", "student-start:layers=2", "student-start:embedding_size=16")
        fault = self.faults(small, general="masked_text", start="checkpoint")["general"]
        assert "not as wide as the language model under whose head it would stand: set mlm_weight to 0" in fault

    @pytest.mark.parametrize("method", [METHOD, MiniLM(), TinyBert()])
    def test_pairs_are_read_by_one_that_can_tell_the_two_texts_apart(self, method):
        written = {"general_fraction": 0.5, "augment": False} if isinstance(method, TinyBert) else {"general": True}
        written = {"general": "text"} if method is METHOD else written
        for traits, fine in ((("pairs",), False), ((), True)):
            subject = self.subject("masked-lm:token_types=1", *traits)
            found = method.faults(subject, settled(method, subject, layers=2, **written))
            assert (not found) == fine, found

    @pytest.mark.parametrize(
        ("model", "message"),
        [
            (
                tiny_candidate("roberta"),
                "the student's family bert does not fit a language model's head for roberta",
            ),
            (tiny_candidate(hidden=16), "width 32 does not fit a language model's head for 16"),
        ],
    )
    def test_under_another_head_no_student_is_put(self, model, message):
        with pytest.raises(TrialError, match=message):
            under_language_head(tiny_candidate().network, tiny_context(model).masked_lm())


class TestObjective:
    def objective(self, candidate, **options):
        matching = Matching.between(
            [Match(student_layer=2, teacher_layer=4)], candidate.network, candidate.network, 0
        )
        return Objective(tiny_context(candidate), matching, SoftTerm(candidate.subject.task), **options)

    def test_is_the_weighted_sum_of_its_terms(self):
        candidate, batch = tiny_candidate(), next(tiny_batches(tiny_candidate()))
        objective = self.objective(candidate, soft_weight=0.5, hard_weight=2.0)
        student = tiny_candidate(seed=3).network
        total = objective(student, batch)
        terms = objective.report()
        assert set(terms) == {"hidden", "soft", "hard"}
        assert total.item() == pytest.approx(terms["hidden"] + 0.5 * terms["soft"] + 2 * terms["hard"], rel=1e-5)

    def test_without_labels_only_matches(self):
        candidate = tiny_candidate()
        batch = next(tiny_context(candidate).unlabelled(4))
        objective = self.objective(candidate)
        assert objective(tiny_candidate(seed=3).network, batch) > 0
        assert set(objective.report()) == {"hidden"}

    def test_weights_of_zero_are_not_computed(self):
        candidate = tiny_candidate()
        objective = self.objective(candidate, hard_weight=1.0)
        objective.context.teacher_logits = lambda batch: pytest.fail("asked for logits of weight 0")
        objective.matching = Matching(())
        batch = next(tiny_batches(candidate))
        loss = objective(candidate.network, batch)
        torch.testing.assert_close(loss, objective.context.task_loss(candidate.network, batch))

    @pytest.mark.parametrize(
        ("strategy", "layers", "choice"), [(EARTH_MOVER, 2, transported), (ALIGNED, 3, aligned)]
    )
    def test_a_step_has_the_matches_that_its_strategy_chooses(self, strategy, layers, choice):
        candidate, batch = tiny_candidate(layers=4), next(tiny_batches(tiny_candidate()))
        student = tiny_candidate(layers=layers, seed=3)
        params = params_for(candidate.subject, layers=layers, strategy=strategy, logit_weight=0.0)
        matches = strategic(params, layers, 4)
        matching = Matching.between(matches, student.network, candidate.network, 0)
        (objective,) = objectives(student, matching, {**params, "hard_weight": 0.0}, tiny_context(candidate))
        with torch.no_grad():
            ours = read_features(student.network, batch, matching.student_features)
            theirs = read_features(candidate.network, batch, matching.teacher_features)
            mask = batch["attention_mask"]
            shares = choice(matching, ours, theirs, mask)
            terms = {n: matching.term(n, ours, theirs, mask) for n in range(len(matches))}
            expected = matching.loss({n: share * terms[n] for n, share in shares.items()})
            torch.testing.assert_close(objective(student.network, batch), expected)
            assert matching.loss(terms) > 1.1 * expected, "it is not all of them"

    def test_dropout_leaves_out_other_matches_in_other_steps(self):
        candidate, batch = tiny_candidate(layers=4), next(tiny_batches(tiny_candidate()))
        student = tiny_candidate(layers=3, seed=3)
        params = params_for(candidate.subject, layers=3, layer_dropout=0.5, features="hidden", logit_weight=0.0)
        matching = Matching.between(strategic(params, 3, 4), student.network, candidate.network, 0)
        (objective,) = objectives(student, matching, {**params, "hard_weight": 0.0}, tiny_context(candidate))
        with torch.no_grad():
            steps = {round(float(objective(student.network, batch)), 5) for _ in range(20)}
            ours = read_features(student.network, batch, matching.student_features)
            theirs = read_features(candidate.network, batch, matching.teacher_features)
        assert len(steps) > 2
        assert max(steps) <= round(float(matching(ours, theirs, batch["attention_mask"])), 5)

    @pytest.mark.parametrize(
        ("schedule", "weights"),
        [("linear_growth", [0, 0.25, 0.5, 0.75]), ("linear_decay", [1, 0.75, 0.5, 0.25]), ("const", [1, 1, 1, 1])],
    )
    def test_a_matchs_weight_follows_its_schedule_through_the_training(self, schedule, weights):
        candidate, student, batch = (
            tiny_candidate(),
            tiny_candidate(seed=3).network,
            next(tiny_batches(tiny_candidate())),
        )
        matches = [Match(student_layer=2, teacher_layer=2, schedule=schedule)]
        objective = Objective(tiny_context(candidate), Matching.between(matches, student, student, 0))
        losses = []

        def fit(network, *, loss, on_step, **options):
            for step in range(4):
                on_step(step, 4)
                losses.append(loss(network, batch).item())

        objective.context.fit = fit
        objective.fit(student)
        assert losses == pytest.approx([weight * objective.report()["hidden"] for weight in weights])


class TestTraining:
    def test_phases_share_the_budget(self):
        candidate = tiny_candidate()
        context = tiny_context(candidate, steps=10)
        applied(candidate, context, width=0.5, matching_fraction=0.3)
        assert context.fits == [3, 7]
        context = tiny_context(candidate, steps=10)
        applied(candidate, context)
        assert context.fits == [10]

    def test_the_first_phase_leaves_the_head_alone_and_is_not_scored(self, monkeypatch):
        candidate = tiny_candidate()
        context, seen = tiny_context(candidate), []
        original = context.fit

        def watched(network, **options):
            before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
            original(network, **options)
            changed = {
                name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])
            }
            seen.append((options.get("scored", True), any(name.startswith("classifier") for name in changed)))

        monkeypatch.setattr(context, "fit", watched)
        applied(candidate, context, width=0.5)
        assert seen == [(False, False), (True, True)]

    def test_unlabelled_text_is_offered_and_used_where_there_is_some(self):
        candidate = tiny_candidate()
        assert "unlabelled_text" not in METHOD.search_space(candidate.subject)
        subject = candidate.subject.having("unlabelled")
        assert "unlabelled_text" in METHOD.search_space(subject)
        context = tiny_context(candidate)
        params = METHOD.effective(
            subject, {**defaults(METHOD.search_space(subject)), "phases": "two_phase", "unlabelled_text": True}
        )
        drawn, original = [], context.unlabelled
        context.unlabelled = lambda size: (drawn.append(size), original(size))[1]
        METHOD.apply(candidate.replace(subject=subject), params, context)
        assert drawn == [32]

    def test_nothing_of_the_training_stays_in_the_student(self):
        candidate = tiny_candidate()
        result = applied(candidate, width=0.5, features="embedding+hidden+attention")
        assert subject_of(result.network, "text-classification") == result.subject.without("lossy")
        assert result.subject.parameters == sum(p.numel() for p in result.network.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in result.network.modules())

    @pytest.mark.parametrize("task", ["text-regression", "token-classification"])
    @pytest.mark.parametrize("width", [1.0, 0.5])
    def test_every_task(self, task, width):
        candidate = tiny_candidate("roberta", task)
        result = applied(candidate, width=width)
        assert forward(result.network, next(tiny_batches(candidate))).isfinite().all()

    @pytest.mark.parametrize("width", [1.0, 0.5])
    def test_a_student_comes_nearer_to_its_teacher(self, width):
        candidate = tiny_candidate()
        held_out = next(tiny_batches(candidate, batch_size=128, seed=999))

        def distance(result):
            with torch.no_grad():
                ours, theirs = (forward(network, held_out) for network in (result.network, candidate.network))
                return (ours.softmax(-1) - theirs.softmax(-1)).abs().mean().item()

        changes = {"width": width, "learning_rate": 3e-3, "logit_weight": 10.0, "hard_weight": 0.01}
        start = applied(candidate, tiny_context(candidate, dry=True), **changes)
        trained = applied(candidate, tiny_context(candidate, steps=60, batch_size=16), **changes)
        assert distance(trained) < 0.8 * distance(start)

    def test_the_terms_are_reported_unweighted(self):
        candidate = tiny_candidate()
        context = tiny_context(candidate)
        light, heavy = (
            METHOD.evaluate(applied(candidate, context, hidden_weight=weight, learning_rate=1e-6), context)
            for weight in (0.01, 10.0)
        )
        assert set(light) == {"hidden", "attention_scores", "soft", "hard"}
        assert heavy["hidden"] == pytest.approx(light["hidden"], rel=0.2)

    def test_a_dry_run_reports_nothing(self):
        candidate = tiny_candidate()
        assert METHOD.evaluate(applied(candidate, tiny_context(candidate, dry=True)), tiny_context(candidate)) == {}

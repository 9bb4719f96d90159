"""How deep and wide a student can be, and what is said of one that would be no smaller or could not be compared."""

from __future__ import annotations

import optuna
import pytest
from compress_search_plugins.layer_match import LayerMatch
from compress_search_plugins.minilm import MiniLM
from compress_search_plugins.tinybert import TinyBert

from compress_search import StudyError, Subject, TrialError
from compress_search.driver import prepare
from compress_search.encoders import layers, subject_of
from compress_search.space import defaults, narrow
from compress_search.study import load_study
from compress_search.testing import tiny_candidate, tiny_context

METHODS = [LayerMatch(), MiniLM(), TinyBert()]
NAMES = ["layer_match", "minilm", "tinybert"]
BERT = Subject("bert", "text-classification", 12, 12, 64, 768, 3072, 30522, 512, 2, 2)


def settled(method, subject, **written):
    space = method.search_space(subject)
    fixed = {name: narrow(dim, written[name]) if name in written else dim for name, dim in space.items()}
    return method.effective(subject, defaults(fixed))


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
class TestFullDepth:
    def test_all_layers_can_stay_where_the_student_is_narrower(self, method):
        candidate = tiny_candidate(layers=3)
        params = settled(method, candidate.subject, layers=3, width=0.5)
        assert method.faults(candidate.subject, params) == {}
        result = method.apply(candidate, params, tiny_context(candidate))
        assert len(layers(result.network)) == 3
        assert subject_of(result.network, "text-classification") == result.subject.without("lossy")
        assert result.subject.hidden == 16

    def test_a_student_of_its_teachers_own_shape_is_none(self, method):
        faults = method.faults(BERT, settled(method, BERT, layers=12, width=1.0))
        assert faults == {
            "layers": "12 at the teacher's width is the teacher's own shape: "
            "expected fewer layers, or a width below 1"
        }
        assert method.faults(BERT, settled(method, BERT, layers=11, width=1.0)) == {}

    def test_where_no_student_can_be_narrower_all_are_shallower(self, method):
        subject = BERT.having(hidden=12 * 7, head_dim=7)
        assert max(method.search_space(subject)["layers"].distribution.choices) == 11


@pytest.mark.parametrize("method", NAMES)
def test_no_proposal_has_the_teachers_own_shape(method, tiny_study):
    plan = prepare(load_study(tiny_study(methods={method: {"use": True, "width": [1.0, 0.5]}}))).plan
    study, seen = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)), set()
    for _ in range(40):
        recipe = plan.propose(study.ask())
        seen |= {(step.params["layers"], step.params["width"]) for step in recipe.steps}
    depth = plan.teacher.layers
    assert (depth, 0.5) in seen
    assert (depth, 1.0) not in seen


@pytest.mark.parametrize("method", NAMES)
def test_a_study_that_leaves_no_other_is_refused(method, tiny_study):
    path = tiny_study(methods={method: {"use": True, "layers": 2, "width": 1.0}})
    with pytest.raises(StudyError, match=f"methods.{method}.layers: 2 at the teacher's width is the teacher's own"):
        prepare(load_study(path))


def test_a_written_map_of_all_layers_too():
    method = TinyBert()
    every = ",".join(map(str, range(1, 13)))
    assert set(method.faults(BERT, settled(method, BERT, custom_map=every))) == {"custom_map"}
    assert method.faults(BERT, settled(method, BERT, custom_map=every, width=0.5)) == {}


@pytest.mark.parametrize("method", [METHODS[0], METHODS[2]], ids=["layer_match", "tinybert"])
class TestNoProjection:
    def test_stays_what_was_asked_for_and_is_refused_where_it_cannot_be(self, method):
        candidate = tiny_candidate()
        params = settled(method, candidate.subject, projection="none", width=0.5)
        assert params["projection"] == "none"
        [(name, fault)] = method.faults(candidate.subject, params).items()
        assert name == "projection"
        assert fault.startswith("none, and the student's states are narrower than its teacher's")
        context = tiny_context(candidate)
        with pytest.raises(TrialError, match="cannot compare widths 16 and 32"):
            method.apply(candidate, params, context)
        assert context.fits == []

    def test_is_one_at_the_teachers_width(self, method):
        params = settled(method, BERT, projection="none")
        assert method.faults(BERT, params) == {}
        assert "projection_learning_rate" not in params


def test_attention_alone_needs_no_projection():
    method = LayerMatch()
    params = settled(method, BERT, projection="none", width=0.5, features="attention")
    assert method.faults(BERT, params) == {}


@pytest.mark.parametrize("method", ["layer_match", "tinybert"])
def test_a_study_with_narrow_students_and_no_projection_is_refused(method, tiny_study):
    states = {"features": "hidden"} if method == "layer_match" else {}
    path = tiny_study(methods={method: {"use": True, "projection": "none", "width": 0.5, **states}})
    with pytest.raises(
        StudyError, match=f"methods.{method}.projection: none, and the student's states are narrower"
    ):
        prepare(load_study(path))

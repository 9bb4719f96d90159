"""How deep and wide a student can be, and what is said of one that would be no smaller or could not be compared."""

from __future__ import annotations

import optuna
import pytest
from compress_search_plugins.layer_match import LayerMatch
from compress_search_plugins.minilm import MiniLM
from compress_search_plugins.tinybert import TinyBert
from hypothesis import given
from hypothesis import strategies as st

from compress_search import StudyError, Subject, TrialError
from compress_search.driver import prepare
from compress_search.encoders import layers, subject_of
from compress_search.space import defaults, fix_experts, narrow
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
        odd = BERT.having(hidden=12 * 7, head_dim=7)  # no quarter of which leaves heads of even size
        assert max(fix_experts(method.search_space(odd))["layers"].distribution.choices) == 11
        assert method.search_space(odd)["layers"].contains(12)  # at a width that a study names
        one = BERT.having(hidden=12, head_dim=1)
        assert not method.search_space(one)["layers"].contains(12)


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
class TestAnyWidth:
    def test_tinyberts_own_is_one(self, method):
        params = settled(method, BERT, layers=4, width=0.40625)
        assert method.effective(BERT, params) == params
        student = method.after(BERT, params)
        assert (student.hidden, student.head_dim, student.heads, student.intermediate) == (312, 26, 12, 1248)
        assert student.parameters == pytest.approx(
            14.35e6, rel=0.02
        )  # of TinyBERT-4, whose layers have 1200 neurons

    def test_quarters_are_searched_and_a_study_may_name_a_part_or_a_range(self, method):
        width = method.search_space(BERT)["width"]
        assert fix_experts({"width": width})["width"].distribution.choices == (1.0, 0.75, 0.5, 0.25)
        assert narrow(width, {"low": 0.3, "high": 0.6}).usual == ()
        assert fix_experts({"width": narrow(width, {"low": 0.3, "high": 0.6})})["width"].contains(0.41)

    @given(width=st.floats(0.2, 1.0), heads=st.sampled_from([1, 3, 4, 12]), size=st.integers(10, 64))
    def test_every_head_stays_and_is_whole(self, method, width, heads, size):
        subject = BERT.having(hidden=heads * size, head_dim=size, heads=heads)
        params = settled(method, subject, layers=2, width=width)
        student = method.after(subject, params)
        assert student.heads == heads
        assert student.head_dim * heads == student.hidden
        assert method.search_space(subject)["width"].contains(params["width"])
        assert abs(student.hidden - width * subject.hidden) <= heads + 1e-9
        assert (params["width"] == 1) == (width == 1)

    def test_a_student_of_heads_of_odd_size_is_trained(self, method):
        candidate = tiny_candidate(layers=3)
        params = settled(method, candidate.subject, layers=2, width=0.66)
        assert params["width"] == 20 / 32
        result = method.apply(candidate, params, tiny_context(candidate))
        assert subject_of(result.network, "text-classification") == result.subject.without("lossy")
        assert (result.subject.hidden, result.subject.head_dim) == (20, 5)


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

"""The table of formats: what a study may combine, what each machine is offered, and what is refused in one line."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import optuna
import pytest
from compress_search_plugins.precision.number_formats import BLOCKS, FORMATS, Setting
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from compress_search import Candidate, Params, TrialError
from compress_search.runtimes import Artifact, load_runner
from compress_search.runtimes.lowering import lower
from compress_search.space import Dim, defaults, fix_experts, narrow, suggest
from compress_search.testing import tiny_context
from tests.quantized import CLASSIFICATION, CODEBOOKS, INT8, METHOD, PACKED, distinct, feed_of, params

SUBJECT = distinct(layers=2).subject


def choices(dim: Dim) -> tuple[Any, ...]:
    return tuple(dim.distribution.choices)  # type: ignore[attr-defined]


def timed(*kernels: str) -> Any:
    return SUBJECT.having("timed", *(f"kernel:{name}" for name in kernels))


def test_every_format_is_there_for_a_study_of_size_and_few_are_searched() -> None:
    space = METHOD.search_space(SUBJECT)
    assert set(choices(space["weight_bits"])) == {32, 16, 8, 4, 2, 1}
    assert choices(space["scheme"]) == ("dynamic_int8", "static_int8", "weight_only")
    assert choices(space["float_type"]) == ("bf16", "fp16")
    assert choices(space["codebook"]) == ("uniform", "ternary")
    searched = {name: choices(dim) for name, dim in fix_experts(space).items() if not dim.fixed}
    assert searched == {
        "weight_bits": (8, 4),
        "scheme": ("dynamic_int8", "static_int8"),
        "codebook": ("uniform", "ternary"),  # with two bits only, which a study has to name
        "group_size": (32, 64, 128),
        "embedding_bits": (32, 8, 4),
    }


@pytest.mark.parametrize(
    ("kernels", "bits", "searched"),
    [
        (("int8",), {8, 32}, (8,)),
        (("int8", "weight-only"), {8, 4, 32}, (8,)),
        (("int8", "weight-only", "weight-only-2", "bf16"), {8, 4, 2, 16, 32}, (8,)),
        (("weight-only",), {8, 4, 32}, (8, 4)),
        (("bf16",), {16, 32}, (16,)),
        (("bf16", "fp16"), {16, 32}, (16,)),
    ],
)
def test_only_real_kernels_are_offered_where_time_counts(
    kernels: tuple[str, ...], bits: set[int], searched: tuple[int, ...]
) -> None:
    space = METHOD.search_space(timed(*kernels))
    assert set(choices(space["weight_bits"])) == bits
    assert choices(fix_experts(space)["weight_bits"]) == searched
    assert ("group_size" in space) == ("weight-only" in kernels)
    assert ("calibration" in space) == ("int8" in kernels)
    assert ("codebook" in space) == ("weight-only-2" in kernels)


def test_what_time_takes_away_needs_a_kernel() -> None:
    needs = METHOD.missing(timed("int8", "bf16"))
    assert {"group_size", "codebook", "weight_bits: 4", "weight_bits: 1", "float_type: fp16"} <= needs.keys()
    assert needs.keys() & {"weight_bits: 16", "float_type: bf16", "scheme", "scheme: dynamic_int8"} == set()
    assert set(needs.values()) == {"a kernel that is real here, as time counts: see compress-search doctor"}
    assert METHOD.missing(SUBJECT) == {}


def test_a_timed_study_searches_integer_schemes_and_embeddings() -> None:
    space = fix_experts(METHOD.search_space(timed("int8", "int8-exact", "weight-only", "bf16")))
    assert {name for name, dim in space.items() if not dim.fixed} == {"scheme", "embedding_bits"}
    chosen = METHOD.effective(SUBJECT, defaults(space))
    assert (chosen["weight_bits"], chosen["scheme"]) == (8, "dynamic_int8"), "the baseline of every study"


def test_where_size_counts_too_packed_weights_are_searched_beside_them() -> None:
    space = fix_experts(METHOD.search_space(timed("int8", "weight-only", "bf16").having("sized")))
    assert choices(space["weight_bits"]) == (8, 4)
    assert not space["group_size"].fixed
    space = fix_experts(METHOD.search_space(timed("int8").having("sized")))
    assert space["weight_bits"].fixed


def test_recurrent_cells_have_no_smaller_form() -> None:
    assert "recurrent" in str(METHOD.unsupported(SUBJECT.having("recurrent")))


def test_without_a_real_kernel_it_cannot_follow() -> None:
    assert METHOD.unsupported(SUBJECT) is None
    assert METHOD.search_space(timed()) == {}
    assert "as fast as float32" in str(METHOD.unsupported(timed()))


@pytest.mark.parametrize("kernels", [("int8",), ("int8", "int8-exact"), ()])
def test_seven_bits_are_the_default_where_eight_saturate(kernels: tuple[str, ...]) -> None:
    subject = SUBJECT.having(*(f"kernel:{name}" for name in kernels))
    assert METHOD.search_space(subject)["reduce_range"].default is (kernels == ("int8",))


@pytest.mark.parametrize("size", [512, 8, 48])
def test_group_sizes_that_decode_wrongly_are_never_proposed_and_refused_by_name(size: int) -> None:
    dim = METHOD.search_space(SUBJECT)["group_size"]
    allowed = "expected one of 16, 32, 64, 128, 256"
    assert choices(dim) == BLOCKS
    with pytest.raises(ValueError, match=f"{size} is outside the space: {allowed}"):
        narrow(dim, size)
    context = tiny_context(distinct(layers=1))
    with pytest.raises(TrialError, match=f"group_size is {size}: {allowed}"):
        METHOD.apply(distinct(layers=1), params("weight_only 4", group_size=size, qat=True), context)
    assert context.fits == [], "before any training"


@pytest.mark.parametrize(
    ("kernels", "chosen", "message"),
    [
        (("int8",), {"weight_bits": 16, "float_type": "fp16"}, "weight_bits is 16: expected one of 8, 32"),
        (("int8", "bf16"), {"weight_bits": 16, "float_type": "fp16"}, "float_type is 'fp16': expected one of bf16"),
        (("int8",), CODEBOOKS["binary"], "weight_bits is 1: expected one of 8, 32"),
        (("weight-only", "weight-only-2"), CODEBOOKS["ternary"], "codebook is 'ternary': expected one of uniform"),
        (("weight-only",), {"weight_bits": 8}, None),
        (
            ("weight-only",),
            {"weight_bits": 8, "scheme": "dynamic_int8"},
            "scheme is 'dynamic_int8': expected one of weight_only",
        ),
        ((), {"weight_bits": 8}, "weight_bits means nothing here"),
    ],
)
def test_what_has_no_kernel_is_refused_where_time_counts(
    kernels: tuple[str, ...], chosen: Params, message: str | None
) -> None:
    candidate = distinct(layers=1)
    candidate = candidate.replace(subject=timed(*kernels))
    if message is None:
        message = "dynamic_int8 has no kernel that is real on this machine"
    with pytest.raises(TrialError, match=message) as caught:
        METHOD.apply(candidate, chosen, tiny_context(distinct(layers=1)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"weight_bits": 3}, "weight_bits is 3: expected one of 8, 16, 4, 2, 1, 32"),
        (params("dynamic_int8", embedding_bits=2), "embedding_bits is 2: expected one of 32, 16, 8, 4"),
        (params("dynamic_int8", blocks=2), "blocks means nothing here: expected some of weight_bits, scheme"),
    ],
)
def test_what_no_study_can_ask_for_is_refused(chosen: Params, message: str) -> None:
    with pytest.raises(TrialError, match=message):
        METHOD.apply(distinct(layers=1), chosen, tiny_context(distinct(layers=1)))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"group_size": 16}, "group_size: 16 has no kernel at 2 bits: expected one of 32, 64, 128"),
        ({"group_size": 256}, "group_size: 256 has no kernel at 2 bits: expected one of 32, 64, 128"),
        ({"accuracy_level": 0}, "accuracy_level: 0 has no kernel at 2 bits: expected 4"),
    ],
)
def test_two_bits_in_groups_without_a_kernel_are_refused_and_not_replaced(changes: Params, fault: str) -> None:
    asked = {**params("weight_only 2", **changes)}
    effective = METHOD.effective(SUBJECT, asked)
    assert effective == asked
    assert [f"{name}: {what}" for name, what in METHOD.faults(SUBJECT, effective).items()] == [fault]
    with pytest.raises(TrialError, match=fault):
        METHOD.apply(distinct(layers=1), asked, tiny_context(distinct(layers=1)))


@pytest.mark.parametrize("name", [*PACKED, *INT8, *CODEBOOKS])
def test_other_formats_take_every_group_or_have_none(name: str) -> None:
    sizes = (32, 64, 128) if name == "weight_only 2" else BLOCKS
    for size in sizes:
        assert METHOD.faults(SUBJECT, METHOD.effective(SUBJECT, params(name, group_size=size))) == {}


@pytest.mark.parametrize(
    ("name", "unused"),
    [
        ("dynamic_int8", {"group_size": 128, "accuracy_level": 0, "calibration": "entropy", "qat_kd": False}),
        ("weight_only 4", {"reduce_range": True, "granularity": "per_tensor", "calibration_examples": 33}),
        ("ternary", {"qat": True, "group_size": 16, "accuracy_level": 0}),
    ],
)
def test_recipes_that_do_the_same_are_the_same(name: str, unused: Params) -> None:
    assert METHOD.effective(SUBJECT, params(name, **unused)) == METHOD.effective(SUBJECT, params(name))
    assert METHOD.effective(SUBJECT, params(name)) == params(name)


def test_training_and_ranking_make_their_parameters_matter() -> None:
    settings_of_training = {"qat_kd": False, "learning_rate": 1e-4}
    trained = params("weight_only 4", qat=True, **settings_of_training)
    assert METHOD.effective(SUBJECT, trained) == trained
    assert METHOD.effective(SUBJECT, trained | {"qat_features": "two_stage"}) == trained, "what nobody learns from"
    ranked = params("weight_only 4", high_precision_layers=2, calibration_examples=64)
    assert METHOD.effective(SUBJECT, ranked) == ranked


def test_ternary_and_binary_weights_are_simulated() -> None:
    assert {format.name for format in FORMATS if format.simulated} == {"ternary", "binary"}
    candidate = distinct(layers=1)
    for name in ("ternary", "weight_only 2"):
        result = METHOD.apply(candidate, params(name), tiny_context(candidate))
        assert result.simulated == (name == "ternary")


@pytest.mark.parametrize(
    ("name", "features"), [("dynamic_int8", "last_hidden"), ("ternary", "two_stage"), ("binary", "two_stage")]
)
def test_ternary_and_binary_networks_learn_in_two_stages_unless_told_otherwise(name: str, features: str) -> None:
    chosen = params(name, qat_kd=True, **({"qat": True} if name == "dynamic_int8" else {}))
    assert METHOD.effective(SUBJECT, {**chosen, "qat_features": "auto"})["qat_features"] == features
    for asked in ("none", "last_hidden", "two_stage"):
        assert METHOD.effective(SUBJECT, {**chosen, "qat_features": asked})["qat_features"] == asked


@cache
def two_layers() -> Candidate:
    return distinct(layers=2)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=8, deadline=None)
def test_every_point_of_the_space_applies_and_runs(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    candidate = two_layers()
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed)).ask()
    chosen = suggest(trial, "quantization", METHOD.search_space(candidate.subject))
    effective = METHOD.effective(candidate.subject, chosen)
    assert METHOD.effective(candidate.subject, effective) == effective
    assume(not METHOD.faults(candidate.subject, effective))
    context = tiny_context(candidate, steps=2)
    result = METHOD.apply(candidate, effective, context)
    assert result.subject == METHOD.after(candidate.subject, effective)
    assert METHOD.trains(effective) == bool(context.fits)
    artifact = tmp_path_factory.mktemp("point") / "artifact"
    lower(result, artifact, CLASSIFICATION)
    assert np.isfinite(load_runner(artifact, 1)(feed_of(candidate))).all()
    assert Artifact.read(artifact).engine == ("torch" if effective["weight_bits"] == 16 else "onnxruntime")
    assert Artifact.read(artifact).simulated == Setting.of(effective).simulated

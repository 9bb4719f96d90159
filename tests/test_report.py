"""The report document: what is derived from rows, its schema, CSV, the page and the picture."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import distribution_to_json
from rich.console import Console

from compress_search import formats
from compress_search.errors import CompressSearchError, NothingFeasible
from compress_search.report import (
    Report,
    build_report,
    hypervolume_history,
    page,
    terminal,
    to_csv,
    wording,
)
from compress_search.report.reading import entry_of, kernels, reference_point, searched
from compress_search.space import Dim
from tests.sample_report import TEACHER, baseline, entries, entry, facts, sample, teacher

HOSTILE = "<script>alert('x')</script>&\"[red]"


def report_of(*trials: Any, **changes: Any) -> Report:
    return build_report(facts(**changes), trials)


# ---- what is derived ---------------------------------------------------------------------------------------------


def test_the_front_holds_what_nothing_dominates_best_score_first() -> None:
    found = report_of(entry(0, 0.80, 5), entry(1, 0.90, 9), entry(2, 0.79, 6), entry(3, 0.85, 7), constraints={})
    assert found.front == [1, 3, 0]
    assert [trial.on_front for trial in found.trials] == [True, True, False, True]


def test_only_complete_trials_within_the_constraints_are_on_the_front() -> None:
    stopped = entry(1, 0.99, 1, state="stopped")
    found = report_of(entry(0, 0.80, 5), stopped, entry(2, 0.87, 9), constraints={"accuracy": ">= 0.85"})
    assert found.front == [2]


def test_a_trial_without_a_value_for_an_objective_is_not_on_the_front() -> None:
    found = report_of(entry(0, metrics={"accuracy": 0.99}), entry(1, 0.8, 5), constraints={})
    assert found.front == [1]


def test_baselines_compete_and_are_listed() -> None:
    found = report_of(teacher(), baseline(), entry(2, 0.80, 10.0))
    assert found.front == [0, 1]
    assert [(one.name, one.number) for one in found.baselines] == [("teacher", 0), ("teacher_int8", 1)]
    assert found.teacher["latency_ms"] == TEACHER["latency_ms"]


def test_overlapping_intervals_cannot_be_told_apart() -> None:
    found = report_of(entry(0, 0.870, 8.0), entry(1, 0.866, 7.9), entry(2, 0.80, 2.0), constraints={})
    assert [trial.alike for trial in found.trials] == [[1], [0], []]


def test_a_bound_on_the_drop_leaves_the_speed_to_be_improved() -> None:
    trials = [teacher(), entry(1, 0.88, 12), entry(2, 0.86, 6), entry(3, 0.80, 2)]
    assert report_of(*trials, constraints={"accuracy_drop": "<= 0.03"}).recommended == 2
    assert report_of(*trials, constraints={"latency_ms": "<= 13"}).recommended == 1


def test_the_teacher_is_never_recommended() -> None:
    found = report_of(teacher(), entry(1, 0.80, 30.0), constraints={})
    assert found.front == [0]
    assert found.recommended is None


def test_the_hypervolume_is_the_area_up_to_the_reference_point() -> None:
    found = report_of(entry(0, 0.8, 10), constraints={}, reference_point={"accuracy": 0.5, "latency_ms": 26})
    assert found.hypervolume == pytest.approx(0.3 * 16)


def test_the_hypervolume_is_unknown_before_the_reference_point_is() -> None:
    assert report_of(entry(0), reference_point={}).hypervolume is None
    assert hypervolume_history(report_of(entry(0), reference_point={"accuracy": 0.5})) == []


def test_the_hypervolume_never_falls_and_ends_at_the_reports() -> None:
    found = sample()
    volumes = [volume for _, volume in hypervolume_history(found)]
    assert volumes == sorted(volumes)
    assert volumes[-1] == found.hypervolume


def test_the_reference_point_is_worse_than_the_teacher_and_no_better_than_a_constant() -> None:
    objectives = {"accuracy": "maximize", "latency_ms": "minimize", "throughput": "maximize"}
    frozen = {"metrics": {"accuracy": 0.9, "latency_ms": 20, "throughput": 55.0}, "constant": {"accuracy": 0.5}}
    point = reference_point(objectives, "text-classification", frozen)
    assert point == pytest.approx({"accuracy": 0.5, "latency_ms": 22, "throughput": 50})
    assert reference_point(objectives, "text-classification", {}) == {}


def test_failures_are_grouped_by_reason() -> None:
    said = "error: layer_match: match 1: expected {linear}, got {'kind': 'conv'}"
    failed = [entry(number, state="failed", metrics={}, error=said) for number in (1, 2)]
    found = report_of(*failed, entry(3, state="failed", error="nan: the loss is not finite"))
    assert wording.failures(found) == [
        (said, [1, 2]),
        ("nan: the loss is not finite", [3]),
    ]


# ---- in words ----------------------------------------------------------------------------------------------------


def test_the_recommendation_says_what_is_gained_and_lost_with_its_interval() -> None:
    found = report_of(teacher(), entry(1, 0.878, 8.0))
    assert wording.recommendation(found) == (
        "Choose trial 1: 3.0× faster, −0.6 points accuracy (95 % CI −1.1 … −0.1), 20.0 MB instead of 91.2 MB."
    )


def test_results_without_an_interval_of_what_is_lost_go_by_their_scores() -> None:
    old = {"intervals": {"accuracy": (0.87, 0.92)}}
    new = {"intervals": {"accuracy": (0.87, 0.92), "accuracy_drop": (-0.002, 0.012)}}
    trials = [teacher(), entry(1, 0.883, 2, **old), entry(2, 0.8835, 6, **new)]
    assert report_of(*trials, constraints={}).recommended == 1


def test_without_a_bound_on_the_score_the_fastest_that_holds_up_is_recommended() -> None:
    level = {"intervals": {"accuracy": (0.87, 0.92), "accuracy_drop": (-0.01, 0.01)}}
    worse = {"intervals": {"accuracy": (0.75, 0.92), "accuracy_drop": (0.07, 0.12)}}
    trials = [teacher(), entry(1, 0.90, 9, **level), entry(2, 0.89, 6, **level), entry(3, 0.78, 2, **worse)]
    assert TEACHER["accuracy"] <= 0.92, "inside the interval of all: what is lost decides"
    assert report_of(*trials, constraints={}).recommended == 2
    assert report_of(trials[0], trials[3], constraints={}).recommended == 3  # nothing holds up: the knee
    assert report_of(*trials, constraints={"accuracy": ">= 0.7"}).recommended == 3  # what the study says is enough


def test_when_nothing_meets_the_constraints_the_closest_is_named() -> None:
    found = report_of(teacher(), entry(1, 0.70, 3), entry(2, 0.80, 5), constraints={"accuracy": ">= 0.95"})
    text = wording.recommendation(found)
    assert text.startswith("Nothing meets the constraints; the closest: trial 2, theseus")
    assert text.index("80.0 % against ≥ 95.0 %") < text.index("trial 1") < text.index("70.0 % against ≥ 95.0 %")
    with pytest.raises(NothingFeasible, match="trial 2"):
        wording.require_result(found)


REJECTED = [entry(n, 0.0, ms, state="infeasible") for n, ms in ((2, 9.0), (3, 7.0))]


@pytest.mark.parametrize(
    ("trials", "bound", "named"),
    [
        ([teacher(), baseline(), entry(2, 0.80, 5), entry(3, 0.70, 3)], {"accuracy": ">= 0.9"}, [1, 2, 3]),
        ([teacher(), baseline(), entry(4, 0.80, 5), *REJECTED], {"latency_ms": "<= 1"}, [4, 1, 3]),
        ([teacher(), baseline(), *REJECTED], {"latency_ms": "<= 1"}, [1, 3, 2]),
        ([teacher(), *REJECTED], {"latency_ms": "<= 1"}, [3, 2]),
        ([teacher(), baseline(), entry(2, 0.80, 5)], {"accuracy": ">= 0.883"}, [1, 2]),
    ],
)
def test_the_closest_are_the_same_wherever_they_are_named(trials: list[Any], bound: Any, named: list[int]) -> None:
    """Complete trials, the int8 baseline among them, go before those whose shapes alone were measured."""
    found = report_of(*trials, constraints=bound, searched=["theseus.block_size"])
    with pytest.raises(NothingFeasible) as caught:
        wording.require_result(found)
    assert str(caught.value) == wording.recommendation(found)
    assert [int(number) for number in re.findall(r"trial (\d+),", str(caught.value))] == named
    assert "schedule" not in str(caught.value), "parameters that the study did not search are left out"
    assert str(caught.value).startswith("Nothing but the teacher") == (named == [1, 2])


def test_an_int8_baseline_within_the_constraints_is_a_result() -> None:
    found = report_of(teacher(), baseline(), entry(2, 0.70, 3), constraints={"accuracy": ">= 0.88"})
    wording.require_result(found)  # raises nothing
    assert found.recommended == 1


def test_recipes_rejected_by_their_shapes_are_named_when_nothing_completed() -> None:
    trials = [teacher(), *(entry(n, 0.0, ms, state="infeasible") for n, ms in ((1, 9), (2, 7)))]
    found = report_of(*trials, constraints={"latency_ms": "<= 5"})
    with pytest.raises(NothingFeasible, match=r"closest: trial 2, .* 7.00 ms against ≤ 5.00 ms; trial 1"):
        wording.require_result(found)


@pytest.mark.parametrize("trials", [[], [teacher(), baseline()], [teacher(), entry(2, state="failed")]])
def test_a_study_in_which_nothing_completed_is_a_failure(trials: list[Any]) -> None:
    with pytest.raises(CompressSearchError, match="no trial completed") as caught:
        wording.require_result(report_of(*trials))
    assert caught.value.exit_code == 1


def test_a_study_with_a_feasible_trial_is_a_success() -> None:
    found = report_of(teacher(), entry(1, 0.87, 8))
    wording.require_result(found)  # raises nothing
    assert 1 in found.front


def test_a_recipe_is_shown_by_what_the_study_searched() -> None:
    found = report_of(teacher(), entry(1), searched=["theseus.block_size", "quantization.weight_bits"])
    assert wording.short(found.trial(1), found) == (
        "theseus(block_size=2) + structured_pruning + quantization(weight_bits=8)"
    )
    assert wording.short(found.trial(0), found) == "teacher"
    assert wording.steps(entry(1), report_of())[1] == "structured_pruning(ffn_ratio=0.5, head_ratio=0.25)"


def test_a_dimension_of_one_value_is_not_searched() -> None:
    dims = {
        "a.fixed": Dim.choice(["only"], "only"),
        "a.free": Dim.real(0, 1, 0.5),
        "b.flag": Dim.flag(False),
    }
    outline = {
        "dims": {name: [distribution_to_json(dim.distribution), dim.default, {}] for name, dim in dims.items()}
    }
    assert searched(outline) == ["a.free", "b.flag"]
    assert searched({}) == []


# ---- JSON and CSV ------------------------------------------------------------------------------------------------


def test_the_json_is_strict_and_reads_back_to_the_same_report() -> None:
    found = sample()
    text = found.to_json()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in the JSON"))
    assert Report.model_validate_json(text) == found


@given(st.dictionaries(st.sampled_from(["accuracy", "latency_ms", "x.y"]), st.floats()))
def test_values_that_are_not_finite_are_left_out(metrics: dict[str, float]) -> None:
    environment = {"flags": [math.nan], "deep": {"inf": -math.inf}}
    found = report_of(entry(0, metrics=metrics, intervals={"accuracy": (math.nan, 1.0)}), environment=environment)
    document = json.loads(found.to_json(), parse_constant=pytest.fail)
    assert document["trials"][0]["metrics"] == {k: v for k, v in metrics.items() if math.isfinite(v)}
    assert document["trials"][0]["intervals"] == {}
    assert document["environment"] == {"flags": [None], "deep": {"inf": None}}


def test_the_json_keeps_every_promised_key() -> None:
    document = json.loads(sample().to_json())
    assert next(iter(document)) == "schema_version"
    assert document["schema_version"] == 1
    promised = "study objectives teacher baselines reference_point hypervolume front recommended trials environment"
    assert set(promised.split()) <= set(document)
    promised = "number state recipe metrics intervals test on_front seconds attempts error"
    assert all(set(promised.split()) <= set(trial) for trial in document["trials"])
    assert document["trials"][2]["recipe"][0] == {
        "method": "theseus",
        "params": {"block_size": 2, "schedule": "linear"},
    }


def test_the_csv_parses_back() -> None:
    found = sample()
    rows = list(csv.DictReader(io.StringIO(to_csv(found))))
    assert [int(row["number"]) for row in rows] == [trial.number for trial in found.trials]
    for row, trial in zip(rows, found.trials, strict=True):
        assert json.loads(row["recipe"]) == [step.model_dump() for step in trial.recipe]
        assert (row["accuracy"] and float(row["accuracy"])) == trial.metrics.get("accuracy", "")
        assert row["on_front"] == str(trial.on_front)
    assert sum(row["recommended"] == "True" for row in rows) == 1
    assert rows[-1]["test_accuracy"] == "0.869"


def test_an_error_with_commas_quotes_and_newlines_stays_in_its_cell() -> None:
    found = report_of(entry(0, state="failed", error='oom: "a", b\nc'))
    (row,) = csv.DictReader(io.StringIO(to_csv(found)))
    assert row["error"] == 'oom: "a", b\nc'


# ---- numbers for people ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "value", "shown"),
    [
        ("accuracy", 0.9124, "91.2 %"),
        ("accuracy_drop", -0.006, "−0.6 points"),
        ("latency_ms", 12.345, "12.35 ms"),
        ("size_mb", 0.0421, "0.042 MB"),
        ("accuracy", 0.0, "0.0 %"),
        ("size_mb", 412.04, "412.0 MB"),
        ("speedup", 2.871, "2.87×"),
        ("mine.sparsity", 0.123456, "0.1235"),
        ("accuracy", math.nan, "–"),
        ("accuracy", None, "–"),
    ],
)
def test_numbers_carry_their_units(metric: str, value: float | None, shown: str) -> None:
    assert formats.number(metric, value, unit=True) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(1.234, "1.2 s"), (59.4, "59 s"), (59.7, "1 min"), (3599, "1 h"), (7500, "2 h 5 min"), (None, "–")],
)
def test_durations_have_at_most_two_units(seconds: float | None, shown: str) -> None:
    assert formats.duration(seconds) == shown


def test_an_interval_has_as_many_decimals_as_its_value() -> None:
    assert formats.with_interval("latency_ms", 0.0412, (0.04, 0.044)) == "0.041 ± 0.002"
    assert formats.with_interval("accuracy", 0.9, (0.88, 0.92)) == "90.0 ± 2.0"
    assert formats.with_interval("accuracy", 0.9, None) == "90.0"


def test_changes_carry_their_sign() -> None:
    assert formats.points(-0.006) == "−0.6 points"
    assert formats.points(0.0001) == "±0.0 points"
    assert formats.points(0.01) == "+1.0 point"
    assert formats.percent(0.35) == "−65 %"


# ---- drawn -------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Text outside scripts, the tags, and the data of the charts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.charts, self._inside = "", "", ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = "charts" if dict(attrs).get("id") == "charts" and tag == "script" else tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "charts":
            self.charts += data
        elif self._inside not in ("script", "style"):
            self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def drawn(found: Report, **changes: Any) -> Page:
    return Page(page.render_html(found, facts(**changes), "study.yaml"))


def test_the_page_shows_every_trial_and_the_recommendation() -> None:
    found = sample()
    shown = drawn(found)
    assert wording.recommendation(found) in shown.text
    assert f"compress-search export study.yaml {found.recommended}" in shown.text
    assert all(trial.text in shown.text for trial in found.trials)
    assert shown.count("table") == shown.count("caption") >= 4


def test_the_page_needs_nothing_but_itself() -> None:
    shown = drawn(sample())
    assert not [attrs for _, attrs in shown.tags if {"src", "href"} & set(attrs)]
    assert shown.count("link") == 0


def test_the_charts_hold_the_points_of_the_front_in_the_units_shown() -> None:
    found = sample()
    front, volume = json.loads(drawn(found).charts)
    traces = {trace["role"]: trace for trace in front["traces"]}
    assert traces["front"]["y"] == pytest.approx([100 * trial.metrics["accuracy"] for trial in found.members])
    assert traces["recommended"]["x"] == [found.trial(found.recommended or 0).metrics["latency_ms"]]
    assert traces["front"]["dy"][-1] == pytest.approx([1.1, 1.1])
    assert volume["traces"][0]["y"][-1] == pytest.approx(found.hypervolume)


def test_whatever_a_study_or_method_says_is_escaped() -> None:
    nasty = entry(
        1,
        recipe=[{"method": HOSTILE, "params": {HOSTILE: HOSTILE}}],
        baseline=HOSTILE,
        marks=[HOSTILE],
        metrics={"accuracy": 0.9, "latency_ms": 3.0, f"m.{HOSTILE}": 1.0},
    )
    failed = entry(2, state="failed", error=HOSTILE)
    found = report_of(nasty, failed, study=HOSTILE, constraints={}, environment={HOSTILE: HOSTILE})
    text = page.render_html(found, facts(settings={"name": HOSTILE}), HOSTILE)
    assert "<script>alert" not in text
    shown = Page(text)
    assert shown.count("script") == 3
    assert HOSTILE in shown.text
    assert "<script>" not in json.loads(shown.charts)[0]["traces"][0]["text"][0]


@pytest.mark.parametrize("trials", [[], [entry(0, state="running", metrics={}, intervals={}, recipe=[])]])
def test_a_study_without_results_can_be_reported_in_every_format(trials: list[Any]) -> None:
    found = report_of(*trials)
    assert "No trial has completed yet." in drawn(found).text
    assert json.loads(found.to_json())["front"] == []
    assert len(to_csv(found).splitlines()) == 1 + len(trials)
    assert "Nothing has completed yet." in terminal.text(*terminal.report_tables(found, "study.yaml"))
    ElementTree.fromstring(page.front_picture(found))


def test_one_objective_alone_has_no_picture_but_a_page() -> None:
    found = report_of(entry(0), entry(1, 0.86), objectives={"accuracy": "maximize"}, constraints={})
    assert [chart["id"] for chart in json.loads(drawn(found).charts)] == ["hypervolume"]


def test_three_objectives_have_two_pictures() -> None:
    objectives = {"accuracy": "maximize", "latency_ms": "minimize", "size_mb": "minimize"}
    found = report_of(*entries(), objectives=objectives, constraints={})
    assert [chart["id"] for chart in page.charts(found)][:2] == ["front-latency_ms", "front-size_mb"]


def test_the_picture_is_an_svg_with_a_mark_for_every_model() -> None:
    found = sample()
    root = ElementTree.fromstring(page.front_picture(found))
    circles = root.iter("{http://www.w3.org/2000/svg}circle")
    chart = page.front_chart(found, "latency_ms", "accuracy")
    points = sum(len(trace["x"]) for trace in chart["traces"])
    assert len(list(circles)) == points + len(chart["traces"])
    bars = [path.attrib["d"] for path in root.iter("{http://www.w3.org/2000/svg}path")]
    assert any("V" in bar for bar in bars)
    for bar in bars:  # M x y H x M x y V y
        left, middle, right, _, low, high = map(float, re.findall(r"-?[\d.]+", bar))
        assert 70 <= left <= right <= 700
        assert 20 <= high <= middle <= low <= 370


def test_the_line_goes_from_left_to_right_and_never_back_up() -> None:
    found = sample()
    line = page.front_chart(found, "latency_ms", "accuracy")["line"]
    assert line["x"] == sorted(line["x"])
    assert line["y"] == sorted(line["y"]), "who waits longer gets more"
    assert set(line["x"]) <= {entry.metrics["latency_ms"] for entry in found.members}
    root = ElementTree.fromstring(page.front_picture(found))
    (drawn,) = root.iter("{http://www.w3.org/2000/svg}polyline")
    assert len(drawn.attrib["points"].split()) == len(line["x"])


@given(st.lists(st.floats(-1e6, 1e6, allow_subnormal=False), min_size=1))
def test_an_axis_holds_its_values_between_few_round_ticks(values: list[float]) -> None:
    scale = page.Scale.over(values, 0, 100)
    assert 2 <= len(scale.ticks) <= 12
    assert scale.ticks == sorted(scale.ticks)
    assert all(-0.1 <= scale(value) <= 100.1 for value in values)


def test_a_report_says_which_kernels_are_real_what_the_front_runs_on_and_what_is_simulated() -> None:
    trials = [
        teacher().model_copy(update={"engine": "onnxruntime"}),
        entry(1, 0.87, 5.0, engine="torch", marks=["simulated"]),
        entry(2, 0.86, 6.0, engine="compile"),
    ]
    found = report_of(*trials, kernels=["bf16", "int8"])
    said = (
        "Real kernels: bf16, int8. The front runs on onnxruntime (1), torch (1). "
        "Simulated, so that their times mean nothing: 1."
    )
    assert wording.run_on(found) == said
    assert said in terminal.text(*terminal.report_tables(found, "study.yaml"))
    assert said in page.render_html(found, facts(), "study.yaml")
    assert wording.run_on(report_of(teacher())) == ""


def test_kernels_and_engines_are_read_from_what_is_stored() -> None:
    assert kernels({"traits": ["timed", "kernel:int8", "kernel:bf16"]}) == ["bf16", "int8"]
    assert kernels({}) == []
    row: Any = SimpleNamespace(
        number=3, state="complete", recipe=None, metrics={}, intervals={}, seconds={}, attempts=1, error=None
    )
    row.baseline, row.provisional = None, False
    assert entry_of(row, {"runtime": {"engine": "compile", "buckets": [8]}}).engine == "compile"
    assert entry_of(row, {}).engine is None


def test_the_terminal_shows_teacher_baseline_and_front_and_marks_doubts() -> None:
    found = sample()
    text = terminal.text(*terminal.report_tables(found, "study.yaml"))
    lines = text.splitlines()
    assert [line.split()[:2] for line in lines[4:6]] == [["0", "●"], ["1", "●"]]
    assert "noisy; cannot be told apart from 41" in text
    assert f"compress-search export study.yaml {found.recommended}" in text
    assert re.search(r"2 +nan: the loss is not finite +12, 30", text)


def test_a_terminal_of_80_columns_shows_every_number() -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(*terminal.front_tables(sample()))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text
    assert "85.8 ± 1.1" in text
    assert "−73 %" in text
    assert "quantization(weight_bits=8)" in text


def test_the_terminal_shows_brackets_as_they_are() -> None:
    found = report_of(entry(0, recipe=[{"method": "a[red]", "params": {}}]), constraints={})
    assert "a[red]" in terminal.text(terminal.trials_table(found))

"""Exported directories load without us where they can, score as recorded, and are whole or not there at all."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from compress_search.data.rows import Rows
from compress_search.environment import fingerprint
from compress_search.errors import ExportError, StorageError, StudyError
from compress_search.export import as_pretrained, check, export_artifact, teacher_metrics, tolerance, write_forms
from compress_search.export.model_card import Card, Contents, render
from compress_search.measure import Bench
from compress_search.recipe import Recipe, Step
from compress_search.runtimes.engines import CPU_SESSION
from compress_search.storage import Store, TrialRow
from compress_search.tasks import Task
from tests import tiny
from tests.workers import HereExecutor

RECIPE = Recipe((Step.of("theseus", {"block_size": 2, "schedule": "linear"}),))


def task_for(kind: str) -> Task:
    return Task(tiny.task_of(kind), tiny.labels_of(kind), entities=kind == "token-classification")


def rows_for(kind: str, task: Task, size: int = 40) -> Rows:
    rows = tiny.tiny_rows(kind, size)
    if task.tokens:
        labels = [[task.labels.index(tag) for tag in row["tags"]] for row in rows]
        return Rows([row["tokens"] for row in rows], None, labels)
    labels = [task.labels.index(str(row["label"])) if task.labels else row["label"] for row in rows]
    pairs = [row["text_pair"] for row in rows] if "text_pair" in rows[0] else None
    return Rows([row["text"] for row in rows], pairs, labels)


@pytest.fixture(scope="module")
def bench():
    with Bench() as bench:
        yield bench


@pytest.fixture
def export(bench):
    """``export(artifact, destination, card, rows)`` on this module's bench, to spare a start for every test."""

    def export(artifact: Path, destination: Path, card: Card, rows: Rows) -> Path:
        return export_artifact(artifact, destination, card=card, validation=rows, bench=bench)

    return export


@pytest.fixture(scope="module")
def make(tmp_path_factory, bench):
    """``make(kind, family, prune=…, runtime=…)``: an artefact with the card and the rows its scores are of."""
    from compress_search.candidate import Candidate
    from compress_search.data import tokenize_rows
    from compress_search.encoders import prune_heads, prune_neurons, subject_of
    from compress_search.runtimes.lowering import lower

    folder = tmp_path_factory.mktemp("export")
    made = {}

    def artifact(kind="text-classification", family="bert", *, prune=None, runtime=None):
        key = (kind, family, prune, runtime)
        if key in made:
            return made[key]
        task, network = task_for(kind), tiny.tiny_network(kind, family)
        tokenizer = tiny.tiny_tokenizer(family)
        if prune == "uniform":
            prune_neurons(network, {0: range(48), 1: range(48)})
        if prune == "heads":
            prune_heads(network, {0: [0, 2]})
        candidate = Candidate(network, tokenizer, subject_of(network, task.name))
        path = folder / "-".join(map(str, key))
        lower(candidate.replace(runtime={"engine": runtime}) if runtime else candidate, path, task)
        rows = rows_for(kind, task)
        score = bench.score(path, tokenize_rows(rows, tokenizer, 32, task, folder).path, task, 8)
        card = Card("tiny", 7, 0, RECIPE, task, 32, score.metrics, score.intervals, environment=fingerprint())
        made[key] = (path, card, rows)
        return made[key]

    return artifact


def run_example(folder: Path, *texts: str) -> str:
    """The example, far from this package: no installed package but those it names, nothing of ours on the path."""
    guard = "import sys, runpy; sys.modules['compress_search'] = sys.modules['torch'] = None; "
    code = guard + "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, str(folder / "run.py"), *texts]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd="/").stdout


# what is written


def test_a_uniform_model_loads_by_from_pretrained_and_by_onnx_runtime(make, export, tmp_path):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    artifact, card, rows = make(prune="uniform")
    out = export(artifact, tmp_path / "new" / "out", card, rows)
    written = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert written >= {"README.md", "card.json", "hf/config.json", "hf/model.safetensors", "hf/tokenizer.json"}
    assert written >= {"onnx/model.onnx", "onnx/tokenizer.json", "onnx/run.py", "onnx/settings.json"}
    assert not any(name.startswith("weights/") for name in written)
    assert (artifact / "model.onnx").read_bytes() == (out / "onnx/model.onnx").read_bytes()

    tokenizer = AutoTokenizer.from_pretrained(out / "hf")
    model = AutoModelForSequenceClassification.from_pretrained(out / "hf")
    assert model.config.intermediate_size == 48
    with torch.inference_mode():
        logits = model(**tokenizer(rows.texts[0], return_tensors="pt")).logits[0]
    label, probability = run_example(out / "onnx", rows.texts[0]).splitlines()[0].split("\t")
    assert label == card.task.labels[int(logits.argmax())] == model.config.id2label[int(logits.argmax())]
    assert float(probability) == pytest.approx(float(logits.softmax(0).max()), abs=2e-4)


def test_an_exported_model_cuts_and_pads_as_it_was_measured(bench, export, tmp_path):
    """The cut is in the tokenizer and the settings, the buckets in the settings, and the score is that of both."""
    from transformers import AutoTokenizer

    from compress_search.candidate import Candidate
    from compress_search.data import tokenize_rows
    from compress_search.encoders import subject_of
    from compress_search.runtimes.lowering import lower

    task, network, tokenizer = task_for("pairs"), tiny.tiny_network("pairs"), tiny.tiny_tokenizer()
    candidate = Candidate(network, tokenizer, subject_of(network, task.name))
    runtime = {"max_length": 12, "buckets": (10, 12), "threads": 1}
    lower(candidate.replace(runtime=runtime), tmp_path / "artifact", task)
    rows = rows_for("pairs", task)
    splits = {length: tokenize_rows(rows, tokenizer, length, task, tmp_path / "cache") for length in (12, 32)}
    assert splits[32].lengths.max() > 12 == splits[12].lengths.max()
    score = bench.score(tmp_path / "artifact", splits[12].path, task, 8)
    card = Card("tiny", 7, 0, RECIPE, task, 32, score.metrics, score.intervals, environment=fingerprint())
    out = export(tmp_path / "artifact", tmp_path / "out", card, rows)
    settings = json.loads((out / "hf" / "settings.json").read_text())
    assert (settings["max_length"], settings["buckets"], settings["threads"]) == (12, [10, 12], 1)
    assert settings["session"] == CPU_SESSION
    assert json.loads((out / "onnx" / "settings.json").read_text()) == settings
    exported = AutoTokenizer.from_pretrained(out / "hf")
    row = int(splits[32].lengths.argmax())
    assert len(exported(rows.texts[row], rows.pairs[row], truncation=True)["input_ids"]) == 12
    assert "\t" in run_example(out / "onnx", rows.texts[row], rows.pairs[row])


@pytest.mark.parametrize(
    ("engine", "forms", "file"),
    [
        ("torch", ["manifest"], "weights/model.safetensors"),
        ("onnxruntime", ["transformers", "onnx"], "onnx/model.onnx"),
    ],
)
def test_a_sparse_model_is_handed_over_as_small_as_it_was_measured(tmp_path, engine, forms, file):
    from compress_search.candidate import Candidate
    from compress_search.encoders import layers, parts, subject_of
    from compress_search.runtimes import size_mb
    from compress_search.runtimes.lowering import lower

    task, network = task_for("text-classification"), tiny.tiny_network()
    for layer in layers(network):
        parts(layer).up.weight.data[1:] = 0
    subject = subject_of(network, task.name).having("sparse", density=0.7)
    lower(Candidate(network, tiny.tiny_tokenizer(), subject, runtime={"engine": engine}), tmp_path / "it", task)
    assert write_forms(tmp_path / "it", tmp_path / "out", task, 32) == forms
    assert (tmp_path / "out" / file).stat().st_size / 1e6 == size_mb(tmp_path / "it")


def test_a_model_no_configuration_can_express_comes_with_its_manifest(make, export, tmp_path):
    from compress_search.encoders import load

    artifact, card, rows = make(prune="heads")
    out = export_artifact(artifact, tmp_path / "out", card=card, validation=rows)
    assert not (out / "hf").exists()
    network, tokenizer = load(out / "weights")
    assert as_pretrained(network) is None
    assert tokenizer("good film")["input_ids"]
    text = (out / "README.md").read_text()
    assert "from compress_search.encoders import load" in text
    assert "from_pretrained" not in text


def test_a_model_that_runs_in_torch_has_no_onnx_form(make, export, tmp_path):
    artifact, card, rows = make(runtime="torch")
    out = export(artifact, tmp_path / "out", card, rows)
    assert (out / "hf").is_dir()
    assert not (out / "onnx").exists()
    assert "onnx" not in (out / "README.md").read_text().lower().split("## environment")[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pairs", "text-regression", "token-classification", "pos"])
def test_every_task_exports_and_its_example_runs(make, export, tmp_path, kind):
    artifact, card, rows = make(kind)
    out = export(artifact, tmp_path / "out", card, rows)
    if card.task.tokens:
        words = rows.texts[0]
        printed = [line.split("\t") for line in run_example(out / "onnx", " ".join(words)).splitlines()]
        assert [word for word, _ in printed] == words
        assert {label for _, label in printed} <= set(card.task.labels)
    elif card.task.labels:
        printed = run_example(out / "onnx", rows.texts[0], rows.pairs[0]).splitlines()
        assert {line.split("\t")[0] for line in printed} == set(card.task.labels)
    else:
        assert abs(float(run_example(out / "onnx", rows.texts[0]))) < 10


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny.FAMILIES[1:])
def test_every_family_exports(make, export, tmp_path, family):
    artifact, card, rows = make(family=family, prune="uniform")
    out = export(artifact, tmp_path / "out", card, rows)
    assert (out / "hf/config.json").exists()


# what is refused


def test_a_score_that_differs_from_the_recorded_one_leaves_nothing(make, export, tmp_path):
    artifact, card, rows = make()
    wrong = {**card.metrics, "accuracy": card.metrics["accuracy"] + 0.025}
    with pytest.raises(ExportError, match=r"onnx model scores accuracy \d\.\d+ where \d\.\d+ is expected"):
        export(artifact, tmp_path / "out", dataclasses.replace(card, metrics=wrong), rows)
    assert list(tmp_path.iterdir()) == []


def test_tampered_weights_are_noticed(make, export, tmp_path, monkeypatch):
    artifact, card, rows = make()

    def damaged(network):
        plain = as_pretrained(network)
        plain.classifier.weight.data.mul_(-1)
        return plain

    monkeypatch.setattr("compress_search.export.as_pretrained", damaged)
    with pytest.raises(ExportError, match="exported transformers model scores"):
        export(artifact, tmp_path / "out", card, rows)
    assert list(tmp_path.iterdir()) == []


def test_a_destination_with_something_in_it_is_refused_untouched(make, export, tmp_path):
    artifact, card, rows = make()
    (tmp_path / "mine.txt").write_text("keep")
    for taken in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(StudyError, match=r"exists already|not a directory"):
            export(artifact, taken, card, rows)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_empty_destination_is_filled(make, export, tmp_path):
    artifact, card, rows = make()
    (tmp_path / "out").mkdir()
    out = export(artifact, tmp_path / "out", card, rows)
    assert (out / "README.md").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert os.access(out, os.R_OK | os.X_OK)
    assert out.stat().st_mode & 0o077 == 0o055


def test_an_empty_folder_can_be_exported_to_from_inside(make, export, tmp_path, monkeypatch):
    artifact, card, rows = make()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    export(artifact, Path(), card, rows)
    assert (tmp_path / "here" / "card.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_no_artefact_is_no_export(make, export, tmp_path):
    _, card, rows = make()
    with pytest.raises(ExportError, match=r"artifact\.json"):
        export(tmp_path / "nowhere", tmp_path / "out", card, rows)
    assert list(tmp_path.iterdir()) == []


def test_the_check_is_exact_where_it_was_measured_and_lenient_elsewhere(tmp_path):
    here = fingerprint()
    elsewhere = {**here, "cpu": {**here["cpu"], "flags": ["avx"]}}
    manifest = tmp_path / "weights" / "manifest.json"
    manifest.parent.mkdir()
    manifest.write_text('{"dtype": "float32"}')

    def allowed(environment, device="cpu"):
        return tolerance(environment, device, tmp_path)

    assert allowed(here) == 1e-4
    assert allowed(elsewhere) == allowed({}) == allowed(here, "cuda") == 0.005
    manifest.write_text('{"dtype": "bfloat16"}')  # rows of other lengths in a batch round otherwise
    assert allowed(here) == 0.005
    check("onnx", {"accuracy": 0.900}, {"accuracy": 0.903, "f1": 0.1}, 0.005)
    with pytest.raises(ExportError, match="accuracy"):
        check("onnx", {"accuracy": 0.900}, {"accuracy": 0.903}, 1e-4)
    with pytest.raises(ExportError, match="nan"):
        check("onnx", {"accuracy": float("nan")}, {"accuracy": 0.903}, 0.005)
    with pytest.raises(ExportError, match="nothing is recorded"):
        check("onnx", {"accuracy": 0.9}, {}, 0.005)


def test_a_study_that_has_not_run_exports_nothing(tiny_study, tmp_path):
    from compress_search.export import export_trial
    from compress_search.study import load_study

    study = load_study(tiny_study())
    with pytest.raises(StorageError):
        export_trial(study, 0, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_trial_of_a_study_exports_also_after_its_model_was_deleted(tiny_study, tmp_path, monkeypatch, bench):
    import shutil

    from compress_search import driver, export
    from compress_search.export import export_trial
    from compress_search.study import load_study

    monkeypatch.setenv("COMPRESS_SEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(driver, "LocalExecutor", HereExecutor)
    study = load_study(tiny_study(methods=["theseus"], search={"trials": 1}))
    driver.run(study, executor="local")
    last = Store(study.storage).trials(study.name)[-1]
    assert last.recipe.methods == ("theseus",)
    first = export_trial(study, last.number, tmp_path / "first")
    shutil.rmtree(study.output / last.artifact)
    monkeypatch.setattr(export, "Bench", lambda threads: nullcontext(bench))  # the first export has started its own
    again = export_trial(study, last.number, tmp_path / "again")
    assert (first / "onnx/model.onnx").read_bytes() == (again / "onnx/model.onnx").read_bytes()
    facts = json.loads((again / "card.json").read_text())
    assert facts["metrics"]["accuracy"] == last.metrics["accuracy"]
    assert facts["teacher"]["speedup"] > 0
    assert str(tmp_path) not in (again / "README.md").read_text() + json.dumps(facts)
    assert facts["command"] == "", "only who called knows how the study is called from where"
    with pytest.raises(StudyError, match=f"there is no trial 99: the study has {last.number + 1} trials"):
        export_trial(study, 99, tmp_path / "no")


@pytest.mark.parametrize(("number", "ratio"), [(0, 0.82), (1, 0.699)])
def test_a_card_tells_of_the_measurement_that_its_latency_is_from(number, ratio, tiny_study, tmp_path, monkeypatch):
    """The second, where there is one; but the teacher's first is the unit of the study."""
    from compress_search import export
    from compress_search.study import load_study
    from tests import sample_report

    study, cards = load_study(tiny_study()), []
    store, noisy = Store(study.storage), {**LATENCY, "ratio": 0.82, "noisy": True}
    sample_report.fill(store, study, [sample_report.teacher(), sample_report.entry(1)])
    store.write_measurement(study.name, number, "latency", noisy)
    store.write_measurement(study.name, number, "final", {"latency": {**LATENCY, "ratio": 0.699}})
    (study.output / "artifacts" / str(number)).mkdir(parents=True)
    monkeypatch.setattr(export, "export_artifact", lambda *arguments, card, **options: cards.append(card))
    export.export_trial(study, number, tmp_path / "out", command="compress-search export a.yaml 1 -o b")
    assert cards[0].latency["ratio"] == ratio
    assert cards[0].command == "compress-search export a.yaml 1 -o b"


@pytest.mark.parametrize("state", ["failed", "running", "infeasible"])
def test_only_a_complete_trial_has_a_model(state):
    from compress_search.export import _complete
    from compress_search.storage import TrialRow

    with pytest.raises(StudyError, match=f"trial 3 is {state}"):
        _complete({3: TrialRow(3, state, RECIPE)}, 3)
    row = TrialRow(3, "complete", RECIPE, artifact="artifacts/x")
    assert _complete({3: row}, 3) == (row, RECIPE)


# the card

LATENCY = {
    "ratio": 0.4213,
    "low": 0.41,
    "high": 0.43,
    "control": 1.002,
    "noisy": False,
    "protocol": {"repeats": 50, "batch_size": 1, "threads": 1, "device": "cpu", "warmup": 5},
}


def card(**changes) -> Card:
    plain = Card(
        study="sst2",
        number=37,
        seed=11,
        recipe=RECIPE,
        task=Task("text-classification", ("negative", "positive")),
        max_length=64,
        metrics={"accuracy": 0.912, "accuracy_drop": 0.004, "latency_ms": 3.456, "my_method.sparsity": 0.5},
        intervals={"accuracy": (0.893, 0.929), "accuracy_drop": (-0.002, 0.011)},
        teacher={"accuracy": 0.916, "latency_ms": 8.2},
        test={"accuracy": 0.905},
        latency=LATENCY,
        environment=fingerprint(),
        command="compress-search export sst2.yaml 37 -o out",
    )
    return dataclasses.replace(plain, **changes)


CONTENTS = Contents(
    {"transformers": "hf", "onnx": "onnx"},
    "onnx",
    {"transformers": {"accuracy": 0.91}, "onnx": {"accuracy": 0.912}},
)


def test_a_card_tells_recipe_scores_intervals_protocol_environment_and_command():
    text = render(card(), CONTENTS)
    front_matter = text.split("---")[1]
    assert "library_name: transformers" in front_matter
    assert "- theseus" in front_matter
    assert "| accuracy (%) | 91.2 | 89.3 – 92.9 | 91.6 | 90.5 |" in text
    assert "| latency (ms) | 3.46 | – | 8.20 | – |" in text
    assert "| accuracy lost (points) | 0.4 | −0.2 – 1.1 | – | – |" in text
    assert '1. `theseus` `{"block_size": 2, "schedule": "linear"}`' in text
    assert "Seed 11." in text
    assert "50 rounds of batches of 1" in text
    assert "0.421\n(0.410 – 0.430)" in text
    assert "not to be trusted" not in text
    assert "compress-search export sst2.yaml 37 -o out" in text
    assert f"torch {fingerprint()['packages']['torch']}" in text
    assert "| `onnx/` | onnx | accuracy 91.2 | the model that was measured |" in text


def test_a_noisy_latency_is_said_to_be_one():
    assert "**the machine was noisy" in render(card(latency={**LATENCY, "noisy": True}), CONTENTS)


def test_a_card_of_the_teacher_without_test_or_latency_is_whole():
    text = render(card(recipe=Recipe(), test={}, latency={}, intervals={}, environment={}), CONTENTS)
    assert "None: this is the teacher itself." in text
    assert "rounds of batches" not in text
    assert "\n\n\n\n" not in text


def test_the_card_for_programs_is_plain_data():
    data = json.loads(json.dumps(card().to_dict()))
    assert data["recipe"] == RECIPE.to_list()
    assert data["metrics"]["latency_ms"] == 3.456
    assert data["task"]["labels"] == ["negative", "positive"]


def test_a_teacher_that_failed_before_it_was_measured_is_passed_over() -> None:
    failed = TrialRow(0, "failed", Recipe(), "teacher")
    measured = TrialRow(1, "complete", Recipe(), "teacher", metrics={"accuracy": 0.9})
    assert teacher_metrics({0: failed, 1: measured}) == {"accuracy": 0.9}

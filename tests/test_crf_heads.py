"""A CRF on a network's head: trained with the teacher, saved, scored, exported, and there wherever it counts."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compress_search.candidate import Candidate
from compress_search.crf import attach_crf, crf_of
from compress_search.data import tokenize_rows
from compress_search.data.rows import read
from compress_search.driver import prepare
from compress_search.encoders import describe, head, load, save, subject_of
from compress_search.environment import fingerprint
from compress_search.errors import ExportError, StudyError, TrialError
from compress_search.export import as_pretrained, export_artifact
from compress_search.export.model_card import Card
from compress_search.measure import Bench
from compress_search.pipeline import run_recipe
from compress_search.recipe import Recipe, Step
from compress_search.records import Assignment, Rung
from compress_search.runtimes import Artifact, load_runner, size_mb
from compress_search.runtimes.lowering import lower
from compress_search.space import defaults
from compress_search.study import load_study
from compress_search.tasks import bounds
from compress_search.teacher import load_teacher, prepare_teacher, teacher_subject
from compress_search.teacher.networks import with_crf
from compress_search.training import evaluate, forward, task_loss
from compress_search.trial import TrialWorker
from compress_search.workbench import Workbench
from tests import tiny
from tests.test_export import rows_for, run_example, task_for

KIND = "token-classification"
TRAINED = {"model": "teacher", "fine_tune": {"epochs": 1, "batch_size": 16, "learning_rate": 0.003, "crf": True}}


def network_with_crf(family: str = "bert", seed: int = 0) -> Any:
    """The tiny tagger with random transitions, large enough to change what it says."""
    network = tiny.tiny_network(KIND, family)
    with_crf(network.config, True)
    attach_crf(network)
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.crf.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    network.classifier.weight.data *= 30  # else transitions would say everything
    return network


def same_crf(one: Any, other: Any) -> bool:
    mine, theirs = (network.crf.state_dict() for network in (one, other))
    return all(torch.equal(mine[name], theirs[name]) for name in ("transitions", "start", "end"))


@pytest.fixture(scope="module")
def bench() -> Any:
    with Bench() as bench:
        yield bench


@pytest.fixture(scope="module")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[str, Path] = {}

    def artifact(engine: str = "onnxruntime") -> Path:
        if engine not in made:
            network, folder = network_with_crf(), tmp_path_factory.mktemp("crf")
            candidate = Candidate(network, tiny.tiny_tokenizer(), subject_of(network, KIND))
            lower(candidate.replace(runtime={"engine": engine}), folder / "it", task_for(KIND))
            made[engine] = folder / "it"
        return made[engine]

    return artifact


# the network


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_it_is_part_of_the_head_and_of_the_description(family: str, tmp_path: Path) -> None:
    network = network_with_crf(family)
    subject = subject_of(network, KIND)
    assert "crf" in subject.traits
    assert subject.parameters == sum(parameter.numel() for parameter in network.parameters())
    assert head(network)[-1] is network.crf
    save(network, tiny.tiny_tokenizer(family), tmp_path)
    again, _ = load(tmp_path)
    assert same_crf(again, network)
    assert describe(again) == describe(network)


@pytest.mark.parametrize("convert", ["half", "bfloat16"])
def test_a_network_of_sixteen_bits_keeps_its_transitions(convert: str, tmp_path: Path) -> None:
    network = getattr(network_with_crf(), convert)()
    save(network, tiny.tiny_tokenizer(), tmp_path)
    again, _ = load(tmp_path)
    assert same_crf(again, network_with_crf())
    assert again.classifier.weight.dtype == network.classifier.weight.dtype != torch.float32


def test_a_network_that_lost_its_crf_on_the_way_is_refused(tmp_path: Path) -> None:
    network = network_with_crf()
    del network.crf
    with pytest.raises(TrialError, match="made without the CRF"):
        crf_of(network)
    with pytest.raises((TrialError, ExportError)):
        save(network, tiny.tiny_tokenizer(), tmp_path)


def test_the_task_loss_is_the_likelihood_and_scoring_decodes(tmp_path: Path) -> None:
    network, task = network_with_crf(), task_for(KIND)
    split = tokenize_rows(rows_for(KIND, task), tiny.tiny_tokenizer(), 32, task, tmp_path)
    batch = split.batch(range(8))
    emissions = forward(network, batch)
    torch.testing.assert_close(task_loss(task)(network, batch), network.crf.loss(emissions, batch["labels"]))
    paths, labels = evaluate(network, split, task)
    expected = network.crf.viterbi(emissions, batch["labels"] != -100)
    for row, (path, gold) in enumerate(zip(paths[:8], labels, strict=False)):
        assert path.tolist() == expected[row][batch["labels"][row] != -100].tolist()
        assert path.shape == gold.shape
    network.config.crf, crf = False, network.crf
    del network.crf
    single, _ = evaluate(network, split, task)
    assert any((path != row.argmax(-1)).any() for path, row in zip(paths, single, strict=True))
    chosen = [np.eye(task.outputs)[path] for path in paths]
    assert task.score(paths, labels) == task.score(chosen, labels)
    assert bounds(task.resampled(paths, labels)) == bounds(task.resampled(chosen, labels))
    assert [path.tolist() for path in crf.decode(single)] == [path.tolist() for path in paths]


# the teacher


def test_a_crf_on_anything_but_tags_is_refused_by_its_line(tiny_study: Callable[..., Path]) -> None:
    path = tiny_study("text-classification", teacher=TRAINED)
    with pytest.raises(StudyError, match="only tags form a sequence") as caught:
        load_study(path)
    assert "teacher.fine_tune.crf" in str(caught.value)


def test_studies_without_one_are_what_they_were(tiny_study: Callable[..., Path]) -> None:
    path = tiny_study(KIND, teacher={"model": "teacher", "fine_tune": {}})
    study = load_study(path)
    assert study.teacher.fine_tune
    assert not {"crf", "crf_multiplier"} & study.teacher.fine_tune.identity().keys()
    other = load_study(path, ["teacher.fine_tune.crf=true"]).teacher.fine_tune
    assert other
    assert other.identity().items() >= {"crf": True, "crf_multiplier": 2.0}.items()


@pytest.mark.parametrize("origin", ["model", "architecture"])
def test_the_teacher_is_trained_with_it_and_a_directory_that_holds_one_keeps_it(
    origin: str, tiny_study: Callable[..., Path], tmp_path: Path
) -> None:
    shape = {"layers": 1, "hidden": 16, "heads": 2, "intermediate": 16, "vocabulary": 100}
    start = {"model": "teacher"} if origin == "model" else {"model": None, "architecture": shape}
    study = load_study(tiny_study(KIND, teacher={**TRAINED, **start}))
    raw, task = read(study)
    subject = teacher_subject(study, task)
    path = prepare_teacher(study, raw, task, tmp_path / "cache")
    network, _ = load_teacher(path)
    trained = crf_of(network)
    assert trained is not None
    assert not any(parameter.requires_grad for parameter in trained.parameters())
    assert all(bool((parameter != 0).any()) for parameter in trained.parameters())
    assert subject == subject_of(network, KIND)
    assert subject.parameters == sum(parameter.numel() for parameter in network.parameters())

    found = study.model_copy(update={"teacher": type(study.teacher)(model=str(path))})
    assert teacher_subject(found, task) == subject
    again, _ = load_teacher(prepare_teacher(found, raw, task, tmp_path / "cache"))
    assert same_crf(again, network)


def test_its_learning_rate_is_a_multiple(tiny_study: Callable[..., Path], tmp_path: Path) -> None:
    """AdamW's first step moves each parameter by about its learning rate, whatever the gradient's size."""
    moved = []
    for multiplier in (2.0, 8.0):
        fine_tune = {**TRAINED["fine_tune"], "epochs": 0.01, "crf_multiplier": multiplier}  # type: ignore[dict-item]
        study = load_study(tiny_study(KIND, teacher={**TRAINED, "fine_tune": fine_tune}))
        raw, task = read(study)
        crf: Any = crf_of(load_teacher(prepare_teacher(study, raw, task, tmp_path / "cache"))[0])
        moved.append(float(crf.start.abs().max()))
    assert moved == pytest.approx([2 * 0.003, 8 * 0.003], rel=0.01)


@pytest.mark.parametrize("method", ["plain_student", "shortcut", "layer_match", "distilbert", "bilstm", "distill"])
def test_methods_train_it_at_the_studys_multiple_of_their_own_rate(
    method: str, tiny_study: Callable[..., Path], tmp_path: Path
) -> None:
    """As above, for a single step of training; ``bilstm`` learns at twenty times the rate anyway."""
    moved = []
    for multiplier in (1.0, 5.0):
        path = tiny_study(KIND, teacher=TRAINED, methods=list(dict.fromkeys(["plain_student", method])))
        settings = {"epochs": 0.01, "warmup": 0, "learning_rate": 1e-4, "crf_multiplier": multiplier}
        study = load_study(path, [f"training.{key}={value}" for key, value in settings.items()])
        prepared = prepare(study)
        bench = Workbench(prepared.brief)
        wanted = [method] if method != "distill" else ["plain_student", method]
        wishes = {"distill": {"alpha": 0.0}, "distilbert": {"distillation_fraction": 0.1}}
        steps = []
        for name in wanted:
            space = bench.registry[name].search_space(bench.materials.teacher.subject)
            steps.append(Step.of(name, {**defaults(space), "learning_rate": 1e-4, **wishes.get(name, {})}))
        candidate, _ = run_recipe(Recipe(tuple(steps)), bench.registry, bench.materials, seed=3, scratch=tmp_path)
        before, after = (crf_of(each) for each in (bench.materials.teacher.network, candidate.network))
        moved.append(float((after.start - before.start).detach().abs().max()))  # type: ignore[union-attr]
    assert moved[1] == pytest.approx(5 * moved[0], rel=0.2)


def test_a_study_that_says_nothing_of_it_is_what_it_was(tiny_study: Callable[..., Path]) -> None:
    path = tiny_study(KIND)
    assert "crf_multiplier" not in load_study(path).training.identity()
    assert load_study(path, ["training.crf_multiplier=2"]).training.identity()["crf_multiplier"] == 2


def test_labels_in_another_order_take_their_transitions_along(
    tiny_study: Callable[..., Path], tmp_path: Path
) -> None:
    study = load_study(tiny_study(KIND))
    raw, task = read(study)
    network = network_with_crf()
    order = [2, 0, 3, 1]
    network.config.id2label = {i: task.labels[j] for i, j in enumerate(order)}
    network.save_pretrained(Path(str(study.teacher.model)))
    loaded: Any = load_teacher(prepare_teacher(study, raw, task, tmp_path / "cache"))[0]
    for i, j in np.ndindex(4, 4):
        assert loaded.crf.transitions[order[i], order[j]] == network.crf.transitions[i, j]
    assert torch.equal(loaded.crf.start[order], network.crf.start)
    assert torch.equal(loaded.crf.end[order], network.crf.end)
    assert torch.equal(loaded.classifier.bias[order], network.classifier.bias)


def test_a_directory_without_the_tensors_is_refused(tiny_study: Callable[..., Path], tmp_path: Path) -> None:
    study = load_study(tiny_study(KIND))
    raw, task = read(study)
    config = Path(str(study.teacher.model)) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "crf": True}))
    with pytest.raises(StudyError, match=r"cannot load the weights: .*Crf"):
        prepare_teacher(study, raw, task, tmp_path / "cache")


def test_several_teachers_cannot_share_one_crf(tiny_study: Callable[..., Path]) -> None:
    path = tiny_study(KIND)
    study = load_study(path)
    task = read(study)[1]
    network_with_crf().save_pretrained(Path(str(study.teacher.model)))
    other = tiny.tiny_teacher(Path(str(study.teacher.model)).parent / "other", KIND)
    for overrides in (["teacher.ensemble=[other]"], ["teacher.model=other", "teacher.ensemble=[teacher]"]):
        with pytest.raises(StudyError, match=r"teacher\.ensemble.* a CRF, whose transitions cannot be averaged"):
            teacher_subject(load_study(path, overrides), task)
    assert other.is_dir()


# what is deployed


def test_the_artefact_holds_the_transitions_and_its_model_only_emissions(lowered: Callable[..., Path]) -> None:
    artifact, network = lowered(), network_with_crf()
    decoder: Any = Artifact.read(artifact).decoder()
    assert torch.equal(decoder.transitions, network.crf.transitions)
    batch = {"input_ids": np.full((2, 5), 7), "attention_mask": np.ones((2, 5), int)}
    batch["token_type_ids"] = np.zeros((2, 5), int)
    with torch.no_grad():
        emissions = forward(network, {name: torch.from_numpy(array) for name, array in batch.items()})
    np.testing.assert_allclose(load_runner(artifact, 1)(batch), emissions, atol=1e-4)
    assert size_mb(artifact) * 1e6 == (artifact / "model.onnx").stat().st_size


@pytest.mark.parametrize(("engine", "forms"), [("onnxruntime", {"weights", "onnx"}), ("torch", {"weights"})])
def test_the_export_scores_as_the_trial_did_and_its_example_decodes(
    engine: str, forms: set[str], lowered: Callable[..., Path], bench: Any, tmp_path: Path
) -> None:
    artifact, task, tokenizer = lowered(engine), task_for(KIND), tiny.tiny_tokenizer()
    rows, network = rows_for(KIND, task), network_with_crf()
    split = tokenize_rows(rows, tokenizer, 32, task, tmp_path)
    score = bench.score(artifact, split.path, task, 8)
    paths, labels = evaluate(network, split, task)
    assert score.metrics == pytest.approx(task.score(paths, labels))
    assert dict(score.intervals) == bounds(task.resampled(paths, labels))
    card = Card("tiny", 7, 0, Recipe(), task, 32, score.metrics, score.intervals, environment=fingerprint())
    out = export_artifact(artifact, tmp_path / "out", card=card, validation=rows, bench=bench)
    assert {path.name for path in out.iterdir() if path.is_dir()} == forms
    assert as_pretrained(network) is None
    assert "conditional random field" in (out / "README.md").read_text()
    assert same_crf(load(out / "weights")[0], network)
    if "onnx" in forms:
        assert _printed(out, rows.texts[0]) == [task.labels[i] for i in paths[0]]


def _printed(out: Path, words: Any) -> list[str]:
    return [line.split("\t")[1] for line in run_example(out / "onnx", " ".join(words)).splitlines()]


def test_the_example_finds_the_best_path(lowered: Callable[..., Path], tmp_path: Path) -> None:
    """Its own Viterbi, which needs no torch, agrees with the module's on random scores."""
    import runpy

    (tmp_path / "settings.json").write_text("{}")
    template = Path(sys.modules["compress_search"].__file__ or "").parent / "templates" / "run_onnx.py"
    (tmp_path / "run.py").write_text(template.read_text())
    best_path = runpy.run_path(str(tmp_path / "run.py"))["best_path"]
    rng = np.random.default_rng(0)
    crf: Any = network_with_crf().crf
    for length in (1, 2, 7, 30):
        emissions = rng.normal(size=(length, 4)).astype(np.float32)
        assert best_path(emissions, crf.to_dict()) == crf.decode([emissions])[0].tolist()


# a study


@pytest.mark.slow
def test_a_study_with_a_crf_runs_from_teacher_to_score(tiny_study: Callable[..., Path]) -> None:
    """Theseus, then distillation of marginals; the trial's score is the trained network's own, by best paths."""
    methods = {"theseus": {"stage1_fraction": 0.3}, "distill": {"crf_target": "posterior"}}
    sections = {
        "methods": methods,
        "objectives": ["f1", "size_mb"],
        "training": {"epochs": 2, "learning_rate": 0.003},
    }
    study = load_study(tiny_study(KIND, teacher=TRAINED, **sections))
    worker, rungs = TrialWorker(prepare(study).brief), []

    def report(rung: Rung) -> bool:
        rungs.append(rung.metrics["f1"])
        return True

    try:
        bench = worker.workbench
        bench.prepare()
        subject, task = bench.materials.teacher.subject, bench.materials.task
        spaces = {name: bench.registry[name].search_space(subject) for name in methods}
        recipe = Recipe(tuple(Step.of(name, {**defaults(spaces[name]), **methods[name]}) for name in methods))
        result = worker.run(Assignment(1, 0, recipe, seed=3), report)
        assert (result.state, result.failure) == ("complete", None)
        candidate, _ = run_recipe(recipe, bench.registry, bench.materials, seed=3, scratch=study.output)
        scores = task.score(*evaluate(candidate.network, bench.materials.validation, task))
        assert {name: result.metrics[name] for name in scores} == pytest.approx(scores)
        assert rungs
        final = worker.finalize({1: str(result.artifact)})[1]["test"]["metrics"]
        assert final == pytest.approx(task.score(*evaluate(candidate.network, bench.split("test"), task)))
        assert not same_crf(candidate.network, bench.materials.teacher.network)
    finally:
        worker.close()

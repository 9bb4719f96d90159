"""Export: one trial's model as a directory that can be deployed, loaded and scored again before it is handed over.

Owns the layout of the directory and the check. Knows nothing of how the model came about.

    README.md, card.json   the model card, for people and for programs
    hf/                    what from_pretrained loads; or, where no configuration can express the shapes,
    weights/               architecture manifest and safetensors, which compress_search.encoders.load reads
    onnx/                  what ONNX Runtime runs, and run.py, which needs nothing of ours
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from compress_search.candidate import Subject
from compress_search.data import tokenize_rows
from compress_search.data.rows import Rows, read
from compress_search.environment import host_kind
from compress_search.errors import ExportError, StudyError
from compress_search.export.model_card import Card, Contents, render
from compress_search.measure import Bench
from compress_search.recipe import Recipe
from compress_search.report.reading import latency_of
from compress_search.runtimes import Artifact
from compress_search.runtimes.deployed import SETTINGS, settings_of
from compress_search.storage import TrialRow
from compress_search.storage.opening import open_store
from compress_search.study.sources import output_directory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from compress_search.study import Study
    from compress_search.tasks import Task

EXACT = 1e-4
"""How far a score may lie from what it should be on the kind of machine that measured it.

One decision that flips moves an accuracy by more; a correlation of nearly constant predictions moves by a tenth
of it with the order of summation, which batch size and memory alignment change.
"""

ELSEWHERE = 0.005
"""The same on other machines, whose kernels round differently, so that a few close decisions flip."""

FOLDERS = {"transformers": "hf", "manifest": "weights", "onnx": "onnx"}


def export_trial(study: Study, number: int, destination: Path, *, command: str = "") -> Path:
    """Write a complete trial of a study as a deployable directory, checked on the validation data.

    A model that was deleted to save space is trained again from its recipe and seed. The card says that
    ``command`` makes the directory again, where the caller gives one.

    Raises:
        StudyError: there is no such trial, it is not complete, or the destination is taken or cannot be written.
        ExportError: what was written does not score as recorded. Nothing is left at the destination then.
        StorageError: the study has not been run.
    """
    _refuse_taken(destination)
    store = open_store(study)
    rows = {row.number: row for row in store.trials(study.name)}
    row, recipe = _complete(rows, number)
    artifact = study.output / str(row.artifact)
    if not artifact.is_dir():
        artifact = rebuild(study, recipe, row.seed or 0, Subject.from_dict(store.study(study.name).subject))
    raw, task = read(study)
    measurements = store.measurements(study.name, number).get(number, {})
    teacher = teacher_metrics(rows)
    card = Card(
        study=study.name,
        number=number,
        seed=row.seed or 0,
        recipe=recipe,
        task=task,
        max_length=study.data.max_length,
        metrics=row.metrics,
        intervals=row.intervals,
        teacher=teacher,
        test=measurements.get("final", {}).get("test", {}).get("metrics", {}),
        latency=latency_of(row, measurements),
        environment=row.environment,
        command=command,
    )
    measure = study.measure
    return export_artifact(
        artifact,
        destination,
        card=card,
        validation=raw.validation,
        batch_size=measure.batch_size,
        threads=measure.threads,
    )


def _complete(rows: Mapping[int, TrialRow], number: int) -> tuple[TrialRow, Recipe]:
    row = rows.get(number)
    if row is None:
        raise StudyError(f"there is no trial {number}: the study has {len(rows)} trials, counted from 0")
    if row.state != "complete" or row.recipe is None:
        raise StudyError(f"trial {number} is {row.state}: only a complete trial has a model")
    return row, row.recipe


def teacher_metrics(rows: Mapping[int, TrialRow]) -> Mapping[str, float]:
    """What the teacher measured; an attempt at it may have failed in an earlier run."""
    return next((row.metrics for row in rows.values() if row.recipe == Recipe() and row.state == "complete"), {})


def rebuild(study: Study, recipe: Recipe, seed: int, teacher: Subject) -> Path:
    """The artefact of a recipe, made anew: the same one on the kind of machine that made the first.

    ``teacher`` is the teacher as the study knows it.
    """
    from compress_search.driver import prepare
    from compress_search.pipeline import run_recipe
    from compress_search.workbench import Workbench

    bench = Workbench(prepare(study, teacher).brief)
    with tempfile.TemporaryDirectory() as scratch:
        candidate, _ = run_recipe(recipe, bench.registry, bench.materials, seed=seed, scratch=Path(scratch))
    artifact = bench.artifact(recipe, seed)
    bench.lower(candidate, artifact)
    return artifact


def export_artifact(
    artifact: Path,
    destination: Path,
    *,
    card: Card,
    validation: Rows,
    batch_size: int = 1,
    threads: int = 1,
    bench: Bench | None = None,
) -> Path:
    """Write an artefact as a deployable directory, which is there checked and whole, or not at all.

    Args:
        artifact: the directory that was measured.
        destination: where to; must not exist, or be empty.
        card: what to say of it; its metrics are what the directory must score again.
        validation: the rows the metrics are of.
        batch_size: as deployed, on which dynamic int8 depends.
        threads: of the process that loads and scores the directory.
        bench: that process, where the caller has one already; a fresh one by default.

    Raises:
        StudyError: the destination is taken or cannot be written.
        ExportError: a form of the model does not score as it should.
    """
    record = Artifact.read(artifact)
    engine = record.engine
    card = replace(card, max_length=min(card.max_length, record.max_length or card.max_length))
    _refuse_taken(destination)
    with _staged(destination) as directory:
        forms = write_forms(artifact, directory, card.task, card.max_length)
        measured = "onnx" if engine == "onnxruntime" else forms[0]
        device = card.latency.get("protocol", {}).get("device", "cpu")
        with tempfile.TemporaryDirectory() as scratch, nullcontext(bench) if bench else Bench(threads) as clean:
            scorer = _Scorer(clean, card, validation, batch_size, Path(scratch))
            scores = {form: scorer.score(directory / FOLDERS[form], form) for form in forms}
            check(measured, scores[measured], card.metrics, tolerance(card.environment, device, artifact))
            if "transformers" in forms:
                weights = scorer.score(artifact / "weights", "manifest")
                check("transformers", scores["transformers"], weights, EXACT)
        contents = Contents({form: FOLDERS[form] for form in forms}, measured, scores, record.crf is not None)
        (directory / "README.md").write_text(render(card, contents), encoding="utf-8")
        (directory / "card.json").write_text(json.dumps(card.to_dict(), indent=1), encoding="utf-8")
    return destination


class _Scorer:
    """Scores directories on the validation rows, cut into tokens by each directory's own tokenizer."""

    def __init__(self, bench: Bench, card: Card, validation: Rows, batch_size: int, scratch: Path) -> None:
        self.bench, self.card, self.validation = bench, card, validation
        self.batch_size, self.scratch = batch_size, scratch

    def score(self, directory: Path, form: str) -> dict[str, float]:
        """Every metric of one form."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(directory)
        task = self.card.task
        split = tokenize_rows(self.validation, tokenizer, self.card.max_length, task, self.scratch)
        score = self.bench.score(directory, split.path, task, self.batch_size, form=form, as_they_come=True)
        return dict(score.metrics)


def tolerance(environment: Mapping[str, Any], device: str, artifact: Path) -> float:
    """How exactly an artefact's score that was recorded in this environment must be met here, on the CPU.

    Weights of 16 bits are scored in batches of other rows than in the trial, which round otherwise; so does a GPU.
    """
    from compress_search.encoders import manifest as manifests

    same = bool(environment) and device == "cpu" and host_kind(environment) == host_kind()
    return EXACT if same and manifests.read(artifact / "weights")["dtype"] == "float32" else ELSEWHERE


def check(form: str, found: Mapping[str, float], expected: Mapping[str, float], allowed: float) -> None:
    """Compare the metrics of an exported form with what they should be.

    Raises:
        ExportError: one differs by more than ``allowed``; the text gives both values.
    """
    for name, value in found.items():
        if name not in expected:
            raise ExportError(f"the exported {form} model scores {name} {value:.6f}, of which nothing is recorded")
        if not abs(value - expected[name]) <= allowed:
            raise ExportError(
                f"the exported {form} model scores {name} {value:.6f} where {expected[name]:.6f} is expected: "
                f"they may differ by {allowed:g}"
            )


def write_forms(artifact: Path, directory: Path, task: Task, max_length: int) -> list[str]:
    """Write every form the artefact can take below the directory; their names, the one with the weights first.

    Beside each lie a tokenizer that cuts where the model was measured to, and the settings it was measured with.
    """
    from compress_search.encoders import load
    from compress_search.encoders.manifest import read as read_manifest
    from compress_search.teacher.networks import quiet

    network, tokenizer = load(artifact / "weights")
    record, onnx = Artifact.read(artifact), (artifact / "model.onnx").exists()
    # what torch ran from a packed file stays one, which from_pretrained could not read
    plain = None if not onnx and read_manifest(artifact / "weights").get("sparse") else as_pretrained(network)
    forms = ["manifest" if plain is None else "transformers"]
    folder = directory / FOLDERS[forms[0]]
    if plain is None:
        shutil.copytree(artifact / "weights", folder)
    else:
        with quiet():
            plain.save_pretrained(folder)
    if onnx:
        forms.append("onnx")
        _write_onnx(artifact / "model.onnx", directory / FOLDERS["onnx"])
    settings = settings_of(record.runtime, task, max_length, record.pad, record.crf)
    tokenizer.model_max_length = settings["max_length"]
    for form in forms:
        tokenizer.save_pretrained(directory / FOLDERS[form])
        text = json.dumps(settings, indent=1)
        (directory / FOLDERS[form] / SETTINGS).write_text(text, encoding="utf-8")
    return forms


def _write_onnx(model: Path, folder: Path) -> None:
    """The model with the example that runs it."""
    folder.mkdir(parents=True)
    shutil.copyfile(model, folder / "model.onnx")
    example = files("compress_search").joinpath("templates/run_onnx.py").read_text(encoding="utf-8")
    (folder / "run.py").write_text(example, encoding="utf-8")


def as_pretrained(network: Any) -> PreTrainedModel | None:
    """The network as its transformers class builds it from a configuration; None when none can express it.

    That is so when layers differ in width, lost heads, share weights or were factorized, and where there is a CRF:
    a network built from the configuration would have other tensors.
    """
    from transformers.initialization import no_init_weights

    from compress_search.encoders import describe

    manifest = describe(network)
    if not hasattr(network, "save_pretrained"):  # a network of our own
        return None
    if manifest["shared"] or manifest["tied"] or len({layer["ffn"] for layer in manifest["layers"]}) != 1:
        return None
    config, width = deepcopy(network.config), manifest["layers"][0]["ffn"]
    config.update({name: width for name in ("intermediate_size", "hidden_dim") if hasattr(config, name)})
    with no_init_weights():
        plain = cast("PreTrainedModel", type(network)(config).to(network.dtype).eval())
    tensors = network.state_dict()
    if {n: t.shape for n, t in plain.state_dict().items()} != {n: t.shape for n, t in tensors.items()}:
        return None
    plain.load_state_dict(tensors)
    return plain


def _refuse_taken(destination: Path) -> None:
    try:
        output_directory(destination, Path.cwd())
    except ValueError as error:
        raise StudyError(str(error), file=destination) from error
    if destination.exists() and any(destination.iterdir()):
        raise StudyError("exists already: expected a new or an empty directory", file=destination)


@contextmanager
def _staged(destination: Path) -> Iterator[Path]:
    """A directory beside the destination that takes its place when the block ends without an error."""
    destination = destination.absolute()  # beside "." is not in it
    destination.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    try:
        yield staging
        staging.chmod(0o755)  # mkdtemp's is for the owner alone
        staging.rename(destination)
    finally:
        shutil.rmtree(staging, ignore_errors=True)

"""The scenes that recipes are compared in: a data set, how much of it is labelled, and what teaches.

Owns the studies of the scenes, and the networks beside a teacher that some of them name: further teachers, a masked
language model and a small pretrained network, all made here from the pretrained encoder of the other benchmarks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import AutoModelForMaskedLM, AutoTokenizer, DataCollatorForLanguageModeling, PreTrainedModel
from transformers.trainer_pt_utils import LengthGroupedSampler

from benchmarks.distillation_quality import BATCH, SETS, study_of
from benchmarks.ground import Ground
from benchmarks.recipes import (
    ALL_LABELS,
    ANSWERS,
    BESIDE_ANSWERS,
    BY_TURNS,
    CHAINS,
    FEW_LABELS,
    LEFT_OUT,
    SEVEN_BITS,
    Groups,
)
from compress_search.losses import IGNORED

LABELLED = 1000
"""Rows with labels in a scene of few of them; the text of all others has none."""
LANGUAGE_STEPS = 600
"""Training steps of a masked language model, of 32 texts each."""


@dataclass(frozen=True)
class Scene:
    """A data set, what its study says beside :data:`SETS`, and the recipes that are compared there.

    ``few_labels``: only the first :data:`LABELLED` rows are labelled. ``teachers``: how many there are, of as many
    seeds. ``further``: a further task, by its data set.
    """

    set: str
    told: str
    groups: Groups
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    few_labels: bool = False
    pretraining: bool = False
    teachers: int = 1
    further: str = ""


FEW = "1,000 labelled rows of banking77 and the text of the other 7,990"
FIELD = {"fine_tune": {"crf": True}}
FULL = {"training": {"precision": "fp32"}}
"""What scenes say that came after the first one, whose processor had kernels for bfloat16."""
SCENES: Mapping[str, Scene] = {
    "all labels": Scene("banking77", "banking77, in bfloat16.", ALL_LABELS, {"training": {"precision": "bf16"}}),
    "few labels": Scene(
        "banking77",
        f"{FEW}. The masked language model, and the small pretrained network of three layers, are the pretrained "
        f"encoder and its lower half after {LANGUAGE_STEPS} steps on that text.",
        FEW_LABELS,
        FULL,
        few_labels=True,
        pretraining=True,
    ),
    "three teachers": Scene(
        "banking77", f"{FEW}; three teachers, means of logits.", ANSWERS, FULL, few_labels=True, teachers=3
    ),
    "three teachers, probabilities": Scene(
        "banking77",
        f"{FEW}; three teachers, means of probabilities.",
        ANSWERS,
        {"teacher": {"average": "probabilities"}, **FULL},
        few_labels=True,
        teachers=3,
    ),
    "layers skipped": Scene(
        "banking77",
        f"{FEW}; each step of the teacher's training skipped half of its layers.",
        {"structured_pruning": LEFT_OUT},
        {"teacher": {"fine_tune": {"layer_drop": 0.5}}, **FULL},
        few_labels=True,
    ),
    "no chain": Scene("wikigold", "wikigold.", BESIDE_ANSWERS, FULL),
    "no chain, three teachers": Scene(
        "wikigold", "wikigold; three teachers, means of logits.", ANSWERS, FULL, teachers=3
    ),
    "no chain, word classes by turns": Scene(
        "wikigold",
        "wikigold; by turns word classes of 6,989 other sentences (ewt_pos) are learnt, of a teacher that was "
        "trained in one pass over them.",
        BY_TURNS,
        FULL,
        further="ewt_pos",
    ),
    "chain": Scene(
        "wikigold", "wikigold, with a CRF that learns twice as fast.", CHAINS, {"teacher": FIELD, **FULL}
    ),
    "chain, at the same rate": Scene(
        "wikigold",
        "wikigold, with a CRF that learns no faster than the rest.",
        ANSWERS,
        {"teacher": {"fine_tune": {"crf": True, "crf_multiplier": 1.0}}, **FULL},
    ),
    "chain, ten times as fast in students": Scene(
        "wikigold",
        "wikigold, with a CRF that learns twice as fast, and in students ten times.",
        ANSWERS,
        {"teacher": FIELD, "training": {"crf_multiplier": 10.0, **FULL["training"]}},
    ),
    "seven bits": Scene("sst2", "sst2.", SEVEN_BITS, FULL),
}


def open_scene(scene: Scene, folder: Path, shared: Path, steps: int) -> Ground:
    """The scene's study, with its teacher and its data ready, in a folder of its own."""
    folder.mkdir(parents=True)
    content = study_of(folder, shared, scene.set, steps, [_metric(scene), "size_mb"])
    for section, changes in scene.changes.items():
        _merge(content[section], changes)
    if scene.few_labels:
        _keep_few_labels(content, folder, steps)
    if scene.pretraining:
        content["teacher"] |= _pretrained(Path(content["teacher"]["model"]), content["data"], folder)
    if scene.further:
        content["auxiliary"] = {scene.further: _word_classes(content, shared / "data" / scene.further)}
    if scene.teachers > 1:
        others = range(1, scene.teachers)
        content["teacher"]["ensemble"] = [_teacher(content, folder, seed=number) for number in others]
    return Ground(_written(content, folder / "study.yaml"))


def _word_classes(content: Mapping[str, Any], data: Path) -> dict[str, Any]:
    """A further task of tags, whose teacher begins as the study's own did."""
    return {
        "task": "token-classification",
        "teacher": {"model": content["teacher"]["model"], "fine_tune": {"epochs": 1, "learning_rate": 2e-4}},
        "data": {"train": str(data / "train.jsonl"), "max_length": content["data"]["max_length"]},
    }


def _metric(scene: Scene) -> str:
    return "f1" if SETS[scene.set]["task"] == "token-classification" else "accuracy"


def _merge(content: dict[str, Any], changes: Mapping[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, Mapping):
            _merge(content.setdefault(key, {}), value)
        else:
            content[key] = value


def _written(content: Mapping[str, Any], path: Path) -> Path:
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def _keep_few_labels(content: dict[str, Any], folder: Path, steps: int) -> None:
    """Fewer rows, as many steps of students; a teacher sees each of them four times as often."""
    rows = Path(content["data"]["train"]).read_text(encoding="utf-8").splitlines()
    texts = (json.dumps({"text": json.loads(row)["text"]}) for row in rows[LABELLED:])
    content["data"]["train"] = _lines(rows[:LABELLED], folder / "labelled.jsonl")
    content["data"]["unlabeled"] = _lines(texts, folder / "unlabelled.jsonl")
    content["training"]["epochs"] = steps * BATCH / LABELLED
    content["teacher"]["fine_tune"]["epochs"] *= 4


def _lines(rows: Any, path: Path) -> str:
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return str(path)


def _teacher(content: Mapping[str, Any], folder: Path, *, seed: int) -> str:
    """A teacher of the same study that another seed trained."""
    path = folder / f"teacher-{seed}"
    ground = Ground(_written({**content, "search": {"seed": seed}, "output": str(path)}, folder / f"{seed}.yaml"))
    teacher = ground.materials.teacher
    cast(PreTrainedModel, teacher.network).save_pretrained(path / "network")
    teacher.tokenizer.save_pretrained(path / "network")
    return str(path / "network")


def _pretrained(source: Path, data: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """A masked language model of the encoder's shapes, and one of its lower half, by their keys in a study."""
    files = (Path(data[part]) for part in ("train", "unlabeled"))
    texts = [json.loads(row)["text"] for file in files for row in file.read_text(encoding="utf-8").splitlines()]
    depths = {"masked_lm": 6, "student_start": 3}
    for key, layers in depths.items():
        train_language_model(source, texts, data["max_length"], layers, folder / key)
    return {key: str(folder / key) for key in depths}


def train_language_model(source: Path, texts: list[str], length: int, layers: int, directory: Path) -> None:
    """Train an encoder's lower layers to tell hidden words, the same in every pass over the text; save them."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(source)
    network = AutoModelForMaskedLM.from_pretrained(source)
    network.base_model.encoder.layer = network.base_model.encoder.layer[:layers]
    network.config.num_hidden_layers = layers
    rows = [tokenizer(text, truncation=True, max_length=length) for text in texts]
    collate = DataCollatorForLanguageModeling(tokenizer)
    alike = LengthGroupedSampler(BATCH, lengths=[len(row["input_ids"]) for row in rows])
    batches: Any = DataLoader(rows, BATCH, sampler=alike, collate_fn=collate)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-4, fused=True)
    course = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-4, LANGUAGE_STEPS, anneal_strategy="linear")
    network.train()
    for batch in islice(cycle(batches), LANGUAGE_STEPS):
        loss = hidden_words_loss(network, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        course.step()
    network.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def hidden_words_loss(network: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The cross-entropy of hidden words; these alone get logits, which are over a vocabulary."""
    read = {name: tensor for name, tensor in batch.items() if name != "labels"}
    asked = batch["labels"] != IGNORED
    logits = network.cls(network.base_model(**read).last_hidden_state[asked])
    return F.cross_entropy(logits, batch["labels"][asked])

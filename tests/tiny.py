"""Tiny data, teachers and study files, made on the spot: no network, no downloads, seconds on one core.

Every task is learnable from single words, so that a two-layer encoder separates it within a hundred steps.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

GOOD = ("good", "great", "lovely", "superb")
BAD = ("bad", "awful", "dull", "poor")
FILLER = ("the", "film", "was", "and", "a", "story", "with", "some", "actors", "really", "here", "today")
PEOPLE = ("ada", "alan", "grace", "edsger")
PLACES = ("paris", "turin", "oslo", "kyoto")
TAGS = ("B-LOC", "B-PER", "I-PER", "O")
FAMILIES = ("bert", "roberta", "xlm-roberta", "electra", "distilbert")

Row = dict[str, Any]


def classification_row(rng: random.Random) -> Row:
    label = rng.randrange(2)
    words = [*rng.choices(FILLER, k=rng.randint(2, 10)), rng.choice((BAD, GOOD)[label])]
    rng.shuffle(words)
    return {"text": " ".join(words), "label": ("negative", "positive")[label]}


def pair_row(rng: random.Random) -> Row:
    """The class says what the second text is; the first one only distracts."""
    left, right = rng.choice((GOOD, BAD)), rng.choice((GOOD, BAD))
    text = " ".join([*rng.choices(FILLER, k=3), rng.choice(left)])
    pair = " ".join([*rng.choices(FILLER, k=rng.randint(2, 6)), rng.choice(right)])
    return {"text": text, "text_pair": pair, "label": int(right is GOOD)}


def regression_row(rng: random.Random) -> Row:
    good, bad = rng.randint(0, 2), rng.randint(0, 2)
    words = [*rng.choices(FILLER, k=4), *rng.choices(GOOD, k=good), *rng.choices(BAD, k=bad)]
    rng.shuffle(words)
    return {"text": " ".join(words), "label": float(good - bad)}


def entity_row(rng: random.Random) -> Row:
    """A sentence with a person of two words (the second is no word of the vocabulary) and sometimes a place."""
    words = [(word, "O") for word in rng.choices(FILLER, k=rng.randint(2, 6))]
    at = rng.randint(0, len(words))
    words[at:at] = [(rng.choice(PEOPLE), "B-PER"), ("hopperman", "I-PER")]
    if rng.random() < 0.7:
        words.append((rng.choice(PLACES), "B-LOC"))
    return {"tokens": [word for word, _ in words], "tags": [tag for _, tag in words]}


def pos_row(rng: random.Random) -> Row:
    """Tags that are no BIO tags: adjectives against the rest."""
    words = rng.choices((*FILLER, *GOOD, *BAD), k=rng.randint(3, 9))
    return {"tokens": words, "tags": ["ADJ" if word in GOOD + BAD else "X" for word in words]}


ROWS: Mapping[str, Callable[[random.Random], Row]] = {
    "text-classification": classification_row,
    "pairs": pair_row,
    "text-regression": regression_row,
    "token-classification": entity_row,
    "pos": pos_row,
}
"""Kinds of data: the three tasks, and ``pairs`` (of texts) and ``pos`` (tags without entities)."""


def task_of(kind: str) -> str:
    return {"pairs": "text-classification", "pos": "token-classification"}.get(kind, kind)


def labels_of(kind: str) -> tuple[str, ...]:
    return {
        "text-classification": ("negative", "positive"),
        "pairs": ("0", "1"),
        "text-regression": (),
        "token-classification": TAGS,
        "pos": ("ADJ", "X"),
    }[kind]


def tiny_rows(kind: str = "text-classification", size: int = 64, seed: int = 0) -> list[Row]:
    rng = random.Random(f"{kind}/{seed}")
    return [ROWS[kind](rng) for _ in range(size)]


def write_jsonl(path: Path, rows: list[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tiny_data(folder: Path, kind: str = "text-classification", train: int = 96, validation: int = 32) -> Path:
    """``train.jsonl``, ``validation.jsonl`` and ``test.jsonl`` in the folder."""
    for seed, (name, size) in enumerate({"train": train, "validation": validation, "test": validation}.items()):
        write_jsonl(folder / f"{name}.jsonl", tiny_rows(kind, size, seed))
    return folder


def tiny_vocabulary() -> list[str]:
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = (*FILLER, *GOOD, *BAD, *PEOPLE, *PLACES)
    pieces = [*letters, *(f"##{letter}" for letter in letters), "hopper", "##man", *words]
    return list(dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces]))


def tiny_tokenizer(family: str = "bert") -> Any:
    """A WordPiece tokenizer of about a hundred pieces; without ``token_type_ids`` where the family has none."""
    from transformers import BertTokenizer

    names = ["input_ids", "attention_mask"] + ["token_type_ids"] * (family in ("bert", "electra"))
    vocabulary = {piece: i for i, piece in enumerate(tiny_vocabulary())}
    return BertTokenizer(vocab=vocabulary, model_max_length=64, model_input_names=names)


def tiny_config(kind: str = "text-classification", family: str = "bert", layers: int = 2, **changes: Any) -> Any:
    from transformers import AutoConfig

    labels = labels_of(kind) or ("LABEL_0",)
    common: dict[str, Any] = {
        "vocab_size": len(tiny_vocabulary()),
        "max_position_embeddings": 68,
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
        "pad_token_id": 0,
    }
    if task_of(kind) == "text-regression":
        common["problem_type"] = "regression"
    if family == "distilbert":
        shapes = {"n_layers": layers, "dim": 32, "n_heads": 4, "hidden_dim": 64, "sinusoidal_pos_embds": False}
    else:
        shapes = {
            "num_hidden_layers": layers,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "type_vocab_size": 2 if family in ("bert", "electra") else 1,
        }
    if family == "electra":
        shapes["embedding_size"] = 32
    return AutoConfig.for_model(family, **{**common, **shapes, **changes})


def tiny_network(kind: str = "text-classification", family: str = "bert", layers: int = 2, **changes: Any) -> Any:
    """An untrained network of 2 layers, hidden size 32, 4 heads, 64 neurons; the same weights on every call."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    tokens = task_of(kind) == "token-classification"
    auto = AutoModelForTokenClassification if tokens else AutoModelForSequenceClassification
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return auto.from_config(tiny_config(kind, family, layers, **changes)).eval()


def tiny_teacher(
    folder: Path, kind: str = "text-classification", family: str = "bert", layers: int = 2, **changes: Any
) -> Path:
    """A directory as ``save_pretrained`` writes it, tokenizer included; the weights are untrained."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    tiny_network(kind, family, layers, **changes).save_pretrained(folder)
    tiny_tokenizer(family).save_pretrained(folder)
    return folder


def tiny_study(folder: Path, task: str = "text-classification", family: str = "bert", **sections: Any) -> Path:
    """``study.yaml`` with data and a teacher beside it; ``task`` may also be ``pairs`` or ``pos``.

    Further sections replace or, where both are mappings, extend the defaults: ``search={"trials": 2}``;
    a section of None is left out.
    """
    tiny_data(folder / "data", task)
    defaults: dict[str, Any] = {
        "name": "tiny",
        "task": task_of(task),
        "teacher": {"model": "teacher"},
        "data": {"train": "data/train.jsonl", "validation": "data/validation.jsonl", "test": "data/test.jsonl"},
        "methods": ["distill"],
        "search": {"trials": 2, "seed": 0},
        "training": {"epochs": 1, "batch_size": 16},
        "measure": {"repeats": 5},
        "output": "run",
    }
    defaults["data"]["max_length"] = 32
    if task == "pairs":
        defaults["data"]["text_pair"] = "text_pair"
    for name, section in sections.items():
        both = isinstance(section, Mapping) and isinstance(defaults.get(name), Mapping)
        defaults[name] = {**defaults[name], **section} if both else section
    content = {name: section for name, section in defaults.items() if section is not None}
    if content["teacher"].get("model") == "teacher":
        tiny_teacher(folder / "teacher", task, family)
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path

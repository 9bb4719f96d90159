"""Studies that have one thing wrong with them: what is written, what is done to the files, and what is answered."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests import tiny

Rows = list[dict[str, Any]]
Prepare = Callable[[Path], Any]

DEAF = "@deaf@"
"""Stands for a port of the loopback interface at which nothing listens."""

METHOD = """
from compress_search import Method, Stage

class Mine(Method):
    stage = Stage.STUDENT

    def search_space(self, teacher):
        return {}

    def apply(self, candidate, params, context):
        return candidate
"""


@dataclass(frozen=True)
class Case:
    """Something wrong: what is written, what is done to the files, and the key and the words of the answer."""

    key: str
    words: str
    keys: Mapping[str, Any] = field(default_factory=dict)
    prepare: Prepare = lambda folder: None


def rows(split: str, change: Callable[[Rows], Any]) -> Prepare:
    """Change the rows of a data file."""

    def prepare(folder: Path) -> None:
        path = folder / "data" / f"{split}.jsonl"
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        change(found)
        tiny.write_jsonl(path, found)

    return prepare


def every(**columns: Any) -> Callable[[Rows], Any]:
    return lambda found: [row.update(columns) for row in found]


def without(column: str) -> Callable[[Rows], Any]:
    return lambda found: [row.pop(column) for row in found]


def numbered(found: Rows) -> None:
    """Labels of a regression, of which the third is no number."""
    for number, row in enumerate(found):
        row["label"] = "nan" if number == 2 else number


def write(name: str, text: str) -> Prepare:
    return lambda folder: (folder / name).write_text(text, encoding="utf-8")


def malformed(folder: Path) -> None:
    path = folder / "data" / "train.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([*lines[:2], '{"text": "half', *lines[3:]]), encoding="utf-8")


def teachers(**values: Any) -> Prepare:
    """Other values in the teacher's configuration."""

    def prepare(folder: Path) -> None:
        path = folder / "teacher" / "config.json"
        config = json.loads(path.read_text(encoding="utf-8")) | values
        path.write_text(json.dumps(config), encoding="utf-8")

    return prepare


def other_vocabulary(name: str, kind: str) -> Prepare:
    """A model beside the study with a piece that the teacher's tokenizer has not, and the teacher's vocab.txt."""

    def prepare(folder: Path) -> None:
        from transformers import BertTokenizer

        tiny.tiny_teacher(folder / name)
        pieces = [*tiny.tiny_vocabulary()[:-1], "other"]
        BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}).save_pretrained(folder / name)
        config = folder / name / "config.json"
        config.write_text(config.read_text().replace("BertForSequenceClassification", kind), encoding="utf-8")
        (folder / "vocab.txt").write_text("\n".join(tiny.tiny_vocabulary()), encoding="utf-8")

    return prepare


def language_model(**changes: Any) -> Prepare:
    """A masked language model ``lm`` beside the study, of the teacher's vocabulary."""

    def prepare(folder: Path) -> None:
        from transformers import AutoModelForMaskedLM

        AutoModelForMaskedLM.from_config(tiny.tiny_config(**changes)).save_pretrained(folder / "lm")
        tiny.tiny_tokenizer().save_pretrained(folder / "lm")

    return prepare


def tagged(folder: Path) -> None:
    """Words that all have a tag, a teacher of these tags, and a masked language model ``lm``."""
    tiny.tiny_data(folder / "data", "pos")
    tiny.tiny_teacher(folder / "teacher", "pos")
    language_model()(folder)


def scored(folder: Path) -> None:
    """Texts with a number each, and a teacher of it."""
    tiny.tiny_data(folder / "data", "text-regression")
    tiny.tiny_teacher(folder / "teacher", "text-regression")


def from_scratch(vocabulary: int | str, **keys: Any) -> dict[str, Any]:
    """A teacher that is to be trained from nothing."""
    architecture = {"layers": 2, "hidden": 32, "heads": 4, "vocabulary": vocabulary}
    return {"teacher": {"architecture": architecture, "fine_tune": {"epochs": 1}, **keys}}


def shorter(folder: Path) -> None:
    """The teacher's weights as a copy leaves them that was broken off."""
    file = folder / "teacher" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


def weights(name: str, text: str = "") -> Prepare:
    """A file of this name in place of the teacher's weights."""

    def prepare(folder: Path) -> None:
        (folder / "teacher" / "model.safetensors").unlink()
        (folder / "teacher" / name).write_text(text, encoding="utf-8")

    return prepare


GPT = '{"model_type": "gpt2", "architectures": ["GPT2ForSequenceClassification"]}'
MYSTERY = '{"model_type": "mystery", "architectures": ["MysteryModel"]}'

CASES = {
    "unknown key": Case("search.trails", 'unknown key (did you mean "trials"?)', {"search.trails": 3}),
    "unknown section": Case("serach", 'unknown key (did you mean "search"?)', {"serach": {"trials": 3}}),
    "wrong type": Case("search.trials", 'expected an integer, got "many"', {"search.trials": "many"}),
    "a section that is none": Case("data", "expected a mapping", {"data": "train.jsonl"}),
    "out of range": Case("data.max_length", "expected at least 4, got 1", {"data.max_length": 1}),
    "a key that is missing": Case("data.train", "missing; expected training data", {"data.train": None}),
    "missing data": Case("data.train", "no such file: data/none.jsonl", {"data.train": "data/none.jsonl"}),
    "missing test data": Case("data.test", "no such file: data/none.jsonl", {"data.test": "data/none.jsonl"}),
    "empty data": Case("data.train", "the file is empty: data/train.jsonl", {}, write("data/train.jsonl", "")),
    "blank data": Case("data.train", "there are no rows", {}, write("data/train.jsonl", "\n\n")),
    "malformed line": Case("data.train", "train.jsonl:3: not JSON: ", {}, malformed),
    "a line that is no object": Case(
        "data.train", "train.jsonl:1: expected a JSON object, got [1, 2]", {}, write("data/train.jsonl", "[1, 2]\n")
    ),
    "label in validation only": Case(
        "data.validation",
        "validation.jsonl:5: label 'mixed' does not occur in the training data (negative, positive)",
        {},
        rows("validation", lambda found: found[4].update(label="mixed")),
    ),
    "one class only": Case(
        "data.train",
        "every label is 'positive'; expected at least two classes",
        {},
        rows("train", every(label="positive")),
    ),
    "label is NaN": Case(
        "data.train",
        "train.jsonl:2: column 'label' holds no value",
        {},
        rows("train", lambda found: found[1].update(label=float("nan"))),
    ),
    "number is NaN": Case(
        "data.train",
        "train.jsonl:3: expected a number as label, got 'nan'",
        {"task": "text-regression"},
        rows("train", numbered),
    ),
    "no text column": Case(
        "data.train", "train.jsonl:1: no column 'text'; there are: label", {}, rows("train", without("text"))
    ),
    "no such text column": Case(
        "data.train", "train.jsonl:1: no column 'sentence'; there are: text, label", {"data.text": "sentence"}
    ),
    "no teacher there": Case("teacher.model", "no such directory: ./nowhere", {"teacher.model": "./nowhere"}),
    "no head": Case(
        "teacher.model",
        "BertModel has no head for text-classification: name a fine-tuned model",
        {},
        teachers(architectures=["BertModel"]),
    ),
    "a further teacher that reads other pieces": Case(
        "teacher.ensemble.0",
        "other: its vocabulary is not the first teacher's",
        {"teacher.ensemble": ["other"], "teacher.fine_tune": {"epochs": 1}},
        other_vocabulary("other", "BertForSequenceClassification"),
    ),
    "a language model that reads other pieces than a vocab.txt": Case(
        "teacher.masked_lm",
        "lm: its vocabulary is not the teacher's",
        from_scratch("vocab.txt", masked_lm="lm"),
        other_vocabulary("lm", "BertForMaskedLM"),
    ),
    "a language model of more pieces than are to be learnt": Case(
        "teacher.masked_lm",
        f"its vocabulary has {len(tiny.tiny_vocabulary())} pieces: expected the teacher's, which is to have 100",
        from_scratch(100, masked_lm="lm"),
        language_model(),
    ),
    "a language model that predicts no pieces": Case(
        "teacher.masked_lm",
        "BertForSequenceClassification: expected a masked language model",
        {"teacher.masked_lm": "teacher"},
    ),
    "no weights": Case(
        "teacher.model",
        "no weights beside config.json: expected model.safetensors or pytorch_model.bin",
        {},
        weights("readme.txt"),
    ),
    "weights without an end": Case(
        "teacher.model", "cannot load the weights: model.safetensors is damaged: ", {}, shorter
    ),
    "weights without anything": Case(
        "teacher.model", "cannot load the weights: pytorch_model.bin is empty", {}, weights("pytorch_model.bin")
    ),
    "a part of the weights is missing": Case(
        "teacher.model",
        "cannot load the weights: model-2.safetensors is not there",
        {},
        weights("model.safetensors.index.json", '{"weight_map": {"classifier.bias": "model-2.safetensors"}}'),
    ),
    "an index of weights that is none": Case(
        "teacher.model",
        "cannot load the weights: model.safetensors.index.json is no index of weights",
        {},
        weights("model.safetensors.index.json", "[]"),
    ),
    "no weights of a further teacher": Case(
        "teacher.ensemble.0",
        "no weights beside config.json",
        {"teacher.ensemble": ["other"]},
        lambda folder: shutil.copytree(
            folder / "teacher", folder / "other", ignore=shutil.ignore_patterns("*.safetensors")
        ),
    ),
    "unsupported family": Case(
        "teacher.model", "'gpt2' are not supported: expected", {}, write("teacher/config.json", GPT)
    ),
    "unknown family": Case(
        "teacher.model", "cannot read the model's configuration: ", {}, write("teacher/config.json", MYSTERY)
    ),
    "a configuration with a value of another kind": Case(
        "teacher.model", "cannot read the model's configuration: ", {}, teachers(hidden_size="32")
    ),
    "a width that its heads do not divide": Case(
        "teacher.model", "no network can be made of its configuration: ", {}, teachers(num_attention_heads=5)
    ),
    "an activation that nobody knows": Case(
        "teacher.model", "no network can be made of its configuration: ", {}, teachers(hidden_act="mystery")
    ),
    "longer than the teacher reads": Case(
        "data.max_length", "the teacher reads at most 68 tokens, got 100", {"data.max_length": 100}
    ),
    "a model the hub has not": Case(
        "teacher.model", "nobody/nothing is no directory here; cannot read", {"teacher.model": "nobody/nothing"}
    ),
    "data the hub has not": Case(
        "data.train", "cannot load nobody/nothing from the hub: ", {"data.train": "nobody/nothing"}
    ),
    "unknown method": Case(
        "methods.theseuss", 'unknown method theseuss (did you mean "theseus"?)', {"methods": {"theseuss": {}}}
    ),
    "unknown method in a list": Case(
        "methods.1", "unknown method nonsense; there are: ", {"methods": ["theseus", "nonsense"]}
    ),
    "unknown dimension": Case(
        "methods.distill.heat",
        "unknown dimension; there are: ",
        {"methods": {"theseus": {}, "distill": {"heat": 2}}},
    ),
    "range outside the space": Case(
        "methods.theseus.base_rate",
        "outside",
        {"methods": {"theseus": {"base_rate": {"low": 2.0, "high": 3.0}}}},
    ),
    "range upside down": Case(
        "methods.theseus.base_rate",
        "the range is empty: low 0.9 is above high 0.1",
        {"methods": {"theseus": {"base_rate": {"low": 0.9, "high": 0.1}}}},
    ),
    "two forced methods of one stage": Case(
        "methods.theseus.use",
        "only one student method can be forced, and 'mine' is already",
        {"methods": {"theseus": {"use": True}, "mine": {"use": True}}, "plugins": ["mine.py"]},
        write("mine.py", METHOD),
    ),
    "a method with nothing to follow": Case(
        "methods.distill", "cannot be used in this study: there is nothing to recover", {"methods": {"distill": {}}}
    ),
    "text without labels that is not there": Case(
        "methods.minilm.unlabelled_text",
        "needs text without labels: name some under data.unlabeled",
        {"methods": {"minilm": {"unlabelled_text": True}}},
    ),
    "a phase on text that is not there": Case(
        "methods.tinybert.general_fraction",
        "needs text without labels: name some under data.unlabeled",
        {"methods": {"tinybert": {"general_fraction": 0.3}}},
    ),
    "a language model that is not there": Case(
        "methods.distilbert.general",
        "needs a masked language model: name one under teacher.masked_lm",
        {"methods": {"distilbert": {"general": True}}},
    ),
    "a CRF that is not there": Case(
        "methods.distill.crf_target",
        "needs a teacher with a CRF: have one trained by teacher.fine_tune.crf",
        {"methods": {"theseus": {}, "distill": {"crf_target": "viterbi"}}},
    ),
    "other words without a language model": Case(
        "methods.tinybert.augment",
        "true, and augmentation needs a masked language model: name one under teacher.masked_lm",
        {"methods": {"tinybert": {"augment": True}}},
    ),
    "other words where every word has a tag": Case(
        "methods.tinybert.augment",
        "true, and augmentation replaces words outside entities, and no tag is O",
        {
            "methods": {"tinybert": {"augment": True}},
            "teacher.masked_lm": "lm",
            "task": "token-classification",
        },
        tagged,
    ),
    "a phase that weighs nothing": Case(
        "methods.distilbert.ce_weight",
        "every weight of the first phase is 0: expected one above",
        {"methods": {"distilbert": {"ce_weight": 0, "cos_weight": [0]}}},
    ),
    "a default that cannot be": Case(
        "methods.1.general",
        "true, and the masked language model is unlike the teacher: layers 3 and not 2",
        {"methods": ["theseus", "distilbert"], "teacher.masked_lm": "lm"},
        language_model(layers=3),
    ),
    "a language model of another width": Case(
        "methods.distilbert.general",
        "the masked language model is unlike the teacher: embedding_size 16 and not 32, hidden 16 and not 32",
        {"methods": {"distilbert": {}}, "teacher.masked_lm": "lm"},
        language_model(hidden_size=16),
    ),
    "a language model of another depth in the teacher's place": Case(
        "methods.tinybert.general_fraction",
        "0.5: the masked language model is unlike the teacher: layers 3 and not 2",
        {
            "methods": {"tinybert": {"general_fraction": 0.5}},
            "teacher.masked_lm": "lm",
            "data.unlabeled": "data/test.jsonl",
        },
        language_model(layers=3),
    ),
    "a match with a layer that no student has": Case(
        "methods.layer_match.matches",
        "match 1: student_layer 2 does not exist: hidden of its 1 layers counts from 0 to 1",
        {"methods": {"layer_match": {"matches": "- {teacher_layer: 2, student_layer: 2}"}}},
    ),
    "a phase in general that is not there": Case(
        "methods.layer_match.general",
        "masked_text needs a masked language model: name one under teacher.masked_lm",
        {"methods": {"layer_match": {"general": "masked_text"}}},
    ),
    "a phase in general of nothing": Case(
        "methods.layer_match.general",
        "text needs text at large: name some under data.unlabeled, or a language model under teacher.masked_lm",
        {"methods": {"layer_match": {"general": "text"}}},
    ),
    "a phase in general from a language model of another depth": Case(
        "methods.layer_match.general",
        "text, and the masked language model is unlike the teacher: layers 3 and not 2",
        {"methods": {"layer_match": {"general": "text"}}, "teacher.masked_lm": "lm"},
        language_model(layers=3),
    ),
    "a match of a phase that is not there": Case(
        "methods.layer_match.matches",
        "match 1 is of phase general, and general is none: expected another",
        {"methods": {"layer_match": {"matches": "- {phase: general}"}}},
    ),
    "a language model that has no sentences": Case(
        "methods.layer_match.matches",
        "match 1: a language model has no pooled sentence: name phase 1 or 2",
        {
            "methods": {"layer_match": {"general": "text", "matches": "- {feature: pooled, loss: mse}"}},
            "teacher.masked_lm": "lm",
        },
        language_model(),
    ),
    "a head of a language model for a narrower student": Case(
        "methods.layer_match.general",
        "masked_text, and the student is not as wide as the language model under whose head it would stand: "
        "set mlm_weight to 0",
        {
            "methods": {"layer_match": {"general": "masked_text", "width": 0.5, "mlm_weight": 2.0}},
            "teacher.masked_lm": "lm",
        },
        language_model(),
    ),
    "logits of a language model for a narrower student": Case(
        "methods.layer_match.matches",
        "match 1 is of logits, and the student is not as wide as the language model under whose head it would",
        {
            "methods": {
                "layer_match": {
                    "general": "text",
                    "width": 0.5,
                    "matches": "- {feature: logits, loss: kd_kl, phase: general}",
                }
            },
            "teacher.masked_lm": "lm",
        },
        language_model(),
    ),
    "a language model that is not there to start as": Case(
        "methods.minilm.start",
        "masked_lm needs a masked language model: name one under teacher.masked_lm",
        {"methods": {"minilm": {"start": "masked_lm"}}},
    ),
    "one of several starts that is not there": Case(
        "methods.layer_match.start",
        "masked_lm needs a masked language model: name one under teacher.masked_lm",
        {"methods": {"layer_match": {"start": ["teacher", "masked_lm"]}}},
    ),
    "a head of a language model of another family": Case(
        "methods.layer_match.general",
        "masked_text, and the masked language model is unlike the teacher: family roberta and not bert",
        {"methods": {"layer_match": {"general": "masked_text"}}, "teacher.masked_lm": "lm"},
        language_model(family="roberta"),
    ),
    "a language model of other layers to start as": Case(
        "methods.layer_match.start",
        "masked_lm, and the masked language model is unlike the teacher: layers 3 and not 2",
        {"methods": {"layer_match": {"start": "masked_lm"}}, "teacher.masked_lm": "lm"},
        language_model(layers=3),
    ),
    "a match of two widths": Case(
        "methods.layer_match.matches",
        "match 1: hidden_mse cannot compare widths 16 and 32: add proj: linear, or use nst",
        {"methods": {"layer_match": {"width": [0.5, 0.25], "matches": "- {teacher_layer: 2, student_layer: 1}"}}},
    ),
    "relation heads that divide no width": Case(
        "methods.layer_match.matches",
        "match 1: relation_kl:5 needs a width that 5 divides, got 32",
        {"methods": {"layer_match": {"matches": "- {feature: q, loss: 'relation_kl:5'}"}}},
    ),
    "heads that cannot be matched": Case(
        "methods.layer_match.matches",
        "match 1: mse cannot compare heads of size 4 and 8: use relation_kl:<heads>",
        {"methods": {"layer_match": {"width": 0.5, "matches": "- {feature: k, loss: mse}"}}},
    ),
    "classes of a number": Case(
        "methods.layer_match.matches",
        "match 1: kd_ce compares classes, and the task has none: use kd_mse",
        {"task": "text-regression", "methods": {"layer_match": {"matches": "- {feature: logits, loss: kd_ce}"}}},
        scored,
    ),
    "unknown objective": Case("objectives.0", "unknown objective", {"objectives": ["acuracy", "latency_ms"]}),
    "contradictory constraints": Case(
        "constraints.size_mb", "nothing is both >= 50 and <= 40", {"constraints": {"size_mb": [">= 50", "<= 40"]}}
    ),
    "unreachable constraint": Case(
        "constraints.accuracy", 'accuracy lies between 0 and 1, got ">= 90"', {"constraints": {"accuracy": ">= 90"}}
    ),
    "unwritable output": Case("output", "study.yaml is not a directory", {"output": "study.yaml/run"}),
    "output where no file can be made": Case("output", "cannot be written: ", {"output": "/proc/mine"}),
    "output where no file can be made, and a database elsewhere": Case(
        "output", "cannot be written: ", {"output": "/proc/mine", "storage": "sqlite:///mine.db"}
    ),
    "a name that is too long": Case("output", "no usable path: File name too long, got ", {"output": "x" * 300}),
    "a name that is too long in a folder to be made": Case(
        "output", "no usable path: File name too long, got ", {"output": f"new/{300 * 'x'}/run"}
    ),
    "a name that no file has": Case("output", "no usable path: ", {"output": "nu\0ll"}),
    "data of a name that is too long": Case("data.train", "no usable path: ", {"data.train": f"{300 * 'x'}.csv"}),
    "a database of a name that is too long": Case(
        "storage", "no usable path: ", {"storage": f"sqlite:///{300 * 'x'}.db"}
    ),
    "more cores than there are": Case(
        "cluster.cpus_per_trial", "a trial asks for 4096 cores, this machine has ", {"cluster.cpus_per_trial": 4096}
    ),
    "more trials than there are cores": Case(
        "search.concurrency",
        "4096 trials at a time, of 1 each, ask for 4096 cores, this machine has ",
        {"search.concurrency": 4096},
    ),
    "output is a file": Case("output", "not a directory: data/train.jsonl", {"output": "data/train.jsonl"}),
    "unwritable database": Case(
        "storage", "study.yaml is not a directory", {"storage": "sqlite:///study.yaml/study.db"}
    ),
    "a database that is none": Case(
        "storage", "file is not a database", {"storage": "sqlite:///mine.db"}, write("mine.db", "words " * 1000)
    ),
    "unreachable database": Case(
        "storage",
        f"postgresql+psycopg://me:***@127.0.0.1:{DEAF}/studies: connection failed: ",
        {"storage": f"postgresql+psycopg://me:s3cret@127.0.0.1:{DEAF}/studies"},
    ),
    "a password of one letter": Case(
        "storage",
        f"://me:***@127.0.0.1:{DEAF}/studies: connection failed: connection to server at",
        {"storage": f"postgresql+psycopg://me:c@127.0.0.1:{DEAF}/studies"},
    ),
    "a database whose driver is not installed": Case(
        "storage", "cannot be used: No module named", {"storage": "sqlite+pysqlcipher://:s3cret@/mine.db"}
    ),
    "another kind of database": Case(
        "storage", "no such kind of database; expected sqlite", {"storage": "mysql://me:s3cret@127.0.0.1/studies"}
    ),
    "no such plugin file": Case("plugins.0", "no such file: mine.py", {"plugins": ["mine.py"]}),
    "a plugin that cannot be imported": Case(
        "plugins.0",
        "method 'mine' (from mine.py): cannot be imported: ModuleNotFoundError: No module named 'nothing_here'",
        {"plugins": ["mine.py"], "methods": "all"},
        write("mine.py", "import nothing_here\n"),
    ),
    "a plugin that is no Python": Case(
        "plugins.0", "cannot be imported: SyntaxError", {"plugins": ["mine.py"]}, write("mine.py", "def (:\n")
    ),
    "a plugin without a method": Case(
        "plugins.0",
        "expected one subclass of compress_search.Method in the file, found none",
        {"plugins": ["mine.py"]},
        write("mine.py", "x = 1\n"),
    ),
    "a plugin of a taken name": Case(
        "plugins.0",
        "method 'theseus': the name is taken by compress-search",
        {"plugins": ["theseus.py"]},
        write("theseus.py", METHOD),
    ),
}

"""Studies with a value that no such step can have here: what is answered names the value and those that can be.

Of pruning, factorization, precision and runtimes, where a teacher's widths and tokenizer, and the kernels of a
machine, say what can be. In these studies time counts, and the machine has kernels for int8 alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests import tiny
from tests.bad_studies import Case, Prepare, tagged


def narrow(folder: Path) -> None:
    """A teacher whose widths no power of two divides but 2."""
    tiny.tiny_teacher(folder / "teacher", hidden_size=36, intermediate_size=66)


def with_pieces_of_unigram(folder: Path) -> None:
    """A teacher whose tokenizer holds scores of pieces, not the ways they are made."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    scored = [(piece.removeprefix("##"), -float(i)) for i, piece in enumerate(tiny.tiny_vocabulary())]
    tokenizer = Tokenizer(models.Unigram(list(dict(scored).items()), unk_id=1))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    for file in (folder / "teacher").glob("tokenizer*"):
        file.unlink()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder / "teacher")


def case(method: str, key: str, words: str, /, prepare: Prepare = lambda folder: None, **values: Any) -> Case:
    """A study of this method with these values; those in capitals are sections of the study."""
    sections = {name.lower(): values.pop(name) for name in list(values) if name.isupper()}
    return Case(f"methods.{method}.{key}".rstrip("."), words, {**sections, "methods": {method: values}}, prepare)


SIZE = ["accuracy", "size_mb"]

CASES = {
    "a ratio that leaves no head": case(
        "structured_pruning",
        "head_ratio",
        "0.9 is outside the space: expected a number from 0 to 0.75",
        head_ratio=0.9,
    ),
    "a ratio that leaves no layer": case(
        "structured_pruning",
        "layer_ratio",
        "1.0 is outside the space: expected a number from 0 to 0.5",
        layer_ratio=1.0,
    ),
    "a target without a budget": case(
        "structured_pruning", "target", "has no effect: it needs budget: macs or latency", target=0.6
    ),
    "a target below the smallest network": case(
        "structured_pruning",
        "target",
        "0.1 is outside the space: expected a number from",
        budget="macs",
        target=0.1,
    ),
    "a target below what all blocks come to": case(
        "structured_pruning",
        "target",
        "0.3 of the multiply-accumulates, and what these layers can be cut to has",
        budget="macs",
        target=0.3,
        whole_blocks=False,
    ),
    "energy without its mode": case("low_rank", "energy", "has no effect: it needs rank_mode: energy", energy=0.9),
    "a rank above the break-even": case(
        "low_rank",
        "rank_ratio",
        "0.89 is rank 16, and a rank gains something below 14.4: expected at most 0.87",
        rank_ratio=0.89,
        targets="attention",
        rank_multiple=4,
        recover="kd",
    ),
    "multiples of ranks that are no smaller than maps": case(
        "low_rank",
        "rank_multiple",
        "32, and a rank gains something below 19.2: expected one of 1, 4, 8, 16",
        rank_multiple=32,
        targets="ffn",
        decomposition="fisher_weighted",
    ),
    "a pattern of weights on other widths": case(
        "unstructured_pruning",
        "pattern",
        "'2:4' is outside the space: expected one of unstructured; "
        "2:4 needs inputs that 4 divides, and there are matrices of 36 x 66",
        narrow,
        OBJECTIVES=SIZE,
        pattern="2:4",
    ),
    "a group size without a kernel": case(
        "quantization",
        "group_size",
        "16 has no kernel at 2 bits: expected one of 32, 64, 128",
        OBJECTIVES=SIZE,
        weight_bits=2,
        group_size=16,
    ),
    "arithmetic without a kernel": case(
        "quantization",
        "accuracy_level",
        "0 has no kernel at 2 bits: expected 4",
        OBJECTIVES=SIZE,
        weight_bits=2,
        codebook="uniform",
        accuracy_level=0,
    ),
    "groups where a scale is a channel's": case(
        "quantization",
        "group_size",
        "has no effect: it needs weight_bits: 4",
        OBJECTIVES=SIZE,
        weight_bits=8,
        scheme="dynamic_int8",
        group_size=64,
    ),
    "layers as numbers and not as text": case(
        "tinybert", "custom_map", '3 is outside the space: expected text, as "1, 3"', custom_map=[3, 6]
    ),
    "a map to a layer that the teacher has not": case(
        "tinybert",
        "custom_map",
        "expected rising numbers from 1 to 2 with commas between, got '1, 9'",
        custom_map="1, 9",
    ),
    "a start as a layer that the teacher has not": case(
        "distilbert",
        "custom_layers",
        "expected rising numbers from 0 to 1 with commas between, got '0, 7'",
        custom_layers="0, 7",
    ),
    "a layer to learn from that the teacher has not": case(
        "minilm", "teacher_layer", "12 is outside the space: expected an integer from", teacher_layer=12
    ),
    "matches as a list of mappings": case(
        "layer_match",
        "matches",
        "; mappings in a list are written as text, after |",
        matches=[{"teacher_layer": 4, "student_layer": 2}],
    ),
    "a group that no kernel has": case(
        "quantization",
        "group_size",
        "512 is outside the space: expected one of",
        OBJECTIVES=SIZE,
        weight_bits=4,
        group_size=512,
    ),
    "a table of more numbers than before": case(
        "embedding_factorization", "embedding_size", "is outside the space: expected", embedding_size=4096
    ),
    "a teacher for weights that are not trained": case(
        "quantization", "qat_kd", "has no effect: it needs qat: true", qat_kd=False
    ),
    "inner states without a teacher": case(
        "quantization",
        "qat_features",
        "has no effect: it needs qat_kd: true",
        qat=True,
        qat_kd=False,
        qat_features="last_hidden",
    ),
    "activations of few bits where time counts": case(
        "quantization",
        "activation_bits",
        "4 needs a kernel that is real here, as time counts: see compress-search doctor",
        activation_bits=4,
    ),
    "sixteen bits where time counts": case(
        "quantization",
        "weight_bits",
        "16 is outside the space: expected one of 8, 32; 16 needs a kernel that is real here",
        weight_bits=16,
        float_type="fp16",
    ),
    "float16 where time counts": case(
        "quantization",
        "float_type",
        "fp16 needs a kernel that is real here, as time counts: see compress-search doctor",
        float_type="fp16",
    ),
    "a tokenizer that cannot be pruned": case(
        "vocabulary_pruning",
        "",
        "cannot be used in this study: its tokenizer is Unigram's (SentencePiece), which weighs all pieces of a "
        "word against each other: expected WordPiece or byte-level BPE",
        with_pieces_of_unigram,
        keep=0.5,
    ),
    "a cut of texts whose every word has a tag": case(
        "runtimes",
        "coverage",
        "needs a task on whole texts: a cut would leave words of this one without a label",
        tagged,
        TASK="token-classification",
        coverage=0.9,
    ),
    "threads on one core": case(
        "runtimes", "threads", "needs more cores than the 1 of a trial: see cluster.cpus_per_trial", threads=99
    ),
}

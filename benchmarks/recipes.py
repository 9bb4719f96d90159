"""The recipes whose figures docs/systems quotes: variants of each method, by the scene they are compared in.

Data alone: which data sets and teachers the scenes have is :mod:`benchmarks.scenes`'s to say, and what becomes of a
recipe :mod:`benchmarks.variants`'s.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from benchmarks.ground import Methods

RATE = 3e-4
"""The learning rate of all training here."""
MEANS = {"convert_init": "average", "tie_warmup": 0.0}
DRAWN = {"convert_init": "average", "tie_warmup": 0.5}
HALVED = {"head_ratio": 0.5, "ffn_ratio": 0.5, "learning_rate": RATE}


def half(method: str, **params: Any) -> Methods:
    """A student of half the teacher's six layers."""
    return {method: {"layers": 3, "learning_rate": RATE, **params}}


def theseus(**params: Any) -> Methods:
    """A successor of half the layers, unless the blocks are others."""
    return {"theseus": {"block_size": 2, "learning_rate": RATE, **params}}


def again(**params: Any) -> Methods:
    """A student of the teacher's own shape that begins where the teacher did."""
    return {"born_again": {"learning_rate": RATE, **params}}


def pruned(**params: Any) -> Methods:
    """Heads and neurons within half of the multiply-accumulates."""
    return {"structured_pruning": {"budget": "macs", "target": 0.5, "learning_rate": RATE, **params}}


def sparse(**params: Any) -> Methods:
    """Zeros by magnitude or movement, or in a pattern."""
    return {"unstructured_pruning": {"learning_rate": RATE, **params}}


def shared(**params: Any) -> Methods:
    """One set of weights for all layers, unless there are groups."""
    return {"sharing": {"learning_rate": RATE, **params}}


def factored(**params: Any) -> Methods:
    """All linear maps as products, not trained."""
    return {"low_rank": {"targets": "all", "rank_multiple": 1, **params}}


def rounded(bits: int, **params: Any) -> Methods:
    """Weights of so many bits, embeddings of 8."""
    return {"quantization": {"weight_bits": bits, "embedding_bits": 8, **params}}


def trained(bits: int, **params: Any) -> Methods:
    """The same with rounded weights in training, which codebooks have anyway."""
    asked = {} if bits == 1 or "codebook" in params else {"qat": True}
    return rounded(bits, learning_rate=RATE, **asked, **params)


def left_out(part: float) -> Methods:
    """The teacher without so many of its layers, evenly spaced."""
    none = {"head_ratio": 0.0, "ffn_ratio": 0.0, "recover": "none", "layer_strategy": "layer_drop"}
    return {"structured_pruning": {**none, "layer_ratio": part}}


def top_layers(**params: Any) -> Methods:
    """The lower half of the layers, which learns from the upper half's and from answers and labels at once."""
    return half("layer_match", init="first", strategy="last", **params)


def top_layer(**match: Any) -> Methods:
    """The same with one match of the last layers' hidden states."""
    last = {"teacher_layer": 6, "student_layer": 3, "feature": "hidden", **match}
    return half("layer_match", init="first", matches=json.dumps([last]))


def recovered(**params: Any) -> Methods:
    """The lower half of the teacher's layers, broken off and distilled afterwards."""
    cut = {**left_out(0.5)["structured_pruning"], "layer_strategy": "top"}
    return {"structured_pruning": cut, "distill": {"learning_rate": RATE, **params}}


Groups = Mapping[str, Mapping[str, Methods]]
"""By method, or by what is compared, the recipes' names and themselves."""

LEFT_OUT: Mapping[str, Methods] = {
    f"{gone} of 6 layers left out, not trained": left_out(gone / 6) for gone in (1, 2, 3)
}
SHORTCUTS: Mapping[str, Methods] = {
    f"a map for {gone} of 6 layers, not trained": {"shortcut": {"layers": 6 - gone, "trained": False}}
    for gone in (1, 2, 3, 4)
}

ALL_LABELS: Groups = {
    "baselines": {
        "lower layers, labels": half("plain_student"),
        "lower layers, labels and soft targets": half("plain_student", alpha=0.5),
        "lower layers of the pretrained network, labels": half("plain_student", start="untrained"),
        "all layers of the pretrained network, labels": half("plain_student", start="untrained", layers=6),
    },
    "theseus": {
        "linear": theseus(schedule="linear"),
        "constant 0.5": theseus(schedule="constant"),
        "uniform mixture": theseus(mixing="uniform"),
        "deterministic mixture": theseus(mixing="deterministic"),
        "half of the steps in stage 1": theseus(stage1_fraction=0.5),
        "last layer of each block": theseus(successor_init="last_of_block"),
        "replaced embeddings": theseus(replace_embeddings=True),
        "the teacher's own size": theseus(block_size=1),
    },
    "tinybert": {
        "uniform map": half("tinybert"),
        "top map": half("tinybert", layer_map="top"),
        "bottom map": half("tinybert", layer_map="bottom"),
        "layers 1, 4, 6": {"tinybert": {"custom_map": "1, 4, 6", "learning_rate": RATE}},
        "random start": half("tinybert", start="random"),
        "attention probabilities": half("tinybert", attention_target="probabilities"),
        "half as wide": half("tinybert", width=0.5),
        "half as wide, a projection for each layer": half("tinybert", width=0.5, projection="per_layer"),
        "312 of 768 as wide": half("tinybert", width=0.40625),
    },
    "distilbert": {
        "answers and labels at the end": half("distilbert"),
        "labels alone at the end": half("distilbert", second_distillation=False),
        "token types kept": half("distilbert", drop_token_type=False),
    },
    "minilm": {
        "version 1": half("minilm", version="v1"),
        "version 2": half("minilm", version="v2"),
        "half as wide": half("minilm", width=0.5, assistant="never"),
        "half as wide, with an assistant": half("minilm", width=0.5, assistant="always"),
        "all layers, half as wide": half("minilm", layers=6, width=0.5, assistant="never"),
    },
    "layer_match": {
        "uniform": half("layer_match", strategy="uniform"),
        "patient (skip, pkd)": half("layer_match", strategy="skip", features="hidden", hidden_loss="pkd"),
        "last": half("layer_match", strategy="last"),
        "learned alignment": half("layer_match", strategy="learned_align"),
        "earth mover's": half("layer_match", strategy="emd"),
        "mirrored Theseus": half("layer_match", strategy="mirror_theseus"),
        "matches and answers at once": half("layer_match", phases="joint"),
    },
    "born_again": {
        "one generation": again(),
        "two generations": again(generations=2),
        "annealing": again(annealing="linear"),
        "temperatures by FLSW": again(temperature_scheduler="flsw"),
        "temperatures by CWSM": again(temperature_scheduler="cwsm"),
        "probability shift": again(probability_shift=True),
    },
    "bilstm": {
        "LSTM": {"bilstm": {"cell": "lstm", "learning_rate": 3e-3}},
        "GRU": {"bilstm": {"cell": "gru", "learning_rate": 3e-3}},
    },
    "structured_pruning": {
        **{name: pruned(criterion=name) for name in ("random", "magnitude", "taylor", "fisher", "movement", "l0")},
        **{f"fisher, {name}": pruned(criterion="fisher", schedule=name) for name in ("one_shot", "iterative")},
        **{
            f"{name}, half of heads and neurons": {"structured_pruning": {"criterion": name, **HALVED}}
            for name in ("taylor", "fisher")
        },
        "fisher, rescaled, not trained": {
            "structured_pruning": {"budget": "macs", "target": 0.5, "criterion": "fisher", "recover": "rescale"}
        },
    },
    "unstructured_pruning": {
        **{
            f"{name}, 10 % stay": sparse(sparsity=0.9, method=name)
            for name in ("magnitude", "movement", "soft_movement")
        },
        "one_shot, 10 % stay": {"unstructured_pruning": {"sparsity": 0.9, "method": "one_shot"}},
        "magnitude, 2:4": sparse(pattern="2:4"),
        "magnitude, blocks of 32 × 32, half stay": sparse(pattern="block_32x32", sparsity=0.5),
    },
    "sharing": {
        "all, the first layer's": shared(convert_init="first"),
        "all, the best layer's": shared(convert_init="best_of"),
        "all, means of aligned layers": shared(**MEANS),
        "all, means": shared(**MEANS, align=False),
        "all, means they are drawn to": shared(**DRAWN),
        "all, means they are drawn to, not aligned": shared(**DRAWN, align=False),
        "all, in two groups, drawn": shared(**DRAWN, groups=2),
        "attention, drawn": shared(**DRAWN, mode="attention"),
        "ffn, drawn": shared(**DRAWN, mode="ffn"),
        "attention, the first layer's": shared(convert_init="first", mode="attention"),
        "ffn, the first layer's": shared(convert_init="first", mode="ffn"),
    },
    "factorization": {
        **{
            f"{name}, half of the ranks": factored(decomposition=name, rank_ratio=0.5)
            for name in ("svd", "activation_aware", "fisher_weighted")
        },
        **{f"activation_aware, energy {part}": factored(rank_mode="energy", energy=part) for part in (0.9, 0.98)},
        "embeddings of 128, svd": {"embedding_factorization": {"embedding_init": "svd", "learning_rate": RATE}},
        "embeddings of 128, weighted": {
            "embedding_factorization": {"embedding_init": "weighted_svd", "learning_rate": RATE}
        },
        "half of the vocabulary": {"vocabulary_pruning": {"keep": 0.5}},
    },
    "quantization": {
        "8 bits": rounded(8),
        "4 bits": rounded(4),
        "4 bits, with zero points": rounded(4, symmetric=False),
        "4 bits, eight maps in 8": rounded(4, high_precision_layers=8),
        "4 bits, FFN down in float32": rounded(4, exclude_ffn_down=True),
        "2 bits": rounded(2, codebook="uniform"),
        "2 bits, with zero points": rounded(2, codebook="uniform", symmetric=False),
        "4 bits, trained": trained(4),
        "ternary, trained on answers alone": trained(2, codebook="ternary", qat_features="none"),
        "ternary, last hidden states too": trained(2, codebook="ternary", qat_features="last_hidden"),
        "ternary, two stages": trained(2, codebook="ternary", qat_features="two_stage"),
        "binary, two stages": trained(1, qat_features="two_stage"),
    },
}

FEW_LABELS: Groups = {
    "plain_student": {
        "lower layers, labels": half("plain_student"),
        "lower layers, labels and soft targets": half("plain_student", alpha=0.5),
        "lower layers of the pretrained network, labels": half("plain_student", start="untrained"),
        "a small pretrained network, labels": {"plain_student": {"start": "checkpoint", "learning_rate": RATE}},
    },
    "structured_pruning": LEFT_OUT,
    "distill": {
        "labelled text alone": recovered(),
        "half of the steps on text without labels": recovered(transfer=0.5),
        "nine tenths of the steps on text without labels": recovered(transfer=0.9),
    },
    "layer_match": {
        "matches on labelled text": half("layer_match", phases="two_phase"),
        "matches on text without labels": half("layer_match", phases="two_phase", unlabelled_text=True),
        **{
            f"{told} on text without labels before": half("layer_match", phases="two_phase", general=kind, **less)
            for told, kind, less in (
                ("a language model's layers", "text", {}),
                ("and its hidden words", "masked_text", {}),
                ("shorter, its layers", "text", {"general_fraction": 0.2}),
            )
        },
    },
    "minilm": {
        "relations on labelled text": half("minilm"),
        "relations on text without labels": half("minilm", unlabelled_text=True),
        "a language model's relations on text without labels": half("minilm", unlabelled_text=True, general=True),
        "relations on labelled text with other words": half("minilm", augment=True),
    },
    "tinybert": {
        "labelled text alone": half("tinybert", augment=False),
        "augmented": half("tinybert", augment=True),
    },
    "distilbert": {
        "answers and directions on labelled text": half("distilbert", general=False),
        "the triple loss on text without labels": half("distilbert", general=True),
    },
}
ANSWERS: Groups = {"plain_student": {"lower layers, labels and soft targets": half("plain_student", alpha=0.5)}}
BESIDE_ANSWERS: Groups = {
    **ANSWERS,
    "shortcut": SHORTCUTS,
    "layer_match": {
        "top three layers' states": top_layers(features="hidden", hidden_weight=0.1),
        "top three layers' attention": top_layers(features="attention", attention_loss="relation_kl_rows"),
        "top layer's states": top_layer(loss="hidden_mse", weight=0.1),
        "top layer's directions": top_layer(loss="cos"),
        "top layer's likeness of tokens": top_layer(loss="nst", teacher_layer=[6, 6], student_layer=[3, 3]),
    },
}
"""What may be learnt of inner layers beside labels and answers, by students that begin as the first ones; and what
a student is that learns nothing."""
BY_TURNS: Groups = {
    "distill": {
        "the study's own task alone": recovered(by_turns=0.0),
        "by turns for a fifth of the steps": recovered(by_turns=0.2),
        "by turns for half of the steps": recovered(by_turns=0.5),
    }
}
"""Of a further task's turns: they take steps from the study's own."""
CHAINS: Groups = {
    "plain_student": {
        "labels": half("plain_student"),
        **{
            f"labels and the teacher's {told}": half("plain_student", alpha=0.5, crf_target=target)
            for target, told in (("emission", "logits"), ("posterior", "marginals"), ("viterbi", "best path"))
        },
        "the same, in int8": {**half("plain_student", alpha=0.5, crf_target="viterbi"), "quantization": {}},
    },
}
SEVEN_BITS: Groups = {
    "quantization": {
        "8 bits": rounded(8, reduce_range=False),
        "8 bits, of which 7 are used": rounded(8, reduce_range=True),
    },
}

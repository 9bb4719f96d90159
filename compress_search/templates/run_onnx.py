"""Runs the model in this directory on the text given on the command line.

Needs nothing but ``pip install onnxruntime tokenizers``:

    python run.py "first text" ["second text"]
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

HERE = Path(__file__).resolve().parent
SETTINGS = json.loads((HERE / "settings.json").read_text(encoding="utf-8"))


def load() -> Any:
    """The model, as it was measured; on all cores where no number of threads was chosen."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when the library is imported
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if SETTINGS["threads"]:
        options.intra_op_num_threads = SETTINGS["threads"]
    for name, value in SETTINGS["session"].items():
        options.add_session_config_entry(name, value)
    return onnxruntime.InferenceSession(str(HERE / "model.onnx"), options, providers=["CPUExecutionProvider"])


def best_path(emissions: Any, crf: dict[str, Any]) -> list[int]:
    """The most likely sequence of labels for scores (words, labels), by Viterbi's algorithm."""
    start, transitions, end = (np.array(crf[name], dtype=np.float32) for name in ("start", "transitions", "end"))
    best, pointers = emissions[0] + start, []
    for emission in emissions[1:]:
        reached = best[:, None] + transitions
        pointers.append(reached.argmax(0))
        best = reached.max(0) + emission
    path = [int((best + end).argmax())]
    for pointer in reversed(pointers):
        path.append(int(pointer[path[-1]]))
    return path[::-1]


def main(texts: list[str]) -> None:
    """Print each label with its probability, the likeliest first; for token tasks a label for each word."""
    tokenizer = Tokenizer.from_file(str(HERE / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(SETTINGS["max_length"])
    tokens = SETTINGS["task"] == "token-classification"
    words = texts[0].split()
    pair = texts[1] if len(texts) > 1 else None
    encoding = tokenizer.encode(words if tokens else texts[0], pair, is_pretokenized=tokens)
    session = load()
    width = len(encoding.ids)
    # padded to the widths that it was measured at, where it has any
    extra = next((bucket for bucket in SETTINGS["buckets"] if bucket >= width), width) - width
    known = {
        "input_ids": encoding.ids + [SETTINGS["pad"]] * extra,
        "attention_mask": encoding.attention_mask + [0] * extra,
        "token_type_ids": encoding.type_ids + [0] * extra,
    }
    feed = {node.name: np.array([known[node.name]], dtype=np.int64) for node in session.get_inputs()}
    logits = session.run(["logits"], feed)[0][0]  # (labels,), or (pieces, labels) for token tasks
    if tokens:
        firsts = {word: piece for piece, word in reversed(list(enumerate(encoding.word_ids))) if word is not None}
        scores = logits[[piece for _, piece in sorted(firsts.items())]]  # (words, labels)
        path = best_path(scores, SETTINGS["crf"]) if SETTINGS["crf"] else scores.argmax(-1)
        for word, label in zip(sorted(firsts), path, strict=True):
            print(words[word], SETTINGS["labels"][label], sep="\t")
    elif SETTINGS["labels"]:
        exponentials = np.exp(logits - logits.max())
        for index in logits.argsort()[::-1]:
            print(SETTINGS["labels"][index], f"{exponentials[index] / exponentials.sum():.4f}", sep="\t")
    else:
        print(f"{logits[0]:.6f}")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(sys.argv[1:])

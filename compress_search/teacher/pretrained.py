"""A model that is there already: found, fetched, checked against task and data, and loaded.

Owns every complaint about a model and the order of its labels. Knows nothing of training.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from compress_search import hub
from compress_search.crf import attach_crf, crf_of
from compress_search.encoders import FAMILIES, head_linears, inputs
from compress_search.study import Study
from compress_search.tasks import Task
from compress_search.teacher.networks import HEADS, auto_class, quiet, restore_crf, seeded, with_crf, with_labels

_DESCRIPTION = ("*.json", "*.txt", "*.model")
_SAFE, _LEGACY = "*.safetensors", "pytorch_model*.bin"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "sentencepiece.bpe.model")


def read_config(study: Study, task: Task) -> PreTrainedConfig:
    """The model's configuration, after every check that needs nothing else; a head to be trained is relabelled.

    Raises:
        StudyError: see :func:`compress_search.teacher.teacher_subject`.
    """
    config = _read(study)
    _check_family(study, config)
    _check_positions(study, config)
    if study.teacher.fine_tune:
        return with_crf(with_labels(config, task), study.teacher.fine_tune.crf)
    _check_head(study, config, task)
    _label_order(study, config, task)
    return config


def _read(study: Study) -> PreTrainedConfig:
    model = str(study.teacher.model)
    local = Path(model).is_dir()
    try:
        with quiet():
            config: PreTrainedConfig = AutoConfig.from_pretrained(
                model, local_files_only=local or not hub.reachable()
            )
    except Exception as error:  # files that are not there, and whatever checks of values the library makes
        fault = f"cannot read the model's configuration: {_first_line(error)}"
        raise study.error("teacher.model", fault if local else f"{model} is no directory here; {fault}") from error
    if local:
        _check_files(study, Path(model))
    return config


def _check_files(study: Study, directory: Path) -> None:
    """What can be seen of a tokenizer and of weights without loading them: whether they are there, and whole."""
    if not any((directory / name).is_file() for name in _TOKENIZERS):
        # without one the library would quietly make up a tokenizer of five pieces
        raise study.error("teacher.model", f"no tokenizer beside the model: expected {' or '.join(_TOKENIZERS)}")
    try:
        files = _weight_files(directory)
        for file in files:
            _check_whole(file)
    except (OSError, ValueError) as error:
        raise study.error("teacher.model", f"cannot load the weights: {_first_line(error)}") from error
    if not files:
        raise study.error("teacher.model", f"no weights beside config.json: expected {' or '.join(_WEIGHTS)}")


def _weight_files(directory: Path) -> list[Path]:
    """The files that hold the weights: one, or those that an index lists; none where there is neither."""
    for name in _WEIGHTS:
        if (directory / name).is_file():
            return [directory / name]
        index = directory / f"{name}.index.json"
        if index.is_file():
            return sorted(directory / shard for shard in set(_shards(index)))
    return []


def _shards(index: Path) -> Iterable[str]:
    try:
        content: dict[str, dict[str, str]] = json.loads(index.read_bytes())
        return content["weight_map"].values()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index.name} is no index of weights") from error


def _check_whole(file: Path) -> None:
    """Refuse a file that is not there, empty, or shorter than its own header says."""
    if not file.is_file() or file.stat().st_size == 0:
        raise ValueError(f"{file.name} is {'empty' if file.is_file() else 'not there'}")
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{file.name} is damaged: {error}") from error


def _check_family(study: Study, config: PreTrainedConfig) -> None:
    if config.model_type not in FAMILIES:
        raise study.error(
            "teacher.model",
            f"models of the family {config.model_type!r} are not supported: expected {_either(FAMILIES)}",
        )


def _check_positions(study: Study, config: PreTrainedConfig) -> None:
    # RoBERTa numbers its positions from just after the padding's number
    reserved = config.pad_token_id + 1 if "roberta" in config.model_type else 0
    longest = config.max_position_embeddings - reserved
    if study.data.max_length > longest:
        raise study.error(
            "data.max_length", f"the teacher reads at most {longest} tokens, got {study.data.max_length}"
        )


def _check_head(study: Study, config: PreTrainedConfig, task: Task) -> None:
    kind = (config.architectures or ["a model of unknown kind"])[0]
    if not kind.endswith(HEADS[task.tokens]):
        raise study.error(
            "teacher.model",
            f"{kind} has no head for {task.name}: name a fine-tuned model, or give teacher.fine_tune to train one",
        )
    if getattr(config, "problem_type", None) == "multi_label_classification":
        raise study.error("teacher.model", "the model predicts several labels at once, which is not supported")


def _label_order(study: Study, config: PreTrainedConfig, task: Task) -> list[int]:
    """Which of the teacher's logits belongs to each label of the task."""
    names = [str(name) for _, name in sorted((config.id2label or {}).items())]
    try:
        return match_labels(task.labels, names, numbered=task.numbered)
    except ValueError as error:
        raise study.error("teacher.model", str(error)) from error


def match_labels(labels: Sequence[str], names: Sequence[str], *, numbered: bool = False) -> list[int]:
    """For each label the position of the same name; case is ignored where that leaves no doubt.

    Labels that are the numbers 0 … C-1 are positions themselves, whatever the names. So are the places of labels
    that the data set has ``numbered``, where the model has none of their names but, say, LABEL_0, LABEL_1. No
    labels: a regression, of one output.

    Raises:
        ValueError: the names are not those of the labels.
    """
    if len(names) != (len(labels) or 1):
        wanted = f"{len(labels)} classes ({_some(labels)})" if labels else "a number to predict"
        raise ValueError(f"the model has {len(names)} outputs ({_some(names)}), the data have {wanted}")
    if not labels or list(labels) == [str(i) for i in range(len(labels))]:
        return list(range(len(names)))
    for fold in (str, str.casefold):
        folded = [fold(name) for name in names]
        if len(set(folded)) == len(folded) and set(folded) == set(map(fold, labels)):
            return [folded.index(fold(label)) for label in labels]
    if numbered and {name.casefold() for name in names}.isdisjoint(label.casefold() for label in labels):
        return list(range(len(names)))
    raise ValueError(
        f"the model's labels ({_some(names)}) are not those of the data ({_some(labels)}): "
        "name them in id2label of its config.json"
    )


def directory_of(study: Study) -> Path:
    """The model's files on this machine, fetched from the hub if need be."""
    model = str(study.teacher.model)
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        with quiet():
            fetch = partial(snapshot_download, model, ignore_patterns="*/*", local_files_only=not hub.reachable())
            fetched = Path(fetch(allow_patterns=[*_DESCRIPTION, _SAFE]))
            if not any(fetched.glob(_SAFE)):
                fetch(allow_patterns=[_LEGACY])
    except (OSError, ValueError) as error:
        raise study.error("teacher.model", f"cannot fetch {model} from the hub: {_first_line(error)}") from error
    return fetched


def files_digest(directory: Path) -> str:
    """SHA-256 over the names and bytes of a model's files."""
    content = hashlib.sha256()
    for path in sorted(path for pattern in (*_DESCRIPTION, _SAFE, _LEGACY) for path in directory.glob(pattern)):
        with path.open("rb") as file:
            content.update(f"{path.name}:{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return content.hexdigest()


def load_pretrained(
    study: Study, source: Path, config: PreTrainedConfig, task: Task
) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model's network and tokenizer, its logits in the order of the task's labels.

    Raises:
        StudyError: files are missing, damaged or do not belong together.
    """
    trained = study.teacher.fine_tune is not None
    order = None if trained else _label_order(study, config, task)
    try:
        with quiet(), seeded(study.search.seed):
            network, info = auto_class(task.tokens).from_pretrained(
                source,
                config=config,
                dtype=torch.float32,
                ignore_mismatched_sizes=trained,
                output_loading_info=True,
            )
        attach_crf(network) if trained else restore_crf(network, source)
    except Exception as error:  # damaged files fail in as many ways as there are formats
        raise study.error("teacher.model", f"cannot load the weights: {_first_line(error)}") from error
    _check_weights(
        study, network, [key for key in info["missing_keys"] if not (trained and _is_head(key, network))]
    )
    if order and order != sorted(order):
        reorder_logits(network, order)
        with_labels(network.config, task)
    return network, _tokenizer(study, source, network, task)


def _check_weights(study: Study, network: nn.Module, missing: Sequence[str]) -> None:
    if missing:
        raise study.error("teacher.model", f"the weights lack {len(missing)} tensors, such as {min(missing)}")
    for name, tensor in network.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise study.error("teacher.model", f"the weights are damaged: {name} holds infinities or no numbers")


def _is_head(name: str, network: Any) -> bool:
    """Whether a tensor belongs to what fine-tuning may start anew: the classifier and the pooler before it."""
    return not name.startswith(f"{network.base_model_prefix}.") or ".pooler." in name


def reorder_logits(network: nn.Module, order: Sequence[int]) -> None:
    """Permute the classifier, and a CRF, in place: logit i becomes what logit ``order[i]`` was."""
    classifier = head_linears(network)[-1]
    with torch.no_grad():
        classifier.weight.copy_(classifier.weight[list(order)])
        classifier.bias.copy_(classifier.bias[list(order)])
        if crf := crf_of(network):
            crf.transitions.copy_(crf.transitions[list(order)][:, list(order)])
            crf.start.copy_(crf.start[list(order)])
            crf.end.copy_(crf.end[list(order)])


def _tokenizer(study: Study, source: Path, network: Any, task: Task) -> PreTrainedTokenizerBase:
    """The model's tokenizer, told which inputs the network takes."""
    # byte-level BPE writes the space into a word's first piece; words that come one by one bring none
    prefix = {"add_prefix_space": True} if task.tokens and network.config.model_type == "roberta" else {}
    tokenizer = load_tokenizer(study, source, model_input_names=list(inputs(network)), **prefix)
    if len(tokenizer) > network.config.vocab_size:
        raise study.error(
            "teacher.model",
            f"the tokenizer has {len(tokenizer)} pieces, the model embeds only {network.config.vocab_size}",
        )
    return tokenizer


def load_tokenizer(study: Study, source: Path | str | None = None, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer beside the study's model, by default where the study names it.

    Raises:
        StudyError: it cannot be loaded, or cannot tell which word a token came from.
    """
    try:
        with quiet():
            local = source is not None or not hub.reachable()
            place = source or str(study.teacher.model)
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                place, local_files_only=local, **options
            )
    except Exception as error:  # damaged files fail in as many ways as there are formats
        raise study.error("teacher.model", f"cannot load the tokenizer: {_first_line(error)}") from error
    if not tokenizer.is_fast:
        raise study.error("teacher.model", f"{type(tokenizer).__name__} cannot tell which word a token came from")
    return tokenizer


def same_vocabulary(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers have the same pieces and special tokens under the same numbers."""
    return one.get_vocab() == other.get_vocab() and one.all_special_ids == other.all_special_ids


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _some(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (" …" if len(names) > most else "")


def _either(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"

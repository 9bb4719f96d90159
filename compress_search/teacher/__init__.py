"""The teacher: found or made, trained on the task if need be, and put away in one form for every worker.

Owns the directory it is kept in and when that is made. Knows nothing of recipes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

import compress_search
from compress_search.cache import content_addressed
from compress_search.candidate import Subject
from compress_search.crf import attach_crf, crf_of
from compress_search.data import tokenize_rows, training_batches
from compress_search.data.rows import Raw
from compress_search.encoders import Pieces, layer_drop, subject_of
from compress_search.recipe import digest
from compress_search.study import Study
from compress_search.tasks import Task
from compress_search.teacher import ensemble, masked_lm, pretrained, scratch, student_start
from compress_search.teacher.networks import HEADS, auto_class, quiet, restore_crf
from compress_search.training import fit, planned_steps, task_loss


def teacher_subject(study: Study, task: Task) -> Subject:
    """The teacher's shapes, from its configuration alone: no weights are read and nothing is created.

    Its traits say what is unlike it of the study's masked language model, and of the network that students start
    from.

    Raises:
        StudyError: the model cannot be found or read, its family is not supported, or it does not fit the task,
            the data's labels or ``data.max_length``; the same of each further teacher, the masked language model
            and the network that students start from, whose vocabularies are the teacher's.
    """
    config = _config(study, task)
    ensemble.check(study, task)
    masked_lm.check(study, task)
    student_start.check(study, task)
    if study.teacher.ensemble or study.teacher.masked_lm or study.teacher.student_start:
        _check_vocabularies(study, known_tokenizer(study))
    with no_init_weights(), torch.device("meta"), quiet():
        try:
            network = auto_class(task.tokens).from_config(config)
        except Exception as error:  # whatever a family's constructor makes of sizes that do not fit
            key = "teacher.architecture" if study.teacher.architecture else "teacher.model"
            said = " ".join(str(error).split()) or type(error).__name__
            raise study.error(key, f"no network can be made of its configuration: {said}") from error
        attach_crf(network)
        subject = subject_of(network, task.name, _device(study))
        unlike = masked_lm.unlike(study, task, subject) | student_start.unlike(study, task, subject)
    if study.teacher.ensemble and crf_of(network):
        raise study.error("teacher.ensemble", "the teacher has a CRF, whose transitions cannot be averaged")
    return subject.having(*unlike)


def known_tokenizer(study: Study) -> PreTrainedTokenizerBase | None:
    """The teacher's tokenizer; None where it is yet to be trained."""
    return scratch.given_tokenizer(study) if study.teacher.architecture else pretrained.load_tokenizer(study)


def _check_vocabularies(study: Study, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Refuse whoever would be given the teacher's tokens and read them as something else."""
    if tokenizer:
        ensemble.check_vocabularies(study, tokenizer)
        masked_lm.check_vocabulary(study, tokenizer)
        student_start.check_vocabulary(study, tokenizer)


def teacher_pieces(study: Study) -> tuple[str, int]:
    """The kind of the teacher's tokenizer, and how many of its pieces it takes to spell every text.

    The number is 0 where the tokenizer is yet to be made. Nothing is created.

    Raises:
        StudyError: the tokenizer cannot be loaded.
    """
    if study.teacher.architecture:
        return "WordPiece", 0
    pieces = Pieces(pretrained.load_tokenizer(study))
    return pieces.kind, len(pieces.reserved | pieces.characters)


def prepare_teacher(
    study: Study, raw: Raw, task: Task, cache: Path, *, on_progress: Callable[[int], None] | None = None
) -> Path:
    """The directory of the task's teacher, made on the first call: ``save_pretrained``'s files and a tokenizer.

    A fine-tuned model is kept as it is, with its labels in the task's order; otherwise it is trained here, from
    a pretrained model or from scratch. The directory's name hashes all that decides its content.

    Args:
        study: names the teacher.
        raw: its training rows are the teacher's.
        task: gives the labels and their order.
        cache: holds the directory.
        on_progress: called with the number of steps done while a teacher is trained.

    Raises:
        StudyError: see :func:`teacher_subject`; or the weights are damaged or not there.
        NotFinite: the training diverged.
    """
    config = _config(study, task)
    source = None if study.teacher.architecture else pretrained.directory_of(study)

    def build(directory: Path) -> None:
        if source:
            network, tokenizer = pretrained.load_pretrained(study, source, config, task)
        else:
            network, tokenizer = scratch.new_network(study, raw.train, config, task)
        _check_vocabularies(study, tokenizer)
        if study.teacher.fine_tune:
            _fine_tune(network, tokenizer, study, raw, task, cache, on_progress)
        with quiet():
            network.cpu().save_pretrained(directory)
            tokenizer.save_pretrained(directory)

    origin = pretrained.files_digest(source) if source else scratch.fingerprint(study)
    trained = _training_fingerprint(study, raw) if study.teacher.fine_tune else None
    key = digest(["teacher", compress_search.__version__, origin, task.to_dict(), trained])
    return content_addressed(cache, key, build)


def prepare_ensemble(study: Study, first: Path, raw: Raw, task: Task, cache: Path) -> list[Path]:
    """The directories of all teachers, the first one's in front, as :func:`prepare_teacher` makes them.

    Raises:
        StudyError: one cannot be loaded, or its vocabulary is not the first one's.
    """
    paths = [first]
    _check_vocabularies(study, AutoTokenizer.from_pretrained(first))
    for number, member in enumerate(ensemble.members(study)):
        with study.blamed(ensemble.key_of(number)):
            paths.append(prepare_teacher(member, raw, task, cache))
    return paths


def untrained(study: Study, task: Task) -> nn.Module | None:
    """The teacher's network as it was before it was trained on the task, the same at every call.

    Its head, and all of it where it was trained from scratch, has the random weights that it started from. None
    where the study names a model that was trained already: then nothing is known of its start.
    """
    if not study.teacher.fine_tune:
        return None
    config = _config(study, task)
    if study.teacher.architecture:
        network: nn.Module = scratch.fresh(study, config, task)
    else:
        network, _ = pretrained.load_pretrained(study, pretrained.directory_of(study), config, task)
    return network.eval()


def load_teacher(path: Path, device: torch.device | str = "cpu") -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The teacher and its tokenizer from :func:`prepare_teacher`'s directory: frozen, in evaluation mode."""
    with quiet():
        kind: str = AutoConfig.from_pretrained(path).architectures[0]
        auto = auto_class(tokens=kind.endswith(HEADS[True]))
        network = auto.from_pretrained(path, attn_implementation="sdpa", dtype=torch.float32)
        restore_crf(network, path)
        tokenizer = AutoTokenizer.from_pretrained(path)
    return network.to(device).eval().requires_grad_(False), tokenizer


def _config(study: Study, task: Task) -> Any:
    """The teacher's configuration; every complaint that needs no weights comes from here."""
    return scratch.new_config(study, task) if study.teacher.architecture else pretrained.read_config(study, task)


def _training_fingerprint(study: Study, raw: Raw) -> list[Any]:
    assert study.teacher.fine_tune
    settings = study.teacher.fine_tune.identity()
    training, seed = study.training, study.search.seed
    shared = [training.warmup, training.weight_decay, training.computes_in, study.data.max_length, seed]
    return [settings, shared, raw.train.digest]


def _fine_tune(
    network: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    study: Study,
    raw: Raw,
    task: Task,
    cache: Path,
    on_progress: Callable[[int], None] | None,
) -> None:
    settings = study.teacher.fine_tune
    assert settings
    train = tokenize_rows(raw.train, tokenizer, study.data.max_length, task, cache)
    device = _device(study)
    with layer_drop(network, settings.layer_drop):
        fit(
            network.to(device),
            training_batches(train, settings.batch_size, study.search.seed),
            planned_steps(len(train), settings.batch_size, settings.epochs),
            task_loss(task),
            learning_rate=settings.learning_rate,
            warmup=study.training.warmup,
            weight_decay=study.training.weight_decay,
            device=device,
            seed=study.search.seed,
            precision=study.training.computes_in,
            crf_multiplier=settings.crf_multiplier,
            on_progress=on_progress,
        )


def _device(study: Study) -> str:
    return "cuda" if study.cluster.gpus_per_trial > 0 else "cpu"

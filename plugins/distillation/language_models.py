"""A student that learns a language from the study's masked language model, under that model's head or its own.

Owns who that model is and what it has to be like, how a student starts as its layers and comes to stand under its
head, and the texts and the losses of the phase. Which features are learnt, and for how long, is a method's to say.

Source: Sanh et al. 2019, DistilBERT, section 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from compress_search import Batch, Candidate, Context, TrialError
from compress_search.data import without_labels
from compress_search.encoders import backbone, embeddings, feature_shape, layers, read_features

from .masked_text import MASKED_LM, hide, prediction_loss
from .matching import Matching
from .objective import UNLABELLED_BATCH, Objective, reader


def language_model(candidate: Candidate, context: Context) -> nn.Module:
    """The study's masked language model, whose encoder can take the place of the candidate's.

    Raises:
        TrialError: there is none, or its encoder is not of the candidate's shapes.
    """
    model = context.masked_lm()
    if model is None:
        raise TrialError(f"this needs {MASKED_LM}")
    ours, theirs = (_shapes(network) for network in (candidate.network, model))
    if wrong := [name for name in theirs if ours.get(name) != theirs[name]]:
        found, expected = theirs[wrong[0]], ours.get(wrong[0], "none")
        raise TrialError(f"the language model's {wrong[0]} has shape {found}, expected the teacher's {expected}")
    return model


def _shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in backbone(network).state_dict().items()}


def in_teachers_place(context: Context) -> nn.Module | None:
    """The study's language model as one whose layers are matched as the teacher's would be; None for none.

    Raises:
        TrialError: it has another depth.
    """
    model = context.masked_lm()
    if model is not None and len(layers(model)) != (depth := len(layers(context.teacher))):
        raise TrialError(f"the language model has {len(layers(model))} layers: expected the teacher's {depth}")
    return model


def started_from(candidate: Candidate, model: nn.Module) -> Candidate:
    """The candidate with the language model's encoder and the candidate's own head."""
    copied = candidate.copy()
    backbone(copied.network).load_state_dict(backbone(model).state_dict(), strict=False)
    return copied


def under_language_head(network: nn.Module, model: nn.Module) -> nn.Module:
    """A language model of the network's own encoder, which is trained with it, and a copy of the model's head.

    Raises:
        TrialError: the two are not of one width, of their states or of their words, or not of one family.
    """
    for what, (ours, theirs) in _fitted(network, model).items():
        if ours != theirs:
            raise TrialError(f"the student's {what} {ours} does not fit a language model's head for {theirs}")
    made = deepcopy(model).requires_grad_(True)
    decoder = cast(Any, made).get_output_embeddings()
    tied = decoder.weight is cast(Any, embeddings(made).word_embeddings).weight
    for name, _ in list(backbone(made).named_children()):
        setattr(backbone(made), name, getattr(backbone(network), name))
    cast(Any, made.config).num_hidden_layers = len(layers(network))
    if tied:
        decoder.weight = cast(Any, embeddings(network).word_embeddings).weight
    return made


def _fitted(*networks: nn.Module) -> dict[str, list[object]]:
    """What has to be the same of a student and the language model, of the one and the other."""
    return {
        "family": [network.config.model_type for network in map(backbone, networks)],  # type: ignore[union-attr]
        "width": [feature_shape(network, "hidden.0")[0] for network in networks],
        "width of words": [cast(Any, embeddings(network).word_embeddings).embedding_dim for network in networks],
    }


def hidden_words(network: nn.Module, batch: Batch) -> Tensor:
    """The cross-entropy of what the language head puts in the place of hidden tokens."""
    return prediction_loss(read_features(network, batch, ["logits"])["logits"], batch["labels"])


def language_objective(
    context: Context, matching: Matching, model: nn.Module | None, mlm_weight: float = 0.0
) -> Objective:
    """Features and logits of the language model by matches, and by ``mlm_weight`` the hidden tokens themselves.

    Without a model they are the teacher's.
    """
    teacher = None if model is None else reader(model)
    return Objective(context, matching, hard_weight=mlm_weight, hard=hidden_words, teacher=teacher)


def learn_language(
    student: nn.Module,
    objective: Objective,
    model: nn.Module | None,
    *,
    share: float,
    learning_rate: float,
    batches: Iterator[Batch],
) -> None:
    """Train a student in place on its share of the budget, under the model's head where a term reaches that."""
    network = under_language_head(student, model) if model is not None and objective.answers else student
    objective.fit(network, share=share, learning_rate=learning_rate, batches=batches, scored=False)


def language_texts(context: Context, *, unlabelled: bool) -> Iterator[Batch]:
    """The study's text without labels, or its training texts, of which then no labels are left either."""
    return context.unlabelled(UNLABELLED_BATCH) if unlabelled else without_labels(context.training_batches())


def with_holes(
    texts: Iterator[Batch], tokenizer: PreTrainedTokenizerBase, probability: float, seed: int
) -> Iterator[Batch]:
    """The texts with some tokens hidden, others each time, and these as labels.

    Raises:
        TrialError: the tokenizer has no mask.
    """
    if tokenizer.mask_token_id is None:
        raise TrialError("the tokenizer has no mask token, so that nothing can be hidden from the language model")
    generator = torch.Generator().manual_seed(seed)
    special, size, mask = set(tokenizer.all_special_ids), len(tokenizer), cast(int, tokenizer.mask_token_id)
    return (hide(batch, mask, special, size, probability, generator) for batch in texts)

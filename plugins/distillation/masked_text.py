"""Learning a language from text with holes: which tokens are hidden, and the losses of what is put in their place.

Pure functions of batches and logits. Which networks learn so, and for how long, is a method's to say.

Sources: Devlin et al. 2019, BERT, section 3.1 (masking); Sanh et al. 2019, DistilBERT, section 2 (triple loss).
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from torch.nn import functional as F

from compress_search import Batch, Subject
from compress_search.losses import IGNORED

UNLIKE = "masked-lm:"
"""What the engine's traits begin with that name a shape of the language model which is not the teacher's."""
MASKED, REPLACED = 0.8, 0.1
"""Of the hidden tokens the parts that the mask stands for, and that another token does; the rest stay in sight."""
MASKED_LM = "a masked language model: name one under teacher.masked_lm"
"""What a dimension needs that is only there with such a model."""
MATCHED = ("layers", "hidden", "heads", "vocabulary")
"""Shapes in which such a model has to be like the teacher in whose place it is matched."""
HEADED = ("family", "embedding_size")
"""Those in which it has to be too where the student stands under its head."""


def unlike_teacher(subject: Subject, shapes: Collection[str] = ()) -> str | None:
    """In which of these shapes, or of all, the study's language model is unlike the teacher; None in none."""
    found = sorted(trait.removeprefix(UNLIKE) for trait in subject.traits if trait.startswith(UNLIKE))
    wrong = [each.split("=") for each in found if not shapes or each.split("=")[0] in shapes]
    values = ", ".join(f"{name} {value} and not {getattr(subject, name)}" for name, value in wrong)
    return f"the masked language model is unlike the teacher: {values}" if wrong else None


def unfit_in_place(subject: Subject, *, headed: bool = False) -> str | None:
    """Why the language model cannot be learnt from in the teacher's place; None where it can.

    ``headed``: its head is what the student is to stand under.
    """
    types = ("token_types",) if "pairs" in subject.traits else ()
    return unlike_teacher(subject, (*MATCHED, *types, *(HEADED if headed else ())))


def hide(
    batch: Batch, mask: int, special: Collection[int], size: int, probability: float, generator: torch.Generator
) -> Batch:
    """The batch with some tokens hidden, and with labels (B, S): the hidden tokens, -100 elsewhere.

    Args:
        batch: ``index`` and labels of its own are left out.
        mask: the id that stands for hidden tokens.
        special: ids that are never hidden; nor is padding.
        size: ids that may come in a token's place are below this.
        probability: of a token to be hidden.
        generator: on the CPU; every call draws anew.
    """
    ids = batch["input_ids"]
    draws, kinds = (torch.rand(ids.shape, generator=generator).to(ids.device) for _ in range(2))
    others = torch.randint(size, ids.shape, generator=generator).to(ids.device)
    words = batch["attention_mask"].bool() & ~torch.isin(ids, torch.tensor(sorted(special), device=ids.device))
    hidden = words & (draws < probability)
    shown = torch.where(kinds < MASKED, mask, torch.where(kinds < MASKED + REPLACED, others, ids))
    inputs = {name: tensor for name, tensor in batch.items() if name not in ("labels", "index")}
    return {**inputs, "input_ids": torch.where(hidden, shown, ids), "labels": ids.masked_fill(~hidden, IGNORED)}


def prediction_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits (B, S, V) at the positions with a label, mean over them; 0 for none."""
    hidden = labels != IGNORED  # of the others nothing is to be kept for the gradient
    total = F.cross_entropy(logits[hidden].float(), labels[hidden], reduction="sum")
    return total / max(int(hidden.sum()), 1)

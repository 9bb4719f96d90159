"""Hinton's distillation on handwritten digits, without the search: a teacher's logits in place of labels.

    python examples/distil_digits.py

A wide network is trained on 900 digits. One narrow network then learns the labels of a hundred of them; another
that started alike and takes as many steps never sees a label, only what the teacher says of all 900. The loss takes
logits: softmax is the loss's to take, and only once. The digits, 8×8 pixels each, come with scikit-learn.

Source: Hinton et al. 2015, Distilling the Knowledge in a Neural Network, sections 2 and 3.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from compress_search.losses import kl

TEMPERATURE = 4.0
STEPS = 1000


def network(width: int) -> nn.Sequential:
    """Pixels (B, 64) to logits (B, 10) through one hidden layer."""
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def train(model: nn.Module, pixels: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Minimise ``loss(logits, rows)`` over random batches of 32 rows."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(STEPS):
        rows = torch.randint(len(pixels), (32,))
        optimizer.zero_grad()
        loss(model(pixels[rows]), rows).backward()
        optimizer.step()


def accuracy(model: nn.Module, pixels: Tensor, digits: Tensor) -> float:
    """The part that is recognised."""
    with torch.no_grad():
        return (model(pixels).argmax(-1) == digits).float().mean().item()


def compare(seed: int, labelled: int = 100) -> dict[str, float]:
    """Held-out accuracy of the teacher and of the two students."""
    torch.manual_seed(seed)
    data = load_digits()
    order = torch.randperm(len(data.target))
    pixels = torch.tensor(data.data / 16, dtype=torch.float32)[order]
    digits = torch.tensor(data.target)[order]
    x, y, held = pixels[:900], digits[:900], slice(900, None)
    teacher, plain, taught = network(512), network(16), network(16)
    taught.load_state_dict(plain.state_dict())
    train(teacher, x, lambda logits, rows: F.cross_entropy(logits, y[rows]))
    with torch.no_grad():
        said = teacher(x)
    train(plain, x[:labelled], lambda logits, rows: F.cross_entropy(logits, y[rows]))
    train(taught, x, lambda logits, rows: kl(logits, said[rows], TEMPERATURE))
    models = {"teacher": teacher, "a hundred labels": plain, "the teacher's word": taught}
    return {name: accuracy(model, pixels[held], digits[held]) for name, model in models.items()}


if __name__ == "__main__":
    results = [compare(seed) for seed in range(5)]
    for name in results[0]:
        print(f"{name:20}{mean(result[name] for result in results):.3f}")

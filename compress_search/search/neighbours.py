"""New recipes near a known one, for when a sampler repeats itself.

Owns how far from the known one they are looked for. Knows nothing of trials or of the database: what is drawn here
leaves no rows.
"""

from __future__ import annotations

import random
from collections.abc import Container, Mapping
from typing import Any

import optuna

from compress_search.plan import Plan

NEAR, ANYWHERE = 200, 1000
"""Draws near the known recipe, and then anywhere, that must all be known for the space to count as exhausted."""

KEPT = 0.9
"""Part of the known recipe's parameters that the first draws keep."""


def unseen_neighbour(
    plan: Plan, known: Mapping[str, Any], seen: Container[str], seed: int
) -> dict[str, Any] | None:
    """Optuna parameters of a recipe whose key is not among ``seen``; None when none is found.

    The first draws keep most parameters of ``known``, then ever fewer, the last ones none: what the sampler holds
    for the best is taken, and its neighbour is good too.
    """
    rng = random.Random(seed)
    draws = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=rng.randrange(2**32)))
    for number in range(NEAR + ANYWHERE):
        keep = KEPT * max(0.0, 1 - number / NEAR)
        draws.enqueue_trial({name: value for name, value in known.items() if rng.random() < keep})
        trial = draws.ask()
        if plan.propose(trial).key not in seen:
            return trial.params
    return None

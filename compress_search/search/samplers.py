"""Which Optuna sampler proposes the next recipe, rebuilt for every ask from a seed of its own.

A rebuilt sampler has no state to lose: an interrupted search resumes with the proposals that an uninterrupted one
would have made. Knows nothing of recipes or of storage.
"""

from __future__ import annotations

import logging
from typing import Any

from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial

from compress_search.recipe import digest

log = logging.getLogger(__name__)

RANDOM_TRIALS = 5
GP_TRIALS = 300
"""Beyond this many trials a Gaussian process, cubic in them, takes longer than it is worth."""


def derive_seed(seed: int, *parts: str | int) -> int:
    """A 31-bit seed that depends on all its arguments and on nothing else."""
    return int(digest([seed, *parts])[:8], 16) & 0x7FFFFFFF


def make_sampler(setting: str, seed: int, sampled: int) -> BaseSampler:
    """The sampler for one ask.

    Args:
        setting: ``auto``, ``random``, ``tpe``, ``gp`` or ``nsga2``. ``auto`` samples a few times at random, then
            from a Gaussian process with TPE for the parameters that not every recipe has, in the end from TPE.
        seed: of this ask alone.
        sampled: trials so far that a sampler proposed; starting points and duplicates do not count.
    """
    if setting == "auto":
        setting = "random" if sampled < RANDOM_TRIALS else "gp" if sampled <= GP_TRIALS else "tpe"
    if setting == "random":
        return RandomSampler(seed=seed)
    if setting == "nsga2":
        return NSGAIISampler(population_size=20, seed=seed)
    tpe = TPESampler(seed=seed)
    return tpe if setting == "tpe" else GaussianProcess(seed, tpe)


class GaussianProcess(GPSampler):
    """Optuna's GP sampler, with TPE for conditional parameters and for a model that cannot be fitted."""

    def __init__(self, seed: int, independent: BaseSampler) -> None:
        super().__init__(
            seed=seed,
            independent_sampler=independent,
            n_startup_trials=RANDOM_TRIALS,
            warn_independent_sampling=False,
        )

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The parameters every recipe has; none, so that all come from TPE, where the numerics fail."""
        try:
            found: dict[str, Any] = super().sample_relative(study, trial, search_space)
        except (ArithmeticError, RuntimeError, ValueError) as error:
            log.warning("no Gaussian process for trial %d (%s): its proposal comes from TPE", trial.number, error)
            return {}
        return found

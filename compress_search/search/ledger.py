"""What a study has tried, from the newest attempt of each trial: what runs, what was seen, what is spent.

Pure. Knows nothing of where attempts are stored or of who proposes the next one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from compress_search.recipe import Recipe
from compress_search.storage.stored import LastAttempt

Baselines = Sequence[tuple[str, Recipe]]

REJECTED_PER_TRIAL = 10
"""How many recipes may be rejected by their shapes for each trial of the budget."""

HOPELESS = 50
"""After so many rejections and nothing else the constraints are taken for impossible."""


@dataclass(frozen=True)
class Ledger:
    """The newest attempt of every trial that has one, by number."""

    attempts: Mapping[int, LastAttempt]

    def __contains__(self, number: int) -> bool:
        return number in self.attempts

    def get(self, number: int) -> LastAttempt | None:
        """The newest attempt at a trial, if there is one."""
        return self.attempts.get(number)

    @property
    def running(self) -> bool:
        """Whether anything has been handed out and has not come back."""
        return _any_running(self.attempts.values())

    @property
    def baseline_running(self) -> bool:
        """Whether a baseline has been handed out and has not come back."""
        return _any_running(attempt for attempt in self.attempts.values() if attempt.baseline)

    def missing(self, baselines: Baselines) -> Baselines:
        """Those that were never handed out."""
        there = {attempt.baseline for attempt in self.attempts.values()}
        return [(name, recipe) for name, recipe in baselines if name not in there]

    @cached_property
    def searched(self) -> list[LastAttempt]:
        """Attempts at what the search proposed: neither baselines nor duplicates."""
        return [a for a in self.attempts.values() if not a.baseline and a.state != "duplicate"]

    @property
    def seen(self) -> dict[str, int]:
        """Recipes tried or being tried, baselines too, with their trials."""
        baselines = {attempt.key: attempt.number for attempt in self.attempts.values() if attempt.baseline}
        return baselines | {attempt.key: attempt.number for attempt in self.searched}

    def speaks_for(self, number: int, recipe: Recipe) -> LastAttempt | None:
        """The baseline whose result samplers get to know by this duplicate of it; None if they do not.

        They see no baselines themselves, so the first duplicate of one tells them of it. To do nothing, as the
        teacher does, is no trial.
        """
        twin = self.attempts[self.seen[recipe.key]]
        first = min(n for n, a in self.attempts.items() if a.key == recipe.key and a.state == "duplicate")
        return twin if twin.baseline and recipe.steps and first == number else None

    @property
    def trailing_duplicates(self) -> int:
        """How many of the newest trials in a row are duplicates."""
        count = 0
        for number in sorted(self.attempts, reverse=True):
            if self.attempts[number].state != "duplicate":
                break
            count += 1
        return count

    def spent(self, trials: int) -> str | None:
        """Why a budget of so many trials admits no more; None when it does. What is being tried counts as tried."""
        rejected = sum(attempt.state == "infeasible" for attempt in self.searched)
        if len(self.searched) - rejected >= trials:
            return f"all {trials} trials are done"
        hopeless = rejected == len(self.searched) >= HOPELESS
        if hopeless or rejected >= REJECTED_PER_TRIAL * trials:
            return f"{rejected} recipes were rejected by their shapes"
        return None


def _any_running(attempts: Iterable[LastAttempt]) -> bool:
    return any(attempt.state == "running" for attempt in attempts)

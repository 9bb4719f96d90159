"""Bringing a study back to where it would be had its last driver not died.

Owns what becomes of trials that were under way then: told late, put back, or given up as the likely cause. Knows
nothing of what is proposed next, nor of how workers leave their results.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from optuna.trial import TrialState

from compress_search.records import FINISHED, Failure, Result
from compress_search.search.asktell import AskTell
from compress_search.search.ledger import Ledger
from compress_search.search.telling import Teller
from compress_search.storage import LastAttempt, Store

MAX_LOST = 5
"""Driver deaths that a trial may be running at before it is taken for their cause."""

ReadResult = Callable[[int], Result | None]
"""What the workers of a trial left behind, by its number."""


@dataclass(frozen=True)
class Counts:
    """What :meth:`Recovery.reconcile` found: results told late, trials put back, trials given up."""

    told: int = 0
    requeued: int = 0
    given_up: int = 0


class Recovery:
    """Takes up one study where a driver left it.

    Args:
        name: of the study.
        token: marks results as of this study, not of a former one in the same place.
        store: the database that holds it.
        optuna_study: the Optuna study in the same database.
        teller: tells it how trials ended.
    """

    def __init__(self, name: str, token: str, store: Store, optuna_study: AskTell, teller: Teller) -> None:
        self.name, self.store = name, store
        self._token, self._optuna, self._teller = token, optuna_study, teller

    def reconcile(self, teacher: str, read_result: ReadResult) -> Counts:
        """Settle every trial that has not ended.

        Args:
            teacher: the name of the baseline that all others are compared with.
            read_result: what the workers left behind.
        """
        counts, ledger = Counts(), self._ledger()
        for trial in self._optuna.trials():
            running, attempt = trial.state is TrialState.RUNNING, ledger.get(trial.number)
            if trial.state.is_finished() or (attempt is None and not running):
                continue
            if attempt is None:
                self._optuna.requeue(trial.number)
                counts = replace(counts, requeued=counts.requeued + 1)
            elif self._tell_late(attempt, read_result):
                counts = replace(counts, told=counts.told + 1)
            elif running:
                given_up = self._take_back(attempt)
                name = "given_up" if given_up else "requeued"
                counts = replace(counts, **{name: getattr(counts, name) + 1})
        self._try_again(teacher)
        return counts

    def _ledger(self) -> Ledger:
        return Ledger(self.store.last_attempts(self.name))

    def _try_again(self, teacher: str) -> None:
        """Put in another teacher where the last one failed: without one there is nothing to compare with."""
        tried = [attempt.state for attempt in self._ledger().attempts.values() if attempt.baseline == teacher]
        waiting = [trial for trial in self._optuna.trials() if trial.state is TrialState.WAITING]
        again = any(trial.user_attrs.get("baseline") == teacher for trial in waiting)
        if not self._teller.reference and "failed" in tried and not again:
            self._optuna.enqueue({}, baseline=teacher, recipe=[])

    def _tell_late(self, attempt: LastAttempt, read_result: ReadResult) -> bool:
        """Tell how a trial ended that no driver lived to tell; whether it did end."""
        if attempt.state == "duplicate":
            self._teller.tell_duplicate(attempt.number, attempt.recipe, self._ledger())
            return True
        if attempt.state in FINISHED:
            self._teller.tell(self.store.result(self.name, attempt.number, attempt.attempt), attempt)
            return True
        result = self._left_behind(attempt, read_result)
        if result:
            self._teller.commit(result, attempt)
        return result is not None

    def _left_behind(self, attempt: LastAttempt, read_result: ReadResult) -> Result | None:
        """What a worker wrote of this trial; a file of a former study in the same place is none of ours."""
        result = read_result(attempt.number)
        if result is None or result.attempt > attempt.attempt:
            return None
        return result if result.measurements.get("study", self._token) == self._token else None

    def _take_back(self, attempt: LastAttempt) -> bool:
        """Requeue a trial whose driver died, or give it up as the likely cause; whether it was given up."""
        lost = attempt.history.count("lost")
        if attempt.state == "running":
            if lost + 1 >= MAX_LOST:
                message = f"the driver died {MAX_LOST} times while this trial ran"
                result = Result(attempt.number, attempt.attempt, "failed", failure=Failure("died", message))
                self._teller.commit(result, attempt)
                return True
            self.store.end_attempt(self.name, attempt.number, attempt.attempt, "lost")
        self._optuna.requeue(attempt.number)
        return False

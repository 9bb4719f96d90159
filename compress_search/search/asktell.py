"""The one place that touches an Optuna study: ask, tell, put back.

Owns the three uses of Optuna's storage that its public interface lacks. Knows nothing of recipes and decides
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import optuna
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState


class AskTell:
    """An Optuna study behind a database that may be away for a while.

    Args:
        study: of any sampler; every ask brings its own.
        patiently: calls a function again while the database is away.
    """

    def __init__(self, study: optuna.Study, patiently: Callable[[Callable[[], Any]], Any]) -> None:
        self._study, self._patiently = study, patiently

    def trials(self) -> list[FrozenTrial]:
        """All trials, the one of number n at place n; not to be changed."""
        found: list[FrozenTrial] = self._patiently(lambda: self._study.get_trials(deepcopy=False))
        return found

    def state(self, number: int) -> TrialState:
        """The state of one trial."""
        found: TrialState = self._patiently(lambda: self._storage.get_trial(self._id(number)).state)
        return found

    def enqueue(self, params: Mapping[str, Any], **marks: Any) -> None:
        """Add a waiting trial with these parameters and, in the same transaction, these user attributes."""
        self._patiently(lambda: self._study.enqueue_trial(dict(params), user_attrs=marks))

    def ask(self, sampler: BaseSampler) -> optuna.Trial:
        """The waiting trial of the lowest number, or a new one; now running."""
        self._study.sampler = sampler
        trial: optuna.Trial = self._patiently(self._study.ask)
        return trial

    def requeue(self, number: int) -> None:
        """Running -> waiting: the same row, number and parameters will be handed out again."""
        self._set_state(number, TrialState.WAITING)

    def tell(
        self,
        number: int,
        state: TrialState,
        values: Sequence[float] | None = None,
        constraints: Mapping[str, float] | None = None,
        attributes: Mapping[str, Any] | None = None,
    ) -> None:
        """Attributes and constraints first, then the end of the trial, which commits it.

        Constraints are satisfied up to 0. Telling twice changes nothing.
        """
        if self.state(number) is TrialState.WAITING:
            self._set_state(number, TrialState.RUNNING)
        trial: optuna.Trial = self._patiently(lambda: optuna.Trial(self._study, self._id(number)))
        for key, value in (attributes or {}).items():
            self._patiently(partial(trial.set_user_attr, key, value))
        # Optuna keeps the first value; what a crash left before the commit came from the same result
        already = self._patiently(lambda: trial.constraints)
        for key, value in (constraints or {}).items():
            if key not in already:
                self._patiently(partial(trial.set_constraint, key, value))
        self._patiently(lambda: self._study.tell(number, values, state, skip_if_finished=True))

    @property
    def _storage(self) -> optuna.storages.BaseStorage:
        return self._study._storage

    def _id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study._study_id, number)

    def _set_state(self, number: int, state: TrialState) -> None:
        self._patiently(lambda: self._storage.set_trial_state_values(self._id(number), state))

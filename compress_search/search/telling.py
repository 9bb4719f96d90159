"""How an attempt's end reaches Optuna: the last write of a trial, after which it is finished for good.

Owns what samplers are told of results, baselines and duplicates, the order of writes (rows first), and the metrics
of the teacher that a study is compared with. Knows nothing of what is handed out, nor of how a result came here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from optuna.trial import TrialState

from compress_search.recipe import Recipe
from compress_search.records import Result
from compress_search.search.aims import Aims
from compress_search.search.asktell import AskTell
from compress_search.search.ledger import Ledger
from compress_search.storage import LastAttempt, Store


class Teller:
    """Tells one study's results.

    Args:
        name: of the study.
        store: the database that holds it.
        optuna_study: the Optuna study in the same database.
        aims: how a result is judged.
        reference: the teacher's metrics where they are known already.
    """

    def __init__(
        self, name: str, store: Store, optuna_study: AskTell, aims: Aims, reference: Mapping[str, float]
    ) -> None:
        self.name, self.store, self.aims = name, store, aims
        self.reference = dict(reference)
        self._optuna = optuna_study

    def commit(self, result: Result, attempt: LastAttempt) -> None:
        """Write down what an attempt, or an older one of the same trial, came to, and tell it."""
        result = self.aims.checked(replace(result, attempt=attempt.attempt), baseline=attempt.baseline is not None)
        self.store.write_result(self.name, result)
        self.tell(result, attempt)

    def tell(self, result: Result, attempt: LastAttempt) -> None:
        """What is written already: attributes and constraints, then the end of the trial."""
        attributes = {"state": result.state, "recipe": str(attempt.recipe), "attempts": result.attempt + 1}
        attributes |= {name: value for name, value in result.metrics.items() if math.isfinite(value)}
        if result.failure:
            attributes["error"] = result.failure.message.partition("\n")[0]
        if attempt.baseline:
            self._freeze_reference(result, attempt.recipe)
            self._optuna.tell(result.number, TrialState.FAIL, attributes=attributes)
            return
        self._optuna.tell(result.number, *self.aims.ending(result), attributes)

    def tell_duplicate(self, number: int, recipe: Recipe, ledger: Ledger) -> None:
        """Pruned; but by the first duplicate of a baseline samplers, which do not see that, learn how it ended."""
        marks = {"state": "duplicate", "duplicate_of": ledger.seen[recipe.key]}
        if baseline := ledger.speaks_for(number, recipe):
            result = self.store.result(self.name, baseline.number, baseline.attempt)
            self._optuna.tell(number, *self.aims.ending(result), marks)
        else:
            self._optuna.tell(number, TrialState.PRUNED, attributes=marks)

    def _freeze_reference(self, result: Result, recipe: Recipe) -> None:
        """The first complete teacher's metrics stand for the whole study."""
        if recipe.steps or result.state != "complete" or self.reference:
            return
        self.reference = dict(result.metrics)
        kept = self.store.study(self.name).reference
        self.store.update_study(self.name, reference={**kept, "metrics": self.reference})

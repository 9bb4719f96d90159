"""A search that tells whoever watches what becomes of its trials, and ends when its teacher cannot be measured.

Owns when which event of :mod:`compress_search.progress` is told. Knows neither who watches nor how trials are run.
"""

from __future__ import annotations

from dataclasses import dataclass

from compress_search import progress
from compress_search.finish import feasible
from compress_search.recipe import Recipe
from compress_search.records import Assignment, Failure, Result, Rung
from compress_search.search import TEACHER, Search
from compress_search.storage import TrialRow


@dataclass
class Announced:
    """A search that also tells whoever watches, and ends when its teacher cannot be measured."""

    search: Search
    on_event: progress.OnEvent
    teacher_fault: Failure | None = None

    def started(self) -> None:
        """Tell what the study is and what earlier runs of it did."""
        plan, rows = self.search.plan, self.search.store.trials(self.search.name)
        earlier = [self._finished(row) for row in rows if row.state not in ("running", "waiting", "duplicate")]
        search = plan.study.search
        aims = plan.study.directions
        self.on_event(
            progress.StudyStarted(
                plan.study.name, aims, search.trials, search.hours, earlier, seconds=self.search.seconds
            )
        )

    def ended(self) -> None:
        """Tell why nothing more is tried."""
        if reason := self.search.reason:
            self.on_event(progress.SearchEnded(reason))

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return self.teacher_fault is not None or self.search.done

    def next(self) -> Assignment | None:
        """Forward, and tell."""
        assignment = None if self.teacher_fault else self.search.next()
        if assignment:
            event = progress.TrialStarted(
                assignment.number, self._shown(assignment.recipe), assignment.attempt, assignment.baseline
            )
            self.on_event(event)
        return assignment

    def report(self, rung: Rung) -> bool:
        """Forward, and tell."""
        going_on = self.search.report(rung)
        self.on_event(progress.RungReported(rung.number, rung.index, rung.metrics, going_on))
        return going_on

    def finish(self, result: Result) -> None:
        """Forward, and tell."""
        self.search.finish(result)
        self._tell(result.number)

    def died(self, number: int, attempt: int, failure: Failure) -> bool:
        """Forward, and tell when it was the last attempt."""
        again = self.search.died(number, attempt, failure)
        if not again:
            self._tell(number)
        return again

    def _tell(self, number: int) -> None:
        """What the database now says of a trial, which may differ from what a worker said."""
        row = self.search.store.trial(self.search.name, number)
        if row.baseline == TEACHER and row.state != "complete":
            self.teacher_fault = row.error or Failure("error", f"it is {row.state}")
        self.on_event(self._finished(row))

    def _shown(self, recipe: Recipe) -> str:
        """The recipe with the parameters that this study searches; the others are the same in every trial."""
        spaces = self.search.plan.spaces
        searched = {(name, key) for name, space in spaces.items() for key, dim in space.items() if not dim.fixed}
        return str(recipe.only(searched))

    def _finished(self, row: TrialRow) -> progress.TrialFinished:
        return progress.TrialFinished(
            row.number,
            row.baseline or self._shown(row.recipe or Recipe()),
            row.state,
            row.metrics,
            row.seconds.get("total", 0.0),
            row.error.message if row.error else None,
            feasible=feasible(self.search.plan.study, row.metrics),
            counted=row.baseline is None and row.state != "infeasible",
        )

"""A study's trials beside Optuna's: what a driver writes, and all that can be read back without a search.

Owns the queries on the ``cs_*`` tables but those on the studies themselves, which are in studies.py. Knows nothing
of what the rows mean for a search. One driver writes; anyone may read. Every write is an upsert keyed by (study,
trial, …), so that a replay after a crash changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, TypeVar

from sqlalchemy import String, cast, select
from sqlalchemy.orm import Session

from compress_search.errors import StorageError
from compress_search.recipe import Recipe
from compress_search.records import Assignment, Failure, Result, Rung
from compress_search.storage.stored import (
    LastAttempt,
    RungRow,
    StudyInfo,
    TrialRow,
    attempt_result,
    plain,
    rung_row,
    trial_row,
)
from compress_search.storage.studies import Studies, study_row
from compress_search.storage.tables import (
    OPTUNA_STUDIES,
    OPTUNA_TRIALS,
    AttemptRow,
    Base,
    MeasurementRow,
    ReportRow,
    now,
)

__all__ = ["LastAttempt", "RungRow", "Store", "StudyInfo", "TrialRow"]

Row = TypeVar("Row", bound=Base)


class Store(Studies):
    """The studies in a database, with their trials.

    See :class:`compress_search.storage.database.Database` for its arguments.
    """

    # ---- attempts -----------------------------------------------------------------------------------------------

    def begin_attempt(self, name: str, assignment: Assignment, state: str = "running") -> None:
        """Write down what is about to be handed out, or, in the state "duplicate", was not."""
        self.renew_lock(name)

        def work(session: Session) -> None:
            row = _upsert(
                session,
                AttemptRow,
                study_id=study_row(session, name).id,
                trial=assignment.number,
                attempt=assignment.attempt,
            )
            row.state, row.baseline, row.seed = state, assignment.baseline, assignment.seed
            row.recipe, row.recipe_key = assignment.recipe.to_list(), assignment.recipe.key
            row.metrics, row.intervals, row.seconds, row.environment = {}, {}, {}, {}
            row.artifact, row.failure, row.provisional, row.ended = None, None, False, None
            row.started = now()

        self._run(work)

    def correct(
        self,
        name: str,
        number: int,
        attempt: int,
        metrics: Mapping[str, float],
        intervals: Mapping[str, tuple[float, float]],
    ) -> None:
        """Replace some metrics of a finished attempt by those of a better measurement."""

        def work(session: Session) -> None:
            row = _attempt_row(session, name, number, attempt)
            row.metrics = {**row.metrics, **plain(metrics)}
            row.intervals = {**row.intervals, **plain(intervals)}

        self._run(work)

    def end_attempt(self, name: str, number: int, attempt: int, state: str, failure: Failure | None = None) -> None:
        """Write down that an attempt ended without a result."""
        self.renew_lock(name)

        def work(session: Session) -> None:
            row = _attempt_row(session, name, number, attempt)
            row.state, row.ended = state, now()
            row.failure = asdict(failure) if failure else None

        self._run(work)

    def write_result(self, name: str, result: Result) -> None:
        """Write down what an attempt came to, its raw measurements included."""
        self.renew_lock(name)

        def work(session: Session) -> None:
            row = _attempt_row(session, name, result.number, result.attempt)
            row.state, row.ended = result.state, now()
            row.metrics, row.intervals = plain(result.metrics), plain(result.intervals)
            row.seconds, row.artifact = plain(result.seconds), result.artifact
            row.failure = asdict(result.failure) if result.failure else None
            row.environment, row.provisional = plain(result.environment), result.provisional
            for kind, data in result.measurements.items():
                _measure(session, row.study_id, result.number, result.attempt, kind, data)

        self._run(work)

    def last_attempts(self, name: str) -> dict[int, LastAttempt]:
        """The newest attempt of every trial that has one."""
        columns = (
            AttemptRow.trial,
            AttemptRow.attempt,
            AttemptRow.state,
            AttemptRow.recipe,
            AttemptRow.recipe_key,
            AttemptRow.baseline,
        )

        def work(session: Session) -> dict[int, LastAttempt]:
            mine = AttemptRow.study_id == study_row(session, name).id
            found: dict[int, LastAttempt] = {}
            query = select(*columns).where(mine).order_by(AttemptRow.trial, AttemptRow.attempt)
            for number, attempt, state, recipe, key, baseline in session.execute(query):
                before = found.get(number)
                history = (*before.history, before.state) if before else ()
                found[number] = LastAttempt(
                    number, attempt, state, Recipe.from_list(recipe), key, baseline, history
                )
            return found

        return self._run(work)

    def result(self, name: str, number: int, attempt: int) -> Result:
        """What is written down of an attempt, measurements aside."""

        def work(session: Session) -> Result:
            return attempt_result(_attempt_row(session, name, number, attempt))

        return self._run(work)

    # ---- rungs and measurements ---------------------------------------------------------------------------------

    def write_rung(self, name: str, rung: Rung, group: str, kept: bool) -> None:
        """Write down a trial's metrics at a rung and what was decided; the first decision stands."""

        def work(session: Session) -> None:
            row = _upsert(
                session, ReportRow, study_id=study_row(session, name).id, trial=rung.number, rung=rung.index
            )
            if row.attempt is None:
                row.attempt, row.peer_group, row.kept = rung.attempt, group, kept
                row.metrics, row.at = plain(rung.metrics), now()

        self._run(work)

    def rungs(self, name: str) -> list[RungRow]:
        """Every report of a study, in the order of their arrival."""

        def work(session: Session) -> list[RungRow]:
            mine = ReportRow.study_id == study_row(session, name).id
            rows = session.scalars(select(ReportRow).where(mine).order_by(ReportRow.id))
            return [rung_row(row) for row in rows]

        return self._run(work)

    def write_measurement(self, name: str, number: int, kind: str, data: Any, attempt: int = 0) -> None:
        """Write down raw samples, for example those of the final measurement; the last of a kind stands."""

        def work(session: Session) -> None:
            _measure(session, study_row(session, name).id, number, attempt, kind, data)

        self._run(work)

    def measurements(
        self, name: str, number: int | None = None, kind: str | None = None
    ) -> dict[int, dict[str, Any]]:
        """Raw measurements by trial and kind, of one trial or one kind if given."""

        def work(session: Session) -> dict[int, dict[str, Any]]:
            query = select(MeasurementRow).where(MeasurementRow.study_id == study_row(session, name).id)
            if number is not None:
                query = query.where(MeasurementRow.trial == number)
            if kind is not None:
                query = query.where(MeasurementRow.kind == kind)
            found: dict[int, dict[str, Any]] = {}
            for row in session.scalars(query.order_by(MeasurementRow.id)):
                found.setdefault(row.trial, {})[row.kind] = row.data
            return found

        return self._run(work)

    # ---- reading ------------------------------------------------------------------------------------------------

    def trials(self, name: str) -> list[TrialRow]:
        """Every trial of a study in the order of their numbers, from the database alone.

        Raises:
            StorageError: there is no database, or no study of this name in it.
        """
        self.study(name)
        return self._run(lambda session: _trial_rows(session, name))

    def trial(self, name: str, number: int) -> TrialRow:
        """One trial of a study; the others are not read.

        Raises:
            StorageError: there is no database, no such study, or no such trial in it.
        """
        self.study(name)
        found = self._run(lambda session: _trial_rows(session, name, number))
        if not found:
            count = self._run(lambda session: _count(session, name))
            raise StorageError(f"no trial {number} in study {name!r}: it has {count}")
        return found[0]


def _attempt_row(session: Session, name: str, number: int, attempt: int) -> AttemptRow:
    key = {"study_id": study_row(session, name).id, "trial": number, "attempt": attempt}
    return session.scalars(select(AttemptRow).filter_by(**key)).one()


def _upsert(session: Session, table: type[Row], **key: Any) -> Row:
    """The row of this key, added when it is new. One driver writes, so nobody can come in between."""
    row = session.scalar(select(table).filter_by(**key))
    if row is None:
        row = table(**key)
        session.add(row)
    return row


def _measure(session: Session, study_id: int, number: int, attempt: int, kind: str, data: Any) -> None:
    row = _upsert(session, MeasurementRow, study_id=study_id, trial=number, kind=kind)
    row.attempt, row.data, row.at = attempt, plain(data), now()


def _trial_rows(session: Session, name: str, number: int | None = None) -> list[TrialRow]:
    """Every trial of a study by number, or the one of this number."""
    study = study_row(session, name).id
    states = _optuna_states(name)
    attempts = select(AttemptRow).filter_by(study_id=study).order_by(AttemptRow.trial, AttemptRow.attempt)
    reports = select(ReportRow).filter_by(study_id=study).order_by(ReportRow.id)
    if number is not None:
        states = states.where(OPTUNA_TRIALS.c.number == number)
        attempts, reports = attempts.filter_by(trial=number), reports.filter_by(trial=number)
    rungs: dict[int, list[RungRow]] = {}
    for report in session.scalars(reports):
        rungs.setdefault(report.trial, []).append(rung_row(report))
    newest: dict[int, AttemptRow] = {}
    counts: dict[int, int] = {}
    for row in session.scalars(attempts):
        newest[row.trial] = row
        counts[row.trial] = counts.get(row.trial, 0) + 1
    return [
        trial_row(trial, state, newest.get(trial), counts.get(trial, 0), rungs.get(trial, ()))
        for trial, state in session.execute(states)
    ]


def _count(session: Session, name: str) -> int:
    return len(session.execute(_optuna_states(name)).all())


def _optuna_states(name: str) -> Any:
    """Number and state of every trial of a study, straight from Optuna's tables."""
    state = cast(OPTUNA_TRIALS.c.state, String)  # an enumeration on PostgreSQL
    of_study = OPTUNA_TRIALS.c.study_id == OPTUNA_STUDIES.c.study_id
    return (
        select(OPTUNA_TRIALS.c.number, state)
        .join(OPTUNA_STUDIES, of_study)
        .where(OPTUNA_STUDIES.c.study_name == name)
        .order_by(OPTUNA_TRIALS.c.number)
    )

"""The search: what to try next, what to make of what came back, and when to stop.

Owns proposals, duplicates, retries and budgets. The order of writes, which makes a crash harmless, is owned by
:mod:`.telling`, what becomes of trials whose driver died by :mod:`.recovery`. Knows nothing of processes, of Ray or
of how a recipe is carried out.

A trial's states, as Optuna knows them, and what they mean here:

* COMPLETE: measured, its objectives told.
* PRUNED: stopped, failed, infeasible or a duplicate; the attempt's row says which. Told so, samplers that learn
  from pruned trials stay away; told FAIL, they would propose a crashing recipe for ever.
* FAIL: a baseline, well measured. Samplers do not see failed trials, and must not see baselines: a complete trial
  without parameters leaves nothing of the intersection of spaces that Gaussian processes are fitted on. What a
  baseline came to they learn when they first propose its recipe: that duplicate is told as the baseline ended.
* WAITING: taken back from a process that died or was interrupted; handed out again under the same number.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import optuna
from optuna.trial import FrozenTrial, TrialState

from compress_search.errors import StorageError
from compress_search.method import Stage
from compress_search.plan import Plan
from compress_search.recipe import Recipe
from compress_search.records import Assignment, Failure, Result, Rung
from compress_search.search.aims import Aims
from compress_search.search.asktell import AskTell
from compress_search.search.early_stop import Entry, Rungs
from compress_search.search.identity import Contents, identity, refuse_change
from compress_search.search.ledger import Baselines, Ledger
from compress_search.search.neighbours import unseen_neighbour
from compress_search.search.recovery import MAX_LOST, Counts, ReadResult, Recovery
from compress_search.search.samplers import derive_seed, make_sampler
from compress_search.search.telling import Teller
from compress_search.storage import Store

__all__ = ["MAX_LOST", "TEACHER", "Counts", "Search"]

TEACHER = "teacher"
REASKS = 3
"""Duplicates in a row after which the sampler, which learns nothing from them, is no longer asked."""


class Search:
    """One study's search, driven by one process.

    Args:
        plan: the study and its space.
        store: the database; it must hold the study's row, which :meth:`open` writes.
        optuna_study: the Optuna study in the same database.
        baselines: recipes to run before the search, by name; the teacher is always the first.
        reference: the teacher's metrics where they are known already; else trial 0 measures them.
        clock: seconds, for the budget of hours.

    Raises:
        StorageError: there is no such study, or Optuna's part of it is gone.
    """

    def __init__(
        self,
        plan: Plan,
        store: Store,
        optuna_study: optuna.Study,
        *,
        baselines: Baselines = (),
        reference: Mapping[str, float] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.plan, self.store = plan, store
        self.name, self.settings = plan.study.name, plan.study.search
        self.aims = Aims(plan.study.directions, plan.study.constraints)
        first = [] if any(not recipe.steps for _, recipe in baselines) else [(TEACHER, Recipe())]
        self.baselines = [*first, *baselines]
        self._optuna = AskTell(optuna_study, store.patiently)
        stored = store.study(self.name)
        self._token = stored.created.isoformat()
        known = reference or stored.reference.get("metrics", {})
        self._teller = Teller(self.name, store, self._optuna, self.aims, known)
        self._clock, self._started, self._seconds_before = clock, clock(), stored.seconds
        self._exhausted = self._blocked = False
        if max(self._ledger().attempts, default=-1) >= len(self._optuna.trials()):
            raise StorageError(f"{store.safe_url}: Optuna's study {self.name!r} was deleted, its results were not")
        self._rungs = Rungs()
        for row in store.rungs(self.name):
            entry = Entry(self.aims.vector(row.metrics), self.aims.total_violation(row.metrics), row.kept)
            self._rungs.record(row.group, row.index, row.trial, entry)

    @property
    def reference(self) -> dict[str, float]:
        """The teacher's metrics; empty until they are known."""
        return self._teller.reference

    @classmethod
    def open(
        cls,
        plan: Plan,
        store: Store,
        *,
        environment: Mapping[str, Any] | None = None,
        contents: Contents | None = None,
        **options: Any,
    ) -> Self:
        """Begin the study in a created database, or continue it.

        Raises:
            StudyError: the database holds a study of this name that is another one.
        """
        new, stored = identity(plan, contents), store.find(plan.study.name)
        if stored:
            refuse_change(plan, stored.identity, new)
        columns = {"definition": plan.study.to_dict(), "identity": new, "space_hash": plan.space_hash}
        if environment is not None:
            columns["environment"] = environment
        store.begin(plan.study.name, subject=plan.teacher.to_dict(), **columns)
        return cls(plan, store, store.optuna_study(plan.study.name, plan.study.directions), **options)

    # ---- handing out --------------------------------------------------------------------------------------------

    def next(self) -> Assignment | None:
        """What to run next; None when there is nothing to hand out now.

        First what was taken back, then baselines, then, once those are done, proposals within the budget.
        """
        if self._blocked:  # an executor may ask many times a second
            return None
        assignment = self._next()
        if assignment is None:
            self._blocked = self._ledger().running
        return assignment

    def _next(self) -> Assignment | None:
        self._keep_time()
        if self._out_of_time:
            return None
        trials, ledger = self._optuna.trials(), self._ledger()
        if ledger.baseline_running and not self.reference:  # whatever comes next is compared with the teacher
            return None
        if self._put_back_unclaimed(trials, ledger) or any(trial.state is TrialState.WAITING for trial in trials):
            if assignment := self._hand_out(self._ask(trials), ledger):
                return assignment
            return self._next()
        if missing := ledger.missing(self.baselines):
            name, recipe = missing[0]
            self._optuna.enqueue({}, baseline=name, recipe=recipe.to_list())
            return self._hand_out(self._ask(trials), ledger)
        if ledger.baseline_running or self._spent(ledger):
            return None
        return self._propose(trials, ledger)

    @property
    def done(self) -> bool:
        """Whether the budget is spent and nothing is outstanding."""
        if self._blocked:
            return False
        ledger = self._ledger()
        if ledger.running:
            return False
        if self._out_of_time:
            return True
        if any(trial.state is TrialState.WAITING for trial in self._optuna.trials()) or ledger.missing(
            self.baselines
        ):
            return False
        return self._spent(ledger) is not None

    @property
    def reason(self) -> str | None:
        """Why nothing more is proposed; None while something is."""
        if self._out_of_time:
            return f"the budget of {self.settings.hours:g} hours is spent"
        return self._spent(self._ledger())

    def _propose(self, trials: Sequence[FrozenTrial], ledger: Ledger) -> Assignment | None:
        """A recipe not tried before: from the sampler, or, when it repeats itself, drawn near what it repeats."""
        for _ in range(REASKS - ledger.trailing_duplicates):
            if assignment := self._hand_out(self._ask(trials, starting=True), ledger):
                return assignment
            trials, ledger = self._optuna.trials(), self._ledger()
        seed = derive_seed(self.settings.seed, "draw", len(trials))
        point = unseen_neighbour(self.plan, trials[-1].params if trials else {}, ledger.seen, seed)
        if point is None:
            self._exhausted = True
            return None
        self._optuna.enqueue(point, drawn=True)
        return self._hand_out(self._ask(trials), ledger)

    def _ask(self, trials: Sequence[FrozenTrial], starting: bool = False) -> optuna.Trial:
        """A running trial of Optuna's; ``starting`` lets the next starting point go first."""
        marks = [trial.user_attrs for trial in trials]
        started = sum("start" in mark for mark in marks)
        if starting and self.settings.sampler == "auto":
            for point in self.plan.starting_points()[started : started + 1]:
                self._optuna.enqueue(point, start=started)
        given = ("start", "baseline")
        sampled = sum(mark.keys().isdisjoint(given) and mark.get("state") != "duplicate" for mark in marks)
        seed = derive_seed(self.settings.seed, "sampler", len(trials))
        return self._optuna.ask(make_sampler(self.settings.sampler, seed, sampled))

    def _hand_out(self, trial: optuna.Trial, ledger: Ledger) -> Assignment | None:
        """Write down the next attempt at the trial; None when its recipe is a duplicate, which is told."""
        number, marks = trial.number, trial.user_attrs
        if before := ledger.get(number):
            return self._begin(number, before.attempt + 1, before.recipe, before.baseline)
        if "baseline" in marks:
            return self._begin(number, 0, Recipe.from_list(marks["recipe"]), marks["baseline"])
        recipe = self.plan.propose(trial)
        if recipe.key not in ledger.seen:
            return self._begin(number, 0, recipe)
        self._begin(number, 0, recipe, state="duplicate")
        self._teller.tell_duplicate(number, recipe, self._ledger())
        return None

    def _begin(
        self, number: int, attempt: int, recipe: Recipe, baseline: str | None = None, state: str = "running"
    ) -> Assignment:
        seed = derive_seed(self.settings.seed, "trial", number)
        assignment = Assignment(number, attempt, recipe, seed, baseline, dict(self.reference), self._token)
        self.store.begin_attempt(self.name, assignment, state)
        return assignment

    def _put_back_unclaimed(self, trials: Sequence[FrozenTrial], ledger: Ledger) -> bool:
        """Requeue trials whose ask reached the database but never came back from it."""
        unclaimed = [t.number for t in trials if t.state is TrialState.RUNNING and t.number not in ledger]
        for number in unclaimed:
            self._optuna.requeue(number)
        return bool(unclaimed)

    # ---- budget -------------------------------------------------------------------------------------------------

    def _ledger(self) -> Ledger:
        return Ledger(self.store.last_attempts(self.name))

    def _spent(self, ledger: Ledger) -> str | None:
        """Which part of the budget is used up, time aside."""
        exhausted = "every recipe of the space has been tried" if self._exhausted else None
        return ledger.spent(self.settings.trials) or exhausted

    @property
    def seconds(self) -> float:
        """How long the study has been driven, over all sessions."""
        return self._seconds_before + self._clock() - self._started

    @property
    def _out_of_time(self) -> bool:
        hours = self.settings.hours
        return hours is not None and self.seconds >= 3600 * hours

    def _keep_time(self) -> None:
        self.store.update_study(self.name, seconds=self.seconds)

    # ---- coming back --------------------------------------------------------------------------------------------

    def report(self, rung: Rung) -> bool:
        """Whether the trial may go on. The first decision on a rung stands; only the newest attempt is heard."""
        attempt = self._ledger().get(rung.number)
        if attempt is None or attempt.state != "running" or attempt.attempt != rung.attempt:
            return False
        if attempt.baseline:
            return True
        group = self._group(attempt.recipe)
        vector, violation = self.aims.vector(rung.metrics), self.aims.total_violation(rung.metrics)
        entry = self._rungs.judge(group, rung.index, rung.number, vector, violation)
        if self.settings.early_stop == "none":
            entry = replace(entry, kept=True)
        elif self.aims.hopeless(rung.metrics):
            entry = replace(entry, kept=False)
        self.store.write_rung(self.name, rung, group, entry.kept)
        self._rungs.record(group, rung.index, rung.number, entry)
        return entry.kept

    def finish(self, result: Result) -> None:
        """Take in what an attempt came to; whatever comes after the first such result is ignored.

        A late result of an older attempt is as good as one of the newest: the recipe is the same.

        Raises:
            ValueError: the attempt was never handed out.
        """
        attempt = self._ledger().get(result.number)
        if attempt is None or result.attempt > attempt.attempt:
            raise ValueError(f"attempt {result.attempt} of trial {result.number} was never handed out")
        if self._optuna.state(result.number).is_finished():
            return
        self._blocked = False
        self._keep_time()
        self._teller.commit(result, attempt)

    def died(self, number: int, attempt: int, failure: Failure) -> bool:
        """Take back an attempt whose process died or overran; whether :meth:`next` will hand out another one.

        A trial is tried again ``search.retries`` times, after a timeout once at most, and then failed.
        """
        last = self._ledger().get(number)
        if last is None or last.attempt != attempt or last.state != "running":
            return False
        retries = min(self.settings.retries, 1) if failure.kind == "timeout" else self.settings.retries
        if last.history.count("died") < retries:
            self._blocked = False
            self.store.end_attempt(self.name, number, attempt, "died", failure)
            self._optuna.requeue(number)
            return True
        self.finish(Result(number, attempt, "failed", failure=failure))
        return False

    def release(self) -> None:
        """Take back everything that runs: it waits for the next session, and nothing is held against it.

        Raises:
            StudyLocked: it runs under another driver by now.
        """
        self.store.renew_lock(self.name)
        self._keep_time()
        ledger = self._ledger()
        for trial in self._optuna.trials():
            if trial.state is TrialState.RUNNING:
                if (attempt := ledger.get(trial.number)) and attempt.state == "running":
                    self.store.end_attempt(self.name, trial.number, attempt.attempt, "released")
                self._optuna.requeue(trial.number)

    def reconcile(self, read_result: ReadResult) -> Counts:
        """Bring the database to where it would be had the last driver not died; call it before anything else.

        Args:
            read_result: what the workers of a trial left behind, by its number.
        """
        recovery = Recovery(self.name, self._token, self.store, self._optuna, self._teller)
        teacher = next(name for name, recipe in self.baselines if not recipe.steps)
        return recovery.reconcile(teacher, read_result)

    def _group(self, recipe: Recipe) -> str:
        """Whom a trial is compared with: those that make their student in the same way."""
        students = [name for name in recipe.methods if self.plan.methods[name].stage is Stage.STUDENT]
        return students[0] if students else ""

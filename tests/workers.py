"""Workers and searches for tests of the executors: importable by name, since workers live in other processes."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress_search.errors import StudyError
from compress_search.executor import Factory
from compress_search.recipe import Recipe, Step
from compress_search.records import Assignment, Failure, Report, Result, Rung

if TYPE_CHECKING:  # a worker process would take a second more to start
    from compress_search.search import Search

TIMES = {"total": 2.5}
"""What every scripted trial says it took."""


class ScriptedWorker:
    """Does what the first step of a recipe names; leaves a file per attempt in the folder it is briefed with."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def run(self, assignment: Assignment, report: Report) -> Result:
        number, attempt = assignment.number, assignment.attempt
        (self.folder / f"{number}-{attempt}").write_text(str(os.getpid()))
        whole = getattr(self, assignment.recipe.methods[0])(assignment, report)
        return Result(
            number, attempt, "complete" if whole else "stopped", {"accuracy": 0.5 + number}, seconds=TIMES
        )

    def fine(self, assignment: Assignment, report: Report) -> bool:
        return True

    def reports(self, assignment: Assignment, report: Report) -> bool:
        for index in range(3):
            if not report(Rung(assignment.number, assignment.attempt, index, {"accuracy": index / 10}, TIMES)):
                return False
            (self.folder / f"{assignment.number}-went-on-{index}").touch()
        return True

    def reports_and_dies(self, assignment: Assignment, report: Report) -> bool:
        threading.Timer(0.3, os._exit, [9]).start()
        return report(Rung(assignment.number, assignment.attempt, 0, {"accuracy": 0.0}))

    def dies_once(self, assignment: Assignment, report: Report) -> bool:
        if assignment.attempt == 1:
            os._exit(9)
        return True

    def dies(self, assignment: Assignment, report: Report) -> bool:
        os._exit(9)

    def breaks(self, assignment: Assignment, report: Report) -> bool:
        raise RuntimeError("a fault of the engine")

    def refuses(self, assignment: Assignment, report: Report) -> bool:
        raise StudyError("no such column", file="study.yaml", line=3, key="data.text")

    def blames(self, assignment: Assignment, report: Report) -> bool:
        raise StudyError("the weights are damaged", key="teacher.model")

    def hangs(self, assignment: Assignment, report: Report) -> bool:
        time.sleep(600)
        return True

    def wait(self) -> None:
        time.sleep(600)

    def refuse(self) -> None:
        raise StudyError("no such column", file="study.yaml", line=3, key="data.text")

    def die(self) -> None:
        os._exit(9)

    def double(self, value: int) -> int:
        return 2 * value

    def close(self) -> None:
        pass


@dataclass
class ScriptedSearch:
    """Hands out one trial a script, each at most ``attempts`` times, and keeps what it is told."""

    scripts: Sequence[str]
    attempts: int = 2
    stop_at: int = 99
    queue: list[Assignment] = field(default_factory=list)
    open: set[int] = field(default_factory=set)
    rungs: list[Rung] = field(default_factory=list)
    results: dict[int, Result] = field(default_factory=dict)
    deaths: list[tuple[int, int, Failure]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for number, script in enumerate(self.scripts):
            self.queue.append(Assignment(number, 1, Recipe((Step.of(script, {}),)), seed=number))

    @property
    def done(self) -> bool:
        return not self.queue and not self.open

    def next(self) -> Assignment | None:
        if not self.queue:
            return None
        assignment = self.queue.pop(0)
        self.open.add(assignment.number)
        return assignment

    def report(self, rung: Rung) -> bool:
        self.rungs.append(rung)
        return rung.index < self.stop_at

    def finish(self, result: Result) -> None:
        assert result.number not in self.results
        self.results[result.number] = result
        self.open.discard(result.number)

    def died(self, number: int, attempt: int, failure: Failure) -> Any:
        self.deaths.append((number, attempt, failure))
        self.open.discard(number)
        if attempt < self.attempts:
            recipe = Recipe((Step.of(self.scripts[number], {}),))
            self.queue.append(Assignment(number, attempt + 1, recipe, seed=number))
        else:
            self.results[number] = Result(number, attempt, "failed", failure=failure)


class HereExecutor:
    """Runs trials in this process, where it is not tested how they are run: another would load the libraries."""

    def __init__(self, factory: Factory, brief: Any, *others: Any) -> None:
        self.worker = factory(brief)

    def run(self, search: Search) -> None:
        while not search.done and (assignment := search.next()):
            search.finish(self.worker.run(assignment, search.report))

    def call(self, job: str, *arguments: Any) -> Any:
        return getattr(self.worker, job)(*arguments)

    def close(self) -> None:
        self.worker.close()


def no_reason(number: int, attempt: int) -> Failure:
    return Failure("died", f"trial {number}, attempt {attempt}")

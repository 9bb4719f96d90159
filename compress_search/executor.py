"""Carries out what the search hands out, in processes of this machine; the Ray counterpart is in ray_executor.

Owns worker processes, their deaths and their time. Knows nothing of what a trial is: a worker is built by a
factory from the study's brief, and runs assignments.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any, Protocol

from compress_search.errors import BenchDied, CompressSearchError, StudyError
from compress_search.records import Assignment, Failure, Report, Result, Rung

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

    from compress_search.search import Search

GRACE_SECONDS = 5.0
"""How long a worker may take to end by itself before it is killed."""


class Worker(Protocol):
    """What a factory builds in a worker process."""

    def run(self, assignment: Assignment, report: Report) -> Result:
        """Run one attempt; trial faults become failed results, anything raised is a fault of the engine."""

    def close(self) -> None:
        """Let go of child processes."""


Factory = Callable[[Any], Worker]
"""Builds a worker from the brief; importable by name, since it runs in another process."""

ReadDeath = Callable[[int, int], Failure]
"""(trial number, attempt) -> why its process ended without a result."""


class Executor(Protocol):
    """Runs a search to its end."""

    def run(self, search: Search) -> None:
        """Hand out, report and finish until the search is done."""

    def call(self, job: str, *arguments: Any) -> Any:
        """The value of a worker's method, for jobs that are no trials."""

    def close(self) -> None:
        """End every process started here."""


class LocalExecutor:
    """Runs trials in ``search.concurrency`` long-lived processes of this machine."""

    def __init__(self, factory: Factory, brief: Any, read_death: ReadDeath, concurrency: int = 1) -> None:
        self.factory, self.brief, self.read_death, self.concurrency = factory, brief, read_death, concurrency
        self.idle: list[_Process] = []
        self.busy: dict[_Process, Assignment] = {}

    def run(self, search: Search) -> None:
        """Hand out, report and finish until the search is done."""
        while not search.done:
            while len(self.busy) < self.concurrency and (assignment := search.next()):
                self._start(assignment)
            if not self.busy:
                break
            for process in wait_for(list(self.busy)):
                self._attend(process, search)

    def call(self, job: str, *arguments: Any) -> Any:
        """The value of a worker's method."""
        process = self._process()
        try:
            process.pipe.send((job, arguments))
            kind, value = process.pipe.recv()
        except (EOFError, OSError) as error:
            process.kill()
            raise CompressSearchError(f"the worker process died during {job}") from error
        except BaseException:  # an interrupt: the process is neither idle nor busy, so nobody else would end it
            process.kill()
            raise
        self.idle.append(process)
        if kind != "value":
            raise raised(value)
        return value

    def close(self) -> None:
        """End every process started here."""
        for process in (*self.busy, *self.idle):
            process.kill()
        self.busy.clear()
        self.idle.clear()

    def _process(self) -> _Process:
        return self.idle.pop() if self.idle else _Process(self.factory, self.brief)

    def _start(self, assignment: Assignment) -> None:
        process = self._process()
        self.busy[process] = assignment
        process.send(("run", assignment))

    def _attend(self, process: _Process, search: Search) -> None:
        """Answer one message of a busy process, or its death."""
        assignment = self.busy[process]
        try:
            kind, value = process.pipe.recv()
        except (EOFError, OSError):
            del self.busy[process]
            how = process.ended()
            failure = self.read_death(assignment.number, assignment.attempt)
            if failure.kind == "died":
                failure = replace(failure, message=f"{failure.message} ({how})")
            search.died(assignment.number, assignment.attempt, failure)
            return
        if kind == "rung":
            process.send(search.report(value))
            return
        self.idle.append(process)
        del self.busy[process]
        if kind == "value":
            search.finish(value)
        elif kind == "crash":
            search.died(assignment.number, assignment.attempt, value)
        else:
            raise raised(value)


def wait_for(processes: Sequence[_Process]) -> list[_Process]:
    """The processes that have something to say; a dead one's pipe ends, which is something to say."""
    ready = wait([process.pipe for process in processes])
    return [process for process in processes if process.pipe in ready]


class _Process:
    """A worker process and our end of its pipe."""

    def __init__(self, factory: Factory, brief: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=serve, args=(theirs, factory, brief), daemon=False)
        self.process.start()
        theirs.close()

    def send(self, message: Any) -> None:
        """Tell the worker something; one that died meanwhile is noticed when it is listened to."""
        with suppress(OSError):
            self.pipe.send(message)

    def ended(self) -> str:
        """How a process that closed its pipe came to its end, which is made sure of."""
        self.process.join(GRACE_SECONDS)
        code = self.process.exitcode
        self.kill()
        if code is None:
            return "it closed its pipe and did not end"
        if code == -signal.SIGKILL:
            return "SIGKILL, as when memory runs out"
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"

    def kill(self) -> None:
        """Close the pipe, which ends an idle worker, and kill one that does not end."""
        self.pipe.close()
        self.process.terminate()
        self.process.join(GRACE_SECONDS)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def serve(pipe: Connection, factory: Factory, brief: Any) -> None:
    """The life of a worker process: jobs in, values out, until the pipe closes or the parent dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver decides what an interrupt means
    threading.Thread(target=_end_with_parent, daemon=True).start()
    worker: Worker | None = None

    def report(rung: Rung) -> bool:
        pipe.send(("rung", rung))
        return bool(pipe.recv())

    while True:
        try:
            job, argument = pipe.recv()
        except (EOFError, OSError):
            break
        try:
            worker = worker or factory(brief)
            value = worker.run(argument, report) if job == "run" else getattr(worker, job)(*argument)
            answer: tuple[str, Any] = ("value", value)
        except Exception as error:  # trial faults are results: this one lies outside of any recipe
            answer = verdict(error)
        pipe.send(answer)
    if worker is not None:
        worker.close()


def verdict(error: Exception) -> tuple[str, Any]:
    """What an exception outside of any recipe means.

    ``("error", (text, exit code, key))`` ends the study: it cannot run in any worker, for which a key of its file,
    "" where none is known, is to blame. ``("crash", Failure)`` repeats the attempt.
    """
    if isinstance(error, CompressSearchError) and not isinstance(error, BenchDied):
        if isinstance(error, StudyError) and error.file is None:
            return "error", (error.message, error.exit_code, error.key or "")
        return "error", (str(error), error.exit_code, "")
    return "crash", Failure("died", f"{type(error).__name__}: {error}", traceback.format_exc())


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def raised(value: Any) -> CompressSearchError:
    """The error of a worker's verdict, as one of ours: a study that cannot run in a worker cannot run at all."""
    if isinstance(value, Failure):
        return CompressSearchError(f"{value.message}\n{value.traceback}")
    message, exit_code, key = value
    error = StudyError(message, key=key) if key else CompressSearchError(message)
    error.exit_code = exit_code
    return error

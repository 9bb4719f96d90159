"""What a running study tells whoever watches it: the events, the board they add up to, and two displays.

The driver calls a function with each event; it knows none of the displays, and the events import nothing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import IO, TYPE_CHECKING

from compress_search import formats

if TYPE_CHECKING:
    from rich.console import RenderableType

    from compress_search.pareto import Direction


@dataclass(frozen=True)
class TrialStarted:
    """An attempt at a trial was handed to a worker. ``baseline`` names the reference it is, if it is one."""

    number: int
    recipe: str
    attempt: int = 0
    baseline: str | None = None


@dataclass(frozen=True)
class RungReported:
    """A trial reached rung ``index``; ``going_on`` is the decision of early stopping."""

    number: int
    index: int
    metrics: Mapping[str, float]
    going_on: bool = True


@dataclass(frozen=True)
class TrialFinished:
    """A trial ended. ``feasible``: it meets every constraint; ``counted``: it uses up one of the study's trials."""

    number: int
    recipe: str
    state: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    reason: str | None = None
    feasible: bool = True
    counted: bool = True


@dataclass(frozen=True)
class StudyStarted:
    """A run of a study begins: its objectives and budget, and what former runs finished, in how many seconds."""

    name: str
    directions: Mapping[str, Direction]
    trials: int
    hours: float | None = None
    earlier: Sequence[TrialFinished] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class SearchEnded:
    """Nothing more is tried in this run, and why; what is left is to look at the front once more."""

    reason: str


Event = StudyStarted | TrialStarted | RungReported | TrialFinished | SearchEnded
OnEvent = Callable[[Event], None]


@dataclass
class Board:
    """The state of a study as its events tell it; empty before :class:`StudyStarted`. Times are in seconds."""

    clock: Callable[[], float] = time.monotonic
    study: StudyStarted = StudyStarted("", {}, 0)
    running: dict[int, TrialStarted] = field(default_factory=dict)
    rungs: dict[int, RungReported] = field(default_factory=dict)
    finished: dict[int, TrialFinished] = field(default_factory=dict)
    began: float = 0.0
    searching: float | None = None
    """When the first trial that is no baseline began: a teacher is trained and measured once."""

    @property
    def done(self) -> int:
        """Finished trials that count towards the budget."""
        return sum(event.counted for event in self.finished.values())

    @property
    def elapsed(self) -> float:
        """Seconds since this run began."""
        return self.clock() - self.began

    @property
    def seconds_left(self) -> float | None:
        """An estimate from the pace of this run's trials, cut by the time limit; None before the first one ends."""
        hours = self.study.hours
        limit = None if hours is None else max(hours * 3600 - self.study.seconds - self.elapsed, 0.0)
        here = self.done - sum(event.counted for event in self.study.earlier)
        if here <= 0:
            return limit
        searched = self.clock() - (self.began if self.searching is None else self.searching)
        pace = searched / here * max(self.study.trials - self.done, 0)
        return pace if limit is None else min(pace, limit)

    def on(self, event: Event) -> None:
        """Take one event in."""
        match event:
            case StudyStarted():
                self.study, self.began = event, self.clock()
                self.finished = {earlier.number: earlier for earlier in event.earlier}
            case TrialStarted():
                self.running[event.number] = event
                if event.baseline is None and self.searching is None:
                    self.searching = self.clock()
            case RungReported():
                self.rungs[event.number] = event
            case TrialFinished():
                self.running.pop(event.number, None)
                self.rungs.pop(event.number, None)
                self.finished[event.number] = event

    def front(self) -> list[TrialFinished]:
        """Complete, feasible trials that none other dominates, best in the first objective first."""
        from compress_search.pareto import front

        names, directions = list(self.study.directions), list(self.study.directions.values())
        there = [
            event
            for event in self.finished.values()
            if event.state == "complete" and event.feasible and all(name in event.metrics for name in names)
        ]
        if not there:
            return []
        rows = front([[event.metrics[name] for name in names] for event in there], directions)
        sign = -1 if directions[0] == "maximize" else 1
        return sorted((there[row] for row in rows), key=lambda event: sign * event.metrics[names[0]])

    def summary(self) -> str:
        """One line: trials, running, front, time left."""
        parts = [
            f"{self.done}/{self.study.trials} trials",
            f"{len(self.running)} running",
            f"front {len(self.front())}",
        ]
        if self.seconds_left is not None and self.done < self.study.trials:
            parts.append(f"about {formats.duration(self.seconds_left)} left")
        return " · ".join(parts)


def sentence(event: Event, directions: Mapping[str, Direction]) -> str:
    """An event as one plain line."""
    if isinstance(event, StudyStarted):
        before = sum(earlier.counted for earlier in event.earlier)
        return f"study {event.name}: {event.trials} trials" + (f", {before} of them done before" if before else "")
    if isinstance(event, SearchEnded):
        return f"the search ended: {event.reason}"
    if isinstance(event, TrialStarted):
        again = f", attempt {event.attempt + 1}" if event.attempt else ""
        return f"trial {event.number} started{again}: {event.baseline or event.recipe}"
    values = ", ".join(
        f"{formats.style(name).label} {formats.number(name, event.metrics[name], unit=True)}"
        for name in directions
        if name in event.metrics
    )
    if isinstance(event, RungReported):
        return f"trial {event.number} rung {event.index}: {values}" + ("" if event.going_on else ", stopped")
    tail = values if event.state == "complete" else event.reason or values
    return f"trial {event.number} {event.state} after {formats.duration(event.seconds)}" + (tail and f": {tail}")


@contextmanager
def display(stream: IO[str] | None = None) -> Iterator[OnEvent]:
    """Show a study's progress while the block runs: live on a terminal, else one line for each event.

    Yields the function to call with each event.
    """
    stream = stream or sys.stderr
    with (_live if stream.isatty() else _plain)(Board(), stream) as on_event:
        yield on_event


@contextmanager
def _plain(board: Board, stream: IO[str]) -> Iterator[OnEvent]:
    def on_event(event: Event) -> None:
        board.on(event)
        line = sentence(event, board.study.directions)
        if isinstance(event, TrialFinished):
            line = f"{line} [{board.summary()}]"
        print(line, file=stream, flush=True)

    yield on_event


@contextmanager
def _live(board: Board, stream: IO[str]) -> Iterator[OnEvent]:
    from rich.console import Console
    from rich.live import Live

    console, lock = Console(file=stream), Lock()

    def picture() -> RenderableType:
        with lock:  # drawn by a thread of its own
            return screen(board)

    with Live(console=console, refresh_per_second=4, get_renderable=picture, transient=True):

        def on_event(event: Event) -> None:
            with lock:
                board.on(event)
            if isinstance(event, TrialFinished | SearchEnded):
                console.print(sentence(event, board.study.directions), markup=False, highlight=False)

        yield on_event


def screen(board: Board, best: int = 5) -> RenderableType:
    """The live picture: a bar, what runs, and the ``best`` first members of the front."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    head = Table.grid(padding=(0, 1))
    head.add_row(
        ProgressBar(board.study.trials, min(board.done, board.study.trials), width=30), Text(board.summary())
    )
    lines = [
        Text(f"  {_running(board, event)}", overflow="ellipsis", no_wrap=True) for event in board.running.values()
    ]
    return Group(head, *lines, *_front_lines(board.front()[:best], board.study.directions))


def _running(board: Board, event: TrialStarted) -> str:
    rung = board.rungs.get(event.number)
    reached = f"  (rung {rung.index})" if rung else ""
    return f"trial {event.number}: {event.baseline or event.recipe}{reached}"


def _front_lines(front: Sequence[TrialFinished], directions: Mapping[str, Direction]) -> list[RenderableType]:
    from rich.table import Table
    from rich.text import Text

    if not front:
        return []
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", expand=True)
    table.add_column("front", justify="right")
    for name in directions:
        table.add_column(formats.style(name).heading, justify="right", no_wrap=True)
    table.add_column("recipe", no_wrap=True, overflow="ellipsis", ratio=1)  # what is left of the width
    for event in front:
        values = [formats.number(name, event.metrics[name]) for name in directions]
        table.add_row(str(event.number), *values, Text(event.recipe))
    return [table]

"""Kills a study ten times at random moments and resumes it: is anything lost, doubled or left running?

``python -m benchmarks.kill_and_resume [--kills 10] [--executor ray] STUDY``
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import click
import psutil

from benchmarks import tables
from compress_search.storage import Store
from compress_search.study import load_study

SOON, PATIENCE = 10.0, 90.0
"""Seconds after a kill at which processes are counted. Ray's two agents try for a minute to report the death of
their raylet to a server that died with it (``publish_error``), idle meanwhile, and end then; nothing of ours may
outlast the first."""


def start(study: Path, executor: str, output: Path) -> subprocess.Popen[bytes]:
    """The study's run command; its progress goes into a file."""
    command = [sys.executable, "-m", "compress_search", "run", str(study), "--executor", executor]
    with output.open("ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)


def descendants(process: psutil.Process) -> list[psutil.Process]:
    """Every process below this one, Ray's included while their parent lives."""
    try:
        found: list[psutil.Process] = process.children(recursive=True)
        return found
    except psutil.NoSuchProcess:
        return []


def outlasting(processes: list[psutil.Process], patience: float) -> int:
    """How many are alive after so many seconds."""
    _, alive = psutil.wait_procs(processes, timeout=patience)
    return sum(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in alive)


def results(study: Path) -> dict[int, tuple[str, str]]:
    """State and recipe key of every finished trial in the database."""
    loaded = load_study(study)
    store = Store(loaded.storage)
    if not store.exists or store.find(loaded.name) is None:
        return {}
    return {
        row.number: (row.state, row.recipe.key if row.recipe else "")
        for row in store.trials(loaded.name)
        if row.state not in ("running", "waiting")
    }


def lost(before: dict[int, tuple[str, str]], after: dict[int, tuple[str, str]]) -> list[int]:
    """Finished trials that are no longer there, or no longer what they were."""
    return [number for number, found in before.items() if after.get(number) != found]


@click.command()
@click.argument("study", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--kills", default=10, show_default=True)
@click.option("--executor", type=click.Choice(["ray", "local"]), default="ray", show_default=True)
@click.option("--longest", default=40.0, show_default=True, help="Seconds a run may live before it is killed.")
@click.option("--seed", default=0, show_default=True)
def main(study: Path, kills: int, executor: str, longest: float, seed: int) -> None:
    """Kill and resume STUDY, then let it finish and check its trials."""
    draw, rows, losses, orphans = random.Random(seed), [], 0, 0
    log = Path(load_study(study).output) / "killed.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    for kill in range(kills):
        before, seconds = results(study), draw.uniform(5, longest)
        run = start(study, executor, log)
        time.sleep(seconds)
        if run.poll() is not None:
            break
        below = descendants(psutil.Process(run.pid))
        run.send_signal(signal.SIGKILL)
        run.wait()
        soon, alive = outlasting(below, SOON), outlasting(below, PATIENCE - SOON)
        gone = lost(before, results(study))
        losses, orphans = losses + len(gone), orphans + alive
        rows.append([kill + 1, f"{seconds:.0f}", len(results(study)), len(gone), len(below), soon, alive])
    before = results(study)
    code = start(study, executor, log).wait()
    after = results(study)
    losses += len(lost(before, after))
    tried = Counter(key for state, key in after.values() if state in ("complete", "stopped", "failed"))
    doubled = sum(count - 1 for count in tried.values())
    contiguous = sorted(after) == list(range(len(after)))
    header = ["kill", "after s", "finished trials", "lost", "processes below the driver"]
    header += [f"alive after {SOON:.0f} s", f"after {PATIENCE:.0f} s"]
    verdict = (
        f"Exit code of the last run: {code}. Trials: {len(after)}, numbered without gaps: {contiguous}. "
        f"Lost: {losses}. Doubled: {doubled}. Left running: {orphans}."
    )
    parts = [f"Executor {executor}, {len(rows)} kills by SIGKILL.", tables.table(header, rows), verdict]
    click.echo(tables.write(f"kill_and_resume_{executor}", "Killing and resuming a study", parts))
    click.echo(verdict)


if __name__ == "__main__":
    main()

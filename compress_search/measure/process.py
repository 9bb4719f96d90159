"""A child process that answers one line of JSON with another, and how it ends.

Owns its environment, its time limit and what is said when it dies. Knows nothing of what it is asked.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from compress_search.errors import BenchDied


def pinned(threads: int) -> dict[str, str]:
    """Environment variables that hold every numeric library to a number of threads, and all hubs off line."""
    pools = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {
        **dict.fromkeys(pools, str(threads)),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }


class Process:
    """A child that answers one line of JSON with another."""

    def __init__(self, command: Sequence[str], threads: int) -> None:
        # append mode: the child's writes and this process's reads of the same file do not move each other
        self._log = tempfile.TemporaryFile("a+b")  # noqa: SIM115  (closed by end)
        self._child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, **pinned(threads)},
            encoding="utf-8",
        )

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._child.poll() is None

    def ask(self, request: Mapping[str, Any], timeout: float | None) -> dict[str, Any]:
        """The reply to a request.

        Raises:
            BenchDied: there is none, because the child ended or was ended at the time limit.
        """
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        with self._limit(timeout) as expired:
            with suppress(BrokenPipeError):  # the empty reply below says as much
                self._child.stdin.write(json.dumps(request) + "\n")
                self._child.stdin.flush()
            line = self._child.stdout.readline()
        if line:
            reply: dict[str, Any] = json.loads(line)
            return reply
        code = self._child.wait()
        doing = " of ".join(request[part] for part in ("operation", "artifact") if part in request)
        if expired.is_set():
            raise BenchDied(f"{doing} took longer than {timeout:g} s", details=self._said(), kind="timeout")
        cause = [f"signal {-code}" if code < 0 else f"exit status {code}", *self._said().strip().splitlines()[-1:]]
        raise BenchDied(f"the bench died during {doing}: {'; '.join(cause)}", details=self._said(), kind="died")

    @contextmanager
    def _limit(self, seconds: float | None) -> Iterator[threading.Event]:
        """Kill the child when the block outlasts its time; the event tells."""
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            self._child.kill()

        timer = threading.Timer(seconds or 0, expire)
        timer.daemon = True
        if seconds is not None:
            timer.start()
        try:
            yield expired
        finally:
            timer.cancel()

    def _said(self, characters: int = 4000) -> str:
        """The end of what the child wrote to standard error."""
        self._log.seek(0)
        return self._log.read().decode("utf-8", errors="replace")[-characters:]

    def end(self) -> None:
        """Kill the child and free what belongs to it."""
        self._child.kill()
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # a request that the child never read
                pipe.close()
        self._log.close()

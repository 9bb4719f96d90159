"""INT and TERM as KeyboardInterrupt. Knows nothing of what is interrupted; light enough to begin a command with."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def interrupts() -> Iterator[None]:
    """Inside the block INT and TERM raise KeyboardInterrupt, once: what follows is cleaning up.

    Ray, when it starts, puts a handler of its own in place, which exits: that is an interrupt too. A second block
    inside, after Ray's start, puts this one back.
    """

    def interrupt(number: int, frame: Any) -> None:
        for one in SIGNALS:
            signal.signal(one, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {one: signal.signal(one, interrupt) for one in SIGNALS}
    try:
        yield
    except SystemExit as left:
        if left.code in SIGNALS:
            raise KeyboardInterrupt from left
        raise
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)

"""A method, as a study's plugin file, that misbehaves in the way one of its parameters names."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Mapping
from typing import Any

from compress_search import Candidate, Context, Dim, Method, Params, Stage, Subject, TrialError


class Trouble(Method):
    stage = Stage.STRUCTURE

    def search_space(self, teacher: Subject) -> Mapping[str, Dim]:
        return {
            "kind": Dim.choice(
                ["fine", "raises", "refuses", "nan", "metric", "oom", "disk", "dies-then-hangs"], "fine"
            ),
            "seconds": Dim.real(0.0, 60.0, 0.0, expert=True),
        }

    def apply(self, candidate: Candidate, params: Params, context: Context) -> Candidate:
        candidate = candidate.copy()
        if not context.dry:
            tried = context.scratch.parent / "tried"  # the trial's own folder, which its next attempt finds
            first = not tried.exists()
            tried.touch()
            self.misbehave(str(params["kind"]), candidate.network, float(params["seconds"]), first)
        return candidate

    def misbehave(self, kind: str, network: Any, seconds: float, first: bool) -> None:
        time.sleep(seconds)
        if kind == "raises":
            raise ZeroDivisionError("a bug of the method")
        if kind == "refuses":
            raise TrialError("these parameters do not go together")
        if kind == "nan":
            next(network.parameters()).data.fill_(float("nan"))
        if kind == "oom":
            raise MemoryError
        if kind == "disk" and "TROUBLE_FREED" not in os.environ:
            raise RuntimeError("cannot write the file") from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if kind == "dies-then-hangs":
            if first:
                os._exit(9)
            time.sleep(600)

    def evaluate(self, candidate: Candidate, context: Context) -> Mapping[str, float]:
        return {"value": 1.0}

"""A bench process without a runtime: what becomes of it is written in the artefact's name.

Stands in for compress_search.measure.bench where the client is under test: standard library only, so that it
starts at once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time


def answer(request: dict) -> dict:
    behaviour = os.path.basename(request.get("artifact", ""))
    if behaviour == "crash":
        print("segfault in kernel 7", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour == "exit":
        sys.exit(3)
    if behaviour == "hang":
        time.sleep(60)
    if behaviour == "broken":
        return {"error": "broken/artifact.json: expected the record", "kind": "error", "details": "Traceback …"}
    return {"result": RESULTS[request["operation"]](request)}


def score(request: dict) -> dict:
    """The process number in place of a metric, so that a restart shows."""
    metrics = {"pid": os.getpid(), "threads": int(os.environ["OMP_NUM_THREADS"])}
    return {"metrics": metrics, "intervals": {}, "examples": 1, "batch_size": request["batch_size"], "seconds": 0.0}


CALLS = []


def latency(request: dict) -> dict:
    """A candidate twice as fast; on a machine that is busy during the first call, when asked for."""
    CALLS.append(request)
    rounds = request["repeats"]
    busy = request["artifact"].endswith("noisy-once") and len(CALLS) == 1
    control = [2.0] * rounds if busy or request["artifact"].endswith("always-noisy") else [1.0] * rounds
    times = {"candidate_ms": [0.5] * rounds, "reference_ms": [1.0] * rounds, "control_ms": control}
    return {"cells": [[8, 1.0]], "samples": {**times, "cell": [0] * rounds}}


def memory(request: dict) -> dict:
    """150 MB, but 200 in the second process that is asked of an artefact in a folder that is there."""
    place, peak = os.path.dirname(request["artifact"]), 150_000_000
    if place:
        open(os.path.join(place, str(os.getpid())), "w").close()
        peak += 50_000_000 * (len(os.listdir(place)) == 2)
    return {"peak": peak, "modules": ["json", "csv"]}


RESULTS = {
    "score": score,
    "latency": latency,
    "memory": memory,
    "empty": lambda request: {"peak": 100_000_000 if request["modules"] == ["json", "csv"] else 0},
}

if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)

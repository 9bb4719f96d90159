"""Carries out what the search hands out, on a Ray cluster through Ray Tune.

Owns the two adapters that forward Tune's callbacks to the search, and how a trial runs inside a Ray actor. Tune
executes and nothing more: its own searchers, schedulers, retries and experiment files decide nothing, since the
database is the one truth (`Tuner.restore` forgets decisions, `OptunaSearch` records stopped trials as complete).
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

# read by Ray when it is imported: signals belong to the driver, and nobody reads Tune's own logs and snapshots
os.environ.update(
    TUNE_DISABLE_SIGINT_HANDLER="1",
    TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1",
    TUNE_GLOBAL_CHECKPOINT_S="100000",
    TUNE_MAX_PENDING_TRIALS_PG="auto",
    RAY_AIR_NEW_OUTPUT="0",
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_worker_niceness="0",  # by default Ray lets whatever else runs on the machine go before a trial
)

import ray
from ray import tune
from ray.exceptions import RayError
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from compress_search.environment import usable_cores
from compress_search.errors import CompressSearchError, StudyError
from compress_search.executor import Factory, ReadDeath, Worker, raised, verdict
from compress_search.records import Assignment, Failure, Result, Rung
from compress_search.study import Study

if TYPE_CHECKING:
    from compress_search.search import Search

ANSWER_SECONDS = 5.0
"""How long a cluster's address may take to answer."""

_workers: dict[str, Worker] = {}
"""This actor's worker by brief: Tune reuses actors, and a worker's teacher and bench with them."""


class ForwardingSearcher(Searcher):
    """Tune asks, the search answers. What goes wrong in an answer ends the run: Tune makes a traceback of it."""

    def __init__(self, search: Search, read_death: ReadDeath) -> None:
        super().__init__(metric=None, mode=None)
        self.search, self.read_death = search, read_death
        self.live: dict[str, Assignment] = {}
        self.error: CompressSearchError | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Tune writes its searcher into a file that is never read back: keep database handles out of it
        return {}

    def set_search_properties(self, *args: Any, **kwargs: Any) -> bool:
        """Accept whatever Tune says: metric and space are the search's own."""
        return True

    def suggest(self, trial_id: str) -> Any:
        """The next assignment, None for "ask again", FINISHED when the search is done."""
        with self.keeping_error():
            if not self.error and not self.search.done:
                if assignment := self.search.next():
                    self.live[trial_id] = assignment
                    return {"assignment": json.dumps(assignment.to_dict())}
                if not self.search.done:
                    return None
        return Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Finish with what the worker returned, or with its death; after an error all that runs is taken back."""
        assignment = self.live.pop(trial_id)
        with self.keeping_error():
            if not self.error:
                self._tell(assignment.number, assignment.attempt, result, error)

    def report(self, rung: Rung) -> bool:
        """Whether the trial may go on."""
        with self.keeping_error():
            return not self.error and self.search.report(rung)
        return False

    @contextmanager
    def keeping_error(self) -> Iterator[None]:
        """The first error inside such blocks is the run's."""
        try:
            yield
        except CompressSearchError as error:
            self.error = self.error or error

    def _tell(self, number: int, attempt: int, result: dict[str, Any] | None, error: bool) -> None:
        if result and "cs_result" in result:
            self.search.finish(Result.from_dict(json.loads(result["cs_result"])))
        elif result and "cs_error" in result:
            self.error = raised(json.loads(result["cs_error"]))
        elif result and "cs_crash" in result:
            self.search.died(number, attempt, Failure(**json.loads(result["cs_crash"])))
        elif error or not result or "cs_rung" not in result:
            self.search.died(number, attempt, self.read_death(number, attempt))
        else:  # stopped by the scheduler below, which is final
            rung = Rung(**json.loads(result["cs_rung"]))
            self.search.finish(Result(number, attempt, "stopped", metrics=rung.metrics, seconds=rung.seconds))

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the database holds it all."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore."""


class ForwardingScheduler(FIFOScheduler):
    """Tune reports, the search decides whether to go on."""

    def __init__(self, searcher: ForwardingSearcher) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.searcher = searcher

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """CONTINUE or STOP."""
        if "cs_rung" in result and not self.searcher.report(Rung(**json.loads(result["cs_rung"]))):
            return str(TrialScheduler.STOP)
        return str(TrialScheduler.CONTINUE)


class RayExecutor:
    """Runs trials as Ray actors with the resources the study asks for."""

    def __init__(self, factory: Factory, brief: Any, read_death: ReadDeath, study: Study) -> None:
        self.factory, self.brief, self.read_death, self.study = factory, brief, read_death, study
        self.started_ray = connect(study)

    def run(self, search: Search) -> None:
        """Hand out, report and finish until the search is done.

        Raises:
            CompressSearchError: what the search raises, or Ray is lost on the way.
        """
        searcher = ForwardingSearcher(search, self.read_death)
        tuner = tune.Tuner(
            tune.with_resources(trainable(self.factory, self.brief), resources(self.study)),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=ForwardingScheduler(searcher),
                num_samples=-1,
                max_concurrent_trials=self.study.search.concurrency,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name=f"run-{int(time.time())}",
                storage_path=str(self.study.output / "ray"),
                verbose=0,
                # a retry is a new attempt of the same trial, and the search's to give
                failure_config=tune.FailureConfig(max_failures=0),
            ),
        )
        try:
            tuner.fit()
        except RayError as error:
            said = " ".join(str(error).split()) or type(error).__name__
            raise CompressSearchError(f"Ray is lost: {said}; the same command goes on") from error
        if searcher.error:
            raise searcher.error

    def call(self, job: str, *arguments: Any) -> Any:
        """The value of a worker's method."""
        remote = ray.remote(_call).options(**_remote_resources(self.study))
        try:
            kind, value = ray.get(remote.remote(self.factory, self.brief, job, arguments))
        except RayError as error:
            raise CompressSearchError(f"the worker process died during {job}") from error
        if kind != "value":
            raise raised(value)
        return value

    def close(self) -> None:
        """End the local cluster if we started one; it takes every process on it along."""
        if self.started_ray:
            ray.shutdown()


def connect(study: Study) -> bool:
    """Join or start a cluster; whether one was started.

    Raises:
        CompressSearchError: the cluster cannot be reached, or has not the resources that one trial asks for.
    """
    if ray.is_initialized():
        return False
    cluster = study.cluster
    local = cluster.address == "local"
    options: dict[str, Any] = {"address": cluster.address}
    if ":" in cluster.address:
        _require_answer(study)
    if local:
        options.update(num_cpus=usable_cores(), include_dashboard=False, _node_ip_address="127.0.0.1")
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    except (OSError, RuntimeError, ValueError) as error:  # nobody there, other versions, or no address at all
        said = " ".join(str(error).split()) or type(error).__name__
        raise study.error("cluster.address", f"cannot join a Ray cluster at {cluster.address!r}: {said}") from error
    try:
        check_nodes(study, [node["Resources"] for node in ray.nodes() if node["Alive"]])
    except StudyError:
        ray.shutdown()
        raise
    return local


def probe_cluster(study: Study, device: str) -> frozenset[str]:
    """The kernels that are real where a trial runs: its place may be on another machine than the driver's.

    Raises:
        CompressSearchError: as :func:`connect`; or the package cannot be run there.
    """
    from compress_search.runtimes.probe import kernels  # with torch, which an actor loads only for what needs it

    connect(study)
    cluster = study.cluster
    probe: Any = ray.remote(num_cpus=cluster.cpus_per_trial, num_gpus=cluster.gpus_per_trial)(kernels)
    try:
        return frozenset(ray.get(probe.remote(device)))
    except RayError as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise study.error("cluster.address", f"compress-search cannot be run on the cluster: {said}") from error


def _require_answer(study: Study) -> None:
    """Refuse an address at which nothing answers, for which Ray itself takes minutes and many lines."""
    address = study.cluster.address
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise study.error("cluster.address", f"no Ray cluster at {address}: {error}") from error


def check_nodes(study: Study, nodes: Sequence[Mapping[str, float]]) -> None:
    """See that one node has all that a trial takes: Ray would wait for it for ever.

    Args:
        study: says what a trial takes.
        nodes: what each node that is alive has, in Ray's words.

    Raises:
        StudyError: none has; at the key of which even the best has too little, or of the GPUs.
    """
    wanted = {"CPU": study.cluster.cpus_per_trial, "GPU": study.cluster.gpus_per_trial}
    for kind, count in wanted.items():
        if count > (most := max((node.get(kind, 0) for node in nodes), default=0)):
            key = f"cluster.{kind.lower()}s_per_trial"
            raise study.error(key, f"a trial asks for {count:g} {kind} of one node, the largest has {most:g}")
    if not any(all(node.get(kind, 0) >= count for kind, count in wanted.items()) for node in nodes):
        asked = " and ".join(f"{count:g} {kind}" for kind, count in wanted.items())
        raise study.error(
            "cluster.gpus_per_trial", f"a trial asks for {asked}, and no node of the cluster has both"
        )


def resources(study: Study) -> dict[str, float]:
    """What one trial takes, in Tune's words."""
    return {"cpu": study.cluster.cpus_per_trial, "gpu": study.cluster.gpus_per_trial}


def _remote_resources(study: Study) -> dict[str, float]:
    return {"num_cpus": study.cluster.cpus_per_trial, "num_gpus": study.cluster.gpus_per_trial}


def trainable(factory: Factory, brief: Any) -> Callable[[dict[str, Any]], None]:
    """A Tune function that runs one assignment in this actor's worker."""

    def run(config: dict[str, Any]) -> None:
        def report(rung: Rung) -> bool:
            # Tune ends this thread inside the call when the scheduler says stop
            tune.report({"cs_rung": json.dumps(vars(rung))})
            return True

        try:
            result = _worker(factory, brief).run(Assignment.from_dict(json.loads(config["assignment"])), report)
            tune.report({"cs_result": json.dumps(result.to_dict())})
        except Exception as error:  # trial faults are results: this one lies outside of any recipe
            kind, value = verdict(error)
            tune.report({f"cs_{kind}": json.dumps(vars(value) if kind == "crash" else value)})

    return run


def _call(factory: Factory, brief: Any, job: str, arguments: tuple[Any, ...]) -> tuple[str, Any]:
    """The value of a worker's method, or the verdict on what it raised."""
    try:
        worker = factory(brief)
        try:
            return "value", getattr(worker, job)(*arguments)
        finally:
            worker.close()
    except Exception as error:
        return verdict(error)


def _worker(factory: Factory, brief: Any) -> Worker:
    key = repr(brief)
    if key not in _workers:
        _workers[key] = factory(brief)
    return _workers[key]

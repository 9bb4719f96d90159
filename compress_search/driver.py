"""Drives one study: checks everything first, then lock, database, search, executor, signals and the final front.

Owns the order in which a run touches the world, so that bad input creates nothing and an interrupt loses
nothing. Knows neither how trials are proposed nor how they are run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Literal

from filelock import FileLock

from compress_search import progress
from compress_search.announced import Announced
from compress_search.cache import cache_folder
from compress_search.candidate import Subject
from compress_search.data.contents import data_digests
from compress_search.data.rows import Raw, read
from compress_search.environment import fingerprint, usable_cores
from compress_search.errors import CompressSearchError, PluginError, StorageError, StudyError
from compress_search.estimate import Estimate, estimate, mean_length
from compress_search.executor import Executor, Factory, LocalExecutor
from compress_search.finish import finalize, measured_once
from compress_search.interrupts import interrupts
from compress_search.plan import Plan, make_plan
from compress_search.recipe import Recipe, Step, settle
from compress_search.registry import PluginFile, Registry
from compress_search.runtimes.probe import keep_kernels, kernels
from compress_search.search import TEACHER, Search
from compress_search.search.identity import identity, refuse_change
from compress_search.search.ledger import Baselines
from compress_search.space import defaults, fix_experts
from compress_search.storage import Store
from compress_search.storage.opening import open_store
from compress_search.study import Study
from compress_search.study.goals import default_objectives
from compress_search.tasks import Task
from compress_search.teacher import auxiliary, teacher_pieces, teacher_subject
from compress_search.teacher.auxiliary import Sources
from compress_search.teacher.contents import teacher_digests
from compress_search.trial import TrialWorker, clear_scratch, read_death, read_result
from compress_search.workbench import Brief

ExecutorName = Literal["ray", "local"]

INT8_METHOD = "quantization"
"""The method whose defaults make the teacher's int8 baseline."""

PATIENCE = 300.0
"""Seconds a driver waits for a database that is locked or away before it gives up."""


@dataclass(frozen=True)
class Prepared:
    """A study whose every word has been checked against its data, its teacher and the installed methods."""

    study: Study
    plan: Plan
    task: Task
    raw: Raw
    auxiliary: Sources
    brief: Brief

    def estimate(self) -> Estimate:
        """How long the study will take on this machine."""
        rows = {name: len(raw.train) for name, (raw, _) in self.auxiliary.items()}
        length = mean_length(self.study, self.raw.train)
        return estimate(self.study, self.plan.teacher, len(self.raw.train), length, further=rows)

    def contents(self) -> dict[str, str]:
        """A hash of what the study's data and model files hold, by the key that names them."""
        own = {**teacher_digests(self.study), **data_digests(self.study, self.raw, self.task)}
        return {**own, **auxiliary.contents(self.study, self.auxiliary)}


Probe = Callable[[str], Collection[str]]
"""Says which kernels are real where trials run, on a device."""


def prepare(study: Study, subject: Subject | None = None, probe: Probe = kernels) -> Prepared:
    """Check everything that can be checked without creating anything.

    ``subject`` is the teacher as an earlier run of the study saw it, kernels included: a space never changes
    within a study, whatever machine it is resumed on. ``probe`` is asked where there was none.

    Raises:
        StudyError, PluginError: what is wrong, with the place of it.
    """
    registry = load_plugins(study)
    raw, task = read(study)
    further = auxiliary.read(study)
    if not study.objectives:  # only now is it known what tags there are, and so which metric comes first
        study = study.model_copy(update={"objectives": default_objectives(task.primary)})
    if subject is None:
        subject = _with_engine_traits(study, raw, task, further, teacher_subject(study, task), probe)
        auxiliary.check(study, subject, further)
    training = study.training.settled(bf16="kernel:bf16" in subject.traits)
    study = study.model_copy(update={"training": training})
    plan = make_plan(study, registry, subject)
    files = [(file.name, file.text) for file in registry.files]
    brief = Brief(study.to_dict(), files, subject.to_dict(), str(cache_folder()))
    return Prepared(study, plan, task, raw, further, brief)


def preview(study: Study) -> Prepared:
    """What :func:`run` would begin with; a study that was begun elsewhere may be looked at here.

    Raises:
        StudyError, PluginError: what is wrong, with the place of it.
    """
    known = stored_subject(study, open_store(study))
    if known is None and study.cluster.address == "local":
        require_machine(study)
    return prepare(study, known)


def load_plugins(study: Study) -> Registry:
    """The installed methods and those of the study's own files, which are imported here: a study that names a
    file wants it, whether or not it names its method.

    Raises:
        StudyError: a file cannot be read or imported, holds no method, or has an installed method's name.
    """
    try:
        registry = Registry(tuple(PluginFile.read(path) for path in study.plugins))
        for file in registry.files:
            _ = registry[file.name]
    except PluginError as error:
        names = [path.stem for path in study.plugins]
        if error.entry_point not in names:  # two installed distributions claim one name
            raise
        raise study.error(f"plugins.{names.index(error.entry_point)}", str(error)) from error
    return registry


def stored_subject(study: Study, store: Store) -> Subject | None:
    """The teacher as an earlier run of the study saw it; None for a new study. Nothing is created.

    Raises:
        StudyError: the database cannot be reached or read.
    """
    try:
        known = store.find(study.name) if store.exists else None
    except StorageError as error:
        raise study.error("storage", str(error)) from error
    return Subject.from_dict(known.subject) if known else None


def _with_engine_traits(
    study: Study, raw: Raw, task: Task, further: Sources, teacher: Subject, probe: Probe
) -> Subject:
    """What the engine itself tells methods of a teacher: whether time counts, which kernels are real, what there is
    to learn from, and what its tokenizer is made of.
    """
    device = device_of(study)
    traits = {f"kernel:{name}" for name in probe(device)} | ({"timed"} if study.timed else set())
    traits |= {"sized"} if study.sized else set()
    traits |= set() if study.teacher.fine_tune else {"came-trained"}
    traits |= {"unlabelled"} if study.data.unlabeled else set()
    traits |= {"auxiliary"} if study.auxiliary else set()
    traits |= {"masked-lm"} if study.teacher.masked_lm else set()
    traits |= {"student-start"} if study.teacher.student_start else set()
    traits |= {"all-tagged"} if task.tokens and "O" not in task.labels else set()
    rows = [raw.train, *(other.train for other, _ in further.values())]
    traits |= {"pairs"} if any(part.pairs is not None for part in rows) else set()
    kind, alphabet = teacher_pieces(study)
    traits.add(f"tokenizer:{kind}")
    threads, cpus = study.measure.threads, study.cluster.cpus_per_trial
    return teacher.having(*traits, device=device, alphabet=alphabet, threads=threads, cpus=cpus)


def device_of(study: Study) -> str:
    """Where trials train."""
    return "cuda" if study.cluster.gpus_per_trial > 0 else "cpu"


def baselines(plan: Plan) -> Baselines:
    """The teacher as it is, and in int8 where that is to be had and the default: what every recipe has to beat."""
    found: list[tuple[str, Recipe]] = [(TEACHER, Recipe())]
    if INT8_METHOD not in plan.registry or plan.registry.unavailable(INT8_METHOD):
        return found
    method = plan.registry[INT8_METHOD]
    params = defaults(fix_experts(method.search_space(plan.teacher)))
    # where only other kernels are real, the defaults are of another precision
    if method.unsupported(plan.teacher) is None and params.get("weight_bits") == 8:
        recipe = Recipe((Step.of(INT8_METHOD, params),))
        found.append(("teacher-int8", settle(recipe, plan.registry, plan.teacher)[0]))
    return found


@interrupts()
def run(
    study: Study,
    *,
    executor: ExecutorName = "ray",
    on_event: progress.OnEvent = lambda event: None,
    factory: Factory = TrialWorker,
) -> None:
    """Start a study or resume it; a finished one is only looked at again.

    Raises:
        StudyError, PluginError: before anything is created.
        StudyLocked: another driver is running the study.
        StorageError: the database is lost on the way.
        CompressSearchError: the study cannot go on, for example since its teacher cannot be measured.
        KeyboardInterrupt: SIGINT or SIGTERM; whatever ran waits for the next run.
    """
    store = open_store(study, patience=PATIENCE)
    if store.outdated:  # what is stored cannot be read before
        store.create()
    known = stored_subject(study, store)
    prepared = prepare(study, known, probe_of(study, executor))
    study, plan, contents = prepared.study, prepared.plan, prepared.contents()
    if known is None:  # a finished study is shown wherever it is
        require_resources(study, executor)
    else:  # before anything is written; once it is locked, the search looks again
        refuse_change(plan, store.study(study.name).identity, identity(plan, contents))
    make_output(study)
    store.create()
    keep_kernels(device_of(study))
    with store.lock(study.name):
        search = Search.open(plan, store, environment=fingerprint(), contents=contents, baselines=baselines(plan))
        freeze_constant(store, prepared)
        search.reconcile(partial(read_result, study.output))
        clear_scratch(study.output)
        announced = Announced(search, on_event)
        announced.started()
        if search.done and not measured_once(study, store):
            return
        refuse_another_device(prepared)
        pool = make_executor(executor, factory, prepared)
        with interrupts(), placed(study):  # once more after Ray has started, which sets handlers of its own
            _drive(announced, pool, store)
        clear_scratch(study.output)
    if fault := announced.teacher_fault:
        raise CompressSearchError(f"the teacher could not be measured: {fault.message}")


def probe_of(study: Study, executor: ExecutorName) -> Probe:
    """Who knows which kernels are real for a study's trials: this machine, or one of the cluster's with a place."""
    if executor == "local" or study.cluster.address == "local":
        return kernels
    from compress_search.ray_executor import probe_cluster

    return partial(probe_cluster, study)


def make_output(study: Study) -> None:
    """Make the folder of the study's artefacts, where it is not there, and write into it whose it is.

    Trials lie there by their numbers, which two studies would take for their own.

    Raises:
        StudyError: it cannot be made, or is another study's.
    """
    claim = study.output / "study.name"
    try:
        study.output.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{claim}.lock"):
            owner = claim.read_text(encoding="utf-8") if claim.exists() else ""
            if owner not in ("", study.name):
                raise study.error(
                    "output", f"{study.output} holds the study {owner!r}: expected a folder of its own"
                )
            claim.write_text(study.name, encoding="utf-8")
    except OSError as error:
        raise study.error("output", f"cannot create {study.output}: {error.strerror}") from error


@contextmanager
def placed(study: Study) -> Iterator[None]:
    """A worker's complaint about a key gets the file and the line, which only the driver knows."""
    try:
        yield
    except StudyError as error:
        if error.key is None or error.file is not None:
            raise
        raise study.error(error.key, error.message) from error


def refuse_another_device(prepared: Prepared) -> None:
    """Stop a study that was begun on a GPU from going on without one, or the reverse: its latencies would mix.

    Raises:
        StudyError: at the key that decides.
    """
    study, begun = prepared.study, prepared.plan.teacher.device
    if ("cuda" if study.cluster.gpus_per_trial > 0 else "cpu") != begun:
        message = f"this study was begun on {begun}, and times on another device do not compare"
        raise study.error("cluster.gpus_per_trial", message)


def freeze_constant(store: Store, prepared: Prepared) -> None:
    """Write down, once for a study, what always giving the same answer scores: where hypervolume counts from."""
    name = prepared.study.name
    reference = store.study(name).reference
    if "constant" not in reference:
        scores = prepared.task.constant_score(prepared.raw.validation.labels)
        store.update_study(name, reference={**reference, "constant": scores})


def _drive(search: Announced, executor: Executor, store: Store) -> None:
    """Run to the end of the budget and look at the front once more; an interrupt takes everything back.

    Nobody who interrupts, or has lost the database, is kept waiting for it: what it says is running then is taken
    back by the next run.
    """
    try:
        executor.run(search)  # type: ignore[arg-type]  # the search, which also tells whoever watches
        if search.teacher_fault is None:
            search.ended()
            finalize(search.search.plan.study, executor, store)
    except BaseException:
        executor.close()
        store.patience = 0.0
        with suppress(StorageError):
            search.search.release()
        raise
    executor.close()


def make_executor(name: ExecutorName, factory: Factory, prepared: Prepared) -> Executor:
    """The executor of this name for a study."""
    study = prepared.study
    death = partial(read_death, study.output)
    require_resources(study, name)
    if name == "local":
        return LocalExecutor(factory, prepared.brief, death, study.search.concurrency)
    from compress_search.ray_executor import RayExecutor

    return RayExecutor(factory, prepared.brief, death, study)


def require_resources(study: Study, executor: ExecutorName) -> None:
    """Refuse a study whose trials find no place to run in; creates nothing but a connection to the cluster.

    Raises:
        StudyError: this machine or the cluster has not what one trial asks for, or cannot be reached.
    """
    if executor == "ray" and study.cluster.address != "local":
        from compress_search.ray_executor import connect

        connect(study)
        return
    require_machine(study)


def require_machine(study: Study) -> None:
    """Refuse a study that asks for more than this machine has; a measured time needs its cores for itself.

    Raises:
        StudyError: at the key that asks for too much.
    """
    import torch

    cores, each, trials = usable_cores(), study.cluster.cpus_per_trial, study.search.concurrency
    if each > cores:
        raise study.error("cluster.cpus_per_trial", f"a trial asks for {each} cores, this machine has {cores}")
    if trials * each > cores:
        asked = f"{trials} trials at a time, of {each} each, ask for {trials * each} cores"
        raise study.error("search.concurrency", f"{asked}, this machine has {cores}")
    wanted, there = study.cluster.gpus_per_trial, torch.cuda.device_count()
    if wanted > there:
        raise study.error("cluster.gpus_per_trial", f"a trial asks for {wanted:g} GPUs, this machine has {there}")

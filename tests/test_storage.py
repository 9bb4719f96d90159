from __future__ import annotations

import math
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import create_engine, inspect, text
from sqlalchemy.exc import OperationalError

from compress_search import storage
from compress_search.errors import StorageError, StudyLocked
from compress_search.recipe import Recipe, Step
from compress_search.records import Assignment, Failure, Result, Rung
from compress_search.storage import Store, schema
from compress_search.storage.stored import trial_row
from compress_search.storage.tables import Base
from tests.databases import database
from tests.fake_plan import fake_store, url_of

RECIPE = Recipe((Step.of("prune", {"ratio": 0.5}), Step.of("quantize", {"bits": 8})))
DIRECTIONS: dict[str, Any] = {"accuracy": "maximize", "latency_ms": "minimize"}


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    with database(request.param, tmp_path) as found:
        yield found


@pytest.fixture
def store(url: str, tmp_path: Path) -> Store:
    """A database with a study "s" of three trials: the first runs, the others wait."""
    store = fake_store(tmp_path, None if url.startswith("sqlite") else url)
    begin(store, "s")
    study = store.optuna_study("s", DIRECTIONS)
    for _ in range(2):
        study.enqueue_trial({})
    store.begin_attempt("s", Assignment(study.ask().number, 0, RECIPE, seed=7))
    study.enqueue_trial({})
    return store


def begin(store: Store, name: str, **columns: Any) -> None:
    store.begin(name, **{"definition": {}, "identity": {}, "space_hash": "h", "subject": {}, **columns})


def tell(store: Store, number: int, values: list[float] | None = None) -> None:
    state = optuna.trial.TrialState.COMPLETE if values else optuna.trial.TrialState.PRUNED
    store.optuna_study("s", DIRECTIONS).tell(number, values, state)


# ---- opening ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "read",
    [
        lambda store: store.trials("s"),
        lambda store: store.study("s"),
        lambda store: store.measurements("s"),
        lambda store: store.check(),
        lambda store: store.find("s"),
    ],
)
def test_reading_a_database_that_is_not_there_creates_nothing(tmp_path: Path, read: Callable[[Store], Any]) -> None:
    store = Store(f"sqlite:///{tmp_path / 'runs' / 'study.db'}")
    assert not store.exists
    with pytest.raises(StorageError, match=r"^no study in sqlite:///.*study\.db: "):
        read(store)
    assert list(tmp_path.iterdir()) == []


def test_reading_a_database_of_something_else_says_so(tmp_path: Path) -> None:
    sqlite3.connect(tmp_path / "study.db").execute("CREATE TABLE other (x)").connection.close()
    with pytest.raises(StorageError, match="it has not been run yet"):
        Store(url_of(tmp_path)).trials("s")
    (tmp_path / "study.db").write_text("no database at all, but quite some text " * 50)
    with pytest.raises(StorageError, match="file is not a database"):
        Store(url_of(tmp_path)).trials("s")


def test_readers_leave_a_file_as_it_is_and_drivers_write_ahead(tmp_path: Path) -> None:
    file = tmp_path / "study.db"
    sqlite3.connect(file).execute("CREATE TABLE other (x)").connection.close()
    before = file.read_bytes()
    assert not Store(url_of(tmp_path)).exists
    assert file.read_bytes() == before
    Store(url_of(tmp_path)).create()
    mode = sqlite3.connect(file).execute("PRAGMA journal_mode")
    assert mode.fetchone() == ("wal",)
    mode.connection.close()


def test_an_unknown_study_is_named(store: Store) -> None:
    with pytest.raises(StorageError, match="no study named 'other'"):
        store.trials("other")
    with pytest.raises(StorageError, match="no trial 99 in study 's': it has 3"):
        store.trial("s", 99)


def test_creating_makes_the_folder_and_can_be_repeated(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path / 'a' / 'b' / 'study.db'}")
    store.create()
    store.create()
    assert store.exists
    store.check()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"^cannot create .*file/runs: Not a directory$"):
        Store(f"sqlite:///{tmp_path / 'file' / 'runs' / 'study.db'}").create()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense", "not a database URL; expected for example sqlite:///study.db"),
        ("sqlite://", "a database in memory cannot be resumed"),
        ("sqlite:///:memory:", "a database in memory cannot be resumed"),
        ("oracle://u:secret@h/d", "cannot be used"),
        ("strange://u:secret@h/d", "cannot be used"),
    ],
)
def test_an_unusable_url_is_refused_without_its_password(url: str, message: str) -> None:
    with pytest.raises(StorageError, match=message) as caught:
        Store(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("act", [lambda store: store.create(), lambda store: store.trials("s")])
def test_an_unreachable_server_is_one_line_without_the_password(act: Callable[[Store], Any]) -> None:
    store = Store("postgresql://user:s3cret@127.0.0.1:1/db", sleep=lambda seconds: None)
    with pytest.raises(StorageError) as caught:
        act(store)
    message = str(caught.value)
    assert message.startswith("postgresql+psycopg://user:***@127.0.0.1:1/db: ")
    assert "s3cret" not in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (
            "cannot open postgresql://user:p@127.0.0.1:1/db: read-only",
            "cannot open postgresql://user:***@127.0.0.1:1/db: ",
        ),
        ("port 1 failed: no space left, accepting nothing", "port 1 failed: no space left, accepting nothing"),
    ],
)
def test_a_password_inside_an_error_is_hidden_where_it_is_one(said: str, shown: str) -> None:
    """Hiding each "p" would mangle the text, and tell the password by that."""
    store = Store("postgresql://user:p@127.0.0.1:1/db?sslpassword=s3cret")

    def fail() -> None:
        raise OperationalError("SELECT 1", {}, Exception(said))

    with pytest.raises(StorageError) as caught:
        store.patiently(fail)
    message = str(caught.value)
    assert message.startswith("postgresql+psycopg://user:***@127.0.0.1:1/db?sslpassword=***: ")
    assert shown in message


def test_tables_of_a_newer_version_are_refused(store: Store) -> None:
    _set_revision(store, "9999")
    for act in (store.check, store.create, lambda: store.trials("s")):
        with pytest.raises(StorageError, match=r"written by a newer version of compress-search \(schema 9999\)"):
            act()


def _set_revision(store: Store, revision: str) -> None:
    with store._engine.begin() as connection:
        connection.execute(text("UPDATE cs_alembic_version SET version_num = :v"), {"v": revision})


def test_tables_of_an_older_version_are_upgraded_by_a_run_only(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "revisions", lambda: ["0002", "0001"])
    with pytest.raises(StorageError, match="written by an older version; `compress-search run` upgrades it"):
        store.check()
    store.create()


def test_tables_of_another_optuna_say_how_to_upgrade_them(store: Store) -> None:
    with store._engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = 'v2.6.0.a'"))
    with pytest.raises(StorageError, match=r"optuna storage upgrade --storage (sqlite|postgresql)") as caught:
        store.create()
    assert "\n" not in str(caught.value)


def test_a_driver_that_creates_the_same_tables_at_the_same_time_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upgrade, clock = schema.upgrade, Clock()

    def overtaken(connection: Any) -> None:
        monkeypatch.setattr(schema, "upgrade", upgrade)
        Store(url_of(tmp_path)).create()
        raise OperationalError("CREATE TABLE", {}, sqlite3.OperationalError("table cs_study already exists"))

    monkeypatch.setattr(schema, "upgrade", overtaken)
    store = Store(url_of(tmp_path), sleep=clock.sleep, clock=clock)
    store.create()
    store.check()
    assert clock.pauses == [1.0]


# ---- the schema -------------------------------------------------------------------------------------------------


def test_the_migrations_make_the_tables_of_the_code_and_leave_optunas_alone(url: str) -> None:
    Store(url).create()
    engine = create_engine(url)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={**schema.options(), "compare_type": True})
        assert compare_metadata(context, Base.metadata) == []
        unfiltered = MigrationContext.configure(connection, opts={"version_table": "cs_alembic_version"})
        dropped = {
            step[1].name for step in compare_metadata(unfiltered, Base.metadata) if step[0] == "remove_table"
        }
    engine.dispose()
    assert {"trials", "studies", "alembic_version"} <= dropped  # what the filter is for


def test_the_first_migration_can_be_undone(url: str) -> None:
    from alembic import command

    Store(url).create()
    engine = create_engine(url)
    with engine.begin() as connection:
        command.downgrade(schema._config(connection), "base")
    tables = inspect(engine).get_table_names()
    engine.dispose()
    assert [name for name in tables if name.startswith("cs_")] == ["cs_alembic_version"]
    assert "trials" in tables


def test_optuna_can_delete_its_study(store: Store) -> None:
    optuna.delete_study(study_name="s", storage=store._optuna_storage())
    assert store.trials("s") == []
    assert store.find("s") is not None


def test_an_optuna_study_of_somebody_else_is_left_alone(store: Store) -> None:
    store.optuna_study("theirs", DIRECTIONS)
    with pytest.raises(StorageError, match="holds another Optuna study named 'theirs'; choose another name"):
        begin(store, "theirs")


# ---- one driver -------------------------------------------------------------------------------------------------


def test_a_second_driver_is_refused_and_told_who_is_first(store: Store, url: str) -> None:
    other = Store(url)
    with store.lock("s"):
        begin(store, "s")
        with pytest.raises(StudyLocked, match=r"study 's' is already being run by process \d+ on \S+ since 2"):
            other.lock("s").__enter__()
        with other.lock("another study"):
            pass
    with other.lock("s"):
        pass


def test_a_driver_of_a_database_without_tables_can_be_refused_too(url: str) -> None:
    with Store(url).lock("s"), pytest.raises(StudyLocked, match="is already being run by another process"):
        Store(url).lock("s").__enter__()


def test_an_error_inside_the_block_releases_the_lock(store: Store) -> None:
    with pytest.raises(RuntimeError), store.lock("s"):
        raise RuntimeError
    with store.lock("s"):
        pass


def test_a_driver_that_lost_its_lock_to_another_stops(tmp_path: Path) -> None:
    with database("postgresql", tmp_path) as url:
        store, other = Store(url), Store(url)
        store.create()
        begin(store, "s")
        with store.lock("s"):
            assert store._lock is not None
            store._lock.release()  # as if the server had restarted
            store.begin_attempt("s", Assignment(0, 0, RECIPE, 0))
            assert store._lock.held()
            store._lock.release()
            with other.lock("s"), pytest.raises(StudyLocked, match="study 's' was taken over by process"):
                store.begin_attempt("s", Assignment(1, 0, RECIPE, 0))


def test_a_driver_that_lost_its_lock_ends_no_attempt_of_the_other(store: Store) -> None:
    other = Store(store.safe_url)
    begin(store, "s")
    with store.lock("s"):
        store.begin_attempt("s", Assignment(0, 0, RECIPE, 0))
        assert store._lock is not None
        store._lock.release()
        with other.lock("s"):
            for write in (
                lambda: store.end_attempt("s", 0, 0, "released"),
                lambda: store.write_result("s", Result(0, 0, "complete")),
            ):
                with pytest.raises(StudyLocked, match="study 's' was taken over by"):
                    write()
            assert other.last_attempts("s")[0].state == "running"


# ---- patience ---------------------------------------------------------------------------------------------------


class Clock:
    """Time that passes only in sleep."""

    def __init__(self) -> None:
        self.now, self.pauses = 0.0, list[float]()

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.pauses.append(seconds)


def locked() -> None:
    raise OperationalError("UPDATE …", {}, sqlite3.OperationalError("database is locked"))


def test_a_database_that_is_away_is_tried_again_with_growing_pauses(tmp_path: Path) -> None:
    clock = Clock()
    store = fake_store(tmp_path, patience=300, sleep=clock.sleep, clock=clock)
    with pytest.raises(StorageError, match=r"study\.db: database is locked$"):
        store.patiently(locked)
    assert 285 < clock.now <= 300
    assert clock.pauses[:3] == [0.1, 0.2, 0.4]
    assert max(clock.pauses) == 10


def test_a_database_that_comes_back_goes_on_where_it_was(tmp_path: Path) -> None:
    clock, calls = Clock(), iter([locked, locked, lambda: "value"])
    store = fake_store(tmp_path, patience=300, sleep=clock.sleep, clock=clock)
    assert store.patiently(lambda: next(calls)()) == "value"
    assert len(clock.pauses) == 2


def test_optunas_own_wrapping_of_an_error_is_seen_through(tmp_path: Path) -> None:
    clock = Clock()
    store = fake_store(tmp_path, patience=1, sleep=clock.sleep, clock=clock)

    def wrapped() -> None:
        try:
            locked()
        except OperationalError as error:
            raise optuna.exceptions.StorageInternalError("during the commit") from error

    with pytest.raises(StorageError, match=r"database is locked$"):
        store.patiently(wrapped)
    assert clock.pauses


def test_a_reader_does_not_wait(tmp_path: Path) -> None:
    clock = Clock()
    with pytest.raises(StorageError):
        fake_store(tmp_path, sleep=clock.sleep, clock=clock).patiently(locked)
    assert clock.pauses == []


@pytest.mark.parametrize("message", ["attempt to write a readonly database", "database or disk is full"])
def test_what_no_waiting_mends_ends_at_once(tmp_path: Path, message: str) -> None:
    clock = Clock()

    def fail() -> None:
        raise OperationalError("INSERT …", {}, sqlite3.OperationalError(message))

    with pytest.raises(StorageError, match=message):
        fake_store(tmp_path, patience=300, sleep=clock.sleep, clock=clock).patiently(fail)
    assert clock.pauses == []


def test_a_locked_sqlite_database_is_waited_for(tmp_path: Path) -> None:
    store = fake_store(tmp_path, patience=20, timeout=0.05)
    begin(store, "s")
    other = sqlite3.connect(tmp_path / "study.db", check_same_thread=False)
    other.execute("BEGIN EXCLUSIVE")
    started = time.monotonic()
    threading.Timer(0.4, other.rollback).start()
    store.update_study("s", seconds=5.0)
    assert time.monotonic() - started > 0.3
    assert store.study("s").seconds == 5.0
    other.close()


def test_a_server_that_ends_our_connections_is_only_a_pause(tmp_path: Path) -> None:
    with database("postgresql", tmp_path) as url:
        store = Store(url, patience=20)
        store.create()
        begin(store, "s")
        engine = create_engine(url, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(
                text(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
                    " AND datname = current_database()"
                )
            )
        engine.dispose()
        store.update_study("s", seconds=5.0)
        assert store.study("s").seconds == 5.0


# ---- rows -------------------------------------------------------------------------------------------------------


def test_a_study_is_written_once_and_updated(store: Store) -> None:
    begin(store, "t", definition={"name": "t"}, identity={"a": [1]}, subject={"layers": 6}, environment={"os": "x"})
    store.update_study("t", seconds=3.5, reference={"metrics": {"accuracy": 0.9, "odd": math.nan}})
    first = store.study("t")
    store.begin("t", definition={"name": "t", "more": True})
    second = store.study("t")
    assert (second.identity, second.seconds, second.created) == ({"a": [1]}, 3.5, first.created)
    assert second.reference == {"metrics": {"accuracy": 0.9, "odd": None}}
    assert second.definition == {"name": "t", "more": True}
    assert second.driver is not None
    assert set(second.driver) == {"host", "pid", "since"}


def test_a_result_is_read_back_as_it_was_written(store: Store) -> None:
    result = Result(
        0,
        0,
        "complete",
        metrics={"accuracy": 0.875, "latency_ms": 1 / 3},
        intervals={"accuracy": (0.85, 0.9)},
        measurements={"latency": {"samples": [1.5, 2.5]}, "recipe": RECIPE.key},
        artifact="artifacts/abc",
        seconds={"fit": 1.25},
        environment={"torch": "2"},
    )
    for _ in range(2):  # a replay changes nothing
        store.write_result("s", result)
    tell(store, 0, [0.875, 1 / 3])
    row = store.trial("s", 0)
    assert (row.state, row.recipe, row.seed, row.attempts) == ("complete", RECIPE, 7, 1)
    assert (row.metrics, row.intervals, row.seconds) == (result.metrics, result.intervals, result.seconds)
    assert (row.artifact, row.environment, row.error) == ("artifacts/abc", {"torch": "2"}, None)
    assert row.ended is not None
    assert store.measurements("s", number=0) == {0: {"latency": {"samples": [1.5, 2.5]}, "recipe": RECIPE.key}}
    assert store.measurements("s", kind="latency") == {0: {"latency": {"samples": [1.5, 2.5]}}}


def test_what_is_not_told_has_not_happened(store: Store) -> None:
    store.write_result("s", Result(0, 0, "complete", metrics={"accuracy": 1.0}))
    assert [row.state for row in store.trials("s")] == ["running", "waiting", "waiting"]
    tell(store, 0, [1.0, 1.0])
    assert store.trial("s", 0).state == "complete"


def test_a_trial_without_an_attempt_has_no_recipe(store: Store) -> None:
    row = store.trial("s", 1)
    assert (row.recipe, row.attempts, row.metrics, row.error) == (None, 0, {}, None)


def test_one_trial_is_read_without_the_others(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write_rung("s", Rung(0, 0, 0, {"accuracy": 0.5}), "", kept=True)
    store.write_rung("s", Rung(1, 0, 0, {"accuracy": 0.1}), "", kept=False)
    every, built = store.trials("s"), []

    def counted(*arguments: Any) -> Any:
        built.append(arguments)
        return trial_row(*arguments)

    monkeypatch.setattr(storage, "trial_row", counted)
    assert [store.trial("s", number) for number in range(3)] == every
    assert len(built) == 3


def test_the_newest_attempt_speaks_for_the_trial(store: Store) -> None:
    failure = Failure("died", "killed", "")
    store.end_attempt("s", 0, 0, "died", failure)
    assert store.trial("s", 0).error == failure
    store.begin_attempt("s", Assignment(0, 1, RECIPE, 7, baseline="teacher"))
    last = store.last_attempts("s")[0]
    assert (last.attempt, last.state, last.history, last.key) == (1, "running", ("died",), RECIPE.key)
    row = store.trial("s", 0)
    assert (row.attempts, row.error, row.baseline) == (2, None, "teacher")


def test_values_that_are_not_finite_are_left_out_of_metrics_but_kept_at_rungs(store: Store) -> None:
    metrics = {"accuracy": math.nan, "latency_ms": math.inf, "size_mb": 1.0}
    store.write_result("s", Result(0, 0, "failed", metrics=metrics, intervals={"accuracy": (math.nan, 1.0)}))
    store.write_rung("s", Rung(0, 0, 1, metrics), "theseus", kept=False)
    row = store.trial("s", 0)
    assert (row.metrics, row.intervals) == ({"size_mb": 1.0}, {})
    (rung,) = row.rungs
    assert (rung.index, rung.group, rung.kept) == (1, "theseus", False)
    assert math.isnan(rung.metrics["accuracy"])
    assert math.isnan(rung.metrics["latency_ms"])


def test_the_first_decision_at_a_rung_stands(store: Store) -> None:
    store.write_rung("s", Rung(0, 0, 0, {"accuracy": 0.5}), "", kept=True)
    store.write_rung("s", Rung(0, 1, 0, {"accuracy": 0.1}), "", kept=False)
    (rung,) = store.rungs("s")
    assert (rung.metrics, rung.kept) == ({"accuracy": 0.5}, True)


def test_the_last_measurement_of_a_kind_stands(store: Store) -> None:
    for samples in ([1], [2]):
        store.write_measurement("s", 1, "final", {"samples": samples}, attempt=1)
    store.write_measurement("s", 0, "final", {"samples": [0]})
    assert store.measurements("s", kind="final") == {
        0: {"final": {"samples": [0]}},
        1: {"final": {"samples": [2]}},
    }


def test_numpy_values_and_paths_are_stored_as_plain_json(store: Store) -> None:
    import numpy as np

    store.write_measurement("s", 0, "k", {"x": np.float32(0.5), "n": np.int64(3), "p": Path("a"), "t": (1, 2)})
    assert store.measurements("s", 0)[0]["k"] == {"x": 0.5, "n": 3, "p": "a", "t": [1, 2]}


def test_two_studies_of_one_database_do_not_mix(store: Store) -> None:
    begin(store, "t")
    store.optuna_study("t", DIRECTIONS).ask()
    store.begin_attempt("t", Assignment(0, 0, Recipe(), 1))
    store.write_rung("t", Rung(0, 0, 0, {}), "", kept=True)
    assert store.last_attempts("s")[0].recipe == RECIPE
    assert store.last_attempts("t")[0].recipe == Recipe()
    assert store.rungs("s") == []
    assert [row.number for row in store.trials("t")] == [0]

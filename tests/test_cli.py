"""Every command and every exit code, as a shell sees them."""

from __future__ import annotations

import csv
import io
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner, Result

from compress_search import __version__, cli, doctor, driver
from compress_search.errors import ExportError, StorageError, StudyError, StudyLocked
from compress_search.estimate import Estimate
from compress_search.progress import StudyStarted, TrialStarted
from compress_search.report import terminal
from compress_search.storage import RungRow, Store, TrialRow
from compress_search.study import load_study
from tests import sample_report, tiny
from tests.sample_report import entry

ROWS = [
    sample_report.teacher(),
    sample_report.baseline(),
    entry(2, 0.874, 7.9, test={"accuracy": 0.871}, marks=["noisy"]),
    entry(3, state="failed", metrics={}, intervals={}, error="no heads left"),
    entry(4, 0.86, 6.4, state="stopped"),
    entry(5, 0.865, 5.0),
    entry(6, state="running"),
]


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


def study_in(folder: Path, **sections: Any) -> Path:
    return tiny.tiny_study(folder, teacher={"model": "owner/model"}, **sections)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study file whose database holds ROWS; only read."""
    path = study_in(
        tmp_path_factory.mktemp("filled"), search={"trials": 8}, constraints={"accuracy_drop": "<= 0.03"}
    )
    study = load_study(path)
    sample_report.fill(Store(study.storage), study, ROWS)
    return path


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    """A study file that has not been run."""
    return study_in(tmp_path)


# ---- help, usage, errors -----------------------------------------------------------------------------------------


def test_help_answers_at_once_without_heavy_imports() -> None:
    code = (
        "import sys; from compress_search.cli import main\n"
        "try: main(['--help'])\n"
        "finally: print(sorted(sys.modules))"
    )
    started = time.perf_counter()
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    took = time.perf_counter() - started
    modules = out.stdout.rpartition("[")[2]
    heavy = [
        name for name in ("torch", "ray", "transformers", "optuna", "numpy", "pydantic") if f"'{name}'" in modules
    ]
    assert not heavy
    assert took < 2  # 0.1 s on an idle machine; the imports above are what would make it slow


def test_the_version_is_the_packages() -> None:
    assert call("--version").output == f"compress-search, version {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["run"],
        ["show", "study.yaml", "minus"],
        ["report", "s.yaml", "--format", "xml"],
        ["export", "s"],
    ],
)
def test_wrong_usage_exits_2(arguments: list[str]) -> None:
    assert call(*arguments).exit_code == 2


@pytest.mark.parametrize("command", ["run", "plan", "status", "trials", "report"])
def test_a_missing_study_file_is_one_line_and_exit_2(command: str) -> None:
    result = call(command, "nowhere.yaml")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: nowhere.yaml: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("command", [["status"], ["trials"], ["report"], ["show", "0"]])
def test_a_study_that_was_not_run_is_said_so_and_nothing_is_created(command: list[str], fresh: Path) -> None:
    before = sorted(fresh.parent.rglob("*"))
    result = call(command[0], fresh, *command[1:])
    assert result.exit_code == 1
    assert "has not been run" in result.stderr
    assert sorted(fresh.parent.rglob("*")) == before


def test_an_override_reaches_the_study(fresh: Path) -> None:
    result = call("status", fresh, "--set", "search.trails=3")
    assert result.exit_code == 2
    assert "--set search.trails=3" in result.stderr
    assert "unknown key" in result.stderr


# ---- run ---------------------------------------------------------------------------------------------------------


def running(monkeypatch: pytest.MonkeyPatch, action: Callable[..., None]) -> None:
    monkeypatch.setattr(driver, "run", action)


def test_run_shows_progress_then_the_front(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(study: Any, *, executor: str, on_event: Callable[[Any], None]) -> None:
        assert executor == "local"
        on_event(StudyStarted(study.name, study.directions, study.search.trials))
        on_event(TrialStarted(0, "teacher"))

    running(monkeypatch, run)
    result = call("run", filled, "--executor", "local", "--set", "search.trials=9")
    assert result.exit_code == 0
    assert "study tiny: 9 trials" in result.stderr
    assert "trial 0 started: teacher" in result.stderr
    assert "Choose trial 5" in result.stdout


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (StudyError("unknown key", file="s.yaml", line=3, key="a"), 2, "error: s.yaml:3: a: unknown key\n"),
        (StudyLocked("process 7 runs it"), 3, "error: process 7 runs it\n"),
        (StorageError("the disk\nis full"), 1, "error: the disk is full\n"),
        (KeyboardInterrupt(), 130, "interrupted: the same command resumes\n"),
    ],
)
def test_each_error_has_its_exit_code_and_one_line(
    error: BaseException, code: int, line: str, filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*arguments: Any, **options: Any) -> None:
        raise error

    running(monkeypatch, run)
    result = call("run", filled)
    assert (result.exit_code, result.stderr) == (code, line)


def test_an_error_of_the_engine_keeps_its_traceback(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*arguments: Any, **options: Any) -> None:
        raise ZeroDivisionError

    running(monkeypatch, run)
    assert isinstance(call("run", filled).exception, ZeroDivisionError)


def test_run_exits_4_when_nothing_meets_the_constraints(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bound = ["--set", "constraints={latency_ms: '<= 1'}"]
    study = load_study(fresh, [bound[1]])
    sample_report.fill(Store(study.storage), study, ROWS[:3])
    running(monkeypatch, lambda *arguments, **options: None)
    result = call("run", fresh, *bound)
    assert result.exit_code == 4
    told = result.stderr.removeprefix("error: ").strip()
    assert told.startswith("Nothing meets the constraints; the closest: trial 2")
    assert told in result.stdout.splitlines()


def test_run_exits_1_when_nothing_completed(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = load_study(fresh)
    failed = entry(2, state="failed", metrics={}, intervals={}, error="no heads left")
    sample_report.fill(Store(study.storage), study, [*ROWS[:2], failed])
    running(monkeypatch, lambda *arguments, **options: None)
    result = call("run", fresh)
    assert result.exit_code == 1
    assert "no trial completed" in result.stderr
    assert "error: no heads left" in result.stdout


# ---- looking -----------------------------------------------------------------------------------------------------


def test_status_counts_trials_and_estimates_the_time_left(filled: Path) -> None:
    result = call("status", filled)
    assert result.exit_code == 0
    assert "4 of 8" in result.output
    assert "2 complete, 1 stopped, 1 failed, 1 running" in result.output
    assert "about 10 min" in result.output


def test_trials_has_a_line_for_each(filled: Path) -> None:
    result = call("trials", filled)
    lines = result.output.splitlines()[2:]
    assert [line.split()[:2] for line in lines] == [
        [f"{row.number}{'*' if row.number in (0, 1, 2, 5) else ''}", row.state] for row in ROWS
    ]
    assert "error: no heads left" in lines[3]


def test_show_prints_a_trial_whole(filled: Path) -> None:
    result = call("show", filled, "2")
    assert result.exit_code == 0
    for part in (
        "theseus(block_size=2, schedule=linear)",
        "87.4 ± 1.1",
        "latency.samples.ms",
        "9 values, median 1",
    ):
        assert part in result.output


def test_show_says_how_far_the_training_was_at_each_rung() -> None:
    rungs = [RungRow(7, 0, "", {"accuracy": 0.5}, kept=True), RungRow(7, 4, "", {"accuracy": 0.75}, kept=False)]
    lines = terminal.text(*terminal.trial_tables(TrialRow(7, "stopped", rungs=rungs), {})).splitlines()
    table = [line.split() for line in lines[lines.index("Rungs") + 2 :]]
    assert table == [["0", "11", "%", "50.0", "went", "on"], ["4", "80", "%", "75.0", "stopped"]]


def test_show_prints_the_traceback_of_a_failure(filled: Path) -> None:
    assert "Failure (error): no heads left\nTraceback\nno heads left\n" in call("show", filled, "3").output


def test_show_of_a_trial_that_is_not_there_exits_2(filled: Path) -> None:
    result = call("show", filled, "99")
    assert result.exit_code == 2
    assert "has no trial 99" in result.stderr


def test_report_prints_a_table_with_the_export_command(filled: Path) -> None:
    result = call("report", filled)
    assert result.exit_code == 0
    assert f"compress-search export {filled} 5 -o trial-5/" in result.output
    assert "1  error: no heads left  3" in result.output


def test_the_export_command_can_be_copied_with_the_overrides(filled: Path) -> None:
    output = call("report", filled, "--set", "constraints={accuracy_drop: '<= 0.03'}").output
    line = next(line for line in output.splitlines() if "compress-search export" in line)
    expected = ["export", str(filled), "--set", "constraints={accuracy_drop: '<= 0.03'}", "5", "-o", "trial-5/"]
    assert shlex.split(line)[1:] == expected


@pytest.mark.parametrize("command", [["run"], ["report"], ["report", "--format", "html"]], ids=" ".join)
def test_commands_to_be_copied_hold_no_password(
    command: list[str], filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(load_study(filled).storage)
    monkeypatch.setattr(cli, "_store", lambda study: store)
    running(monkeypatch, lambda *arguments, **options: None)
    url = "storage=postgresql://me:s3cret@host/db?sslpassword=s3cret"
    output = call(*command, filled, "--set", url).output
    assert "s3cret" not in output
    assert "storage=postgresql://me:***@host/db?sslpassword=***" in output


def test_report_as_json_holds_what_the_database_does(filled: Path) -> None:
    document = json.loads(call("report", filled, "--format", "json").stdout)
    assert document["front"] == [0, 1, 2, 5]
    assert document["recommended"] == 5
    assert document["trials"][2]["test"] == {"accuracy": 0.871}
    assert document["trials"][2]["marks"] == ["noisy"]
    assert document["trials"][3]["error"] == "error: no heads left"
    assert document["trials"][6]["state"] == "running"
    assert document["reference_point"] == pytest.approx({"accuracy": 0.51, "latency_ms": 26.4})
    assert document["hypervolume"] > 0


def test_report_as_csv_has_a_line_for_each_trial(filled: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(call("report", filled, "--format", "csv").stdout)))
    assert [row["state"] for row in rows] == [row.state for row in ROWS]


def test_report_as_html_goes_to_a_file_in_a_new_folder(filled: Path, tmp_path: Path) -> None:
    page = tmp_path / "new" / "report.html"
    result = call("report", filled, "--format", "html", "-o", page)
    assert (result.exit_code, result.stdout) == (0, "")
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_report_as_svg_is_a_picture_of_its_own(filled: Path) -> None:
    assert call("report", filled, "--format", "svg").stdout.lstrip().startswith("<svg")


def test_report_to_a_place_that_cannot_be_written_exits_2(filled: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = call("report", filled, "-o", tmp_path / "file" / "report.txt")
    assert result.exit_code == 2
    assert "cannot be written" in result.stderr


# ---- export ------------------------------------------------------------------------------------------------------


def exporting(monkeypatch: pytest.MonkeyPatch, action: Callable[..., Any]) -> None:
    module = ModuleType("compress_search.export")
    module.export_trial = action  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "compress_search.export", module)


def test_export_hands_study_number_and_folder_over(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    exporting(monkeypatch, lambda study, number, output, *, command: seen.append((study.name, number, output)))
    assert call("export", filled, "5", "-o", "out").exit_code == 0
    assert seen == [("tiny", 5, Path("out"))]


def test_the_command_in_a_card_exports_the_same_trial_from_the_same_folder(
    filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(filled.parent)
    seen: list[Any] = []
    exporting(monkeypatch, lambda study, number, output, **card: seen.append((study, number, output, card)))
    overrides = ["--set", "objectives=[accuracy, size_mb]", "--set", "data.max_length=16"]
    assert call("export", filled.name, *overrides, "5", "-o", "my models/out").exit_code == 0
    first = seen.pop()
    program, *words = shlex.split(first[3]["command"])
    assert program == "compress-search"
    assert words[1] == filled.name
    assert call(*words).exit_code == 0
    again = seen.pop()
    assert again[:2] == first[:2]
    assert again[2] != first[2], "where the first lies, a second is refused"


def test_a_card_does_not_repeat_a_password(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[str] = []
    exporting(monkeypatch, lambda *arguments, command: commands.append(command))
    url = "storage=postgresql+psycopg://someone:hunter2@host/studies"
    assert call("export", filled, "--set", url, "5", "-o", "out").exit_code == 0
    assert "hunter2" not in commands[0]


def test_an_export_that_does_not_reload_exits_1(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any, **options: Any) -> None:
        raise ExportError("scores 0.5 instead of 0.9")

    exporting(monkeypatch, fails)
    result = call("export", filled, "5", "-o", "out")
    assert (result.exit_code, result.stderr) == (1, "error: scores 0.5 instead of 0.9\n")


# ---- init, plan, plugins, doctor ---------------------------------------------------------------------------------


def test_init_writes_a_study_that_loads_and_is_not_overwritten(tmp_path: Path) -> None:
    tiny.tiny_data(tmp_path / "data")
    model = tiny.tiny_teacher(tmp_path / "teacher")
    study = tmp_path / "study.yaml"
    arguments = ["init", "--model", model, "--train", tmp_path / "data" / "train.jsonl", "-o", study]
    assert call(*arguments).exit_code == 0
    assert load_study(study).task == "text-classification"
    before = study.read_text()
    result = call(*arguments)
    assert result.exit_code == 2
    assert "not overwritten" in result.stderr
    assert study.read_text() == before


def test_plan_shows_the_space_and_creates_nothing(tmp_path: Path) -> None:
    study = tiny.tiny_study(tmp_path, methods=["theseus", "distill"])
    before = sorted(tmp_path.rglob("*"))
    result = call("plan", study)
    assert result.exit_code == 0, result.output
    assert "bert, 2 layers of width 32" in result.output
    assert "distill (recovery)" in result.output
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("kernels", "precision", "told"),
    [
        ({"bf16"}, "auto", "each, in bf16\n"),
        ({"bf16"}, "fp32", "each, in fp32\n"),
        (set(), "auto", "each, in fp32\n"),
        (set(), "bf16", "each, in bf16, for which no kernel is real here: slower than fp32\n"),
    ],
)
def test_plan_says_in_which_precision_trials_train_and_when_that_is_the_slower_one(
    kernels: set[str], precision: str, told: str, tmp_path: Path
) -> None:
    study = load_study(tiny.tiny_study(tmp_path, methods=["theseus"], training={"precision": precision}))
    prepared = driver.prepare(study, probe=lambda device: kernels)
    shown = terminal.text(*terminal.plan_tables(prepared.plan, Estimate(0.1, 20, 1.0, 2.0)))
    assert f"20 steps a trial, 100 ms {told}" in shown


def test_plugins_list_names_stage_and_origin() -> None:
    lines = call("plugins", "list").output.splitlines()
    (found,) = (line.split() for line in lines if line.startswith("quantization "))
    assert found == ["quantization", "precision", "compress-search", __version__, "available"]


def test_plugins_show_prints_the_space_for_bert_base_or_a_studys_teacher(tmp_path: Path) -> None:
    base = call("plugins", "show", "theseus")
    assert base.exit_code == 0
    assert "cut_after_11" in base.output
    own = call("plugins", "show", "theseus", "--study", tiny.tiny_study(tmp_path, methods=["theseus"]))
    assert own.exit_code == 0, own.output
    assert "cut_after_11" not in own.output


@pytest.mark.parametrize("command", ["show", "check"])
def test_an_unknown_method_exits_2(command: str) -> None:
    result = call("plugins", command, "nonsense")
    assert result.exit_code == 2
    assert "'nonsense': not installed; there are: " in result.stderr


def test_a_plugin_that_cannot_be_loaded_exits_2(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import nothing_of_the_kind\n")
    result = call("plugins", "check", tmp_path / "mine.py")
    assert result.exit_code == 2
    assert "cannot be imported: ModuleNotFoundError" in result.stderr


def test_a_new_method_is_written_with_its_test_and_not_overwritten(tmp_path: Path) -> None:
    assert call("plugins", "new", "my_method", "-o", tmp_path / "new").exit_code == 0
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == ["my_method.py", "test_my_method.py"]
    again = call("plugins", "new", "my_method", "-o", tmp_path / "new")
    assert again.exit_code == 2
    assert "not overwritten" in again.stderr


@pytest.mark.slow
def test_a_new_method_keeps_the_contract_as_it_is(tmp_path: Path) -> None:
    call("plugins", "new", "my_method", "-o", tmp_path)
    checked = call("plugins", "check", tmp_path / "my_method.py")
    assert checked.exit_code == 0, checked.output


def test_a_plugin_that_breaks_the_contract_exits_1_and_names_the_checks(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(
        "from compress_search import Method, Stage\n"
        "class Broken(Method):\n"
        "    stage = Stage.STRUCTURE\n"
        "    def search_space(self, teacher):\n"
        "        return {}\n"
        "    def apply(self, candidate, params, context):\n"
        "        raise ZeroDivisionError('always')\n"
    )
    result = call("plugins", "check", tmp_path / "broken.py")
    assert result.exit_code == 1
    assert "breaks the contract: " in result.stderr
    assert "ZeroDivisionError: always" in result.stdout


def test_a_method_needs_a_name_that_python_can_import(tmp_path: Path) -> None:
    result = call("plugins", "new", "no-name", "-o", tmp_path)
    assert result.exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_doctor_tells_versions_devices_kernels_memory_and_disk() -> None:
    result = call("doctor", "--quick")
    assert result.exit_code == 0
    for part in (
        "torch",
        "processor",
        "accelerators",
        "int8",
        "compile",
        "free memory",
        "free disk",
        "cache folder",
    ):
        assert part in result.output


def test_doctor_prints_json_and_fails_where_something_needed_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = doctor.Check("torch", "broken", "cannot be imported: OSError: libgomp")
    found = doctor.Findings({}, {}, (), (broken, doctor.Check("Hugging Face hub", "absent", "does not answer")))
    monkeypatch.setattr(doctor, "examine", lambda study, quick: found)
    result = call("doctor", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["ok"] is False
    assert result.stderr == "error: broken: torch\n"

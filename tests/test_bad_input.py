"""Bad input is one line on stderr that says where and what, the right exit code, and nothing is created.

Every case goes through the commands as a person types them; the folder, the caches and the working directory are
compared before and after, down to the bytes.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from compress_search import StudyError, cli, driver, hub
from compress_search.runtimes import probe
from compress_search.storage import Store
from compress_search.study import load_study
from tests import bad_values, sample_report, tiny
from tests.bad_studies import CASES, DEAF, Case

Files = dict[str, bytes]
ALL_CASES = {**CASES, **bad_values.CASES}

# ---- the world, and whether it changed ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a study that has nothing wrong with it."""
    folder = tmp_path_factory.mktemp("original")
    tiny.tiny_study(folder, methods=["theseus", "distill"])
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of it; below ``tmp_path`` are also the caches and the working directory."""
    shutil.copytree(original, tmp_path / "study")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("COMPRESS_SEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(probe, "_measure", lambda device: (probe.Kernel("int8", True, 0.5, "made up"),))
    monkeypatch.setattr(
        driver, "make_executor", lambda *arguments: pytest.fail("it was accepted, and began to run")
    )
    probe._found.cache_clear()
    hub.reachable.cache_clear()
    yield tmp_path / "study"
    probe._found.cache_clear()
    hub.reachable.cache_clear()


@pytest.fixture(scope="module")
def filled(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study file whose database holds the teacher, a complete trial and a failed one."""
    path = Path(shutil.copytree(original, tmp_path_factory.mktemp("filled") / "study")) / "study.yaml"
    study = load_study(path)
    failed = sample_report.entry(2, state="failed", metrics={}, intervals={}, error="no heads left")
    rows = [sample_report.teacher(), sample_report.entry(1, 0.87, 7.9), failed]
    sample_report.fill(Store(study.storage), study, rows)
    return path


def snapshot(folder: Path) -> Files:
    """Every file and folder below this one, with what is in it; what SQLite keeps while a reader is there aside."""
    found = (path for path in sorted(folder.rglob("*")) if not path.name.endswith(("-wal", "-shm")))
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in found}


def refused(root: Path, *arguments: object, code: int = 2) -> str:
    """The one line that a command says before it ends with this code, having changed nothing below ``root``."""
    before = snapshot(root)
    result = CliRunner().invoke(cli.main, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.exception, result.output)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert snapshot(root) == before
    return result.stderr.removeprefix("error: ").rstrip("\n")


def line_of(key: str, text: str) -> int:
    """The line of a dotted key in YAML of one key a line; of its nearest ancestor where it is not there."""
    lines, number, found = text.splitlines(), 0, 0
    for part in key.split("."):
        starts = [i for i in range(number, len(lines)) if lines[i].strip().startswith((f"{part}:", f"- {part}"))]
        items = [i for i in range(number, len(lines)) if lines[i].strip().startswith("- ")]
        hits = items[int(part) :] if part.isdecimal() else starts
        if not hits:
            break
        found, number = hits[0] + 1, hits[0] + 1
    return found


def with_keys(path: Path, keys: Mapping[str, Any]) -> str:
    """Set dotted keys of a study file, or delete those of None; the text that it holds then."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    for key, value in keys.items():
        *sections, last = key.split(".")
        section = content
        for name in sections:
            section = section.setdefault(name, {})
        section[last] = value
        if value is None:
            del section[last]
    text = yaml.safe_dump(content, sort_keys=False)
    path.write_text(text, encoding="utf-8")
    return text


# ---- a bad study ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deaf() -> Iterator[int]:
    """A port that is taken, and at which nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@pytest.mark.parametrize("command", [("run", "--executor", "local"), ("plan",)], ids=lambda command: command[0])
@pytest.mark.parametrize("case", ALL_CASES.values(), ids=ALL_CASES)
def test_a_bad_study_is_one_line_and_nothing_is_created(
    case: Case, command: tuple[str, ...], folder: Path, deaf: int
) -> None:
    case.prepare(folder)
    path = folder / "study.yaml"
    keys = {
        key: value.replace(DEAF, str(deaf)) if isinstance(value, str) else value for key, value in case.keys.items()
    }
    text = with_keys(path, keys)
    name, *options = command
    said = refused(folder.parent, name, path, *options)
    assert said.startswith(f"{path}:{line_of(case.key, text)}: {case.key}: ")
    assert case.words.replace(DEAF, str(deaf)) in said
    assert "s3cret" not in said


def test_the_study_itself_has_nothing_wrong_with_it(folder: Path) -> None:
    before = snapshot(folder.parent)
    result = CliRunner().invoke(cli.main, ["plan", str(folder / "study.yaml")])
    assert result.exit_code == 0, result.output
    assert snapshot(folder.parent) == before


@pytest.mark.parametrize(
    ("assignment", "key", "words"),
    [
        ("search.trails=3", "search.trails", 'unknown key (did you mean "trials"?)'),
        ("search.trials=many", "search.trials", 'expected an integer, got "many"'),
        ("search.trials.more=3", "search.trials.more", "nothing can be set there"),
        ("search.trials", "", "expected KEY=VALUE, for example search.trials=8"),
        ("methods=[nonsense]", "methods.0", "unknown method nonsense; there are: "),
        ("methods.1=nonsense", "methods.1", "unknown method nonsense; there are: "),
        ("search=[1", "", "not valid YAML"),
    ],
)
@pytest.mark.parametrize("command", ["run", "plan"])
def test_a_bad_override_is_named(assignment: str, key: str, words: str, command: str, folder: Path) -> None:
    said = refused(folder.parent, command, folder / "study.yaml", "--set", assignment)
    assert said.startswith(f"--set {assignment}: {key}")
    assert words in said


# ---- where trials run --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"cluster.cpus_per_trial": 3}, "cluster.cpus_per_trial: a trial asks for 3 cores, this machine has 2"),
        ({"search.concurrency": 3}, "search.concurrency: 3 trials at a time, of 1 each, ask for 3 cores, this"),
        (
            {"cluster.cpus_per_trial": 2, "search.concurrency": 2},
            "search.concurrency: 2 trials at a time, of 2 each",
        ),
    ],
)
def test_cores_that_are_not_here(
    keys: dict[str, int], words: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "usable_cores", lambda: 2)
    with_keys(folder / "study.yaml", keys)
    for command in (["run"], ["run", "--executor", "local"], ["plan"]):
        assert f": {words}" in refused(folder.parent, *command, folder / "study.yaml")


@pytest.mark.parametrize("address", ["local", "auto"])
def test_all_cores_may_be_asked_for_here_and_any_number_elsewhere(
    address: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "usable_cores", lambda: 2)
    with_keys(
        folder / "study.yaml",
        {"search.concurrency": 2 if address == "local" else 8, "cluster": {"address": address}},
    )
    assert CliRunner().invoke(cli.main, ["plan", str(folder / "study.yaml")]).exit_code == 0


@pytest.mark.parametrize("executor", ["local", "ray"])
def test_devices_that_are_not_here(executor: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    path = folder / "study.yaml"
    text = with_keys(path, {"cluster": {"gpus_per_trial": 8}})
    said = refused(folder.parent, "run", path, "--executor", executor)
    line = line_of("cluster.gpus_per_trial", text)
    assert said == f"{path}:{line}: cluster.gpus_per_trial: a trial asks for 8 GPUs, this machine has 2"


def test_an_address_at_which_no_cluster_answers(folder: Path, deaf: int) -> None:
    path = folder / "study.yaml"
    text = with_keys(path, {"cluster": {"address": f"127.0.0.1:{deaf}"}})
    started = time.monotonic()
    said = refused(folder.parent, "run", path)
    line = line_of("cluster.address", text)
    assert said.startswith(f"{path}:{line}: cluster.address: no Ray cluster at 127.0.0.1:{deaf}: ")
    assert time.monotonic() - started < 20  # Ray itself takes minutes


@pytest.mark.parametrize(
    ("fault", "key", "words"),
    [
        (
            ConnectionError("no instance\nfound"),
            "address",
            "cannot join a Ray cluster at 'auto': no instance found",
        ),
        (RuntimeError("Version mismatch: 3.11.7"), "address", "cannot join a Ray cluster at 'auto': Version mis"),
        (None, "gpus_per_trial", "a trial asks for 8 GPU of one node, the largest has 0"),
    ],
)
def test_a_cluster_that_is_not_there_or_another_or_too_small(
    fault: Exception | None, key: str, words: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    def init(**options: Any) -> None:
        if fault:
            raise fault

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 4.0}}])
    path = folder / "study.yaml"
    with_keys(path, {"cluster": {"address": "auto", "gpus_per_trial": 0 if fault else 8}})
    assert f"cluster.{key}: {words}" in refused(folder.parent, "run", path)


CPU_NODE, GPU_NODE = {"CPU": 8.0, "memory": 1e9}, {"CPU": 2.0, "GPU": 1.0}


@pytest.mark.parametrize(
    ("cpus", "gpus", "fault"),
    [
        (8, 0, None),
        (2, 1, None),
        (2, 0.5, None),
        (16, 0, "cpus_per_trial: a trial asks for 16 CPU of one node, the largest has 8"),
        (1, 2, "gpus_per_trial: a trial asks for 2 GPU of one node, the largest has 1"),
        (4, 1, "gpus_per_trial: a trial asks for 4 CPU and 1 GPU, and no node of the cluster has both"),
    ],
)
def test_one_node_has_all_that_a_trial_takes(folder: Path, cpus: float, gpus: float, fault: str | None) -> None:
    from compress_search.ray_executor import check_nodes

    path = folder / "study.yaml"
    with_keys(path, {"cluster": {"cpus_per_trial": cpus, "gpus_per_trial": gpus}})
    study, nodes = load_study(path), [CPU_NODE, CPU_NODE, GPU_NODE, GPU_NODE]
    if fault is None:
        check_nodes(study, nodes)
        return
    with pytest.raises(StudyError, match=re.escape(f"cluster.{fault}") + "$"):
        check_nodes(study, nodes)


# ---- an interrupt before anything runs ---------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", ["load_study", "prepare"])
def test_an_interrupt_before_anything_is_made_ends_with_130(
    where: str, number: signal.Signals, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = cli if where == "load_study" else driver
    monkeypatch.setattr(module, where, lambda *arguments: os.kill(os.getpid(), number))
    before = snapshot(folder.parent)
    result = CliRunner().invoke(cli.main, ["run", str(folder / "study.yaml")])
    assert (result.exit_code, result.stderr) == (130, "interrupted: the same command resumes\n")
    assert snapshot(folder.parent) == before
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_an_interrupt_while_ray_starts_ends_with_130(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*arguments: Any) -> None:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))  # as Ray does
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(driver, "make_executor", start)
    result = CliRunner().invoke(cli.main, ["run", str(folder / "study.yaml")])
    assert result.exit_code == 130, result.output
    assert "interrupted: the same command resumes" in result.stderr


# ---- looking at what is not there --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [["status"], ["trials"], ["report"], ["report", "--format", "json"], ["show", "0"]], ids=" ".join
)
def test_a_study_that_never_ran_is_said_so(arguments: list[str], folder: Path) -> None:
    command, *rest = arguments
    said = refused(folder.parent, command, folder / "study.yaml", *rest, code=1)
    assert said.endswith("study/run/study.db: it has not been run yet")


@pytest.mark.parametrize("arguments", [["status"], ["trials"], ["report"], ["show", "0"]], ids=" ".join)
def test_a_server_that_does_not_answer_is_named_with_its_place(
    arguments: list[str], folder: Path, deaf: int
) -> None:
    path = folder / "study.yaml"
    text = with_keys(path, {"storage": f"postgresql://me:s3cret@127.0.0.1:{deaf}/studies"})
    command, *rest = arguments
    said = refused(folder.parent, command, path, *rest)
    assert said.startswith(f"{path}:{line_of('storage', text)}: storage: postgresql+psycopg://me:***@127.0.0.1:")


def test_nothing_is_exported_of_a_study_that_never_ran(folder: Path, tmp_path: Path) -> None:
    said = refused(tmp_path, "export", folder / "study.yaml", "0", "-o", tmp_path / "model", code=1)
    assert "has not been run yet" in said


@pytest.mark.parametrize("number", ["7", "99"])
def test_a_trial_that_is_not_there(number: str, filled: Path) -> None:
    assert f"no trial {number}" in refused(filled.parent, "show", filled, number)
    assert f"no trial {number}" in refused(filled.parent, "export", filled, number, "-o", filled.parent / "model")


def test_only_a_complete_trial_is_exported(filled: Path) -> None:
    said = refused(filled.parent, "export", filled, "2", "-o", filled.parent / "model")
    assert said == "trial 2 is failed: only a complete trial has a model"


def test_nothing_is_exported_over_something_else(filled: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("keep")
    for place, words in {
        "taken": "exists already: expected a new or an empty directory",
        "taken/mine.txt": "not a directory",
        "taken/mine.txt/model": "mine.txt is not a directory",
    }.items():
        said = refused(tmp_path, "export", filled, "1", "-o", tmp_path / place)
        assert said.startswith(f"{tmp_path / place}: ")
        assert words in said


# ---- first files and plugins -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"--train": "none.jsonl"}, "--train: no such file: none.jsonl"),
        ({"--test": "none.jsonl"}, "--test: no such file: none.jsonl"),
        ({"--model": "./none"}, "--model: no such directory: ./none"),
        ({"--task": "translation"}, "--task: unknown task translation; expected one of text-classification"),
        ({"-o": "{folder}/study.yaml"}, "{folder}/study.yaml: exists already and is not overwritten"),
        ({"-o": "{folder}/study.yaml/new.yaml"}, "{folder}/study.yaml/new.yaml: cannot be written: "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_no_study_is_begun_from_bad_options(change: dict[str, str], said: str, folder: Path) -> None:
    options = {"--model": f"{folder}/teacher", "--train": f"{folder}/data/train.jsonl", "-o": "new.yaml"}
    options |= {name: value.format(folder=folder) for name, value in change.items()}
    words = [word for option in options.items() for word in option]
    assert refused(folder.parent, "init", *words).startswith(said.format(folder=folder))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["check", "nowhere.py"], "nowhere.py"),
        (["check", "nonsense"], "method 'nonsense': not installed; there are: "),
        (["check", "{folder}/mine.py"], "method 'mine' (from mine.py): cannot be imported: ZeroDivisionError"),
        (["show", "nonsense"], "method 'nonsense': not installed; there are: "),
        (["show", "theseus", "--study", "nowhere.yaml"], "nowhere.yaml: cannot be read: "),
        (["new", "theseus"], "method 'theseus': a method of this name is installed"),
        (["new", "no-name"], "method 'no-name': expected a name that Python can import"),
        (["new", "mine", "-o", "{folder}"], "mine.py: exists already and is not overwritten"),
        (["new", "ours", "-o", "{folder}/study.yaml"], "study.yaml/ours.py: cannot be written: "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_plugin_that_cannot_be_had(arguments: list[str], words: str, folder: Path) -> None:
    (folder / "mine.py").write_text("1 / 0\n")
    assert words in refused(folder.parent, "plugins", *(word.format(folder=folder) for word in arguments))


# ---- as a shell sees it ------------------------------------------------------------------------------------------


def as_a_shell(folder: Path, *arguments: str, **environment: str) -> str:
    """What a command prints on stderr, libraries and warnings included."""
    caches = {"COMPRESS_SEARCH_CACHE": str(folder / "cache"), "HF_HOME": str(folder / "hf")}
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    before = snapshot(folder)
    done = subprocess.run(
        [sys.executable, "-m", "compress_search", *arguments],
        cwd=folder,
        env={**kept, **caches, **environment},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert snapshot(folder) == before
    return done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("key", ["teacher.model", "data.train"])
def test_a_hub_that_does_not_answer_is_said_in_one_line(key: str, folder: Path, deaf: int) -> None:
    with_keys(folder / "study.yaml", {key: "nobody/nothing"})
    said = as_a_shell(folder, "run", "study.yaml", HF_ENDPOINT=f"http://127.0.0.1:{deaf}")
    assert said.count("\n") == 1, (
        "the libraries print a line for each time they try again, for half a minute: " + said
    )
    assert f": {key}: " in said


@pytest.mark.slow
def test_libraries_add_nothing_to_the_line(folder: Path) -> None:
    with_keys(folder / "study.yaml", {"methods": {"nonsense": {}}})
    said = as_a_shell(folder, "run", "study.yaml", HF_HUB_OFFLINE="1")
    assert said.startswith("error: study.yaml:")
    assert said.count("\n") == 1, said

"""The command line: reads arguments, calls the engine, prints what tables.py draws, exits with a documented code.

Thin: everything a command does is open to any caller of the package. Heavy imports stand inside the commands, so
that ``--help`` answers at once.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from compress_search import __version__
from compress_search.errors import CompressSearchError, StudyError

if TYPE_CHECKING:
    from compress_search.candidate import Subject
    from compress_search.report import Report
    from compress_search.storage import Store
    from compress_search.study import Study

INTERRUPTED = 130

FilePath = click.Path(path_type=Path)


class Commands(click.Group):
    """Turns this package's errors into one line and their exit code; anything else keeps its traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order in which a study meets them, rather than by name."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the chosen command."""
        try:
            return super().invoke(ctx)
        except CompressSearchError as error:
            click.echo(f"error: {' '.join(str(error).split())}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("interrupted: the same command resumes", err=True)
            ctx.exit(INTERRUPTED)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="compress-search")
def main() -> None:
    """Search for compressed transformers on the accuracy/latency Pareto front.

    Exit codes: 0 done, 1 failed, 2 bad input or usage, 3 another driver is running this study, 4 nothing meets
    the constraints, 130 interrupted and resumable.
    """


def study_command(function: Callable[..., None]) -> Callable[..., None]:
    """The argument STUDY and the option --set, as every command on a study takes them."""
    function = click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="KEY=VALUE",
        help="Override a key of the study file; repeatable.",
    )(function)
    return click.argument("path", metavar="STUDY", type=FilePath)(function)


@main.command()
@click.option("--model", required=True, help="The teacher: a directory or hub id.")
@click.option("--train", required=True, help="Training data: jsonl, csv, tsv, parquet or a hub data set.")
@click.option("--validation", help="Validation data; a part of the training data is held out without it.")
@click.option("--test", help="Test data, scored once for the front.")
@click.option("--task", help="Guessed from the training data by default.")
@click.option("-o", "--output", type=FilePath, default=Path("study.yaml"), show_default=True, help="File to write.")
def init(model: str, train: str, validation: str | None, test: str | None, task: str | None, output: Path) -> None:
    """Write a commented study file that runs as it is.

    \b
    Example:
      compress-search init --model ./teacher --train train.jsonl -o study.yaml
    """
    from compress_search.scaffold import study_text

    text = study_text(model=model, train=train, validation=validation, test=test, task=task, path=output)
    _write_new({output: text})
    click.echo(f"Now run: compress-search run {output}")


@main.command()
@study_command
@click.option(
    "--executor", type=click.Choice(["ray", "local"]), default="ray", show_default=True, help="What runs it."
)
def run(path: Path, overrides: tuple[str, ...], executor: Literal["ray", "local"]) -> None:
    """Start a study, or resume it.

    A finished study prints its front again.

    \b
    Example:
      compress-search run study.yaml --set search.trials=8
    """
    from compress_search import driver, progress
    from compress_search.report import terminal, wording

    study = load_study(path, overrides)
    with progress.display() as on_event:
        driver.run(study, executor=executor, on_event=on_event)
    found = _report(study)
    terminal.show(*terminal.report_tables(found, _named(path, overrides)))
    wording.require_result(found)


@main.command()
@study_command
def plan(path: Path, overrides: tuple[str, ...]) -> None:
    """Show the search space and the time it will take.

    Everything in the study file is checked, and nothing is created.

    \b
    Example:
      compress-search plan study.yaml
    """
    from compress_search import driver
    from compress_search.report import terminal

    study = load_study(path, overrides)
    prepared = driver.prepare(study, driver.stored_subject(study, _store(study)))
    terminal.show(*terminal.plan_tables(prepared.plan, prepared.estimate()))


@main.command()
@study_command
def status(path: Path, overrides: tuple[str, ...]) -> None:
    """Show how far a study is.

    Trials by state, the front so far, time spent and left.

    \b
    Example:
      compress-search status study.yaml
    """
    from compress_search.report import read_facts, terminal

    study = load_study(path, overrides)
    facts = read_facts(_store(study), study.name)
    terminal.show(*terminal.status_tables(_report(study), facts.seconds, study.search))


@main.command()
@study_command
def trials(path: Path, overrides: tuple[str, ...]) -> None:
    """List every trial on one line.

    \b
    Example:
      compress-search trials study.yaml
    """
    from compress_search.report import terminal

    terminal.show(terminal.trials_table(_report(load_study(path, overrides))))


@main.command()
@study_command
@click.argument("number", metavar="N", type=click.IntRange(min=0))
def show(path: Path, overrides: tuple[str, ...], number: int) -> None:
    """Show one trial whole.

    Its recipe, metrics, rungs, measurements and attempts, and a failure with its traceback.

    \b
    Example:
      compress-search show study.yaml 37
    """
    from compress_search.report import terminal

    study = load_study(path, overrides)
    store = _store(study)
    row = next((row for row in store.trials(study.name) if row.number == number), None)
    if row is None:
        raise StudyError(f"study {study.name!r} has no trial {number}", file=path)
    terminal.show(*terminal.trial_tables(row, store.measurements(study.name, number).get(number, {})))


@main.command()
@study_command
@click.option(
    "--format",
    "kind",
    type=click.Choice(["table", "json", "csv", "html", "svg"]),
    default="table",
    show_default=True,
    help="A table for people, JSON or CSV for programs, one self-contained page, or the front as a picture.",
)
@click.option("-o", "--output", type=FilePath, help="Write to this file instead of the terminal.")
def report(path: Path, overrides: tuple[str, ...], kind: str, output: Path | None) -> None:
    """Report the front, the recommendation and the failures.

    \b
    Examples:
      compress-search report study.yaml
      compress-search report study.yaml --format html -o report.html
    """
    from compress_search.report import page, read_facts, terminal, to_csv

    study = load_study(path, overrides)
    found = _report(study)
    if kind == "table" and output is None:
        terminal.show(*terminal.report_tables(found, _named(path, overrides)))
        return
    if kind == "html":
        text = page.render_html(found, read_facts(_store(study), study.name), _named(path, overrides))
    elif kind == "svg":
        text = page.front_picture(found)
    elif kind == "table":
        text = terminal.text(*terminal.report_tables(found, _named(path, overrides)))
    else:
        text = to_csv(found) if kind == "csv" else found.to_json() + "\n"
    if output is None:
        click.echo(text, nl=False)
    else:
        _write(output, text)


@main.command()
@study_command
@click.argument("number", metavar="N", type=click.IntRange(min=0))
@click.option("-o", "--output", type=FilePath, required=True, metavar="DIR", help="A directory to be made.")
def export(path: Path, overrides: tuple[str, ...], number: int, output: Path) -> None:
    """Write trial N as a deployable directory.

    It holds Hugging Face and ONNX files, a model card and the command that rebuilds it. What was written is
    loaded and scored again before the command says done.

    \b
    Example:
      compress-search export study.yaml 37 -o model/
    """
    from compress_search.export import export_trial

    export_trial(load_study(path, overrides), number, output)
    click.echo(f"trial {number} is in {output}")


@main.group(cls=Commands)
def plugins() -> None:
    """List, show, check and start methods."""


@plugins.command("list")
def plugins_list() -> None:
    """List every method and where it comes from.

    \b
    Example:
      compress-search plugins list
    """
    from compress_search.registry import Registry
    from compress_search.report import terminal

    terminal.show(terminal.plugins_table(Registry()))


@plugins.command("show")
@click.argument("name")
@click.option(
    "--study", "path", type=FilePath, help="Show the space for this study's teacher; BERT-base otherwise."
)
def plugins_show(name: str, path: Path | None) -> None:
    """Show a method's search space.

    \b
    Example:
      compress-search plugins show structured_pruning
    """
    from compress_search.registry import Registry
    from compress_search.report import terminal

    if path is None:
        registry, teacher = Registry(), bert_base()
    else:
        from compress_search import driver

        prepared = driver.prepare(load_study(path))
        registry, teacher = prepared.plan.registry, prepared.plan.teacher
    method = registry[name]
    terminal.show(terminal.space_table(name, method, method.search_space(teacher)))


@plugins.command("check")
@click.argument("name")
def plugins_check(name: str) -> None:
    """Run the plugin contract on a method or a file.

    \b
    Examples:
      compress-search plugins check structured_pruning
      compress-search plugins check ./my_method.py
    """
    from compress_search.registry import PluginFile, Registry
    from compress_search.report import terminal
    from compress_search.testing import check_method

    file = PluginFile.read(Path(name)) if name.endswith(".py") else None
    registry = Registry((file,) if file else ())
    results = check_method(registry[file.name if file else name])
    terminal.show(terminal.contract_table(name, results))
    if broken := [result.name for result in results if not result.ok]:
        raise CompressSearchError(f"{name} breaks the contract: {', '.join(broken)}")


@plugins.command("new")
@click.argument("name")
@click.option(
    "-o", "--output", type=FilePath, default=Path(), show_default="here", metavar="DIR", help="Where the files go."
)
def plugins_new(name: str, output: Path) -> None:
    """Write a method of one's own and its contract test.

    \b
    Example:
      compress-search plugins new my_method -o plugins/
    """
    from compress_search.scaffold import method_test_text, method_text

    files = {output / f"{name}.py": method_text(name), output / f"test_{name}.py": method_test_text(name)}
    _write_new(files)
    click.echo(f"Wrote {', '.join(map(str, files))}. Now run: compress-search plugins check {output / name}.py")


@main.command()
def doctor() -> None:
    """Show versions, devices, real kernels, free memory and disk.

    A kernel is real where a short timing finds it no slower than what it stands in for.

    \b
    Example:
      compress-search doctor
    """
    from compress_search.report import terminal

    terminal.show(*terminal.doctor_tables())


def load_study(path: Path, overrides: tuple[str, ...] = ()) -> Study:
    """The study of a file, imported late."""
    from compress_search import study

    return study.load_study(path, overrides)


def bert_base() -> Subject:
    """The teacher that spaces are shown for where no study names one."""
    from compress_search.candidate import Subject

    return Subject(
        family="bert",
        task="text-classification",
        layers=12,
        heads=12,
        head_dim=64,
        hidden=768,
        intermediate=3072,
        vocabulary=30522,
        positions=512,
        token_types=2,
        labels=2,
    )


def _named(path: Path, overrides: tuple[str, ...]) -> str:
    """The study as a shell names it, for commands to be copied."""
    return shlex.join([str(path), *(word for override in overrides for word in ("--set", override))])


def _store(study: Study) -> Store:
    from compress_search.storage import Store

    return Store(study.storage)


def _report(study: Study) -> Report:
    from compress_search.report import read_report

    return read_report(_store(study), study.name)


def _write_new(files: Mapping[Path, str]) -> None:
    """Write files that must not exist yet: all of them or none."""
    for file in files:
        if file.exists():
            raise StudyError("exists already and is not overwritten", file=file)
    for file, text in files.items():
        _write(file, text)


def _write(file: Path, text: str) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StudyError(f"cannot be written: {error.strerror}", file=file) from error

"""The command line: reads arguments, calls the engine, prints what the reports draw, exits with a documented code.

Thin: everything a command does is open to any caller of the package. Heavy imports stand inside the commands, so
that ``--help`` answers at once.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from compress_search import __version__
from compress_search.cli.common import Commands, FilePath, load_study, study_command, write, write_new
from compress_search.cli.doctor import doctor
from compress_search.cli.plugins import plugins
from compress_search.errors import StudyError
from compress_search.interrupts import interrupts

if TYPE_CHECKING:
    from compress_search.report import Report
    from compress_search.storage import Store
    from compress_search.study import Study


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="compress-search")
def main() -> None:
    """Search for compressed transformers on the accuracy/latency Pareto front.

    Exit codes: 0 done, 1 failed, 2 bad input or usage, 3 another driver is running this study, 4 nothing meets
    the constraints, 130 interrupted and resumable.
    """


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
    write_new({output: text})
    click.echo(f"Now run: compress-search run {output}")


@main.command()
@study_command
@click.option(
    "--executor", type=click.Choice(["ray", "local"]), default="ray", show_default=True, help="What runs it."
)
@interrupts()
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

    prepared = driver.preview(load_study(path, overrides))
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
    from compress_search.report import terminal
    from compress_search.report.reading import read_facts

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
    from compress_search.report import page, terminal, to_csv
    from compress_search.report.reading import read_facts

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
        write(output, text)


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

    again = shlex.quote(f"{output}-again")  # where this one lies, another is refused
    command = f"compress-search export {_named(path, overrides)} {number} -o {again}"
    export_trial(load_study(path, overrides), number, output, command=command)
    click.echo(f"trial {number} is in {output}")


def _named(path: Path, overrides: tuple[str, ...]) -> str:
    """The study as a shell names it, for commands to be copied, in which a password has to be filled in again."""
    from compress_search.study import hide_passwords

    return shlex.join([str(path), *(word for each in overrides for word in ("--set", hide_passwords(each)))])


def _store(study: Study) -> Store:
    from compress_search.storage.opening import open_store

    return open_store(study)


def _report(study: Study) -> Report:
    from compress_search.report.reading import read_report

    return read_report(_store(study), study.name)


main.add_command(plugins)
main.add_command(doctor)

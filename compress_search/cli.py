"""The command line: reads arguments, calls the engine, prints what tables.py draws, exits with a documented code.

Thin: everything a command does is open to any caller of the package. Heavy imports stand inside the commands, so
that ``--help`` answers at once.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compress_search import __version__
from compress_search.errors import CompressSearchError, ExportError, NothingFeasible, StudyError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from compress_search.registry import Registry
    from compress_search.report import Report
    from compress_search.storage import Store
    from compress_search.study import Study

INTERRUPTED = 130

ExistingFile = click.Path(exists=True, dir_okay=False, path_type=Path)
NewPath = click.Path(path_type=Path)


class Commands(click.Group):
    """Turns this package's errors into one line and their exit code; anything else keeps its traceback."""

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
        "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the study file; repeatable."
    )(function)
    return click.argument("path", metavar="STUDY", type=ExistingFile)(function)


@main.command()
@click.option("--model", required=True, help="The teacher: a directory or hub id.")
@click.option("--train", required=True, help="Training data: jsonl, csv, tsv, parquet or a hub data set.")
@click.option("--validation", help="Validation data; a part of the training data is held out without it.")
@click.option("--test", help="Test data, scored once for the front.")
@click.option("-o", "--output", type=NewPath, default=Path("study.yaml"), show_default=True, help="File to write.")
def init(model: str, train: str, validation: str | None, test: str | None, output: Path) -> None:
    """Write a commented study file that runs as it is.

    \b
    Example:
      compress-search init --model ./teacher --train train.jsonl -o study.yaml
    """
    from compress_search.scaffold import study_text

    _write_new({output: study_text(model=model, train=train, validation=validation, test=test, path=output)})
    click.echo(f"Now run: compress-search run {output}")


@main.command()
@study_command
@click.option("--executor", type=click.Choice(["ray", "local"]), default="ray", show_default=True)
def run(path: Path, overrides: tuple[str, ...], executor: str) -> None:
    """Start a study, or resume it; a finished one prints its front again.

    \b
    Example:
      compress-search run study.yaml --set search.trials=8
    """
    from compress_search import driver, progress

    study = _load(path, overrides)
    with progress.display() as on_event:
        driver.run(study, executor=executor, on_event=on_event)
    found = _report(study)
    _print(_tables().report_table(found, path))
    _require_result(found)


@main.command()
@study_command
def plan(path: Path, overrides: tuple[str, ...]) -> None:
    """Show the resolved search space, its size and the time it will take; creates nothing.

    \b
    Example:
      compress-search plan study.yaml
    """
    from compress_search import driver

    _print(_tables().plan_table(driver.prepare(_load(path, overrides))))


@main.command()
@study_command
def status(path: Path, overrides: tuple[str, ...]) -> None:
    """Show how far a study is: trials by state, the front so far, the time left.

    \b
    Example:
      compress-search status study.yaml
    """
    study = _load(path, overrides)
    _print(_tables().status_table(_report(study), study))


@main.command()
@study_command
def trials(path: Path, overrides: tuple[str, ...]) -> None:
    """List every trial on one line.

    \b
    Example:
      compress-search trials study.yaml
    """
    _print(_tables().trials_table(_report(_load(path, overrides))))


@main.command()
@study_command
@click.argument("number", type=click.IntRange(min=0))
def show(path: Path, overrides: tuple[str, ...], number: int) -> None:
    """Show one trial whole: recipe, rungs, measurements, attempts, failure with its traceback.

    \b
    Example:
      compress-search show study.yaml 37
    """
    study = _load(path, overrides)
    with _open(study) as store:
        _print(_tables().trial_table(store.trial(study.name, number)))


@main.command()
@study_command
@click.option("--format", "kind", type=click.Choice(["table", "json", "csv", "html"]), default="table")
@click.option("-o", "--output", type=NewPath, help="Write to this file instead of the terminal.")
def report(path: Path, overrides: tuple[str, ...], kind: str, output: Path | None) -> None:
    """Report the front, the recommendation for the constraints, and the failures.

    \b
    Examples:
      compress-search report study.yaml
      compress-search report study.yaml --format html -o report.html
    """

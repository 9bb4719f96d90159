"""What all commands share: errors as one line with an exit code, a study's arguments, files that must be new."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compress_search.errors import CompressSearchError, StudyError

if TYPE_CHECKING:
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


def load_study(path: Path, overrides: tuple[str, ...] = ()) -> Study:
    """The study of a file, imported late."""
    from compress_search import study

    return study.load_study(path, overrides)


def write_new(files: Mapping[Path, str]) -> None:
    """Write files that must not exist yet: all of them or none."""
    for file in files:
        if os.path.lexists(file):
            raise StudyError("exists already and is not overwritten", file=file)
    for file, text in files.items():
        write(file, text)


def write(file: Path, text: str) -> None:
    """Write a file and the folders it is in."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StudyError(f"cannot be written: {error.strerror}", file=file) from error

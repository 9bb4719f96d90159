"""docs/cli.md, written from the commands themselves so that it cannot drift.

``python -m compress_search.cli_reference`` prints it. Knows nothing of what the commands do.
"""

from __future__ import annotations

from collections.abc import Iterator

import click

from compress_search.cli import main

PREAMBLE = """# Command line

Printed by `python -m compress_search.cli_reference`; a test keeps it equal to `--help`.

| exit code | means |
|---|---|
| 0 | done |
| 1 | failed: nothing completed, the database was lost, a method broke its contract |
| 2 | bad input or usage: nothing was created; a full disk or damaged files: nothing of the study was lost |
| 3 | another driver is running this study |
| 4 | nothing meets the constraints |
| 130 | interrupted (INT, TERM); the same command resumes |
"""


def reference() -> str:
    """The page: every command with its help."""
    sections = [f"## {name}\n\n```\n{text}\n```\n" for name, text in helps(main, "compress-search")]
    return "\n".join([PREAMBLE, *sections])


def helps(command: click.Command, name: str, parent: click.Context | None = None) -> Iterator[tuple[str, str]]:
    """(full name, help text) of a command and all below it, depth first."""
    context = click.Context(
        command, parent=parent, info_name=name.split()[-1], terminal_width=80, **command.context_settings
    )
    yield name, command.get_help(context)
    if isinstance(command, click.Group):
        for child in command.list_commands(context):
            yield from helps(command.commands[child], f"{name} {child}", context)


if __name__ == "__main__":
    click.echo(reference(), nl=False)

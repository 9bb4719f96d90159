"""The commands on methods: list, show, check and start them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from compress_search.cli.common import Commands, FilePath, load_study, write_new
from compress_search.errors import CompressSearchError

if TYPE_CHECKING:
    from compress_search.candidate import Subject


@click.group(cls=Commands)
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
    from compress_search.narrowing import space_of
    from compress_search.registry import Registry
    from compress_search.report import terminal

    if path is None:
        registry, teacher = Registry(), bert_base()
    else:
        from compress_search import driver

        prepared = driver.prepare(load_study(path))
        registry, teacher = prepared.plan.registry, prepared.plan.teacher
    method = registry[name]
    terminal.show(terminal.space_table(name, method, space_of(name, method, teacher)))


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
    write_new(files)
    click.echo(f"Wrote {', '.join(map(str, files))}. Now run: compress-search plugins check {output / name}.py")


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

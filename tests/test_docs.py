"""The documentation says what the code does: commands, report keys, the tests of systems."""

from __future__ import annotations

import configparser
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from compress_search import cli_reference
from compress_search.cli import main
from compress_search.report import Entry, Report, to_csv
from tests.sample_report import sample

ROOT = Path(__file__).resolve().parents[1]


def commands(group: click.Group, name: str = "compress-search") -> Iterator[tuple[str, click.Command]]:
    for child, command in group.commands.items():
        yield f"{name} {child}", command
        if isinstance(command, click.Group):
            yield from commands(command, f"{name} {child}")


COMMANDS = dict(commands(main))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_an_example_and_every_option_too(name: str) -> None:
    command = COMMANDS[name]
    assert command.help
    if not isinstance(command, click.Group):
        assert f"\n      {name}" in command.help
        assert all(option.help for option in command.params if isinstance(option, click.Option))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_in_the_documentation(name: str) -> None:
    assert f"## {name}\n" in (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")


def test_the_command_lines_page_is_what_the_commands_print() -> None:
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert page == cli_reference.reference(), "run: python -m compress_search.cli_reference > docs/cli.md"


def documented(header: str) -> list[str]:
    """Keys in the first column of the table after a line of docs/report.md."""
    text = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    table = text.partition(header)[2].lstrip("\n").partition("\n\n")[0]
    return re.findall(r"^\| `(\w+)`", table, flags=re.MULTILINE)


def test_the_readme_names_every_method_and_their_number() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.partition("## Methods\n")[2].partition("\n## ")[0].partition("\n\nA search")[0]
    named = set(re.findall(r"`([a-z_]+)`", table))
    shipped = [name for name, entry in setup_methods().items() if entry.startswith("compress_search_plugins.")]
    assert named >= set(shipped)
    numbers = {18: "eighteen", 19: "nineteen", 20: "twenty"}
    assert f"the [{numbers[len(shipped)]}](#methods) that come with it" in text


def setup_methods() -> dict[str, str]:
    """The entry points that setup.cfg gives this distribution."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = setup["options.entry_points"]["compress_search.methods"].strip().splitlines()
    return {name.strip(): entry.strip() for name, _, entry in (line.partition("=") for line in lines)}


def test_the_report_page_documents_exactly_the_keys_there_are() -> None:
    assert set(documented("unless it says test.")) == set(Report.model_fields)
    assert set(documented("Each of `trials`:")) == set(Entry.model_fields)


def test_the_report_page_names_the_columns_of_the_csv() -> None:
    fixed = to_csv(sample()).splitlines()[0].split(",")[:9]
    text = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    positions = [text.index(f"`{column}`", text.index("--format csv")) for column in fixed]
    assert positions == sorted(positions)


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "systems").glob("*.md")), ids=lambda page: page.stem)
def test_the_tests_that_a_page_of_systems_names_are_there(page: Path) -> None:
    file, named = None, 0
    names = r"`(?:tests/([\w/]+\.py))?(?:::([\w:]+)(?:\[\w+\])?)?`"
    for name, test in re.findall(names, page.read_text(encoding="utf-8")):
        if name:
            file = ROOT / "tests" / name
            assert file.is_file(), f"{page.name} names {name}"
        if test:
            assert file
            for part in test.split("::"):
                assert re.search(rf"(def|class) {part}\b", file.read_text(encoding="utf-8")), f"{name}::{test}"
            named += 1
    assert named

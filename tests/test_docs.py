"""The documentation says what the code does: commands, report keys, the tests of systems."""

from __future__ import annotations

import configparser
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml
from compress_search_plugins.distillation.matches import KINDS, Match, Projection
from compress_search_plugins.layer_match import LayerMatch

from compress_search import cli_reference
from compress_search.cli import main
from compress_search.cli.plugins import bert_base
from compress_search.losses import feature_loss
from compress_search.losses.registry import ALIASES, FEATURE_LOSSES, PARAMETRIC
from compress_search.report import Entry, Report, to_csv
from compress_search.space import defaults, narrow
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


MATCHES = (ROOT / "docs" / "matches.md").read_text(encoding="utf-8")


def first_column(page: str, table: str) -> set[str]:
    """The names in the first column of the table that a comment of the page announces."""
    rows = page.partition(f"<!-- {table}:")[2].partition("|---")[2].partition("\n\n")[0].splitlines()[1:]
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])}


def test_the_page_of_matches_names_every_key_feature_and_loss() -> None:
    assert first_column(MATCHES, "keys") == set(Match.model_fields)
    told = {"attention": "also written `attention`"}  # in its row
    assert all(words in MATCHES for words in told.values())
    assert first_column(MATCHES, "features") == set(KINDS) - set(told)
    losses = {name.partition(":")[0] for name in first_column(MATCHES, "losses")}
    assert losses == {*FEATURE_LOSSES, *PARAMETRIC, *ALIASES}
    assert all(f"`{name}`" in MATCHES for name in Projection.model_fields)


def test_the_page_of_matches_says_what_losses_compare_and_what_may_differ() -> None:
    rows = MATCHES.partition("<!-- losses:")[2].partition("\n\n## ")[0].splitlines()
    for row in (row for row in rows if row.startswith("| `")):
        names, _, _, differ = (cell.strip() for cell in row.strip("|").split("|"))
        for name in re.findall(r"`([^`]+)`", names):
            loss = feature_loss(re.sub("<.*>", "12", name))
            assert ("heads" in differ, "width" in differ) == (loss.any_heads, loss.any_width), name
            assert ("two layers" in row) == loss.pair, name


@pytest.mark.parametrize("text", re.findall(r"```yaml\n(.*?)```", MATCHES, flags=re.DOTALL))
def test_the_lists_of_the_page_of_matches_can_be_trained_on(text: str) -> None:
    """By students of BERT-base that the page says they are for."""
    written = yaml.safe_load(text)
    narrowing = {} if isinstance(written, list) else written["methods"]["layer_match"]
    method, teacher = LayerMatch(), bert_base().having("masked-lm", "unlabelled")
    numbers = [match.get("student_layer", match.get("layer_S")) for match in written if isinstance(match, dict)]
    layers = max((n for n in numbers if isinstance(n, int)), default=0) or 3
    wishes = narrowing or {"matches": text, "layers": layers, "width": 0.5 if "384" in text else 1.0}
    wishes |= {"general": "masked_text"} if "general" in text else {}
    space = method.search_space(teacher)
    params = defaults({name: narrow(dim, wishes[name]) if name in wishes else dim for name, dim in space.items()})
    assert wishes.keys() <= space.keys()
    assert not method.faults(teacher, method.effective(teacher, params))


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

"""What the README and the guides say is true: their code runs, their commands exist, their links lead somewhere."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
import yaml

from compress_search import Method
from compress_search.cli import main
from compress_search.registry import PluginFile, Registry
from compress_search.scaffold import method_text
from compress_search.study import load_study
from compress_search.testing import check_method, tiny_candidate, tiny_context
from compress_search.testing.checks import CHECKS

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
GUIDE = ROOT / "docs" / "plugin-guide.md"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])
EXAMPLE = ROOT / "examples" / "single_file" / "first_layers.py"


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> Iterator[str]:
    for block in blocks(page, "sh"):
        yield from (line.strip() for line in block.splitlines() if line.strip())


def pages(*names: str) -> Any:
    return pytest.mark.parametrize("page", [ROOT / name for name in names], ids=names)


def test_the_readmes_method_is_the_example_and_short() -> None:
    (code,) = blocks(README, "python")
    assert code == EXAMPLE.read_text(encoding="utf-8")
    assert len(code.splitlines()) < 40


def test_the_readmes_method_keeps_the_contract() -> None:
    registry = Registry((PluginFile.read(EXAMPLE),))
    assert [result for result in check_method(registry["first_layers"]) if not result.ok] == []


def test_the_readmes_studies_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUDY_DATABASE", "postgresql+psycopg://user:password@host/studies")
    study, *fragments = [yaml.safe_load(block) for block in blocks(README, "yaml")]
    (tmp_path / "my-model").mkdir()
    (tmp_path / "my-model" / "config.json").write_text("{}")
    (tmp_path / "first_layers.py").write_text(EXAMPLE.read_text(encoding="utf-8"))
    (tmp_path / "data").mkdir()
    for name in ("train", "dev", "test"):
        (tmp_path / "data" / f"{name}.jsonl").write_text(json.dumps({"text": "a", "label": "b"}) + "\n")
    for number, fragment in enumerate([{}, *fragments]):
        path = tmp_path / f"study{number}.yaml"
        path.write_text(yaml.safe_dump({**study, **fragment, "output": str(tmp_path / "runs")}))
        assert load_study(path).name == f"study{number}"


@pages("README.md", "docs/plugin-guide.md", "CONTRIBUTING.md")
def test_every_command_exists_with_its_options(page: Path) -> None:
    for line in commands(page):
        program, *words = shlex.split(line)
        if program == "make":
            assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE), line
        else:
            assert Path(program).name == "compress-search", line
            _parse(main, words)


def _parse(command: click.Command, words: list[str]) -> None:
    """Follow the words to the command they name, and let it read its options."""
    context = click.Context(command, **command.context_settings)
    while isinstance(command, click.Group):
        name, *words = words
        found = command.get_command(context, name)
        assert found, f"no command {name}"
        # commands remember their help option as they first made it, which is as their parent says
        command, context = found, click.Context(found, parent=context)
    command.make_context(command.name, words, parent=context.parent, resilient_parsing=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_guide_names_every_check_with_its_rule() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", GUIDE.read_text(encoding="utf-8"), re.MULTILINE))
    rules = {name: " ".join((check.__doc__ or "").split()).replace("``", "`") for name, check in CHECKS.items()}
    assert {name: rule for name, rule in rows.items() if name in rules} == rules


def test_the_guide_names_every_hook() -> None:
    table = GUIDE.read_text(encoding="utf-8").split("## The interface")[1].split("### Stages")[0]
    named = set(re.findall(r"^\| `(\w+)", table, re.MULTILINE))
    assert named == {"stage", *(name for name in vars(Method) if not name.startswith("_"))}


def test_the_guides_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_method.py").write_text(method_text("my_method"))
    monkeypatch.syspath_prepend(tmp_path)
    # whatever the guide imports under this name is forgotten again afterwards
    monkeypatch.setitem(sys.modules, "my_method", ModuleType("my_method"))
    del sys.modules["my_method"]
    candidate = tiny_candidate(layers=2)
    context = tiny_context(tiny_candidate(layers=4))
    names: dict[str, Any] = {"context": context, "student": candidate.copy().network}
    for block in blocks(GUIDE, "python"):
        exec(compile(block, str(GUIDE), "exec"), names)
    assert names["unsupported"](None, candidate.subject.having("shared")) == "its layers share weights"
    assert all(dim.contains(dim.default) for dim in names["space"].values())
    assert names["context"].fits == [6, 6]
    assert set(names["TestContract"].expected_failures) <= set(CHECKS)

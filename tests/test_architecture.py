"""The table of imports in docs/architecture.md holds, and the command line stays light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import compress_search

ROOT = Path(__file__).resolve().parents[1]
ENGINE, PLUGINS = ROOT / "compress_search", ROOT / "plugins"
HEAVY = {"torch", "transformers", "ray", "optuna", "datasets", "onnxruntime", "sqlalchemy", "scipy", "pandas"}
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("## What may import what")[1]
ALLOWED = {
    part: set(re.findall(r"`(\w+)`", imports))
    for part, imports in re.findall(r"^\| `(\w+)` \| [^|]+ \|([^|]*)\|$", PAGE, re.MULTILINE)
}
"""Part of the engine -> parts it may import."""

SOURCES = [path for path in ENGINE.rglob("*.py") if "templates" not in path.parts]
MODULES = [*SOURCES, *PLUGINS.rglob("*.py")]
METHOD_MODULES = {point.value.partition(":")[0] for point in entry_points(group="compress_search.methods")}


def part_of(path: Path) -> str:
    return path.relative_to(ENGINE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Absolute names of what a file imports (``package.name`` for ``from package import name``), types aside."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in _run(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "compress_search_plugins" if node.level else node.module
            inner = f".{node.module}" if node.level and node.module else ""
            yield from (f"{prefix}{inner}.{alias.name}" for alias in node.names)


def _run(node: ast.AST) -> Iterator[ast.AST]:
    """Every node below that is there when the program runs."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from _run(child)


def names(paths: list[Path]) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in paths]


def test_every_part_has_its_row() -> None:
    assert set(ALLOWED) == {part_of(path) for path in SOURCES} - {"__init__", "__main__"}


def test_the_table_has_no_circles() -> None:
    assert list(TopologicalSorter(ALLOWED).static_order())


@pytest.mark.parametrize("path", SOURCES, ids=names(SOURCES))
def test_a_part_imports_what_its_row_says(path: Path) -> None:
    part = part_of(path)
    used = {name.split(".")[1] for name in imports(path) if name.startswith("compress_search.")}
    # the entry module leads to the command line; the version is no part
    allowed = ALLOWED.get(part, {"cli"}) | {part, "errors", "__version__"}
    assert used <= allowed, f"{part} may not import {', '.join(sorted(used - allowed))}"


def test_the_table_allows_no_more_than_is_used() -> None:
    used: dict[str, set[str]] = {part: set() for part in ALLOWED}
    for path in SOURCES:
        if part_of(path) in used:
            used[part_of(path)] |= {n.split(".")[1] for n in imports(path) if n.startswith("compress_search.")}
    idle = {part: sorted(allowed - used[part]) for part, allowed in ALLOWED.items() if allowed - used[part]}
    assert idle == {}


@pytest.mark.parametrize("path", SOURCES, ids=names(SOURCES))
def test_the_engine_imports_no_plugin_and_nothing_by_relative_path(path: Path) -> None:
    assert not [name for name in imports(path) if name.startswith(("compress_search_plugins", "plugins"))]


@pytest.mark.parametrize("path", sorted(PLUGINS.glob("*.py")), ids=lambda path: path.name)
def test_a_plugin_imports_public_names_and_no_other_method(path: Path) -> None:
    open_to_all = {f"compress_search.{name}" for name in compress_search.__all__}
    for name in imports(path):
        module = name.rpartition(".")[0]
        if name.startswith("compress_search."):
            assert name in open_to_all or module in ("compress_search.encoders", "compress_search.losses"), name
        assert not name.startswith("plugins."), "import compress_search_plugins: this makes a second copy"
        if name.startswith("compress_search_plugins."):
            assert module not in METHOD_MODULES, f"{module} is a method: no method names another"


@pytest.mark.parametrize("path", MODULES, ids=names(MODULES))
def test_a_module_says_what_it_owns(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("module", ["", ".cli", ".errors", ".study", ".formats", ".environment", ".progress"])
def test_light_modules_import_nothing_heavy(module: str) -> None:
    code = f"import sys, compress_search{module}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert HEAVY & set(output.split()) == set()

"""What is installed is what the repository holds: packages, entry points, version, files beside the code."""

from __future__ import annotations

import configparser
import re
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import distribution, entry_points, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import compress_search

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def config() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of the files in a wheel built from what git would commit."""
    source, target = _clean_copy(tmp_path_factory.mktemp("source")), tmp_path_factory.mktemp("wheel")
    _pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", target, source)
    (path,) = target.glob("*.whl")
    return set(zipfile.ZipFile(path).namelist())


def _clean_copy(folder: Path) -> Path:
    """The tracked files and those that could be, without what earlier builds left (a stale build/lib is packed)."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("NO GIT CHECKOUT: a wheel is built from tracked files")
    for name in filter(lambda name: (ROOT / name).is_file(), listed.stdout.splitlines()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


def _pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", *map(str, arguments), "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def _packages() -> set[str]:
    """Every folder of the repository that is a package of ours, by its import name."""
    found = {path.parent.relative_to(ROOT) for path in (ROOT / "compress_search").rglob("__init__.py")}
    found |= {path.parent.relative_to(ROOT) for path in (ROOT / "plugins").rglob("__init__.py")}
    return {".".join(path.parts).replace("plugins", "compress_search_plugins", 1) for path in found}


def test_every_package_is_listed(config: configparser.ConfigParser) -> None:
    listed = config["options"]["packages"].split()
    assert sorted(listed) == sorted(set(listed))
    assert set(listed) == _packages()


def test_every_module_lies_in_a_package() -> None:
    modules = [*(ROOT / "compress_search").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")]
    orphans = [
        path for path in modules if not (path.parent / "__init__.py").exists() and "templates" not in path.parts
    ]
    assert orphans == []


def test_installed_entry_points_are_those_of_setup_cfg(config: configparser.ConfigParser) -> None:
    text = config["options.entry_points"]["compress_search.methods"]
    declared = {tuple(part.strip() for part in line.split("=")) for line in text.strip().splitlines()}
    points = entry_points(group="compress_search.methods")
    installed = {
        (point.name, point.value) for point in points if point.dist and point.dist.name == "compress-search"
    }
    assert installed == declared, "run `pip install -e .` again: Python reads the installed metadata"


def test_every_method_is_a_module_of_its_name_with_tests_of_its_own(config: configparser.ConfigParser) -> None:
    text = config["options.entry_points"]["compress_search.methods"]
    for line in text.strip().splitlines():
        name, value = (part.strip() for part in line.split("="))
        assert value.startswith(f"compress_search_plugins.{name}:")
        assert (ROOT / "plugins" / f"{name}.py").is_file()
        assert (ROOT / "tests" / "plugins" / f"test_{name}.py").is_file()


def test_the_version_is_one(config: configparser.ConfigParser) -> None:
    (latest, *_) = re.findall(
        r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert config["metadata"]["version"] == compress_search.__version__ == latest
    assert distribution("compress-search").version == latest


def test_public_names_are_listed_once_and_are_there() -> None:
    assert compress_search.__all__ == sorted(set(compress_search.__all__))
    assert set(compress_search.__all__) == set(compress_search._HOME)
    for name in compress_search.__all__:
        value = getattr(compress_search, name)
        home = getattr(value, "__module__", None)
        # plain aliases (Params, Loss, …) know no home
        assert home is None or not home.startswith("compress_search") or home.endswith(compress_search._HOME[name])
    assert dir(compress_search) == compress_search.__all__


def test_public_names_exist_for_type_checkers_too() -> None:
    source = (ROOT / "compress_search" / "__init__.py").read_text(encoding="utf-8")
    block = source.split("if TYPE_CHECKING:")[1].split("\n\n")[0]
    assert {*re.findall(r"\b\w+\b", re.sub(r"from [\w.]+ import", "", block))} == set(compress_search.__all__)


def test_constraints_pin_everything_that_an_installation_brings() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(str(pin.specifier).startswith("==") and "+" not in str(pin.specifier) for pin in pins)
    names = [canonicalize_name(pin.name) for pin in pins]
    assert names == sorted(set(names))
    direct = [Requirement(text) for text in requires("compress-search") or ()]
    pinned = {canonicalize_name(pin.name): pin for pin in pins}
    for requirement in direct:
        version = str(pinned[canonicalize_name(requirement.name)].specifier).removeprefix("==")
        assert requirement.specifier.contains(version), f"constraints.txt breaks {requirement}"


def test_the_code_is_imported_from_where_it_is_tested() -> None:
    assert Path(compress_search.__file__).resolve().parent == ROOT / "compress_search"


@pytest.mark.slow
def test_a_wheel_holds_all_modules_and_the_files_beside_them(wheel: set[str]) -> None:
    sources = [*(ROOT / "compress_search").rglob("*"), *(ROOT / "plugins").rglob("*.py")]
    kept = [path for path in sources if path.is_file() and "__pycache__" not in path.parts]
    expected = {
        path.relative_to(ROOT).as_posix().replace("plugins/", "compress_search_plugins/", 1) for path in kept
    }
    shipped = {name for name in wheel if ".dist-info/" not in name}
    assert shipped == expected


@pytest.mark.slow
def test_a_source_distribution_can_be_built_from_itself(tmp_path: Path) -> None:
    source = _clean_copy(tmp_path / "source")
    code = "from setuptools import build_meta; print(build_meta.build_sdist('dist'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = (source / "dist").glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        archive.extractall(tmp_path / "unpacked", filter="data")
    assert {
        "setup.cfg",
        "pyproject.toml",
        "plugins/theseus.py",
        "studies/quickstart.yaml",
        "constraints.txt",
    } <= names
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    _pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path / "wheel", unpacked)


@pytest.mark.slow
def test_a_strangers_distribution_is_found_like_the_built_in_ones(tmp_path: Path) -> None:
    project = _clean_copy(tmp_path / "source") / "examples" / "nm_sparsity_plugin"
    target = tmp_path / "site"
    _pip("install", "--no-deps", "--no-build-isolation", "--target", target, project)
    done = subprocess.run(
        [sys.executable, "-m", "compress_search", "plugins", "list"],
        env={"PYTHONPATH": str(target), "PATH": "", "COLUMNS": "120"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    assert re.search(r"sparsity +compress-search-nm-sparsity 0\.1\.0 +available", lines["nm_sparsity"])
    assert re.search(r"student +compress-search \S+ +available", lines["theseus"])


@pytest.mark.slow
def test_the_examples_own_tests_pass(tmp_path: Path) -> None:
    example = ROOT / "examples" / "nm_sparsity_plugin"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", example / "tests"],
        env={"PYTHONPATH": str(example), "PATH": "", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr

"""Methods are found through entry points and files, by no other road, and a broken one breaks only itself."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from compress_search import registry
from compress_search.errors import PluginError
from compress_search.registry import PluginFile, Registry

SOUND = """
from compress_search import Method, Stage

class Sound(Method):
    stage = Stage.SPARSITY
    def search_space(self, teacher):
        return {}
    def apply(self, candidate, params, context):
        return candidate
"""

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """``install(distribution, method="module:Class", source=…)`` puts a distribution on the path as pip would."""

    def add(distribution: str, source: str | None, **methods: str) -> None:
        root = tmp_path / distribution
        info = root / f"{distribution.replace('-', '_')}-1.2.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
        lines = [f"{name} = {value}" for name, value in methods.items()]
        (info / "entry_points.txt").write_text("\n".join([f"[{registry.GROUP}]", *lines]) + "\n")
        if source is not None:
            (root / f"{distribution.replace('-', '_')}.py").write_text(source)
        monkeypatch.syspath_prepend(root)

    return add


def test_built_in_methods_come_from_the_distribution_like_any_other() -> None:
    found = Registry()
    assert {"theseus", "structured_pruning", "distill", "quantization", "runtimes"} <= set(found)
    for name in found:
        assert found.source(name).entry_point is not None
        assert found.source(name).origin


def test_without_entry_points_there_are_no_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "entry_points", lambda group: ())
    assert list(Registry()) == []
    with pytest.raises(PluginError, match="not installed"):
        Registry()["theseus"]


def test_a_strangers_method_stands_among_the_built_in_ones(install: Install) -> None:
    install("sound-plugin", SOUND, sound="sound_plugin:Sound")
    found = Registry()
    assert "theseus" in found
    assert found.source("sound").origin == "sound-plugin 1.2"
    assert type(found["sound"]).__name__ == "Sound"
    assert found["sound"] is found["sound"]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise RuntimeError('no licence')", "cannot be imported: RuntimeError: no licence"),
        ("import a_library_that_is_not_there", "cannot be imported: ModuleNotFoundError"),
        ("def (", "cannot be imported: SyntaxError"),
        (None, "cannot be imported: ModuleNotFoundError"),
        ("", "cannot be imported: AttributeError"),
        ("Sound = 3", "expected a subclass of compress_search.Method, got 3"),
        ("class Sound: pass", "expected a subclass of compress_search.Method"),
        ("from compress_search import Method\nclass Sound(Method): pass", "lacks apply, search_space"),
        (SOUND.replace("stage = Stage.SPARSITY", "pass"), "lacks a class attribute `stage`"),
        (SOUND.replace("Stage.SPARSITY", "6"), "lacks a class attribute `stage`"),
        (SOUND + "    def __init__(self, size): pass\n", "cannot be created: TypeError"),
    ],
)
def test_a_broken_method_is_unavailable_for_a_reason_and_breaks_nothing_else(
    install: Install, monkeypatch: pytest.MonkeyPatch, source: str | None, reason: str
) -> None:
    monkeypatch.delitem(sys.modules, "broken_plugin", raising=False)
    install("broken-plugin", source, broken="broken_plugin:Sound")
    found = Registry()
    assert reason in str(found.unavailable("broken"))
    with pytest.raises(PluginError, match=r"method 'broken' \(from broken-plugin 1.2\)") as refused:
        found["broken"]
    assert refused.value.exit_code == 2
    assert found.unavailable("theseus") is None


def test_two_distributions_may_not_claim_one_name(install: Install) -> None:
    install("first-plugin", SOUND, sound="first_plugin:Sound")
    install("second-plugin", SOUND, sound="second_plugin:Sound")
    with pytest.raises(PluginError, match=r"claimed by both second-plugin 1.2 and first-plugin 1.2"):
        Registry()


def test_one_distribution_seen_twice_is_one(install: Install) -> None:
    install("checkout", SOUND, sound="checkout:Sound")
    install("installed", SOUND, sound="checkout:Sound")
    assert "sound" in Registry()


def test_an_unknown_method_is_refused_with_those_there_are() -> None:
    with pytest.raises(PluginError, match=r"method 'thesus': not installed; there are: bilstm, .*theseus"):
        Registry()["thesus"]


def test_a_file_is_a_method_named_after_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(SOUND)
    found = Registry((PluginFile.read(path),))
    assert "mine" in found
    assert type(found["mine"]).__name__ == "Sound"
    assert found.source("mine").text == SOUND


def test_a_files_text_is_all_a_worker_needs() -> None:
    found = Registry((PluginFile("travelled", SOUND),))
    assert type(found["travelled"]).__name__ == "Sound"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("x = 1", "expected one subclass of compress_search.Method in the file, found none"),
        (SOUND + SOUND.replace("Sound", "Other"), "found Sound, Other"),
        ("1/0", "cannot be imported: ZeroDivisionError"),
    ],
)
def test_a_file_holds_exactly_one_method(text: str, reason: str) -> None:
    assert reason in str(Registry((PluginFile("mine", text),)).unavailable("mine"))


def test_a_file_may_not_take_the_name_of_an_installed_method() -> None:
    with pytest.raises(PluginError, match=r"method 'theseus': the name is taken by compress-search"):
        Registry((PluginFile("theseus", SOUND),))


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match="cannot read"):
        PluginFile.read(tmp_path / "absent.py")
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe")
    with pytest.raises(PluginError, match="cannot read"):
        PluginFile.read(tmp_path / "binary.py")


def test_a_fingerprint_changes_with_the_source() -> None:
    first, same = (Registry((PluginFile("mine", SOUND),)).fingerprint("mine") for _ in range(2))
    other = Registry((PluginFile("mine", SOUND + "# changed\n"),)).fingerprint("mine")
    assert first == same
    assert first != other


def test_a_fingerprint_names_version_and_source_of_an_installed_method() -> None:
    assert Registry().fingerprint("theseus").startswith("compress-search 0.")


def test_a_fingerprint_changes_with_any_module_of_the_methods_package(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("packed-plugin", None, packed="packed_plugin.methods.sound:Sound")
    package = tmp_path / "packed-plugin" / "packed_plugin"
    (package / "methods").mkdir(parents=True)
    (package / "methods" / "sound.py").write_text(SOUND)
    helper = package / "helper.py"
    found = []
    for text in ("FACTOR = 1\n", "FACTOR = 1\n", "FACTOR = 2\n"):
        helper.write_text(text)
        found.append(Registry().fingerprint("packed"))
    helper.rename(package / "methods" / "helper.py")
    found.append(Registry().fingerprint("packed"))
    assert found[0] == found[1]
    assert len(set(found)) == 3


def test_a_fingerprint_changes_with_a_method_in_a_module_of_its_own(install: Install, tmp_path: Path) -> None:
    install("alone-plugin", SOUND, alone="alone_plugin:Sound")
    first = Registry().fingerprint("alone")
    (tmp_path / "alone-plugin" / "alone_plugin.py").write_text(SOUND + "# changed since\n")
    assert Registry().fingerprint("alone") != first


def test_listing_imports_no_plugin() -> None:
    code = (
        "import sys; from compress_search.registry import Registry; assert list(Registry()); "
        "print([name for name in sys.modules if name.startswith('compress_search_plugins') or name == 'torch'])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"

"""Finds methods: entry points of installed distributions and single files a study names. Nothing else discovers.

Listing imports nothing, so that a broken plugin breaks neither ``--help`` nor its neighbours; loading fails
loudly with the method's name, its distribution and the cause.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from compress_search.errors import PluginError
from compress_search.method import Method, Stage

GROUP = "compress_search.methods"


@dataclass(frozen=True)
class Source:
    """Where a method comes from: an entry point, or a file's text that travels to the workers."""

    name: str
    distribution: str
    version: str = ""
    entry_point: EntryPoint | None = None
    text: str | None = None

    @property
    def origin(self) -> str:
        """Distribution and version, or the file."""
        return f"{self.distribution} {self.version}".strip()


@dataclass(frozen=True)
class PluginFile:
    """A method in a single file, as plain data."""

    name: str
    text: str

    @classmethod
    def read(cls, path: Path) -> PluginFile:
        """Read a plugin file; its stem is the method's name.

        Raises:
            PluginError: the file cannot be read.
        """
        try:
            return cls(path.stem, path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise PluginError(f"cannot read {path}: {error}", entry_point=path.stem) from error


class Registry(Mapping[str, Method]):
    """Methods by name, imported when first asked for."""

    def __init__(self, files: tuple[PluginFile, ...] = ()) -> None:
        self.files = files
        self._sources = _installed()
        for file in files:
            if file.name in self._sources:
                raise PluginError(f"the name is taken by {self._sources[file.name].origin}", entry_point=file.name)
            self._sources[file.name] = Source(file.name, f"{file.name}.py", text=file.text)
        self._methods: dict[str, Method] = {}

    def __getitem__(self, name: str) -> Method:
        if name not in self._methods:
            self._methods[name] = load(self.source(name))
        return self._methods[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._sources))

    def __len__(self) -> int:
        return len(self._sources)

    def __contains__(self, name: object) -> bool:
        return name in self._sources

    def source(self, name: str) -> Source:
        """Where the method comes from.

        Raises:
            PluginError: there is no such method.
        """
        if name not in self._sources:
            raise PluginError(f"not installed; there are: {', '.join(self)}", entry_point=name)
        return self._sources[name]

    def unavailable(self, name: str) -> str | None:
        """Why the method cannot be loaded, in one line; None when it can."""
        try:
            self[name]
        except PluginError as error:
            return error.message
        return None

    def fingerprint(self, name: str) -> str:
        """Version and hash of the method's file or whole package: what makes cached artefacts of it stale."""
        method, source = self[name], self.source(name)
        text = _package_text(type(method).__module__) if source.text is None else source.text
        return f"{source.origin}:{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _package_text(module: str) -> str:
    """Every module beside a method's own, up to its top-level package: it may take help from any of them."""
    top = sys.modules[module.partition(".")[0]]
    folders = [Path(folder) for folder in getattr(top, "__path__", ())]
    files = [(path.relative_to(folder), path) for folder in folders for path in folder.rglob("*.py")]
    if not files:
        return inspect.getsource(top)
    return "".join(f"# {name.as_posix()}\n{path.read_text(encoding='utf-8')}" for name, path in sorted(files))


def _installed() -> dict[str, Source]:
    sources: dict[str, Source] = {}
    for point in entry_points(group=GROUP):
        dist = point.dist
        found = Source(point.name, dist.name if dist else "unknown", dist.version if dist else "", point)
        known = sources.get(point.name)
        # the same distribution can be on the path twice (a source checkout beside its installed metadata)
        if known and known.entry_point and known.entry_point.value != point.value:
            raise PluginError(f"claimed by both {known.origin} and {found.origin}", entry_point=point.name)
        sources.setdefault(point.name, found)
    return sources


def load(source: Source) -> Method:
    """Import a method and check that it is one.

    Raises:
        PluginError: it cannot be imported, or is no concrete subclass of Method with a stage.
    """

    def fault(message: str) -> PluginError:
        return PluginError(message, entry_point=source.name, distribution=source.origin)

    try:
        kind = source.entry_point.load() if source.entry_point else _class_in(source)
    except PluginError:
        raise
    except Exception as error:  # whatever a stranger's module raises while it is imported
        raise fault(f"cannot be imported: {type(error).__name__}: {error}") from error
    if not (isinstance(kind, type) and issubclass(kind, Method)):
        raise fault(f"expected a subclass of compress_search.Method, got {kind!r}")
    if missing := sorted(kind.__abstractmethods__):
        raise fault(f"lacks {', '.join(missing)}")
    if not isinstance(getattr(kind, "stage", None), Stage):
        raise fault("lacks a class attribute `stage` of type compress_search.Stage")
    try:
        return kind()
    except Exception as error:
        raise fault(f"cannot be created: {type(error).__name__}: {error}") from error


def _class_in(source: Source) -> type[Method]:
    """The one Method subclass defined in a file's text."""
    module = types.ModuleType(f"compress_search_file_{source.name}")
    module.__file__ = source.distribution
    # registered, so that dataclasses and pickling by reference work as in any module
    sys.modules[module.__name__] = module
    exec(
        compile(source.text or "", source.distribution, "exec"), module.__dict__
    )  # the user named this file to be run
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Method) and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        names = ", ".join(kind.__name__ for kind in found) or "none"
        raise PluginError(
            f"expected one subclass of compress_search.Method in the file, found {names}", entry_point=source.name
        )
    return found[0]

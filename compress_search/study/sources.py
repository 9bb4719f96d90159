"""The paths, hub ids and database URLs a study names: resolved against its folder, and checked before any work.

Each function takes the folder that relative paths start from; without one, where a worker rebuilds a study from
plain data, it checks the form only. All raise ValueError and create nothing. Knows nothing of what the files hold.
"""

from __future__ import annotations

import keyword
import os
import re
import string
import tempfile
from pathlib import Path
from typing import Any

from compress_search.study.complaints import Fault, show

DATA_SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")
_FILE_SUFFIXES = (*DATA_SUFFIXES, ".json", ".txt", ".yaml", ".safetensors", ".bin", ".onnx")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.-]*){0,2}")
"""``name`` or ``owner/name``; a data set's may go on with ``:configuration:split``."""
_BEFORE_HOST = re.compile(r"(://[^:/\s]*:)[^@]*@")
_IN_QUERY = re.compile(r"([?&][^=&\s]*(?:pass|secret|token)[^=&\s]*=)[^&\s]*", re.IGNORECASE)
_OTHER_DATABASE = "no such kind of database; expected sqlite:///… or postgresql+psycopg://…"


def data_source(text: str, folder: Path | None) -> str:
    """An absolute path of a data file, or a hub id as it is."""
    path = _absolute(text, folder)
    if path is None or (not path.exists() and _is_hub_id(text, folder)):
        return text
    _require_file(path, text)
    if path.suffix not in DATA_SUFFIXES:
        raise ValueError(f"expected a file ending in {', '.join(DATA_SUFFIXES)}, got {text}")
    return str(path)


def data_sources(value: Any, folder: Path | None) -> tuple[str, ...]:
    """Each of one or several data sources; see :func:`data_source`."""
    if isinstance(value, str):
        return (data_source(value, folder),)
    # plain data of a study without any is an empty list
    if not isinstance(value, list | tuple) or not (value or folder is None):
        raise ValueError(f"expected a data source or a list of them, such as [a.jsonl, b.jsonl], got {show(value)}")
    found: list[str] = []
    for number, item in enumerate(value):
        try:
            if not isinstance(item, str):
                raise ValueError(f"expected a data file or a hub id, got {show(item)}")
            found.append(data_source(item, folder))
        except ValueError as error:
            raise Fault(number, str(error)) from error
    return tuple(found)


def model_source(text: str, folder: Path | None) -> str:
    """An absolute path of a model directory, or a hub id as it is."""
    path = _absolute(text, folder)
    if path is None or (not path.exists() and _is_hub_id(text, folder)):
        return text
    if not path.exists():
        raise _missing("directory", text, path)
    if not (path / "config.json").is_file():
        raise ValueError(f"expected a directory with a config.json, got {text}")
    return str(path)


def model_sources(items: Any, folder: Path | None) -> tuple[str, ...]:
    """:func:`model_source` of each item of a list."""
    if not isinstance(items, list | tuple | None):
        raise ValueError(f"expected a list of directories or hub ids, got {show(items)}")
    found = []
    for number, item in enumerate(items or ()):
        try:
            if not isinstance(item, str):
                raise ValueError(f"expected a directory or a hub id, got {show(item)}")
            found.append(model_source(item, folder))
        except ValueError as error:
            raise Fault(number, str(error)) from error
    return tuple(found)


def vocabulary_source(value: Any, folder: Path | None) -> int | Path:
    """A number of word pieces to train, or the path of a file that lists them."""
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 100:
            raise ValueError(f"expected at least 100 word pieces, got {value}")
        return value
    if not isinstance(value, str | Path):
        raise ValueError(f"expected a number of word pieces or the path of a vocab.txt, got {show(value)}")
    path = _absolute(str(value), folder)
    if path is None:
        return Path(value)
    _require_file(path, str(value))
    return path


def plugin_files(items: Any, folder: Path | None) -> tuple[Path, ...]:
    """Absolute paths of Python files, each of which can name a method."""
    if not isinstance(items, list | tuple | None):
        raise ValueError(f"expected a list such as [./my_method.py], got {show(items)}")
    found: list[Path] = []
    for number, item in enumerate(items or ()):
        try:
            path = _plugin_file(item, folder)
            if path.stem in {other.stem for other in found}:
                raise ValueError(f"a method is named after its file, and there are two called {path.name}")
        except ValueError as error:
            raise Fault(number, str(error)) from error
        found.append(path)
    return tuple(found)


def _plugin_file(item: Any, folder: Path | None) -> Path:
    if not isinstance(item, str | Path):
        raise ValueError(f"expected the path of a Python file, got {show(item)}")
    path = _absolute(str(item), folder)
    if path is None:
        return Path(item)
    _require_file(path, str(item))
    if path.suffix != ".py" or not path.stem.isidentifier() or keyword.iskeyword(path.stem):
        raise ValueError(f"expected a Python file whose name can name a method, such as my_method.py, got {item}")
    return path


def output_directory(value: Any, folder: Path | None) -> Path:
    """An absolute path at which a directory is or can be made."""
    if not isinstance(value, str | Path) or not str(value):
        raise ValueError(f"expected the path of a directory, got {show(value)}")
    path = _absolute(str(value), folder)
    if path is None:
        return Path(value)
    if path.exists() and not path.is_dir():
        raise ValueError(f"not a directory: {value}")
    _require_writable(path)
    return path


def database_url(value: Any, folder: Path | None) -> str:
    """A database URL with environment variables expanded and a relative SQLite file made absolute.

    No message repeats the value, which may hold a password.
    """
    if not isinstance(value, str):
        raise ValueError("expected a database URL such as sqlite:///study.db")
    if folder is None:
        return value
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError

    try:
        url = make_url(string.Template(value).substitute(os.environ))
        url.get_dialect()
    except KeyError as error:
        raise ValueError(f"the environment variable {error.args[0]} is not set") from None
    except NoSuchModuleError:
        raise ValueError(_OTHER_DATABASE) from None
    except (ArgumentError, ValueError):
        raise ValueError("not a database URL; expected for example sqlite:///study.db") from None
    if url.get_backend_name() not in ("sqlite", "postgresql"):
        raise ValueError(_OTHER_DATABASE)
    if url.get_backend_name() == "sqlite":
        url = url.set(database=str(_database_file(url.database, folder)))
    return url.render_as_string(hide_password=False)


def _database_file(database: str | None, folder: Path) -> Path:
    if database in (None, "", ":memory:"):
        raise ValueError("a database in memory cannot be resumed; expected for example sqlite:///study.db")
    path = Path(os.path.normpath(folder / str(database)))
    _require_name(path)
    if path.is_dir():
        raise ValueError(f"is a directory: {database}")
    _require_writable(path)
    return path


def hide_passwords(text: str) -> str:
    """The text with the passwords of the URLs in it, wherever they stand in them, replaced by ``***``.

    What merely equals a password is left alone: hiding "p" all over a sentence would tell it.
    """
    return _IN_QUERY.sub(r"\1***", _BEFORE_HOST.sub(r"\1***@", text))


def _absolute(text: str, folder: Path | None) -> Path | None:
    """The path, where there is a folder to start from, once it is known to be one that files can have."""
    if folder is None:
        return None
    path = Path(os.path.normpath(folder / os.path.expanduser(text)))
    _require_name(path)
    return path


def _require_name(path: Path) -> None:
    """Refuse what cannot even be looked for, such as a name that is too long for any file system."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:  # of a null character Python says the latter
        raise ValueError(f"no usable path: {getattr(error, 'strerror', error)}, got {show(str(path))}") from None


def _is_hub_id(text: str, folder: Path | None) -> bool:
    """Whether what is no path here can be something on a hub."""
    if not _HUB_ID.fullmatch(text) or text.endswith(_FILE_SUFFIXES):
        return False
    # data/missing beside an existing data/ is a misspelt path rather than somebody's repository
    head, slash, _ = text.partition("/")
    neighbour = _absolute(head, folder)
    return not (slash and neighbour and neighbour.exists())


def _missing(kind: str, text: str, path: Path) -> ValueError:
    return ValueError(f"no such {kind}: {text}" + (f" (looked for {path})" if str(path) != text else ""))


def _require_file(path: Path, text: str) -> None:
    if not path.exists():
        raise _missing("file", text, path)
    if not path.is_file():
        raise ValueError(f"not a file: {text}")
    if not os.access(path, os.R_OK):
        raise ValueError(f"cannot be read: {text}")
    if path.stat().st_size == 0:
        raise ValueError(f"the file is empty: {text}")


def _require_writable(path: Path) -> None:
    """Refuse a path that can be neither written nor, at its nearest existing ancestor, created.

    The superuser has every permission, in /proc too: whether a file can be made in a folder is seen by making one
    that has no name, and so is never there.
    """
    existing = next(place for place in (path, *path.parents) if place.exists())
    if existing != path and not existing.is_dir():
        raise ValueError(f"cannot be created: {existing} is not a directory")
    if not os.access(existing, os.W_OK):
        raise ValueError(f"cannot be written: no permission for {existing}")
    for name in path.relative_to(existing).parts:
        _require_name(existing / name)
    try:
        with tempfile.TemporaryFile(dir=existing if existing.is_dir() else existing.parent):
            pass
    except OSError as error:
        raise ValueError(f"cannot be written: no file can be made in {existing}: {error.strerror}") from None

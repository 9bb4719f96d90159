"""The whole error tree; owns what the command line may turn into one line and with which exit code.

CompressSearchError                 exit 1: anything this package raises on purpose
├── StudyError                      exit 2: a study file, an option or the data it names is wrong
├── PluginError                     exit 2: a method cannot be found, imported or breaks the contract
├── TrialError                      exit 1: a step of a recipe cannot be carried out
│   └── NotFinite                   exit 1: a loss or an output is infinite or not a number
├── BenchError                      exit 1: an artefact cannot be loaded, scored or timed
│   └── BenchDied                   exit 1: the bench process ended, or was ended at its time limit
├── StorageError                    exit 1: the database cannot be reached, read or written
│   └── StudyLocked                 exit 3: another driver is running this study
├── ExportError                     exit 1: an artefact cannot be written, or does not reload to the same score
└── NothingFeasible                 exit 4: no recipe meets the constraints
"""

from __future__ import annotations

from pathlib import Path


class CompressSearchError(Exception):
    """Base of every error raised on purpose; its text is one line for the user."""

    exit_code = 1


class StudyError(CompressSearchError):
    """A study file, an override or a data file is wrong; the text starts with ``file:line: key:``."""

    exit_code = 2

    def __init__(
        self,
        message: str,
        *,
        file: str | Path | None = None,
        line: int | None = None,
        key: str | None = None,
    ) -> None:
        self.message, self.file, self.line, self.key = message, file, line, key
        place = ":".join(str(part) for part in (file, line) if part is not None)
        super().__init__(": ".join(part for part in (place, key, message) if part))


class PluginError(CompressSearchError):
    """A method is unknown, cannot be imported, or does not keep the plugin contract."""

    exit_code = 2

    def __init__(self, message: str, *, entry_point: str, distribution: str | None = None) -> None:
        self.message, self.entry_point, self.distribution = message, entry_point, distribution
        origin = f" (from {distribution})" if distribution else ""
        super().__init__(f"method {entry_point!r}{origin}: {message}")


class TrialError(CompressSearchError):
    """A step cannot be applied with its parameters, which the recipe tells: a fault of that, never retried."""

    def __init__(self, message: str, *, method: str | None = None) -> None:
        self.message, self.method = message, method
        super().__init__(f"{method}: {message}" if method else message)


class NotFinite(TrialError):
    """A loss or a network's output is infinite or not a number; the text gives the step or the count."""

    kind = "nan"


class BenchError(CompressSearchError):
    """What the bench was given cannot be loaded, scored or timed; ``details`` is its traceback."""

    def __init__(self, message: str, *, details: str = "", kind: str = "error") -> None:
        self.details, self.kind = details, kind
        super().__init__(message)


class BenchDied(BenchError):
    """The bench process ended before it answered; ``kind`` is ``died``, or ``timeout`` at its time limit."""


class StorageError(CompressSearchError):
    """The study's database cannot be reached, read or written."""


class StudyLocked(StorageError):
    """Another driver holds the study; the text names who."""

    exit_code = 3


class ExportError(CompressSearchError):
    """An artefact cannot be written, or what was written does not reload to the same score."""


class NothingFeasible(CompressSearchError):
    """No recipe meets the study's constraints; the text names the closest ones."""

    exit_code = 4

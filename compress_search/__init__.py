"""Search over compositions of transformer compression methods for the accuracy/latency Pareto front.

Owns the public names, and loads each only when it is first used, so that ``compress-search --help`` imports
neither torch nor Ray.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress_search.candidate import Candidate, Subject
    from compress_search.errors import (
        CompressSearchError,
        ExportError,
        NothingFeasible,
        PluginError,
        StorageError,
        StudyError,
        TrialError,
    )
    from compress_search.method import AuxiliaryTask, Batch, Context, Loss, Method, ParameterGroup, Stage
    from compress_search.recipe import Recipe, Step
    from compress_search.space import Dim, Params, Space
    from compress_search.study import Study, load_study

__version__ = "0.1.0"

# ONNX Runtime otherwise writes an identifier into the user's cache when it is imported
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_HOME = {
    "AuxiliaryTask": "method",
    "Batch": "method",
    "Candidate": "candidate",
    "CompressSearchError": "errors",
    "Context": "method",
    "Dim": "space",
    "ExportError": "errors",
    "Loss": "method",
    "Method": "method",
    "NothingFeasible": "errors",
    "ParameterGroup": "method",
    "Params": "space",
    "PluginError": "errors",
    "Recipe": "recipe",
    "Space": "space",
    "Stage": "method",
    "Step": "recipe",
    "StorageError": "errors",
    "Study": "study",
    "StudyError": "errors",
    "Subject": "candidate",
    "TrialError": "errors",
    "load_study": "study",
}

__all__ = [
    "AuxiliaryTask",
    "Batch",
    "Candidate",
    "CompressSearchError",
    "Context",
    "Dim",
    "ExportError",
    "Loss",
    "Method",
    "NothingFeasible",
    "ParameterGroup",
    "Params",
    "PluginError",
    "Recipe",
    "Space",
    "Stage",
    "Step",
    "StorageError",
    "Study",
    "StudyError",
    "Subject",
    "TrialError",
    "load_study",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__

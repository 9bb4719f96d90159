"""Which engine runs the result: ONNX Runtime or torch, as a dimension of the search.

Their ratio depends on the machine and on the shapes, so it is measured and never assumed.
"""

from __future__ import annotations

from collections.abc import Mapping

from compress_search import Candidate, Context, Dim, Method, Params, Stage, Subject


class Runtimes(Method):
    """The engine, where an earlier step has left a choice."""

    stage = Stage.RUNTIME

    def search_space(self, teacher: Subject) -> Mapping[str, Dim]:
        """Engines that run every network without further rewriting."""
        return {"engine": Dim.choice(("onnxruntime", "torch"), "onnxruntime")}

    def unsupported(self, subject: Subject) -> str | None:
        """Whether the precision has settled the engine already."""
        settled = {"onnx-only": "ONNX Runtime", "torch-only": "torch"}
        engines = [engine for trait, engine in settled.items() if trait in subject.traits]
        return f"only {engines[0]} runs what the precision step leaves" if engines else None

    def apply(self, candidate: Candidate, params: Params, context: Context) -> Candidate:
        """Name the engine; nothing about the network changes."""
        return candidate.replace(runtime={**candidate.runtime, "engine": params["engine"]})

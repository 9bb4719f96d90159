"""The engines: what loads an artefact's files and computes logits with them.

Owns how each engine is set up, threads included, and the padding of batches to the widths it was prepared for.
Knows nothing of artefact directories as wholes, of scores or of clocks. Engines import their libraries when they
are set up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from compress_search.errors import ExportError

if TYPE_CHECKING:
    from onnxruntime import SessionOptions
    from torch import nn

ONNX, TORCH, COMPILE = "onnxruntime", "torch", "compile"
ENGINES = (ONNX, TORCH, COMPILE)
"""ONNX Runtime on an exported file; torch as it is; torch compiled by Inductor."""

BACKEND = "inductor"
"""What torch.compile hands the traced network to."""

CUDA_PROVIDER = "CUDAExecutionProvider"

CPU_SESSION = {"optimization.disable_specified_optimizers": "SkipLayerNormFusion"}
"""What an ONNX Runtime session on a CPU is configured with, whoever opens it.

Its kernel for a residual sum and the layer normalisation after it takes 5 times as long as the two apart or longer
(decision 0029); it is fused in the graphs of int8 networks.
"""

Inputs = Mapping[str, NDArray[Any]]


class Runner(Protocol):
    """A loaded model: int64 arrays (B, S) in, float32 logits (B, C) or (B, S, C) out."""

    def __call__(self, batch: Inputs) -> NDArray[np.float32]:
        """Takes ``input_ids``, ``attention_mask`` and, where there are any, ``token_type_ids``; ignores others."""


class OnnxRunner:
    """An ONNX Runtime session with every graph optimisation that pays, fed with the inputs that the file has.

    The exporter leaves out those that nothing depends on, as the mask of a network that lost all its heads.
    """

    def __init__(self, model: Path, threads: int, device: str) -> None:
        import onnxruntime

        providers = providers_for(device, onnxruntime.get_available_providers())
        if not model.is_file():
            raise ExportError(f"{model}: no such file")
        options = session_options(threads, device)
        self.session = onnxruntime.InferenceSession(str(model), options, providers=providers)
        self.inputs = tuple(node.name for node in self.session.get_inputs())

    def __call__(self, batch: Inputs) -> NDArray[np.float32]:
        """Logits of one batch."""
        return cast(NDArray[np.float32], self.session.run(["logits"], feed(self.inputs, batch))[0])


def session_options(threads: int, device: str) -> SessionOptions:
    """How ONNX Runtime is asked to run a graph."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # else idle threads go on spinning after a pass, and take the cores of whoever is timed next
    entries = {"session.force_spinning_stop": "1"} | (CPU_SESSION if device == "cpu" else {})
    for name, value in entries.items():
        options.add_session_config_entry(name, value)
    return options


def providers_for(device: str, available: Sequence[str]) -> list[str]:
    """ONNX Runtime's providers in the order they are asked: CUDA first where the device is one and it is there.

    An operator that CUDA has no kernel for, as those of int8, runs on the CPU in between.
    """
    wanted = [] if device == "cpu" else [CUDA_PROVIDER]
    return [name for name in wanted if name in available] + ["CPUExecutionProvider"]


class TorchRunner:
    """The network itself in inference mode, in the dtype of its weights."""

    def __init__(
        self, network: nn.Module, inputs: Sequence[str], threads: int, device: str, attention: str = "sdpa"
    ) -> None:
        from compress_search.encoders import set_attention

        set_attention(network, attention)
        self.network, self.inputs = network.eval().requires_grad_(False).to(device), tuple(inputs)
        self.threads, self.device = threads, device
        self.compute: Callable[..., Any] = self.forward

    def forward(self, **tensors: Any) -> Any:
        """Logits as a tensor on the device."""
        return self.network(**tensors).logits

    def __call__(self, batch: Inputs) -> NDArray[np.float32]:
        """Logits of one batch, on the CPU."""
        import torch

        tensors = {
            name: torch.from_numpy(value).to(self.device) for name, value in feed(self.inputs, batch).items()
        }
        use_threads(self.threads)
        with torch.inference_mode():
            return cast(NDArray[np.float32], self.compute(**tensors).float().cpu().numpy())


class CompiledRunner(TorchRunner):
    """The network compiled by Inductor: once for all shapes, or once for each of a few widths.

    Compilation happens on the first batch of its shape and takes tens of seconds of a C++ (or Triton) compiler.
    ``freezing`` folds the weights into the compiled code's constants; it is for CPUs.
    """

    def __init__(
        self,
        network: nn.Module,
        inputs: Sequence[str],
        threads: int,
        device: str,
        attention: str = "sdpa",
        *,
        widths: int = 0,
        freezing: bool = True,
        max_autotune: bool = False,
    ) -> None:
        import torch

        super().__init__(network, inputs, threads, device, attention)
        # a compilation for each width at one batch size, and for what is left over at the end of a split
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 2 * widths + 8)
        options = {"freezing": freezing and device == "cpu", "max_autotune": max_autotune}
        settings: dict[str, Any] = {"options": options} if BACKEND == "inductor" else {}
        self.compute = torch.compile(self.forward, backend=BACKEND, dynamic=not widths, **settings)


class Bucketed:
    """Another runner, fed with batches padded to the next of a few widths.

    ``pad`` is the tokenizer's padding token: some families count positions by it. Batches wider than the last
    bucket run as they are.
    """

    def __init__(self, run: Runner, buckets: Sequence[int], pad: int) -> None:
        self.run, self.buckets, self.pad = run, tuple(buckets), pad

    def __call__(self, batch: Inputs) -> NDArray[np.float32]:
        """Logits of one batch; of its own positions alone where there are logits for each."""
        length = batch["input_ids"].shape[1]
        logits = self.run(padded(batch, padded_width(length, self.buckets), self.pad))
        return logits[:, :length] if logits.ndim == 3 else logits


def padded_width(length: int, buckets: Sequence[int]) -> int:
    """The width that a batch of this length runs at: the first bucket that holds it, or its own."""
    return next((width for width in sorted(buckets) if width >= length), length)


def padded(batch: Inputs, width: int, pad: int) -> Inputs:
    """The batch's (B, S) arrays as (B, ``width``): padding tokens that the mask hides."""
    extra = width - batch["input_ids"].shape[1]
    if extra == 0:
        return batch
    names = ("input_ids", "attention_mask", "token_type_ids")
    fill = {"input_ids": pad}
    return {
        name: np.pad(batch[name], ((0, 0), (0, extra)), constant_values=fill.get(name, 0))
        for name in names
        if name in batch
    }


def feed(inputs: Sequence[str], batch: Inputs) -> dict[str, NDArray[np.int64]]:
    """The engine's inputs; a tokenizer that knows no segments leaves ``token_type_ids`` to be zeros."""
    zeros = {"token_type_ids": np.zeros_like(batch["input_ids"])}
    return {name: np.ascontiguousarray({**zeros, **batch}[name], dtype=np.int64) for name in inputs}


def load_torch(
    weights: Path, inputs: Sequence[str], runtime: Mapping[str, Any], threads: int, device: str
) -> Runner:
    """The runner of the torch engines on a directory of weights, set up as ``runtime`` says."""
    from compress_search.encoders import load_network

    network, attention = load_network(weights), runtime.get("attention", "sdpa")
    if runtime["engine"] == TORCH:
        return TorchRunner(network, inputs, threads, device, attention)
    return CompiledRunner(
        network,
        inputs,
        threads,
        device,
        attention,
        widths=len(runtime.get("buckets", ())),
        freezing=runtime.get("freezing", True),
        max_autotune=runtime.get("max_autotune", False),
    )


def use_threads(number: int) -> None:
    """Give torch so many threads; that setting is the whole process's, which other runners share."""
    import torch

    if torch.get_num_threads() != number:
        torch.set_num_threads(number)

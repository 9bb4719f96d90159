"""The architecture manifest: shapes as JSON beside the weights, so that any network of ours loads again.

A transformers configuration cannot say that layers have different widths, share weights or hold a matrix as a
product of two. The manifest can: the base configuration, the shapes of every layer, which modules are factored, and
which modules or tensors are one and the same. Owns the saved directory; knows nothing of how a network came to its
shapes.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from compress_search.crf import Crf, attach_crf
from compress_search.encoders import recurrent, sparse_storage, surgery, view
from compress_search.encoders.factors import KINDS, Factored
from compress_search.errors import ExportError

FORMAT = 1
MANIFEST, WEIGHTS = "manifest.json", "model.safetensors"
_HEADS = ("ForSequenceClassification", "ForTokenClassification")
# facts of a session or of a file, not of the architecture
_VOLATILE = ("_name_or_path", "transformers_version", "architectures", "dtype", "output_hidden_states")

_BUILDING = threading.Lock()
"""Held while weights are not initialised, which transformers arranges by patching torch for every thread."""

Manifest = Mapping[str, Any]


def describe(network: nn.Module) -> dict[str, Any]:
    """The manifest of a network, read off its modules.

    Returns:
        ``class`` and ``config`` of the network that is built first; ``layers``: heads, head_dim and ffn of each;
        ``hidden``: the width, where it is not that of the configuration;
        ``factors``: module path -> ``kind`` and ``rank`` of a factored module; ``shared``: module path -> path of
        the module it is; ``tied``: the same for single tensors; ``dtype``.

    Raises:
        ExportError: the network holds something that the manifest cannot express, so it would not load again.
    """
    if isinstance(network, recurrent.Recurrent):
        manifest = {**_common(network), "layers": recurrent.shapes(network), "factors": {}}
        _check_complete(network, manifest)
        return manifest
    manifest = {
        **_common(network),
        "layers": [_shape(layer) for layer in view.layers(network)],
        "factors": _factors(network),
    }
    width = len(view.parts(view.layers(network)[0]).output_norm.weight)
    if width != cast(Any, network.config).hidden_size:
        manifest["hidden"] = width
    _check_complete(network, manifest)
    return manifest


def _common(network: nn.Module) -> dict[str, Any]:
    shared = _shared_modules(network)
    return {
        "format": FORMAT,
        "class": type(network).__name__,
        "config": _config(network),
        "dtype": _dtype(network),
        "shared": shared,
        "tied": _tied_tensors(network, shared),
    }


def build(manifest: Manifest, device: str = "cpu") -> nn.Module:
    """A network of these shapes in evaluation mode, with weights that mean nothing.

    Raises:
        ExportError: the manifest is of another format, or names a class or a factored module we do not build.
    """
    if manifest.get("format") != FORMAT:
        raise ExportError(f"manifest format {manifest.get('format')!r} is not supported: expected {FORMAT}")
    if manifest["class"] in recurrent.CLASSES:
        return recurrent.build(manifest["class"], manifest["config"], device).to(_dtype_of(manifest)).eval()
    if not str(manifest["class"]).endswith(_HEADS) or manifest["config"]["model_type"] not in view.FAMILIES:
        raise ExportError(f"{manifest['class']!r} is no network that a manifest may describe")
    config = AutoConfig.for_model(**manifest["config"])
    config._attn_implementation = "sdpa"
    with _BUILDING, no_init_weights(), torch.device(device):
        network: nn.Module = getattr(transformers, manifest["class"])(config)
        attach_crf(network)
    _cut(network, manifest["layers"])
    if "hidden" in manifest:
        surgery.prune_hidden(network, range(manifest["hidden"]))
    _factor(network, manifest.get("factors", {}))
    _alias(network, manifest)
    return network.to(_dtype_of(manifest)).eval()


def _dtype_of(manifest: Manifest) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, manifest["dtype"])
    return dtype


def save(network: nn.Module, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write manifest, canonical tensors and tokenizer; each shared tensor once.

    Tensors with many zeros are packed; the manifest then has their forms in ``sparse``.

    Raises:
        ExportError: the network would not load again (see :func:`describe`).
    """
    manifest = describe(network)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous().cpu() for name, tensor in _canonical(network, manifest)}
    stored, manifest["sparse"] = sparse_storage.pack_tensors(tensors)
    save_file(stored, directory / WEIGHTS)
    tokenizer.save_pretrained(directory)
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True), encoding="utf-8")


def load(directory: Path) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The network in evaluation mode and the tokenizer that :func:`save` wrote.

    Raises:
        ExportError: a file is missing, or tensors and manifest do not match.
    """
    return load_network(directory), AutoTokenizer.from_pretrained(directory)


def load_network(directory: Path) -> nn.Module:
    """Only the network of :func:`load`."""
    manifest = read(directory)
    network = build(manifest)
    tensors = sparse_storage.unpack_tensors(load_file(directory / WEIGHTS), manifest.get("sparse", {}))
    expected = {name: tensor.shape for name, tensor in _canonical(network, manifest)}
    if expected != {name: tensor.shape for name, tensor in tensors.items()}:
        wrong = sorted(expected.keys() ^ tensors.keys()) or [n for n in expected if expected[n] != tensors[n].shape]
        raise ExportError(f"{directory / WEIGHTS}: tensors do not match the manifest: {', '.join(wrong[:3])}")
    with torch.no_grad():
        for name, tensor in _canonical(network, manifest):
            tensor.copy_(tensors[name])
    return network


def read(directory: Path) -> dict[str, Any]:
    """The manifest in a directory.

    Raises:
        ExportError: there is none, or it is not JSON.
    """
    path = directory / MANIFEST
    try:
        return cast(dict[str, Any], json.loads(path.read_text(encoding="utf-8")))
    except (OSError, json.JSONDecodeError) as error:
        raise ExportError(f"{path}: expected an architecture manifest: {error}") from error


def shape_key(manifest: Manifest) -> str:
    """Equal for networks of equal shapes, whatever their weights, labels' names or dropout: 16 hex digits."""
    config = manifest["config"]
    sizes = {name: value for name, value in config.items() if type(value) is int and not name.endswith("_id")}
    facts = [manifest[part] for part in ("class", "dtype", "layers", "factors", "shared", "tied")]
    facts += [manifest["hidden"]] if "hidden" in manifest else []
    activation = config.get("hidden_act", config.get("activation"))
    outputs = len(config.get("id2label", ()))
    text = json.dumps([facts, sizes, activation, outputs], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _config(network: nn.Module) -> dict[str, Any]:
    config = cast(Any, network.config).to_dict()
    # as it will be read again: JSON knows no integer keys, which id2label has
    return cast(dict[str, Any], json.loads(json.dumps({k: v for k, v in config.items() if k not in _VOLATILE})))


def _dtype(network: nn.Module) -> str:
    # a CRF stays in 32 bits whatever the rest is converted to
    apart = {id(p) for module in network.modules() if isinstance(module, Crf) for p in module.parameters()}
    converted = [parameter for parameter in network.parameters() if id(parameter) not in apart]
    dtypes = {str(parameter.dtype).removeprefix("torch.") for parameter in converted}
    if len(dtypes) != 1:
        raise ExportError(f"a network is saved in one dtype, and this one mixes {', '.join(sorted(dtypes))}")
    return dtypes.pop()


def _shape(layer: nn.Module) -> dict[str, int]:
    try:
        parts = view.parts(layer)
    except (TypeError, AttributeError) as error:
        raise ExportError(f"the manifest cannot describe this layer: {error}") from error
    return {"heads": parts.heads, "head_dim": parts.head_dim, "ffn": parts.neurons}


def _cut(network: nn.Module, shapes: list[dict[str, int]]) -> None:
    """Bring every layer to its shape; which heads go does not matter, as the weights mean nothing yet."""
    surgery.prune_heads(network, {index: range(shape["heads"]) for index, shape in enumerate(shapes)})
    surgery.prune_neurons(network, {index: range(shape["ffn"]) for index, shape in enumerate(shapes)})


def _factors(network: nn.Module) -> dict[str, dict[str, Any]]:
    """Path -> kind and rank of every factored module, each under its first path."""
    return {
        path: {"kind": module.kind, "rank": module.rank}
        for path, module in network.named_modules()
        if isinstance(module, Factored)
    }


def _factor(network: nn.Module, factors: Mapping[str, Mapping[str, Any]]) -> None:
    """Put a factored module in place of each whole one that the manifest names."""
    for path, entry in factors.items():
        if entry["kind"] not in KINDS:
            raise ExportError(f"{path}: factors of kind {entry['kind']!r} are unknown: expected {', '.join(KINDS)}")
        whole = network.get_submodule(path)
        network.set_submodule(path, KINDS[entry["kind"]].like(whole, entry["rank"]))


def _shared_modules(network: nn.Module) -> dict[str, str]:
    """Outermost modules with weights that occur at several paths: later path -> first path."""
    first: dict[int, str] = {}
    shared: dict[str, str] = {}
    for path, module in network.named_modules(remove_duplicate=False):
        inside = any(path.startswith(f"{outer}.") for outer in shared)
        if inside or not any(True for _ in module.parameters()):
            continue
        if first.setdefault(id(module), path) != path:
            shared[path] = first[id(module)]
    return shared


def _tied_tensors(network: nn.Module, shared: Mapping[str, str]) -> dict[str, str]:
    """Parameters that occur in several distinct modules: later name -> first name."""
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        if any(name.startswith(f"{path}.") for path in shared):
            continue
        if first.setdefault(id(parameter), name) != name:
            tied[name] = first[id(parameter)]
    return tied


def _alias(network: nn.Module, manifest: Manifest) -> None:
    for path, source in manifest["shared"].items():
        network.set_submodule(path, network.get_submodule(source))
    for name, source in manifest["tied"].items():
        owner, _, attribute = name.rpartition(".")
        setattr(network.get_submodule(owner), attribute, network.get_parameter(source))


def _canonical(network: nn.Module, manifest: Manifest) -> Iterator[tuple[str, torch.Tensor]]:
    """Persistent tensors under their canonical names: aliases left out."""
    for name, tensor in network.state_dict(keep_vars=True).items():
        aliased = name in manifest["tied"] or any(name.startswith(f"{path}.") for path in manifest["shared"])
        if not aliased:
            yield name, tensor.detach()


def _check_complete(network: nn.Module, manifest: Manifest) -> None:
    """Compare every tensor's name and shape with those of the network the manifest builds."""
    rebuilt = {n: tuple(t.shape) for n, t in build(manifest, device="meta").state_dict().items()}
    actual = {n: tuple(t.shape) for n, t in network.state_dict().items()}
    if rebuilt != actual:
        wrong = sorted(name for name in rebuilt.keys() | actual.keys() if rebuilt.get(name) != actual.get(name))
        raise ExportError(f"the manifest cannot describe {', '.join(wrong[:3])}: fold masks first (bake)")

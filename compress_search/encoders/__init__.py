"""BERT-like encoders as methods see them: one view of their parts, surgery on them, and saving what results."""

from compress_search.encoders.factors import Factored, FactoredEmbedding
from compress_search.encoders.manifest import build, describe, load, load_network, save, shape_key
from compress_search.encoders.surgery import bake, keep_layers, prune_heads, prune_neurons, share_parts
from compress_search.encoders.view import (
    FAMILIES,
    LayerParts,
    backbone,
    embeddings,
    family,
    head,
    inputs,
    layers,
    parts,
    set_attention,
    set_layers,
    subject_of,
)

__all__ = [
    "FAMILIES",
    "Factored",
    "FactoredEmbedding",
    "LayerParts",
    "backbone",
    "bake",
    "build",
    "describe",
    "embeddings",
    "family",
    "head",
    "inputs",
    "keep_layers",
    "layers",
    "load",
    "load_network",
    "parts",
    "prune_heads",
    "prune_neurons",
    "save",
    "set_attention",
    "set_layers",
    "shape_key",
    "share_parts",
    "subject_of",
]

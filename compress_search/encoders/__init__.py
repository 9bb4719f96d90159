"""BERT-like encoders as methods see them: one view of their parts, surgery on them, and saving what results."""

from compress_search.crf import Crf, attach_crf, crf_of
from compress_search.encoders.factors import Factored, FactoredEmbedding, LowRankLinear
from compress_search.encoders.features import feature_shape, read_features, recording
from compress_search.encoders.manifest import build, describe, load, load_network, save, shape_key
from compress_search.encoders.recurrent import RecurrentConfig, new_recurrent
from compress_search.encoders.skipping import layer_drop
from compress_search.encoders.stream import Stream, norm_over, stream
from compress_search.encoders.surgery import (
    bake,
    keep_layers,
    keep_tokens,
    prune_heads,
    prune_hidden,
    prune_neurons,
    share_parts,
)
from compress_search.encoders.view import (
    FAMILIES,
    LayerParts,
    backbone,
    embeddings,
    family,
    head,
    head_linears,
    inputs,
    layers,
    parts,
    set_attention,
    set_layers,
    subject_of,
)
from compress_search.encoders.vocabulary import Pieces, keep_pieces, kept_ids, refusal

__all__ = [
    "FAMILIES",
    "Crf",
    "Factored",
    "FactoredEmbedding",
    "LayerParts",
    "LowRankLinear",
    "Pieces",
    "RecurrentConfig",
    "Stream",
    "attach_crf",
    "backbone",
    "bake",
    "build",
    "crf_of",
    "describe",
    "embeddings",
    "family",
    "feature_shape",
    "head",
    "head_linears",
    "inputs",
    "keep_layers",
    "keep_pieces",
    "keep_tokens",
    "kept_ids",
    "layer_drop",
    "layers",
    "load",
    "load_network",
    "new_recurrent",
    "norm_over",
    "parts",
    "prune_heads",
    "prune_hidden",
    "prune_neurons",
    "read_features",
    "recording",
    "refusal",
    "save",
    "set_attention",
    "set_layers",
    "shape_key",
    "share_parts",
    "stream",
    "subject_of",
]

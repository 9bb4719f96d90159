"""Self-attention of an exported graph as one node of ONNX Runtime, which computes the same and sooner.

A layer's queries, keys, values, scores and context are 19 nodes of the ONNX standard, 28 where the three maps are
in dynamic int8. On a CPU ``Attention`` and ``QAttention`` (domain com.microsoft) take less time
(decision 0033). ONNX Runtime makes the first of them itself, but only for layers that have all of their heads.

Owns the pattern and the nodes that replace it. Knows nothing of networks, nor why some maps have fewer bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from compress_search.runtimes.onnx_graph import Graph, drop_unread

DOMAIN = "com.microsoft"
MASK = "attention_mask"
_ADDED_MASK = ("Mul", "Sub", "Cast", "Unsqueeze", "Unsqueeze")
"""From what is added to the scores back to the mask, as :mod:`~compress_search.runtimes.onnx_export` writes it."""


class _Differs(Exception):
    """The graph is not the pattern here."""


@dataclass(frozen=True)
class _Map:
    """A linear map by the names of what it reads and of its constants.

    ``reads`` is the activation in float32, or its int8 codes, their scale and their zero point; then the weight
    (inputs, outputs) has a scale and a zero point for each output too.
    """

    reads: tuple[str, ...]
    weight: str
    bias: str
    scale: str = ""
    zero: str = ""


@dataclass(frozen=True)
class _Block:
    """The attention of a layer: its maps for queries, keys and values, and the name of the context (B, S, A·d)."""

    maps: tuple[_Map, _Map, _Map]
    heads: int
    context: str


def fuse_attention(path: Path) -> int:
    """Rewrite the file with one node for each attention that can be one; how many there are.

    Left as they are: maps of other forms or of different precision, with one scale for all outputs, products of two
    matrices, and weights that are shared in other company, which would be stored more than once.
    """
    model = onnx.load(path)
    graph = Graph(model.graph)
    blocks = _without_copies(graph, [found for node in graph.nodes if (found := _block(graph, node))])
    if blocks:
        _replace(model, graph, blocks)
        onnx.save(model, path)
    return len(blocks)


def _block(graph: Graph, end: onnx.NodeProto) -> _Block | None:
    """The attention that ends with this node; None where there is none, or one that is not the pattern."""
    try:
        return _matched(graph, end)
    except _Differs:
        return None


def _matched(graph: Graph, end: onnx.NodeProto) -> _Block:
    if end.op_type != "Reshape" or (shape := graph.array(end.input[1])) is None or len(shape) != 3:
        raise _Differs
    context, permutation = _transposed(graph, end.input[0])
    probabilities, values = _made(graph, context, "MatMul").input
    added = _made(graph, _made(graph, probabilities, "Softmax").input[0], "Add")
    scaled, mask = added.input
    _check_mask(graph, mask)
    scores, factor = _with_constant(graph, _made(graph, scaled, "Mul"))
    queries, keys = _made(graph, scores, "MatMul").input
    orders = [(queries, (0, 2, 1, 3)), (keys, (0, 2, 3, 1)), (values, (0, 2, 1, 3))]
    found = [_heads(graph, name, order) for name, order in orders]
    widths = {width for _, width in found}
    query, key, value = (one for one, _ in found)
    alike = {(one.reads, bool(one.scale)) for one in (query, key, value)}
    if permutation != (0, 2, 1, 3) or len(widths) != 1 or len(alike) != 1:
        raise _Differs
    width = widths.pop()
    outputs = {_size(graph, one.bias) for one in (query, key, value)}
    if len(outputs) != 1 or not np.isclose(graph.number(factor) or 0, width**-0.5, rtol=1e-6):
        raise _Differs
    return _Block((query, key, value), outputs.pop() // width, end.output[0])


def _heads(graph: Graph, name: str, order: tuple[int, ...]) -> tuple[_Map, int]:
    """The map behind a value of shape (B, S, A, d) in some other order of axes, and d."""
    split, permutation = _transposed(graph, name)
    reshape = _made(graph, split, "Reshape")
    shape = graph.array(reshape.input[1])
    if permutation != order or shape is None or len(shape) != 4:
        raise _Differs
    return _map(graph, reshape.input[0]), int(shape[3])


def _map(graph: Graph, name: str) -> _Map:
    """The linear map with a bias that makes a value."""
    product, bias = _with_constant(graph, _made(graph, name, "Add"))
    if (scaled := graph.made(product, "Mul")) is not None:
        return _dynamic_map(graph, scaled, bias)
    read, weight = _made(graph, product, "MatMul").input
    if not graph.is_constant(weight):
        raise _Differs
    return _Map((read,), graph.base(weight), graph.base(bias))


def _dynamic_map(graph: Graph, scaled: onnx.NodeProto, bias: str) -> _Map:
    """The map whose integer products are brought to scale by this node."""
    integers = _made(graph, _made(graph, scaled.input[0], "Cast").input[0], "MatMulInteger")
    scale, weight_scale = _with_constant(graph, _made(graph, scaled.input[1], "Mul"))
    if len(integers.input) != 4:
        raise _Differs
    codes, weight, zero, weight_zero = integers.input
    if not graph.is_constant(weight) or _size(graph, weight_scale) != _size(graph, bias):
        raise _Differs
    constants = (graph.base(one) for one in (weight, bias, weight_scale, weight_zero))
    return _Map((codes, scale, zero), *constants)


def _size(graph: Graph, name: str) -> int:
    """How many numbers a constant holds."""
    return int(np.asarray(graph.array(name)).size)


def _made(graph: Graph, name: str, kind: str) -> onnx.NodeProto:
    """The node of this kind that makes a value."""
    if (maker := graph.made(name, kind)) is None:
        raise _Differs
    return maker


def _with_constant(graph: Graph, node: onnx.NodeProto) -> tuple[str, str]:
    """The computed and the constant input of a sum or product, whichever comes first."""
    first, second = node.input
    if graph.is_constant(first) == graph.is_constant(second):
        raise _Differs
    return (second, first) if graph.is_constant(first) else (first, second)


def _transposed(graph: Graph, name: str) -> tuple[str, tuple[int, ...]]:
    """What one or two transpositions make a value of four axes from, and the order they bring its axes in."""
    order = (0, 1, 2, 3)
    while (maker := graph.made(name, "Transpose")) is not None:
        permutation = helper.get_attribute_value(maker.attribute[0]) if maker.attribute else ()
        if len(permutation) != len(order):
            raise _Differs
        order = tuple(permutation[axis] for axis in order)
        name = maker.input[0]
    return name, order


def _check_mask(graph: Graph, name: str) -> None:
    """Only what hides padding is an input of the fused node; anything else that is added to scores is not."""
    for kind in _ADDED_MASK:
        computed = [one for one in _made(graph, name, kind).input if not graph.is_constant(one)]
        if len(computed) != 1:
            raise _Differs
        (name,) = computed
    if name != MASK:
        raise _Differs


def _without_copies(graph: Graph, blocks: Sequence[_Block]) -> list[_Block]:
    """The blocks of three weights that nobody reads but blocks of the same three."""
    triples = {block.context: tuple(one.weight for one in block.maps) for block in blocks}
    readers = {
        weight: [triple for triple in triples.values() for one in triple if one == weight]
        for triple in triples.values()
        for weight in triple
    }
    alone = {
        weight for weight, found in readers.items() if len(set(found)) == 1 and len(found) == graph.reads[weight]
    }
    return [block for block in blocks if len(alone.intersection(triples[block.context])) == len(block.maps)]


def _replace(model: onnx.ModelProto, graph: Graph, blocks: Sequence[_Block]) -> None:
    constants: dict[tuple[str, ...], onnx.TensorProto] = {}
    fused = {block.context: _node(graph, block, constants) for block in blocks}
    mask = helper.make_node("Cast", [MASK], [f"{MASK}_32"], name=f"{MASK}_32", to=TensorProto.INT32)
    after = [fused.get(node.output[0], node) for node in graph.nodes]
    del model.graph.node[:]
    model.graph.node.extend([mask, *after])
    model.graph.initializer.extend(constants.values())
    drop_unread(model.graph)
    if DOMAIN not in {opset.domain for opset in model.opset_import}:
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))


def _node(graph: Graph, block: _Block, constants: dict[tuple[str, ...], onnx.TensorProto]) -> onnx.NodeProto:
    """The one node of a block; its constants, the three maps' side by side, are added to the others."""

    def joined(part: str) -> str:
        names = tuple(getattr(one, part) for one in block.maps)
        if names not in constants:
            arrays = [np.asarray(graph.array(name)) for name in names]
            constants[names] = numpy_helper.from_array(np.concatenate(arrays, -1), f"{block.context}/{part}")
        return constants[names].name

    first, weight, bias = block.maps[0].reads[0], joined("weight"), joined("bias")
    if block.maps[0].scale:
        _, scale, zero = block.maps[0].reads
        kind = "QAttention"
        reads = [first, weight, bias, scale, joined("scale"), f"{MASK}_32", zero, joined("zero")]
    else:
        kind, reads = "Attention", [first, weight, bias, f"{MASK}_32"]
    return helper.make_node(
        kind,
        reads,
        [block.context],
        name=block.context,
        domain=DOMAIN,
        num_heads=block.heads,
        mask_filter_value=float(np.finfo(np.float32).min),
    )

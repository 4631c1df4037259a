"""Accounting: every operator that multiplies, its floating-point operations, and why it is as it
is.

Linear, convolution, matmul, einsum that contracts two or more tensors, and attention have a kind of
their own; any other operator that torch counts products in, such as a recurrent layer, is a kind by
its name (`fxq.flops`). The cost of everything else grows with the number of elements only. Each
operator that multiplies is quantized or sparse, or its record (`fxq.layer`) says why not.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

import fxq.rectified_attention.op  # noqa: F401  registers the operator
from fxq.einsum import Equation
from fxq.flops import counted_flops
from fxq.graph import args_of, constant_of, hint, is_constant, is_op, owner_name, shape_of, val_of
from fxq.layer import Layer, Skip, layer_of

aten = torch.ops.aten

LINEAR = frozenset({aten.linear.default})
CONV = frozenset({
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.convolution.default,
    aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding,
})  # fmt: skip
CONV_TRANSPOSE = frozenset({
    aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input,
})  # fmt: skip
MATMUL = frozenset({
    aten.matmul.default, aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default,
    aten.addmm.default, aten.baddbmm.default,
})  # fmt: skip
SPARSE_ATTENTION = torch.ops.fxq.rectified_attention.default
ATTENTION = frozenset({aten.scaled_dot_product_attention.default, SPARSE_ATTENTION})
KINDS = {
    "linear": LINEAR,
    "conv": CONV,
    "transposed conv": CONV_TRANSPOSE,
    "matmul": MATMUL,
    "einsum": frozenset({aten.einsum.default}),
    "attention": ATTENTION,
}
KIND_OF: dict[Any, str] = {target: kind for kind, targets in KINDS.items() for target in targets}


@dataclass(frozen=True)
class Row:
    """One operator of the account.

    Args:
        node: the node's name in the graph.
        module: qualified name of the module it came from.
        kind: a key of `KINDS`, or the operator's name.
        flops: floating-point operations, a multiply-add counting as two.
        layer: its record.
    """

    node: str
    module: str
    kind: str
    flops: int
    layer: Layer

    @property
    def format(self) -> str | None:
        """`"int8 x int8"` and the like (activation x weight), how sparse an attention is, None
        where float and dense."""
        return self.layer.format

    @property
    def skip(self) -> Skip | None:
        """Why float, None where quantized or about to be."""
        return self.layer.skip


def kind_of(node: Node) -> str | None:
    """Return the key of `KINDS` a node falls under, the name of any other operator that multiplies,
    and None for the rest."""
    kind = KIND_OF.get(node.target) if node.op == "call_function" else None
    if kind is None and counted_flops(node):
        return str(node.target._opname)  # type: ignore[union-attr]
    return None if kind == "einsum" and not Equation.of(node).contracts else kind


def flops_of(node: Node, sizes: Mapping[str, int] | None = None) -> int:
    """Return a node's floating-point operations, 0 for a node that does not multiply.

    Sparse attention counts as the dense attention it stands for, so that shares compare with the
    model as it was, and because its density may change from call to call.

    Args:
        node: any node.
        sizes: values of the graph's free sizes by name; those at capture where left out.
    """
    kind = kind_of(node)
    if kind not in KINDS or kind == "einsum":
        return counted_flops(node, sizes)
    shapes = [[hint(size, sizes) for size in shape_of(n)] for n in node.args if isinstance(n, Node)]
    result = val_of(node)
    result = result[0] if isinstance(result, tuple | list) else result
    out = math.prod(hint(size, sizes) for size in result.shape)
    match kind:
        case "linear":
            return 2 * out * shapes[1][-1]
        case "conv":
            return 2 * out * math.prod(shapes[1][1:])
        case "transposed conv":
            return 2 * math.prod(shapes[0]) * math.prod(shapes[1][1:])
        case "attention":
            return 2 * (math.prod(shapes[0]) + out) * shapes[1][-2]
    adds = is_op(node, aten.addmm.default, aten.baddbmm.default)
    return 2 * out * shapes[1 if adds else 0][-1]


def sparse_format(node: Node) -> str | None:
    """Return how sparse an attention is, None for any other operator."""
    if not is_op(node, SPARSE_ATTENTION):
        return None
    density, mode = args_of(node)[3], args_of(node)[11]
    if not is_constant(density):
        return f"sparse ({mode}), density by policy"
    return f"sparse ({mode}), density {float(constant_of(density)):.3g}"


def account(gm: GraphModule, sizes: Mapping[str, int] | None = None) -> list[Row]:
    """Return one row per operator that multiplies, in graph order. `sizes` as for `flops_of`."""
    rows = []
    for node in gm.graph.nodes:
        kind = kind_of(node)
        if kind is None:
            continue
        layer = layer_of(node)
        layer = replace(layer, format=layer.format or sparse_format(node))
        rows.append(Row(node.name, owner_name(node), kind, flops_of(node, sizes), layer))
    return rows


def unintended_skips(gm: GraphModule) -> dict[str, str]:
    """Return module name -> reason for what a recipe meant to quantize and could not."""
    return {
        row.module: row.skip.reason
        for row in account(gm)
        if row.skip is not None and not row.skip.intended
    }

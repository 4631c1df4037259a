"""Accounting: every operator that multiplies, its floating-point operations, and why it is as it
is.

Linear, convolution, matmul, einsum that contracts two or more tensors, and attention have a kind of
their own; any other operator that torch counts products in, such as a recurrent layer, is a kind by
its name (`fxq.flops`). So is an operator of another library that reads a weight, with 0 operations,
which nobody can count. The cost of everything else grows with the number of elements only. Each
operator that multiplies is quantized or sparse, or its record (`fxq.layer`) says why not.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch.fx import GraphModule, Node

from fxq.einsum import Equation
from fxq.errors import listed
from fxq.flops import counted_flops, is_opaque, reads_weight
from fxq.graph import constant_of, hint, is_constant, is_op, owner_name, shape_of, val_of
from fxq.layer import OVERRIDE, Layer, Skip, layer_of
from fxq.operators import SPARSE_ATTENTION, TABLE, Movement, multiplied, operand

KINDS: Mapping[Movement | None, str] = {
    Movement.LINEAR: "linear", Movement.CONV: "conv", Movement.CONV_TRANSPOSE: "transposed conv",
    Movement.MATMUL: "matmul", Movement.ADDMM: "matmul", Movement.EINSUM: "einsum",
    Movement.ATTENTION: "attention", Movement.SPARSE_ATTENTION: "attention",
}  # fmt: skip
MIN_CHANGED = 0.01  # of the operations, below which a recipe's user is told
N_REASONS = 3
UNKNOWN = Skip(
    "an operator that fxq does not know reads its weight; its operations cannot be counted",
    intended=False,
)


@dataclass(frozen=True)
class Row:
    """One operator of the account.

    Args:
        node: the node's name in the graph.
        module: qualified name of the module it came from.
        kind: one of `KINDS`, or the operator's name; with its namespace where it is unknown.
        flops: floating-point operations, a multiply-add counting as two; 0 of an unknown one.
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
    """Return the kind a node falls under, the name of any other operator that multiplies, and None
    for the rest."""
    kind = KINDS.get(TABLE.get(node.target)) if node.op == "call_function" else None
    if kind is None and counted_flops(node):
        return str(node.target._opname)  # type: ignore[union-attr]
    if kind is None and is_unknown(node):
        return operator_name(node)
    return None if kind == "einsum" and not Equation.of(node).contracts else kind


def is_unknown(node: Node) -> bool:
    """Tell whether a node may be a layer that nobody can see into: an operator of another library
    that reads a weight."""
    return is_opaque(node) and reads_weight(node)


def operator_name(node: Node) -> str:
    """Return the name of the operator that a node calls, with its namespace."""
    return str(node.target._schema.name)  # type: ignore[union-attr]


def uncounted(gm: GraphModule) -> Counter[str]:
    """Return how many nodes there are of each operator that cannot be counted, by its name."""
    return Counter(operator_name(node) for node in gm.graph.nodes if is_opaque(node))


def flops_of(node: Node, sizes: Mapping[str, int] | None = None) -> int:
    """Return a node's floating-point operations, 0 for a node that does not multiply or that cannot
    be counted.

    Sparse attention counts as the dense attention it stands for, so that shares compare with the
    model as it was, and because its density may change from call to call.

    Args:
        node: any node.
        sizes: values of the graph's free sizes by name; those at capture where left out.
    """

    def shape(name: str) -> list[int]:
        return [hint(size, sizes) for size in shape_of(operand(node, name))]

    match kind_of(node):
        case "linear":
            of_one = shape("weight")[-1]
        case "conv":
            of_one = math.prod(shape("weight")[1:])
        case "transposed conv":
            return 2 * math.prod(shape("input")) * math.prod(shape("weight")[1:])
        case "attention":
            out = val_of(node)[0] if is_op(node, SPARSE_ATTENTION) else val_of(node)
            scored = math.prod(shape("query")) + math.prod(hint(size, sizes) for size in out.shape)
            return 2 * scored * shape("key")[-2]
        case "matmul":
            of_one = hint(shape_of(multiplied(node)[0])[-1], sizes)
        case _:
            return counted_flops(node, sizes)
    return 2 * math.prod(hint(size, sizes) for size in shape_of(node)) * of_one


def sparse_format(node: Node) -> str | None:
    """Return how sparse an attention is, None for any other operator."""
    if not is_op(node, SPARSE_ATTENTION):
        return None
    density, mode = operand(node, "density"), operand(node, "mode")
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


def little_changed(gm: GraphModule, quantizing: bool) -> str | None:
    """Return, of a graph in which a recipe changed less than a hundredth of the operations, that it
    did and why; None of any other, and where overrides asked for it.

    Args:
        gm: what the recipe made.
        quantizing: it is one that changes formats, so that nothing is less than was asked for.
    """
    rows = account(gm)
    total = sum(row.flops for row in rows)
    share = sum(row.flops for row in rows if row.format is not None) / max(total, 1)
    if share >= MIN_CHANGED or not total:
        return None
    ours = any(getattr(n.target, "namespace", "") == "fxq" for n in gm.graph.nodes)
    if not share and (not quantizing or ours):  # what has codes may be no layer, but a cache
        return None
    left = Counter[str]()
    for row in rows:
        if row.skip is not None and not row.skip.reason.startswith(OVERRIDE):
            left[f"{row.kind}: {row.skip.reason}"] += row.flops
    if left.total() < (1 - MIN_CHANGED if share else MIN_CHANGED) * total:
        return None
    reasons = [f"{why} ({flops / total:.1%})" for why, flops in left.most_common(N_REASONS)]
    changed = f"{share:.1%} of the operations" if share else "nothing"
    hint = "`fxq recipes` lists others"
    if any(why.startswith("conv: ") for why in left):
        hint += ", those that end in _conv quantize convolutions too"
    return f"it changed {changed} and left as they were {'; '.join(reasons)}; {hint}"


def weights_unseen(gm: GraphModule) -> str | None:
    """Return what operators a recipe left as they are because they are unknown and read a weight,
    how many and where; None where there are none."""
    rows = [row for row in account(gm) if row.skip == UNKNOWN]
    if not rows:
        return None
    kinds = Counter(row.kind for row in rows)
    operators = ", ".join(f"{kind} ({count})" for kind, count in kinds.most_common())
    return (
        f"operators that fxq does not know read weights, which stay as they are: {operators}, at "
        f"{listed(row.module for row in rows)}. Their operations cannot be counted and are in no "
        "share that fxq.report prints; write them in operators of torch to have them quantized"
    )


def unintended_skips(gm: GraphModule) -> dict[str, str]:
    """Return module name -> reason for what a recipe meant to quantize and could not."""
    return {
        row.module: row.skip.reason
        for row in account(gm)
        if row.skip is not None and not row.skip.intended
    }

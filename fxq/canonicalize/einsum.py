"""An einsum of two operands that is one matrix product becomes `aten.matmul`."""

from collections.abc import Sequence

import torch
from torch.fx import GraphModule, Node

from fxq.einsum import Equation
from fxq.graph import args_of, insert_call, is_constant, shape_of

aten = torch.ops.aten


def matmul_of_einsum(gm: GraphModule) -> int:
    """einsum("...", [a, b]) equals a product of both, permuted, provided one axis of each is
    contracted and every other axis is the result's.

    Where one operand is a constant it becomes the right one, so that the product is a linear.
    """
    count = 0
    for node in list(gm.graph.find_nodes(op="call_function", target=aten.einsum.default)):
        tensors = args_of(node)[1]
        if len(tensors) != 2:
            continue
        order = (1, 0) if is_constant(tensors[0]) else (0, 1)
        found = _product(node, order) or _product(node, order[::-1])
        if found is not None:
            found.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(found)
            count += 1
    return count


def _product(node: Node, order: tuple[int, int]) -> Node | None:
    """Insert the product of operands `order[0]` and `order[1]`; None where it is not one."""
    equation = Equation.of(node)
    a, b = (args_of(node)[1][index] for index in order)
    left, right = (equation.operands[index] for index in order)
    result = equation.result
    if not _same_sizes(a, left, b, right) or len(set(left)) < len(left):
        return None
    if len(set(right)) < len(right) or set(result) - {*left, *right}:
        return None
    batch = [x for x in left if x in right and x in result]
    summed = [x for x in left if x in right and x not in result]
    rows, columns = [x for x in left if x not in right], [x for x in right if x not in left]
    if {*rows, *columns} - set(result) or len(summed) != 1 or len(columns) != 1:
        return None
    if not rows or (batch and len(rows) > 1):
        return None
    a = _permuted(a, left, [*batch, *rows, *summed], node)
    b = _permuted(b, right, [*batch, *summed, *columns], node)
    product = insert_call(aten.matmul.default, (a, b), before=node)
    return _permuted(product, [*batch, *rows, *columns], result, node)


def _same_sizes(a: Node, left: Sequence[str], b: Node, right: Sequence[str]) -> bool:
    """Tell whether no size broadcasts."""
    sizes = dict(zip(left, map(str, shape_of(a)), strict=True))
    pairs = zip(right, map(str, shape_of(b)), strict=True)
    return all(sizes.get(label, size) == size for label, size in pairs)


def _permuted(value: Node, labels: Sequence[str], wanted: Sequence[str], user: Node) -> Node:
    dims = [list(labels).index(label) for label in wanted]
    moved = [i for i, dim in enumerate(dims) if i != dim]
    if not moved:
        return value
    if len(moved) == 2:
        # The form in which attention and linear are recognised.
        args = (value, *(i - len(dims) for i in moved))
        return insert_call(aten.transpose.int, args, before=user)
    return insert_call(aten.permute.default, (value, dims), before=user)

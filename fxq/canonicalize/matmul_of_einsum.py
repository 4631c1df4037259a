"""An einsum of two operands that is one matrix product becomes `aten.matmul`, one that only moves
the axes of a tensor `aten.permute`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from fxq.einsum import Equation
from fxq.graph import args_of, is_constant, shape_of
from fxq.rewriting import insert_call

aten = torch.ops.aten


@dataclass(frozen=True)
class _Product:
    """The product of operands `[*batch, *rows, *summed]` and `[*batch, *summed, *columns]`.

    Args:
        order: which operand is the left and which the right one.
        batch: labels of both operands and the result.
        rows: of the left operand and the result.
        summed: of both operands.
        columns: of the right operand and the result.
    """

    order: tuple[int, int]
    batch: list[str]
    rows: list[str]
    summed: list[str]
    columns: list[str]

    def n_moved(self, equation: Equation) -> int:
        """Count the axes that have to move."""
        left, right = (equation.operands[index] for index in self.order)
        return (
            _n_moved(left, [*self.batch, *self.rows, *self.summed])
            + _n_moved(right, [*self.batch, *self.summed, *self.columns])
            + _n_moved([*self.batch, *self.rows, *self.columns], equation.result)
        )


def permute_of_einsum(gm: GraphModule) -> int:
    """einsum("nchpwq->nhwcpq", [x]) equals permute(x, [0, 2, 4, 1, 3, 5]), provided every axis is
    the result's once."""
    count = 0
    for node in gm.graph.find_nodes(op="call_function", target=aten.einsum.default):
        equation = Equation.of(node)
        labels = equation.operands[0]
        if len(equation.operands) == 1 and sorted(labels) == sorted(set(equation.result)):
            x, order = args_of(node)[1][0], [labels.index(label) for label in equation.result]
            new = insert_call(aten.permute.default, (x, order), before=node)
            node.replace_all_uses_with(new)
            count += 1
    return count


def matmul_of_einsum(gm: GraphModule) -> int:
    """einsum("...", [a, b]) equals a product of both, permuted, provided one axis of each is
    contracted and every other axis is the result's.

    A constant becomes the right operand, so that the product is a linear; several of its axes may
    then be contracted or the result's, and are joined. Of two other orders the one in which fewer
    axes move is how the author thought of it: attention weights stay on the left.
    """
    count = 0
    for node in gm.graph.find_nodes(op="call_function", target=aten.einsum.default):
        if len(args_of(node)[1]) != 2:
            continue
        equation = Equation.of(node)
        constant = [is_constant(operand) for operand in args_of(node)[1]]
        found = [p for order in ((0, 1), (1, 0)) if (p := _product(node, equation, order))]
        if found:
            ranks = [(not constant[p.order[1]], p.n_moved(equation)) for p in found]
            chosen = found[ranks.index(min(ranks))]
            node.replace_all_uses_with(_insert(node, equation, chosen))
            count += 1
    return count


def _product(node: Node, equation: Equation, order: tuple[int, int]) -> _Product | None:
    """Return the einsum as a product of its operands in this order; None where it is not one."""
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
    if {*rows, *columns} - set(result) or not (rows and summed and columns):
        return None
    joined = is_constant(b) and not is_constant(a) and not batch
    if (len(summed) > 1 or len(columns) > 1) and not joined:
        return None
    if batch and len(rows) > 1:
        return None
    return _Product(order, batch, rows, summed, columns)


def _insert(node: Node, equation: Equation, product: _Product) -> Node:
    """Insert a product in front of the einsum."""
    a, b = (args_of(node)[1][index] for index in product.order)
    left, right = (equation.operands[index] for index in product.order)
    batch, rows, summed, columns = product.batch, product.rows, product.summed, product.columns
    sizes = equation.sizes([shape_of(operand) for operand in args_of(node)[1]])
    a = _permuted(a, left, [*batch, *rows, *summed], node)
    b = _permuted(b, right, [*batch, *summed, *columns], node)
    # Sizes of a constant are numbers; those in front of them need not be.
    if len(summed) > 1:
        a = _with_last_axes(a, len(summed), [math.prod(sizes[x] for x in summed)], node)
    if len(summed) > 1 or len(columns) > 1:
        shape = [math.prod(sizes[x] for x in labels) for labels in (summed, columns)]
        b = insert_call(aten.reshape.default, (b, shape), before=node)
    value = insert_call(aten.matmul.default, (a, b), before=node)
    if len(columns) > 1:
        value = _with_last_axes(value, 1, [sizes[x] for x in columns], node)
    return _permuted(value, [*batch, *rows, *columns], equation.result, node)


def _with_last_axes(value: Node, n_axes: int, sizes: Sequence[int], user: Node) -> Node:
    """Insert a reshape of the last `n_axes` axes to `sizes`."""
    shape = []
    for axis, size in enumerate(shape_of(value)[:-n_axes]):
        fixed = isinstance(size, int)
        shape.append(size if fixed else insert_call(aten.sym_size.int, (value, axis), before=user))
    return insert_call(aten.reshape.default, (value, [*shape, *sizes]), before=user)


def _same_sizes(a: Node, left: Sequence[str], b: Node, right: Sequence[str]) -> bool:
    """Tell whether no size broadcasts."""
    sizes = dict(zip(left, map(str, shape_of(a)), strict=True))
    pairs = zip(right, map(str, shape_of(b)), strict=True)
    return all(sizes.get(label, size) == size for label, size in pairs)


def _n_moved(labels: Sequence[str], wanted: Sequence[str]) -> int:
    return sum(a != b for a, b in zip(labels, wanted, strict=True))


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

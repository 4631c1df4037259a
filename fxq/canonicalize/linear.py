"""Products with a constant matrix become `aten.linear(x, weight, bias)`.

A matrix stored as `[in, out]` stays as it is: the linear's weight is then a permute of a constant,
which `fxq.graph.weight_of` sees through.
"""

import torch
from torch.fx import GraphModule, Node

from fxq.graph import args_of, is_constant, is_op, shape_of, val_of
from fxq.rewriting import insert_call

aten = torch.ops.aten


def matmul_of_linear(gm: GraphModule) -> int:
    """linear(x, w, bias) equals matmul(x, w.T) + bias; it stands so where w is no matrix, or one of
    complex numbers: no layer is quantized with such a weight."""
    count = 0
    for node in gm.graph.find_nodes(op="call_function", target=aten.linear.default):
        x, weight, *bias = args_of(node)
        if val_of(weight).ndim == 2 and not val_of(weight).is_complex():
            continue
        if val_of(weight).ndim == 2:
            weight = insert_call(aten.permute.default, (weight, [1, 0]), before=node)
        new = insert_call(aten.matmul.default, (x, weight), before=node)
        if bias and bias[0] is not None:
            new = insert_call(aten.add.Tensor, (new, bias[0]), before=node)
        node.replace_all_uses_with(new)
        count += 1
    return count


def linear_of_addmm(gm: GraphModule) -> int:
    """addmm(bias, x, W) equals linear(x, W.T, bias), provided W and a 1-D bias are constants."""
    count = 0
    for node in gm.graph.find_nodes(op="call_function", target=aten.addmm.default):
        bias, x, matrix = args_of(node)
        if (
            node.kwargs
            or not is_constant(matrix)
            or not is_constant(bias)
            or val_of(bias).ndim != 1
            or val_of(matrix).is_complex()
        ):
            continue
        _replace(node, aten.linear.default, (x, _transposed(matrix, node), bias))
        count += 1
    return count


def linear_of_matmul(gm: GraphModule) -> int:
    """mm(x, W) and matmul(x, W) equal linear(x, W.T), provided W is a constant matrix."""
    count = 0
    for node in list(gm.graph.nodes):
        if not is_op(node, aten.mm.default, aten.matmul.default) or not is_constant(
            args_of(node)[1]
        ):
            continue
        x, matrix = args_of(node)
        is_real_matrix = val_of(matrix).ndim == 2 and not val_of(matrix).is_complex()
        if is_real_matrix and not is_constant(x):
            _replace(node, aten.linear.default, (x, _transposed(matrix, node)))
            count += 1
    return count


def linear_with_bias(gm: GraphModule) -> int:
    """linear(x, W) + b equals linear(x, W, b), provided b is a constant vector of the output's
    width and dtype."""
    count = 0
    for node in gm.graph.find_nodes(op="call_function", target=aten.add.Tensor):
        for product, bias in (args_of(node)[:2], args_of(node)[1::-1]):
            if (
                is_op(product, aten.linear.default)
                and len(product.args) == 2
                and len(product.users) == 1
                and is_constant(bias)
                and val_of(bias).shape == val_of(product).shape[-1:]
                and val_of(bias).dtype == val_of(product).dtype
                and not node.kwargs
            ):
                _replace(node, aten.linear.default, (*product.args, bias))
                count += 1
                break
    return count


def linear_of_rows(gm: GraphModule) -> int:
    """reshape(linear(reshape(x, [-1, C])), [..., N]) equals linear(x), provided the leading sizes
    come back as they were.

    It gives the token axis back, which a scale per token needs.
    """
    count = 0
    for node in list(gm.graph.nodes):
        if not is_op(node, aten.reshape.default):
            continue
        product = args_of(node)[0]
        if not is_op(product, aten.linear.default) or len(product.users) != 1:
            continue
        rows = args_of(product)[0]
        if not is_op(rows, aten.reshape.default):
            continue
        x = args_of(rows)[0]
        shapes = shape_of(x), shape_of(node), shape_of(rows)
        same_lead = list(map(str, shapes[0][:-1])) == list(map(str, shapes[1][:-1]))
        if len(shapes[2]) == 2 and same_lead and shapes[0][-1] == shapes[2][-1]:
            _replace(node, aten.linear.default, (x, *product.args[1:]))
            count += 1
    return count


def _transposed(matrix: Node, user: Node) -> Node:
    """Return a node for `matrix.T`, without a second transpose where it is one already."""
    source, *dims = args_of(matrix) or (None,)
    swaps = (
        is_op(matrix, aten.t.default)
        or (is_op(matrix, aten.permute.default) and list(dims[0]) == [1, 0])
        or (is_op(matrix, aten.transpose.int) and {d % 2 for d in dims} == {0, 1})
    )
    if swaps:
        assert isinstance(source, Node)
        return source
    return insert_call(aten.permute.default, (matrix, [1, 0]), before=user)


def _replace(node: Node, target: object, args: tuple[object, ...]) -> None:
    new = insert_call(target, args, before=node)
    new.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(new)

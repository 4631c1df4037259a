"""Remove what does nothing in inference."""

import sys

import torch
from torch.fx import GraphModule, Node

from fxq.graph import dtype_of, is_op, shape_of, val_of

aten = torch.ops.aten

DROPOUT = (aten.dropout.default, aten.feature_dropout.default, aten.native_dropout.default)
ALIASES = (
    aten.detach.default,
    aten.detach_.default,
    aten.alias.default,
    aten.lift_fresh_copy.default,  # of a constant that nothing writes to
)
CHECKS = (
    aten._assert_tensor_metadata.default,
)  # of dtypes that the signature checks once per call


def drop_no_ops(gm: GraphModule) -> int:
    """Remove eval-mode dropout, detach, alias, casts to the same dtype and slices of everything."""
    count = 0
    for node in list(gm.graph.nodes):
        if is_op(node, *CHECKS):
            gm.graph.erase_node(node)
        elif node.op == "call_function" and _does_nothing(node):
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            gm.graph.erase_node(node)
            count += 1
    return count


def _does_nothing(node: Node) -> bool:
    if is_op(node, *DROPOUT[:2]):
        return node.args[1] == 0.0 or node.args[2] is False
    if is_op(node, *ALIASES):
        return True
    if is_op(node, aten.to.dtype, aten.to.dtype_layout):
        before, after = val_of(node.args[0]), val_of(node)
        return before.dtype == after.dtype and before.device == after.device
    if is_op(node, aten._to_copy.default):
        return set(node.kwargs) == {"dtype"} and dtype_of(node) == dtype_of(node.args[0])
    if is_op(node, aten.slice.Tensor):
        start, end, step = (*node.args[2:], None, None, None)[:3]
        everything = start in (None, 0) and end in (None, sys.maxsize) and step in (None, 1)
        return everything and shape_of(node) == shape_of(node.args[0])
    if is_op(node, aten.expand.default, aten.view.default, aten.reshape.default):
        same = len(shape_of(node)) == len(shape_of(node.args[0]))
        return same and all(
            (isinstance(a, int) and a == b) or str(a) == str(b)
            for a, b in zip(shape_of(node), shape_of(node.args[0]), strict=True)
        )
    return False

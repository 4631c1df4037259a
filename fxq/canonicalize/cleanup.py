"""Remove what does nothing in inference."""

import sys

import torch
from torch.fx import GraphModule, Node

from fxq.graph import args_of, dtype_of, is_op, shape_of, val_of, writes
from fxq.operators import Movement, canonical_form, of, operand

aten = torch.ops.aten

DROPOUT = of(Movement.DROPOUT)


def drop_no_ops(gm: GraphModule) -> int:
    """Remove eval-mode dropout, detach, alias, casts to the same dtype and slices of everything."""
    count = 0
    for node in list(gm.graph.nodes):
        if canonical_form(node) == "nothing":
            gm.graph.erase_node(node)
        elif node.op == "call_function" and _does_nothing(node):
            node.replace_all_uses_with(args_of(node)[0])
            gm.graph.erase_node(node)
            count += 1
    return count


def _does_nothing(node: Node) -> bool:
    if is_op(node, *DROPOUT):
        return bool(operand(node, "p") == 0.0 or operand(node, "train") is False)
    if canonical_form(node) == "its input":
        return True
    if is_op(node, aten.lift_fresh_copy.default):  # of a constant; needed only to write to it
        return not any(writes(user) for user in node.users)
    if is_op(node, aten.to.dtype, aten.to.dtype_layout, aten.type_as.default):
        before, after = val_of(args_of(node)[0]), val_of(node)
        return bool(before.dtype == after.dtype and before.device == after.device)
    if is_op(node, aten._to_copy.default):
        return set(node.kwargs) == {"dtype"} and dtype_of(node) == dtype_of(args_of(node)[0])
    if is_op(node, aten.slice.Tensor):
        start, end, step = (operand(node, name) for name in ("start", "end", "step"))
        everything = start in (None, 0) and end in (None, sys.maxsize) and step == 1
        return everything and shape_of(node) == shape_of(args_of(node)[0])
    if is_op(node, aten.expand.default, aten.reshape.default):
        return list(map(str, shape_of(node))) == list(map(str, shape_of(args_of(node)[0])))
    return False


def refuse_train_mode(gm: GraphModule) -> None:
    """Raise where an operator of `gm`, canonical or not, behaves as in training.

    Raises:
        ValueError: one does.
    """
    for node in gm.graph.nodes:
        if _trains(node):
            raise ValueError(
                f"model: expected eval mode, found {node.target} in train mode; call model.eval() "
                "first (and export it again where it was exported)"
            )


def _trains(node: Node) -> bool:
    if is_op(node, *DROPOUT):
        return not _does_nothing(node)
    if is_op(node, aten.batch_norm.default, aten.instance_norm.default):
        name = "training" if is_op(node, aten.batch_norm.default) else "use_input_stats"
        return operand(node, name) is True and operand(node, "running_mean") is not None
    return is_op(node, aten.rrelu.default) and operand(node, "training") is True

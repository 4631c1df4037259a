"""Strides that somebody can see are those of the simulated graph.

Convolution kernels write channels last, whatever order the simulated convolution has. Values are
the same, and most readers do not ask; but a caller may view a result, or hand its memory on, and
`as_strided` reads memory as it lies.
"""

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from fxq.graph import args_of, hint, is_op, val_of
from fxq.rewriting import insert_call, propagate

aten = torch.ops.aten
REORDERING = (torch.ops.fxq.int8_conv.default,)


def keep_strides(lowered: GraphModule, simulated: GraphModule) -> None:
    """Give the results of a lowered graph, and what `as_strided` reads, the order in memory that
    they have in the simulated graph that it was made from."""
    if not any(is_op(node, *REORDERING) for node in lowered.graph.nodes):
        return
    propagate(lowered)
    meant = {node.name: node for node in simulated.graph.nodes if asks(node)}
    for node in list(lowered.graph.nodes):
        if asks(node) and node.name in meant:
            for value, original in zip(_read(node), _read(meant[node.name]), strict=True):
                _keep(node, value, val_of(original))
    lowered.recompile()


def asks(node: Node) -> bool:
    """Tell whether it matters to a node how its inputs lie in memory."""
    return node.op == "output" or is_op(node, aten.as_strided.default)


def _read(node: Node) -> list[Node]:
    return [leaf for leaf in pytree.tree_leaves(args_of(node)) if isinstance(leaf, Node)]


def _keep(reader: Node, value: Node, meant: object) -> None:
    found = val_of(value)
    if not isinstance(found, Tensor) or not isinstance(meant, Tensor):
        return
    order = _order(meant)
    if _order(found) == order:
        return
    full = [*order, *(dim for dim in range(found.ndim) if dim not in order)]
    args = (value, full)
    turned = insert_call(aten.permute.default, args, before=reader, like=value)
    dense = {"memory_format": torch.contiguous_format}
    copied = insert_call(aten.clone.default, (turned,), dense, before=reader, like=value)
    back = [full.index(dim) for dim in range(found.ndim)]
    args = (copied, back)
    reader.replace_input_with(
        value, insert_call(aten.permute.default, args, before=reader, like=value)
    )


def _order(value: Tensor) -> list[int]:
    """Return the axes of more than one element, the one with the longest steps first."""
    axes = [axis for axis, size in enumerate(value.shape) if hint(size) != 1]
    return sorted(axes, key=lambda axis: -hint(value.stride()[axis]))

"""The values of what depends on parameters and buffers only."""

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from fxq.graph import is_op, is_state, owning_module, tensor_of

aten = torch.ops.aten


def constant_value(node: Any) -> Tensor | None:
    """Return the value of a node that depends on parameters and buffers only; None for any other.

    A repetition along a symbolic size is left out: the value then broadcasts to the node's shape.
    """
    if not isinstance(node, Node):
        return None
    result = _value(node, {})
    return result if isinstance(result, Tensor) else None


def _value(node: Node, known: dict[Node, Any]) -> Any:
    """Compute a node's value, each operator once; None where it is no constant."""
    if node not in known:
        known[node] = _computed(node, known)
    return known[node]


def _computed(node: Node, known: dict[Node, Any]) -> Any:
    if node.op == "get_attr" and not is_state(node):
        return tensor_of(owning_module(node), node)
    if not is_pure(node):
        return None
    if is_op(node, aten.expand.default) and len(node.all_input_nodes) > 1:
        return _value(node.all_input_nodes[0], known)
    inputs = {n: _value(n, known) for n in node.all_input_nodes}
    if any(value is None for value in inputs.values()):
        return None
    args, kwargs = map_arg((node.args, node.kwargs), inputs.__getitem__)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def is_pure(node: Node) -> bool:
    """Tell whether `node` calls an operator of torch's own that gives the same for the same
    arguments, and does nothing else."""
    if node.op != "call_function" or node.is_impure():  # as random operators and writes are
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target.namespace == "aten"  # a schema says nothing of what others do
    return node.target is operator.getitem

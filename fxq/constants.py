"""The values of what depends on parameters and buffers only."""

import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from fxq.graph import is_state, owning_module, tensor_of
from fxq.identity import TensorKey
from fxq.operators import Movement, of

EXPANDS = of(Movement.EXPAND)


class _Root(NamedTuple):
    """A parameter or buffer as it was when it was read."""

    key: TensorKey
    version: object  # how often it was written to; inference tensors do not count that

    @staticmethod
    def of(value: Tensor) -> "_Root":
        return _Root(TensorKey.of(value), object() if value.is_inference() else value._version)


class _Known(NamedTuple):
    """A node's value, None where it is no constant, and what it was computed from."""

    made_of: tuple[object, ...]
    value: Any

    def is_of(self, made_of: tuple[object, ...]) -> bool:
        return len(made_of) == len(self.made_of) and all(
            a is b or (isinstance(a, _Root) and a == b)
            for a, b in zip(made_of, self.made_of, strict=True)
        )


class Constants:
    """The values of what depends on parameters and buffers only, each operator computed once.

    A value is computed anew where a node of those it depends on calls something else by now, or a
    tensor it depends on was replaced or written to. All values are kept: hold one of these for one
    walk over a graph, not for longer.
    """

    def __init__(self) -> None:
        self._known: dict[Node, _Known] = {}

    def value(self, node: Any) -> Tensor | None:
        """Return the value of a node that depends on parameters and buffers only, else None.

        A repetition along a symbolic size is left out: it then broadcasts to the node's shape.
        """
        result = self._find(node, {}).value if isinstance(node, Node) else None
        return result if isinstance(result, Tensor) else None

    def _find(self, node: Node, checked: dict[Node, _Known]) -> _Known:
        if node not in checked:
            reads = node.all_input_nodes
            if not is_pure(node):
                reads = []
            elif _repeats(node):
                reads = reads[:1]
            found = [self._find(read, checked) for read in reads]
            made_of: tuple[object, ...] = (node.target, node.args, node.kwargs, *found)
            if node.op == "get_attr" and not is_state(node):
                value = tensor_of(owning_module(node), node)
                made_of = (value, _Root.of(value) if isinstance(value, Tensor) else None)
            known = self._known.get(node)
            if known is None or not known.is_of(made_of):
                known = _Known(made_of, _computed(node, dict(zip(reads, found, strict=True))))
            checked[node] = self._known[node] = known
        return checked[node]


def constant_value(node: Any) -> Tensor | None:
    """Return the value of one constant, as `Constants.value` does."""
    return Constants().value(node)


def _computed(node: Node, inputs: dict[Node, _Known]) -> Any:
    if node.op == "get_attr" and not is_state(node):
        return tensor_of(owning_module(node), node)
    if not is_pure(node) or any(known.value is None for known in inputs.values()):
        return None
    if _repeats(node):
        return inputs[node.all_input_nodes[0]].value
    args, kwargs = map_arg((node.args, node.kwargs), lambda read: inputs[read].value)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _repeats(node: Node) -> bool:
    """Tell whether a node is repeated along a symbolic size."""
    return node.target in EXPANDS and len(node.all_input_nodes) > 1


def is_pure(node: Node) -> bool:
    """Tell whether `node` calls an operator of torch's own that gives the same for the same
    arguments, and does nothing else."""
    if node.op != "call_function" or node.is_impure():  # as random operators and writes are
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target.namespace == "aten"  # a schema says nothing of what others do
    return node.target is operator.getitem

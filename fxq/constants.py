"""The values of what depends on parameters and buffers only."""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from fxq.graph import hint, is_state, owning_module, result_of, tensor_of
from fxq.identity import TensorKey
from fxq.operators import Movement, movement_of


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

    Args:
        at_capture: count sizes among the constants, free ones as at capture.
    """

    def __init__(self, at_capture: bool = False) -> None:
        self._at_capture = at_capture
        self._known: dict[Node, _Known] = {}

    def value(self, node: Any) -> Tensor | None:
        """Return the value of a node that depends on parameters and buffers only, else None.

        A repetition along a free size is left out: the value then broadcasts to the node's shape.
        """
        result = self._find(node, {}).value if isinstance(node, Node) else None
        return result if isinstance(result, Tensor) else None

    def _find(self, node: Node, checked: dict[Node, _Known]) -> _Known:
        if node not in checked:
            made_of, compute = self._computation(node, checked)
            known = self._known.get(node)
            if known is None or not known.is_of(made_of):
                known = _Known(made_of, compute())
            checked[node] = self._known[node] = known
        return checked[node]

    def _computation(
        self, node: Node, checked: dict[Node, _Known]
    ) -> tuple[tuple[object, ...], Callable[[], Any]]:
        """Return what a node's value is made of, and how."""
        size = node.meta.get("val")
        if node.op == "get_attr" and not is_state(node):
            value = tensor_of(owning_module(node), node)
            return (value, _Root.of(value) if isinstance(value, Tensor) else None), lambda: value
        if self._at_capture and isinstance(size, int | torch.SymInt):
            return (size,), lambda: hint(size)
        if not is_pure(node):
            return (node.target,), lambda: None
        repeats = movement_of(node) is Movement.EXPAND and not self._at_capture
        reads = node.all_input_nodes[:1] if repeats else node.all_input_nodes
        inputs = {read: self._find(read, checked) for read in reads}

        def compute() -> Any:
            if any(known.value is None for known in inputs.values()):
                return None
            if len(inputs) < len(node.all_input_nodes):
                return inputs[node.all_input_nodes[0]].value
            return result_of(node, lambda read: inputs[read].value)

        return (node.target, node.args, node.kwargs, *inputs.values()), compute


def constant_value(node: Any) -> Tensor | None:
    """Return the value of one constant, as `Constants.value` does."""
    return Constants().value(node)


def is_pure(node: Node) -> bool:
    """Tell whether `node` calls an operator of torch's own that gives the same for the same
    arguments, and does nothing else."""
    if node.op != "call_function" or node.is_impure():  # as random operators and writes are
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target.namespace == "aten"  # a schema says nothing of what others do
    return node.target is operator.getitem

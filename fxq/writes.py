"""What a call writes, to its arguments and to buffers, as values that a graph returns.

A graph of fxq computes and does not write. The new value of whatever the model writes to in place
is one more result, after the model's own, and who calls the graph copies it back: a `Program` in
Python, a graph compiled for `torch.compile` with the `copy_` that `write_back` puts at its end.
"""

import operator
from collections.abc import Callable, Container, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import (
    FunctionalTensor,
    FunctionalTensorMode,
    dispatch_functionalize,
)
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.multiprocessing.reductions import StorageWeakRef

from fxq.errors import UnsupportedError
from fxq.graph import args_of, dtype_of, is_op, tensor_of, val_of, writes
from fxq.identity import TensorKey
from fxq.rewriting import insert_call

aten = torch.ops.aten

# Keys in the meta of an input that is written to: which result is its new value, and, of a buffer
# that a pass keeps in another form than the model, what makes that form of the model's values.
WRITTEN, STORED = "fxq_written", "fxq_stored"

# Operators that write what they compute to their first argument, and the same without the write.
ACTIVATIONS = {
    getattr(aten, f"{name}_").default: getattr(aten, name).default
    for name in (
        "relu", "relu6", "hardtanh", "leaky_relu", "elu", "gelu", "silu", "mish", "hardswish",
        "hardsigmoid", "sigmoid", "tanh",
    )
}  # fmt: skip
SUMS = {aten.add_.Tensor: aten.add.Tensor, aten.mul_.Tensor: aten.mul.Tensor}
WITHOUT_WRITE = ACTIVATIONS | SUMS

# Operators whose result never is their argument, or a view of it. Schemas do not tell: in eval mode
# dropout gives what it is given, and an einsum may be a view.
FRESH = (
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv2d.padding,
    aten.linear.default, aten.batch_norm.default, aten.cat.default, *WITHOUT_WRITE.values(),
)  # fmt: skip


class Functionalized:
    """A function without in-place writes: what it writes to its arguments it returns, after its own
    results.

    Attributes:
        written: indices of the arguments that the last call wrote to, in the order of the values.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward
        self.written: tuple[int, ...] = ()

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        """Call with the writes as values. `export` keeps composite operators whole."""
        mode = FunctionalTensorMode(pre_dispatch=True, export=True)
        return dispatch_functionalize(self._call, mode)(*args)

    def _call(self, *args: Any) -> tuple[Any, ...]:
        results = self.forward(*args)
        self.written = tuple(i for i, arg in enumerate(args) if _is_written(arg))
        return (*results, *(args[i] for i in self.written))


def _is_written(arg: Any) -> bool:
    if not isinstance(arg, FunctionalTensor):
        return False
    return torch._functionalize_has_data_mutation(arg.elem)  # type: ignore[attr-defined]


def is_unseen(node: Node) -> bool:
    """Tell whether nobody would miss that an operator of `WITHOUT_WRITE` writes: it alone reads the
    value, which has memory of its own, or that of a value of which the same is true."""
    if not is_op(node, *WITHOUT_WRITE):
        return False
    value, *others = args_of(node)
    if not is_op(value, *FRESH, *WITHOUT_WRITE) or list(value.users) != [node]:
        return False
    if is_op(node, *ACTIVATIONS):
        return True
    # Of others in another dtype the result would be too, and what is written is as it was before.
    values = [val_of(other) if isinstance(other, Node) else other for other in others]
    return all(isinstance(v, Tensor) and v.dtype == dtype_of(value) for v in values)


def drop_unseen_writes(gm: GraphModule) -> None:
    """Replace in-place operators by those that compute the same and write nothing.

    Args:
        gm: whose writes in place all are unseen (`is_unseen`).
    """
    for node in [n for n in gm.graph.nodes if is_op(n, *WITHOUT_WRITE)]:
        target = WITHOUT_WRITE[node.target]
        new = insert_call(target, args_of(node), node.kwargs, before=node, like=node)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)


def lift_writes(gm: GraphModule) -> tuple[dict[str, Tensor], tuple[int, ...]]:
    """Make explicit what an exported graph writes: buffers that it writes to become inputs, after
    its others, and their new values results, after its others.

    Args:
        gm: writes with `copy_`, at its end, to inputs and buffers only.
    Returns:
        the buffers by name, in the order of their inputs, and the indices of the inputs that have a
        new value, in the order of the values.
    """
    copies = gm.graph.find_nodes(op="call_function", target=aten.copy_.default)
    state: dict[str, Tensor] = {}
    inputs = gm.graph.find_nodes(op="placeholder")
    buffers: dict[str, Node] = {}
    for node in gm.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        if any(args_of(copy)[0].target == name for copy in copies):
            if name not in buffers:
                state[name] = tensor_of(gm, node)
                buffers[name] = _new_input(gm, name, node)
            node.replace_all_uses_with(buffers[name])
            gm.graph.erase_node(node)
    inputs += buffers.values()
    output, values, written = gm.graph.output_node(), [], []
    for copy in copies:
        target, value = args_of(copy)[:2]
        copy.replace_all_uses_with(value)
        gm.graph.erase_node(copy)
        values.append(value)
        written.append(inputs.index(target))
    results = args_of(output)[0]
    for place, index in enumerate(written, len(results)):
        inputs[index].meta[WRITTEN] = place
    output.args = ((*results, *values),)
    give_own_memory(gm, {inputs[index] for index in written})
    return state, tuple(written)


def written_inputs(gm: GraphModule) -> list[tuple[Node, Node]]:
    """Return the inputs of a captured graph that the model writes to, each with its new value.

    Those with a "source" in their meta are buffers, and that is their name; others are arguments.
    """
    results: Any = args_of(gm.graph.output_node())[0]
    inputs = gm.graph.find_nodes(op="placeholder")
    return [(node, results[node.meta[WRITTEN]]) for node in inputs if WRITTEN in node.meta]


def as_stored(gm: GraphModule, inputs: Sequence[Any]) -> list[Any]:
    """Return a captured graph's inputs with the model's buffers among them in the form in which
    `gm` keeps them."""
    nodes = gm.graph.find_nodes(op="placeholder")
    return [
        node.meta[STORED](value) if STORED in node.meta else value
        for node, value in zip(nodes, inputs, strict=True)
    ]


def give_own_memory(gm: GraphModule, written: Container[Node]) -> None:
    """Copy the results that are an input which is written to, or a view of one: the writes come
    after the graph, one after another, and must not change what others still read."""
    output, copies = gm.graph.output_node(), dict[Node, Node]()
    for value in output.all_input_nodes:
        root: Node | None = value
        while root is not None and root not in written:
            root = aliased_by(root)
        if root is not None:
            copies[value] = insert_call(aten.clone.default, (value,), before=output)
    output.args = map_arg(output.args, lambda node: copies.get(node, node))


def _new_input(gm: GraphModule, name: str, buffer: Node) -> Node:
    """Add an input after the others for what a get_attr node gave."""
    last = gm.graph.find_nodes(op="placeholder")[-1:]
    first = next(iter(gm.graph.nodes))
    with gm.graph.inserting_after(last[0]) if last else gm.graph.inserting_before(first):
        node = gm.graph.placeholder(name.replace(".", "_"))
    node.meta |= {"val": buffer.meta["val"], "source": name}
    return node


def write_back(gm: GraphModule, written: Sequence[Node]) -> None:
    """Copy the last results of `gm` into the inputs they are the new values of, and return the
    others only.

    A result that is one of the new values, or a view of one, becomes the input or a view of it, as
    it was in the model.

    Args:
        gm: returns its results and one value for each of `written`.
        written: placeholders of `gm`.
    """
    output = gm.graph.output_node()
    results: Any = output.args[0]
    if not written:
        return
    n_results = len(results) - len(written)
    copies: dict[Node, Node] = {}
    for target, value in zip(written, results[n_results:], strict=True):
        copies[value] = insert_call(aten.copy_.default, (target, value), before=output)
    output.args = (tuple(_on_copies(value, copies, output) for value in results[:n_results]),)
    gm.recompile()


def read_before_writing(gm: GraphModule) -> None:
    """Copy, before the first write, what a later one reads from an input that was written by then.

    Inductor of torch 2.11 takes a clone for its source, also where the source is overwritten
    afterwards: two buffers that exchange their values get the same one. Releases that keep such
    clones give nothing to do here.

    Args:
        gm: writes with `copy_`, at its end, as AOTAutograd gives it to Inductor.
    """
    copies = gm.graph.find_nodes(op="call_function", target=aten.copy_.default)
    written = set[Node]()
    for copy in copies:
        target, value = args_of(copy)[:2]
        root = value
        while root not in written and len(root.all_input_nodes) == 1:
            root = root.all_input_nodes[0]  # through what may be a view, or be dropped as a no-op
        if root in written:  # not by a clone, which would be dropped again
            own = insert_call(aten.lift_fresh_copy.default, (value,), before=copies[0])
            copy.replace_input_with(value, own)
        written.add(target)
    gm.recompile()


def _on_copies(value: Any, copies: dict[Node, Node], output: Node) -> Any:
    """Return `value`, or the same view of the input that a copied value went to."""
    if value in copies:
        return copies[value]
    base = aliased_by(value)
    if base is None:
        return value
    moved = _on_copies(base, copies, output)
    if moved is base:
        return value
    return insert_call(value.target, (moved, *args_of(value)[1:]), value.kwargs, before=output)


def aliased_by(value: Any) -> Node | None:
    """Return the tensor that `value` is a view of, None where it has memory of its own."""
    if is_op(value, operator.getitem):  # one of several views, as `chunk` gives
        return value.args[0] if aliased_by(value.args[0]) is not None else None
    if not isinstance(value, Node) or not isinstance(value.target, torch._ops.OpOverload):
        return None
    schema = value.target._schema
    is_view = bool(schema.returns) and schema.returns[0].alias_info is not None
    return value.args[0] if is_view and not writes(value) else None  # type: ignore[return-value]


def check_apart(named: Sequence[tuple[str, Any]], written: Sequence[int], where: str) -> None:
    """Raise where memory that is written to is also reached through another tensor.

    A graph reads every input as it was before the call; through memory that two of them share it
    should have seen the writes.

    Args:
        named: what messages call each value, and the value; only tensors count.
        written: indices of those that are written to.
        where: how messages name the call.
    Raises:
        UnsupportedError: two of them overlap.
    """
    spans = [(name, _span(value)) for name, value in named]
    for index in written:
        name, mine = spans[index]
        for other, (other_name, span) in enumerate(spans):
            if other != index and mine and span and mine[0] == span[0] and _meet(mine, span):
                raise UnsupportedError(
                    f"{where}: expected {name!r}, which the model writes to, to have memory of its "
                    f"own, found that it shares memory with {other_name!r}; pass a clone of one"
                )


def _span(value: Any) -> tuple[StorageWeakRef, int, int] | None:
    """Return a tensor's storage, and the first byte and the end of what it reaches there."""
    if not isinstance(value, Tensor) or not value.numel():
        return None
    steps = zip(value.shape, value.stride(), strict=True)
    last = sum((size - 1) * step for size, step in steps)
    key, width = TensorKey.of(value), value.element_size()
    return key.storage, key.offset * width, (key.offset + int(last) + 1) * width


def _meet(a: tuple[Any, int, int], b: tuple[Any, int, int]) -> bool:
    return a[1] < b[2] and b[1] < a[2]

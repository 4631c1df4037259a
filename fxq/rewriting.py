"""How passes change FX graphs: put in, take out, work out values again, and copy."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from fxq.graph import OWNER, SETTLED, args_of, val_of, writable


def insert_call(
    target: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    after: Node | None = None,
    before: Node | None = None,
    like: Node | None = None,
) -> Node:
    """Insert a call of `target` beside a node, with its fake value and the origin's module names.

    Args:
        target: an operator.
        args: nodes and constants.
        kwargs: likewise.
        after: the node to insert after; or
        before: the node to insert before.
        like: where `nn_module_stack` is taken from; the neighbour unless given.
    """
    neighbour = after or before
    assert neighbour is not None
    graph = neighbour.graph
    with graph.inserting_after(insertion_point(after)) if after else graph.inserting_before(before):
        node = graph.call_function(target, args, dict(kwargs or {}))
    inherit(node, like or neighbour)
    fake_args, fake_kwargs = map_arg((args, dict(kwargs or {})), val_of)
    mode = detect_fake_mode(tree_leaves((fake_args, fake_kwargs)))
    if mode is None:  # no tensor among them: a free size would be taken for that of the example
        mode = _fake_mode(graph)
    # Without Python's dispatcher linear and matmul of torch 2.11 make constants of free sizes.
    with torch.no_grad(), mode or contextlib.nullcontext(), enable_python_dispatcher():
        node.meta["val"] = target(*fake_args, **fake_kwargs)
    return node


def insert_module(gm: GraphModule, name: str, module: nn.Module, *args: Node) -> Node:
    """Insert a call of a module that returns its first argument, after the nodes it reads."""
    name = unique_name(gm, name)
    gm.add_submodule(name, module)
    after = args[0]
    with gm.graph.inserting_after(insertion_point(last_of(*args))):
        node = gm.graph.call_module(name, args)
    inherit(node, after)
    node.meta["val"] = after.meta["val"]
    return node


def last_of(*nodes: Node | None) -> Node:
    """Return the node that comes last in the graph; None is left out."""
    return max(node for node in nodes if node is not None)


def insertion_point(node: Node) -> Node:
    """Return the node after which a reader of `node` goes: itself, or the last placeholder."""
    while node.op == "placeholder" and node.next.op == "placeholder":
        node = node.next
    return node


def inherit(node: Node, origin: Node) -> None:
    """Give `node` the module names and source location of `origin`."""
    for key in ("nn_module_stack", "stack_trace", "custom", OWNER, SETTLED):
        if key in origin.meta:
            node.meta[key] = origin.meta[key]


def unique_name(gm: GraphModule, name: str) -> str:
    """Return a name, as code can have it, with a number at its end where the module already has
    such an attribute."""
    name = writable(name)
    candidate, count = name, 0
    while has_attribute(gm, candidate):
        count += 1
        candidate = f"{name}_{count}"
    return candidate


def has_attribute(gm: nn.Module, name: str) -> bool:
    """Tell whether a dotted name leads somewhere."""
    value: Any = gm
    for part in name.split("."):
        if not hasattr(value, part):
            return False
        value = getattr(value, part)
    return True


def add_buffer(gm: GraphModule, name: str, value: Tensor, *, like: Node) -> Node:
    """Register a buffer under a (dotted) name and return a get_attr node for it, first in the
    graph. A parameter stays one.

    First, so that every node that comes to share it is after it.
    """
    name = unique_name(gm, name)
    register_tensor(gm, name, value)
    with gm.graph.inserting_before(next(iter(gm.graph.nodes))):
        node = gm.graph.get_attr(name)
    inherit(node, like)
    mode = _fake_mode(gm.graph)
    node.meta["val"] = mode.from_tensor(value, static_shapes=True) if mode else value
    return node


def _fake_mode(graph: Graph) -> FakeTensorMode | None:
    """Return the mode of the graph's first fake value, which is that of all; None where it has
    none."""
    values = (node.meta["val"] for node in graph.nodes if "val" in node.meta)
    modes: Iterator[FakeTensorMode | None] = map(detect_fake_mode, itertools.chain([None], values))
    return next((mode for mode in modes if mode is not None), None)


def register_tensor(module: nn.Module, name: str, value: Tensor) -> None:
    """Register a parameter or buffer under a dotted name, which code can have (`graph.writable`),
    making the modules on the way; torch refuses a name that hides another attribute."""
    *path, leaf = name.split(".")
    for part in path:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module._modules[part]  # type: ignore[assignment]
    if isinstance(value, nn.Parameter):
        module.register_parameter(leaf, value)
    else:
        module.register_buffer(leaf, value)


def erase_dead(gm: GraphModule) -> None:
    """Remove nodes nobody uses, and parameters, buffers and submodules no node refers to."""
    gm.graph.eliminate_dead_code()
    gm.delete_all_unused_submodules()
    used = {str(n.target) for n in gm.graph.nodes if n.op == "get_attr"}
    modules = {str(n.target) for n in gm.graph.nodes if n.op == "call_module"}
    for prefix, module in gm.named_modules():
        if any(prefix == m or prefix.startswith(f"{m}.") for m in modules):
            continue
        for store in (module._parameters, module._buffers):
            for leaf in [k for k in store if f"{prefix}.{k}".lstrip(".") not in used]:
                del store[leaf]
    gm.delete_all_unused_submodules()
    gm.recompile()


def propagate(gm: GraphModule, before: Callable[[Node], None] | None = None) -> None:
    """Recompute every node's fake value from the placeholders'. Symbolic sizes stay symbolic.

    Args:
        gm: a graph whose placeholders have values.
        before: called with each node before it runs.
    """
    inputs = [n.meta["val"] for n in gm.graph.find_nodes(op="placeholder")]
    mode = detect_fake_mode(inputs)
    if mode is None:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        inputs = [mode.from_tensor(v) if isinstance(v, Tensor) else v for v in inputs]
    # As torch.export traces: without the Python dispatcher C++ kernels take free sizes for numbers.
    with torch.no_grad(), mode, enable_python_dispatcher():
        _Propagate(gm, mode, before).run(*inputs)


class _Propagate(Interpreter):
    def __init__(
        self, gm: GraphModule, mode: FakeTensorMode, before: Callable[[Node], None] | None
    ) -> None:
        super().__init__(gm)
        self.mode, self.before = mode, before

    def run_node(self, n: Node) -> Any:
        if self.before is not None:
            self.before(n)
        result = super().run_node(n)
        if n.op == "get_attr" and isinstance(result, Tensor):
            result = self.mode.from_tensor(result, static_shapes=True)
        if n.op != "output":
            n.meta["val"] = result
        return result

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args[0]  # observers return what they are given


def copy_graph(gm: GraphModule) -> GraphModule:
    """Return a GraphModule with a graph of its own that shares parameters and buffers with `gm`."""
    graph = Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    copied = GraphModule(gm, graph)
    copied.meta = dict(gm.meta)
    return copied


def with_outputs(gm: GraphModule, names: Sequence[str]) -> GraphModule:
    """Return a copy of `gm` that returns the values of more nodes after its own results.

    Args:
        gm: a flat graph.
        names: of nodes in it.
    """
    copied = copy_graph(gm)
    nodes = {node.name: node for node in copied.graph.nodes}
    output = copied.graph.output_node()
    results = args_of(output)[0]
    results = tuple(results) if isinstance(results, tuple | list) else (results,)
    output.args = ((*results, *(nodes[name] for name in names)),)
    copied.recompile()
    return copied


def frozen(gm: GraphModule) -> GraphModule:
    """Return a copy of `gm` whose parameters are constants for autograd."""
    copied = copy_graph(gm)
    for module in copied.modules():
        for name, parameter in list(module._parameters.items()):
            del module._parameters[name]
            module.register_buffer(name, None if parameter is None else parameter.detach())
    return copied


def with_constants(gm: GraphModule, values: Mapping[str, Tensor]) -> GraphModule:
    """Return a copy of `gm` in which the placeholders named in `values` are buffers with these
    values.

    A buffer is called as the placeholder's `meta["source"]` says, so that a parameter keeps its
    qualified name.
    """
    bound = copy_graph(gm)
    for node in [n for n in bound.graph.nodes if n.op == "placeholder" and n.name in values]:
        constant = add_buffer(bound, node.meta["source"], values[node.name], like=node)
        constant.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(constant)
        bound.graph.erase_node(node)
    bound.recompile()
    return bound

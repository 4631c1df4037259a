"""What an FX graph says: the words that passes use to ask it."""

import re
import sys
import weakref
from collections.abc import Callable, Mapping
from keyword import iskeyword
from typing import Any
from unicodedata import normalize

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from fxq.layer import LAYER, layer_of
from fxq.operators import VIEWS

# Submodule of a graph whose buffers may change in place between calls, as a step counter does. The
# backend hands them to every call instead of compiling their values in.
RUNTIME_STATE = "runtime_state"


# Key in a node's meta: it is decided what the node does, and passes leave it as it is. True of all
# that came from a `Program`.
SETTLED = "fxq_settled"

# Key in a node's meta: the name it goes by where that is not the module that calls it.
OWNER = "fxq_owner"


UNWRITABLE = re.compile(r"[^\w +,/:@~-]")  # in a name that stands in code, or in a file

AUTOCAST = ("_enter_autocast", "wrap_with_autocast")  # of Dynamo, of torch.export


def is_op(node: Any, *targets: Any) -> bool:
    """Tell whether `node` calls one of `targets`."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def writes(node: Node) -> bool:
    """Tell whether `node` calls an operator that writes to one of its arguments."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and bool(target._schema.is_mutable)


def why_unreadable(graph: Graph) -> str | None:
    """Return why a graph cannot be brought to operators on tensors, and what to do about it; None
    where it can."""
    for node in graph.nodes:
        if getattr(node.target, "__name__", None) in AUTOCAST:
            return (
                "expected operators on tensors, found a region of torch.autocast; cast the model "
                "instead, as model.to(torch.bfloat16) does"
            )
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            return (
                f"expected operators on tensors, found {node.target}, which calls other graphs; "
                "compute both branches and choose with torch.where, or compress the parts"
            )
    return None


def is_transform(node: Node) -> bool:
    """Tell whether `node` enters or leaves a transform of torch.func, such as vmap."""
    return str(getattr(node.target, "__module__", "")).startswith("torch._functorch")


def args_of(node: Any) -> tuple[Any, ...]:
    """Return a node's arguments. FX's own type for them is too wide to be of use."""
    return tuple(node.args)


def result_of(node: Node, value: Callable[[Node], Any]) -> Any:
    """Run the function that a node calls on the values of the nodes it reads."""
    args, kwargs = map_arg((node.args, node.kwargs), value)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def tensor_of(gm: GraphModule, node: Node) -> Tensor:
    """Return the tensor that a get_attr node reads."""
    value: Any = gm
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def owning_module(node: Node) -> GraphModule:
    """Return the GraphModule that a node's graph belongs to."""
    module = node.graph.owning_module
    assert module is not None
    return module


def is_constant(node: Any) -> bool:
    """Tell whether `node` is a parameter or buffer, possibly seen through views."""
    while is_op(node, *VIEWS):
        node = node.args[0]
    return isinstance(node, Node) and node.op == "get_attr" and not is_state(node)


def is_state(node: Node) -> bool:
    """Tell whether `node` reads what may change between calls."""
    return node.op == "get_attr" and RUNTIME_STATE in str(node.target).split(".")


def constant_of(node: Node) -> Tensor:
    """Return the value of a constant node: a parameter or buffer, possibly seen through views."""
    if node.op == "get_attr":
        return tensor_of(owning_module(node), node)
    return node.target(constant_of(node.args[0]), *node.args[1:], **node.kwargs)  # type: ignore


def weight_of(layer: Node) -> Tensor:
    """Return the weight of a linear `[N, K]` or convolution `[N, C, ...]` as the layer uses it."""
    return constant_of(layer.args[1])  # type: ignore[arg-type]


def val_of(node: Any) -> Any:
    """Return the fake value of a node."""
    return node.meta["val"]


def shape_of(node: Any) -> tuple[int | torch.SymInt, ...]:
    """Return the shape of a node's value; sizes that are free stay symbolic."""
    return tuple(_fixed(size) for size in node.meta["val"].shape)


def _fixed(size: int | torch.SymInt) -> int | torch.SymInt:
    value = size if isinstance(size, int) else size.node.maybe_as_int()
    return size if value is None else value


def depends_on_data(node: Node) -> bool:
    """Tell whether a size of a node's value, or of one of its values, depends on the data."""
    values = tree_leaves(node.meta.get("val"))
    return any(
        isinstance(size, torch.SymInt) and size.node.hint is None
        for value in values
        for size in (value.shape if isinstance(value, Tensor) else (value,))
    )


def dtype_of(node: Any) -> torch.dtype:
    """Return the dtype of a node's value."""
    return node.meta["val"].dtype


def writable(name: str) -> str:
    """Return a dotted name as torch.fx can write it into the code of a graph: `heads.class_` of
    `heads.class`, with underscores in the place of what is neither letter, digit nor harmless.

    It puts quotes around a part that is no identifier, escapes nothing and does not know keywords:
    the code would not be Python, or read another attribute, or be what a file wants run.
    """
    parts = (UNWRITABLE.sub("_", part) for part in normalize("NFKC", name).split("."))
    return ".".join(f"{part}_" if iskeyword(part) else part for part in parts)


def owner_name(node: Node) -> str:
    """Return the name a node goes by in reports and overrides: of the module that calls it, e.g.
    `blocks.0.attn.qkv`, or of a module in that one that only lends its weight (`name_lenders`); of
    what the model itself computes, the node's name at capture.

    It is that of the call, not of the weight: layers that share a weight have names of their own,
    which no pass changes.
    """
    return node.meta.get(OWNER) or _calling_path(node) or layer_of(node).origin


def _calling_path(node: Node) -> str:
    """Return the qualified name of the innermost module that was called; "" for the model."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]) if stack else ""


def weight_owner(node: Node) -> str:
    """Return the qualified name of the module whose tensor a node multiplies by, as code can have
    it; "" where the model itself has it, or where it is none of the model's."""
    for arg in node.all_input_nodes[1:2]:
        while is_op(arg, *VIEWS):
            arg = arg.args[0]  # type: ignore[assignment]
        if arg.op == "get_attr":
            return str(arg.target).rpartition(".")[0]
    return ""


def name_lenders(gm: GraphModule) -> None:
    """Have nodes whose weight is of a module in the one that calls them, but which nobody calls,
    go by that module's name: `attn.out_proj` of a `MultiheadAttention`."""
    called = {writable(_calling_path(node)) for node in gm.graph.nodes}
    for node in gm.graph.nodes:
        path, owner = _calling_path(node), weight_owner(node)
        start = f"{writable(path)}." if path else ""
        if owner not in called and owner.startswith(start):
            node.meta[OWNER] = f"{path}.{owner.removeprefix(start)}" if path else owner


def input_name(placeholder: Node) -> str:
    """Return the name of the model's argument that a placeholder, no parameter, stands for."""
    return str(placeholder.meta.get("source", placeholder.name)).rpartition(".")[2]


def hint(size: int | torch.SymInt, sizes: Mapping[str, int] | None = None) -> int:
    """Return a size as a number: itself, or what it comes to at given values of the free sizes.

    Args:
        size: fixed or symbolic.
        sizes: values of free sizes by name; a size they do not decide has its value at capture, and
            one that depends on the data, which has none, counts as 1.
    """
    if isinstance(size, int):
        return size
    expression = size.node.expr
    known = {s: sizes[str(s)] for s in expression.free_symbols if sizes and str(s) in sizes}
    if len(known) == len(expression.free_symbols):
        return int(expression.xreplace(known))
    return 1 if size.node.hint is None else int(size.node.hint)


def mark_for_dynamo(gm: GraphModule) -> None:
    """Have Dynamo know every node of `gm` again as settled, with its record.

    When Dynamo traces through a GraphModule it copies a few keys of its nodes' meta; "custom" is
    the one of them that is free.
    """
    for node in gm.graph.nodes:
        record = {LAYER: node.meta[LAYER]} if LAYER in node.meta else {}
        node.meta["custom"] = {**node.meta.get("custom", {}), SETTLED: record}


def show_to_dynamo(gm: GraphModule) -> None:
    """Have Dynamo know `gm` by its code, when that is about to run as a frame of its own.

    Dynamo finds the module of a frame, and so the meta of its nodes, where it came to it from a
    frame that calls it. After a call that could not be traced, one that was refused among them, it
    leaves the calling frame alone and begins with this one.
    """
    loaded = sys.modules.get("torch._dynamo.code_context")
    if loaded is not None:  # otherwise nothing is being compiled
        context = loaded.code_context.get_context(gm.forward.__code__)
        context["orig_graphmodule"] = weakref.ref(gm)


def settle_marked(gm: GraphModule) -> None:
    """Settle the nodes of a traced graph that `mark_for_dynamo` marked."""
    for node in gm.graph.nodes:
        custom = node.meta.get("custom") or {}
        if SETTLED in custom:
            node.meta |= {**custom[SETTLED], SETTLED: True}
            node.meta["custom"] = {key: value for key, value in custom.items() if key != SETTLED}


def is_settled(node: Node) -> bool:
    """Tell whether passes must leave `node` as it is."""
    return SETTLED in node.meta

"""From the graph that `torch.compile` hands to a backend to canonical aten operators."""

import contextlib
import copy
import re
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import SymInt, Tensor
from torch._C._dynamo.eval_frame import reset_code
from torch._dynamo.convert_frame import register_bytecode_hook
from torch._dynamo.exc import BackendCompilerFailed, exceptions_allowed_to_be_fallback
from torch._guards import CompileContext, TracingContext, tracing
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import PendingUnbackedSymbolNotFound
from torch.fx.traceback import preserve_node_meta

from fxq.autocast import drop_inert_regions
from fxq.canonicalize import canonicalize
from fxq.canonicalize.cleanup import refuse_train_mode
from fxq.errors import UnreadableGraphError
from fxq.graph import (
    is_op,
    is_transform,
    settle_marked,
    tensor_of,
    why_unreadable,
    writable,
    writes,
)
from fxq.writes import Functionalized, give_own_memory

UNREADABLE = (*exceptions_allowed_to_be_fallback, PendingUnbackedSymbolNotFound)
NUMBER = "a number that changes from call to call must stay one"
READS = (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default)


def from_dynamo(gm: GraphModule) -> tuple[GraphModule, tuple[int, ...]]:
    """Return the graph that Dynamo hands to a backend as canonical aten operators, and the indices
    of the inputs it writes to, whose new values are its last results (`fxq.writes`).

    Placeholders keep their order; symbolic sizes stay Dynamo's, but for those fixed since
    (`fix_sizes`), which are numbers. `meta["source"]` of a placeholder is the qualified name of the
    parameter it stands for, or the name of the model's argument. Nodes that come from a `Program`
    are settled.

    Raises:
        ValueError: an operator is in train mode.
        UnreadableGraphError: it calls other graphs, or does what only real values can answer.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    gm = drop_inert_regions(gm)
    if why := why_unreadable(gm.graph):
        raise UnreadableGraphError(why)
    values = [_as_fixed(n.meta["example_value"]) for n in placeholders]
    mode = fake_mode_of(values)
    interpreter = _Run(gm)  # node by node: so the new nodes know the modules they come from
    run = interpreter.run
    with tracing(TracingContext(mode)), mode, torch.no_grad(), preserve_node_meta():
        if any(map(is_transform, gm.graph.nodes)):
            # Below their dispatch transforms are operators like any other; composites come apart.
            run = Interpreter(make_fx(run, _allow_non_fake_inputs=True)(*values)).run
        flat = _trace(run, values)
        if interpreter.numbers and any(is_op(node, *READS) for node in flat.graph.nodes):
            # An operator takes numbers only: read them off when it is called.
            run, pending = Interpreter(gm).run, _pending(mode.shape_env)
            pending.clear()
            flat = _trace(run, values)
            if any(getattr(n.target, "__module__", "") == "builtins" for n in flat.graph.nodes):
                raise UnreadableGraphError(NUMBER)
        functionalized = Functionalized(run)
        refuse_train_mode(flat)  # before its operators are taken apart
        if any(map(writes, flat.graph.nodes)):  # as in `capture`
            flat = _trace(functionalized, values)
            inputs = flat.graph.find_nodes(op="placeholder")
            give_own_memory(flat, [inputs[index] for index in functionalized.written])
        for node, origin, value in zip(flat.graph.nodes, placeholders, values, strict=False):
            node.meta["source"] = qualified_name(origin)
            node.meta.setdefault("val", value)  # torch 2.11 leaves numbers out
        for node in flat.graph.nodes:
            stack = node.meta.get("nn_module_stack", {})
            node.meta["nn_module_stack"] = {
                key: (_module_path(source), kind) for key, (source, kind) in stack.items()
            }
        settle_marked(flat)
        return canonicalize(flat), functionalized.written


def fake_mode_of(values: Sequence[Any]) -> FakeTensorMode:
    """Return the fake mode of the tensors among `values`; where there are none, as among the inputs
    of a function of numbers or of nothing, that of the graph that is being compiled."""
    modes = [v.fake_mode for v in values if isinstance(v, FakeTensor)]
    context = TracingContext.try_get()
    mode = modes[0] if modes else context.fake_mode if context else None
    return mode or FakeTensorMode()


class _Run(Interpreter):
    """Runs Dynamo's graph. A number that changes from call to call comes as a tensor, which it is
    read off; it stays a tensor here, with results in the dtypes that a number gives. (Inductor then
    has Dynamo make a constant of it, and a graph for each value; what observes needs one graph.)"""

    numbers = False

    def run_node(self, n: Node) -> Any:
        expected = n.meta.get("example_value")
        if n.op == "call_method" and n.target == "item" and isinstance(expected, torch.SymFloat):
            self.numbers = True
            return self.fetch_args_kwargs_from_env(n)[0][0]
        try:
            result = super().run_node(n)
        except (TypeError, AttributeError) as error:
            if not self.numbers:
                raise
            raise UnreadableGraphError(f"{NUMBER}: {error}") from error
        if not self.numbers or not isinstance(expected, Tensor) or not isinstance(result, Tensor):
            return result
        return result if result.dtype == expected.dtype else result.to(expected.dtype)


def graphs_left() -> int:
    """Return how many graphs Dynamo makes of the function that it compiles now after this one,
    before it leaves the function as it is; 0 where it compiles none."""
    current = CompileContext.current_compile_id()
    if current is None or current.frame_compile_id is None:
        return 0
    return max(torch._dynamo.config.recompile_limit - 1 - current.frame_compile_id, 0)


def fix_sizes(gm: GraphModule, sizes: Iterable[SymInt], example_inputs: Sequence[Any]) -> bool:
    """Make every free size of its inputs that `sizes` are computed of the number that it is in the
    call for which Dynamo compiles `gm`. Dynamo guards on it: another number makes another graph.

    Args:
        gm: Dynamo's graph, which `from_dynamo` is to read once more afterwards.
        sizes: of values in its graph.
        example_inputs: of `gm`; sizes that a user marked as dynamic stay free.
    Returns:
        Whether any was fixed.
    """
    inputs = [n.meta["example_value"] for n in gm.graph.find_nodes(op="placeholder")]
    needed = {symbol for size in sizes for symbol in size.node.expr.free_symbols}
    for value, given in zip(inputs, example_inputs, strict=True):
        marked: Container[int] = getattr(given, "_dynamo_dynamic_indices", ())
        shape: Sequence[Any] = value.shape if isinstance(value, Tensor) else ()
        kept = [size for dim, size in enumerate(shape) if dim in marked]
        needed -= {size.node.expr for size in kept if isinstance(size, SymInt)}
    found = [s for value in inputs for s in _sizes(value) if s.node.expr in needed]
    for size in found:
        int(size)
    return bool(found)


def _sizes(value: Any) -> list[SymInt]:
    """Return the free sizes of an example value, strides among them."""
    numbers: Sequence[Any] = (
        (*value.shape, *value.stride()) if isinstance(value, FakeTensor) else (value,)
    )
    return [number for number in numbers if isinstance(number, SymInt)]


def _as_fixed(value: Any) -> Any:
    """Return an example value in which sizes that have been fixed are numbers."""
    if not any(size.node.expr.is_number for size in _sizes(value)):
        return value
    if not isinstance(value, FakeTensor):
        return int(value)
    both: Sequence[Sequence[Any]] = (value.shape, value.stride())
    shape, stride = (
        [int(n) if isinstance(n, SymInt) and n.node.expr.is_number else n for n in numbers]
        for numbers in both
    )
    with value.fake_mode:
        fixed = torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)
    return fixed.requires_grad_(value.requires_grad)


def _pending(env: Any) -> list[Any]:
    """Return the sizes and numbers that depend on data and that no value of a graph has yet."""
    return [] if env is None else env.pending_fresh_unbacked_symbols


@contextlib.contextmanager
def readable() -> Iterator[None]:
    """Turn what Dynamo would take for a reason to run a frame in eager, without a word, into an
    error of our own, and forget sizes and numbers that depend on data, which a trace has met."""
    context = TracingContext.try_get()
    pending = _pending(context.fake_mode.shape_env if context and context.fake_mode else None)
    before = list(pending)
    try:
        yield
    except (UnreadableGraphError, *UNREADABLE) as error:
        pending[:] = before
        if isinstance(error, UnreadableGraphError):
            raise
        raise UnreadableGraphError(f"{type(error).__name__}: {error}") from error


@contextlib.contextmanager
def passing_graphs(limit: int) -> Iterator[None]:
    """Have what Dynamo compiles inside go afterwards, up to `limit` graphs of a function; when it
    would need more it raises, instead of leaving the function as it is. Errors of the backend come
    as what they are."""
    codes: list[CodeType] = []
    handle = register_bytecode_hook(lambda code, _: codes.append(code))
    config = torch._dynamo.config
    try:
        with config.patch(recompile_limit=limit, fail_on_recompile_limit_hit=True):
            yield
    except BackendCompilerFailed as error:
        raise error.inner_exception from None
    finally:
        handle.remove()
        for code in codes:
            reset_code(code)


def _trace(forward: Callable[..., Any], values: Sequence[Any]) -> GraphModule:
    return make_fx(forward, pre_dispatch=True, _allow_non_fake_inputs=True)(*values)


def lift_attributes(gm: GraphModule) -> tuple[GraphModule, list[Tensor]]:
    """Return a Dynamo graph whose tensors among its attributes are more inputs, the last ones, and
    these tensors. Dynamo makes attributes of parameters where Inductor's freezing is on.

    Args:
        gm: left as it is.
    """
    attributes = [n for n in gm.graph.nodes if n.op == "get_attr" and _is_tensor_of(gm, n)]
    if not attributes:
        return gm, []
    lifted = copy.copy(gm)
    graph, known = Graph(), dict[Node, Node]()
    nodes = list(gm.graph.nodes)
    inputs = [n for n in nodes if n.op == "placeholder"]
    for node in (*inputs, *attributes):
        known[node] = new = graph.placeholder(node.name)
        new.meta = dict(node.meta)
        source = getattr(node, "_dynamo_source", None) or _Source(_attribute_name(node))
        new._dynamo_source = source
        if node in attributes:
            new.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    for node in nodes:
        if node not in known:
            known[node] = graph.node_copy(node, known.__getitem__)
    lifted.graph = graph
    return lifted, [tensor_of(gm, node) for node in attributes]


class _Source(NamedTuple):
    """Stands for Dynamo's own, which knows where a value comes from."""

    name: str


def _is_tensor_of(gm: GraphModule, node: Node) -> bool:
    return isinstance(tensor_of(gm, node), Tensor)


def _attribute_name(node: Node) -> str:
    """Return `L['self'].blocks.0.qkv.weight` for an attribute that Dynamo calls
    `L__self___blocks_0_qkv_weight`, of which it says the module."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    module = _module_path(stack[-1][0]) if stack else ""
    last = re.sub(r"\W", "_", module) if module else "___"
    leaf = str(node.target).rpartition(last)[2].strip("_")
    return "L['self']" + "".join(f".{part}" for part in (*module.split("."), leaf) if part)


def qualified_name(placeholder: Node) -> str:
    """Return `blocks.0.attn.qkv.weight` for a placeholder that stands for it in a Dynamo graph, and
    `hidden_states` for one that stands for an argument."""
    local, *names = _parts_of(_source_of(placeholder)) or [placeholder.name]
    # Of a parameter the local holds the model; an input is one.
    return writable(".".join(names) or local)


def is_registered(placeholder: Node) -> bool:
    """Tell whether a placeholder of a Dynamo graph stands for a parameter or buffer of a module."""
    source = _source_of(placeholder)
    return "._parameters[" in source or "._buffers[" in source


def _source_of(placeholder: Node) -> str:
    source = getattr(placeholder, "_dynamo_source", None)
    text = source.name if source is not None else ""
    return text() if callable(text) else text


def _module_path(source: str) -> str:
    """Return `blocks.0.attn` for Dynamo's `L['self'].blocks.0.attn`."""
    return writable(".".join(_parts_of(source)[1:]))


def _parts_of(source: str) -> list[str]:
    parts = re.findall(r"\['([^']+)'\]|\.([A-Za-z]\w*)|[.\[](\d+)", source)
    stores = ("_modules", "_parameters", "_buffers")
    return [name for part in parts if (name := "".join(part)) not in stores]

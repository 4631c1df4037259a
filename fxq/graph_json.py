"""A graph as JSON, and back, without executing anything the JSON names.

None, bool, int, finite float, str and list stand for themselves. Anything else is a JSON object
with one key, its tag: `{"node": "linear_1"}`, `{"tuple": [...]}`, `{"torch": "torch.float32"}`.
Operators are names in three `torch.ops` namespaces; Python functions come from one closed table.
FX generates Python source from names and targets, so `NAME` and `is_path` see every one of them
before it reaches a graph. No device is written: a program has one, and `load` chooses it.
"""

import contextlib
import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.numbers import int_oo

from fxq.errors import UnsupportedError
from fxq.graph import hint, owner_name, val_of, writable
from fxq.layer import layer_of
from fxq.layer_json import decode_layer, encode_layer

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
# Not `aten::from_file`, which opens, and may create, the file it is told.
OPERATOR = re.compile(r"(aten|prims|fxq)\.(?!from_file\.)([A-Za-z_]\w*)\.([A-Za-z_]\w*)", re.ASCII)
SYMBOL = re.compile(r"s[0-9]+")

# Arithmetic on symbolic sizes, and the choice of one of several results.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module, names in (
        (operator, "getitem add sub mul truediv floordiv mod pow neg pos eq ne lt le gt ge"),
        (operator, "and_ or_ not_"),
        (math, "ceil floor trunc"),
        (torch, "sym_max sym_min sym_not sym_float sym_ite"),
    )
    for name in names.split()
}
FUNCTION_NAMES = {function: name for name, function in FUNCTIONS.items()}
CONSTANTS = {
    str(value): value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype | torch.layout | torch.memory_format)
}


def encode(value: Any) -> Any:
    """Return a node argument or plain value as JSON.

    Raises:
        UnsupportedError: JSON has no form for it.
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, Node):
        return {"node": value.name}
    if isinstance(value, tuple) and (type(value) is torch.Size or not hasattr(value, "_fields")):
        return {"tuple": [encode(item) for item in value]}
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    if isinstance(value, slice):
        return {"slice": [encode(value.start), encode(value.stop), encode(value.step)]}
    if isinstance(value, torch.dtype | torch.layout | torch.memory_format):
        return {"torch": str(value)}
    if isinstance(value, torch.device):
        return {"device": "program"}
    raise UnsupportedError(
        f"expected a plain value, found {type(value).__name__} {repr(value)[:60]}; a file holds "
        "numbers, strings, containers of them and torch dtypes only"
    )


def decode(data: Any, nodes: Mapping[str, Node], device: torch.device) -> Any:
    """Return what `encode` was given. Nodes are looked up by name; every device is `device`."""
    if isinstance(data, list):
        return [decode(item, nodes, device) for item in data]
    if not isinstance(data, dict):
        return data
    ((tag, content),) = data.items()
    match tag:
        case "node":
            return nodes[content]
        case "tuple":
            return tuple(decode(item, nodes, device) for item in content)
        case "dict":
            return {decode(k, nodes, device): decode(v, nodes, device) for k, v in content}
        case "slice":
            return slice(*(decode(item, nodes, device) for item in content))
        case "float":
            return float(content)
        case "torch":
            return CONSTANTS[content]
        case "device":
            return device
    raise ValueError(f"expected a known tag, found {tag!r}; the file is damaged")


def encode_target(target: Any) -> str:
    """Return the name of an operator or function that `decode_target` finds again.

    Raises:
        UnsupportedError: it would not.
    """
    name = FUNCTION_NAMES.get(target) or str(target)
    with contextlib.suppress(ValueError):
        if decode_target(name) is target:
            return name
    raise UnsupportedError(
        f"expected operators of aten, prims or fxq, found {target}, which a file cannot carry"
    )


def not_in_files(graph: Graph) -> str | None:
    """Return what a file cannot carry of a graph, None where it can carry all."""
    found: dict[str, None] = {}
    for target in {node.target: None for node in graph.nodes if node.op == "call_function"}:
        try:
            encode_target(target)
        except UnsupportedError:
            found[str(target)] = None
    return f"{', '.join(found)} would have to be operators of aten, prims or fxq" if found else None


def decode_target(name: str) -> Callable[..., Any]:
    """Return the operator `aten.linear.default` or the function `operator.add`; raise for any
    other."""
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    if parts := OPERATOR.fullmatch(name):
        packet = getattr(getattr(torch.ops, parts[1]), parts[2], None)
        is_packet = isinstance(packet, torch._ops.OpOverloadPacket)
        found = getattr(packet, parts[3], None) if is_packet else None
        # The dispatcher's only: TorchScript adds others, of which `aten::save` writes files.
        if isinstance(found, torch._ops.OpOverload) and torch._C._dispatch_has_kernel(found._name):
            return found
    raise ValueError(
        f"expected an operator of aten, prims or fxq, found {name!r}, which torch "
        f"{torch.__version__} does not have or a file may not call"
    )


def _encode_size(size: int | torch.SymInt, symbols: dict[str, Any]) -> Any:
    """Return a size as JSON, and add to `symbols` the free sizes it is made of."""
    if isinstance(size, int):
        return size
    env = size.node.shape_env
    assert env is not None
    for symbol in size.node.expr.free_symbols:
        bounds = env.var_to_range[symbol]
        symbols[symbol.name] = {
            "hint": hint(env.create_symintnode(symbol, hint=None)),
            "low": int(bounds.lower),
            "high": int(bounds.upper) if bounds.upper.is_Integer else None,
        }
    return _encode_expression(size.node.expr)


def _encode_expression(expr: sympy.Expr) -> Any:
    if expr.is_Integer:
        return int(expr)
    if expr.is_Symbol:
        return {"symbol": expr.name}
    if expr.is_Add or expr.is_Mul:
        return {"add" if expr.is_Add else "mul": [_encode_expression(part) for part in expr.args]}
    raise UnsupportedError(
        f"expected inputs whose sizes are sums and products, found the size {expr}; "
        "capture with dynamic_shapes= that leaves this size fixed"
    )


def decode_symbols(facts: Mapping[str, Mapping[str, Any]]) -> tuple[ShapeEnv, dict[str, Any]]:
    """Return a new ShapeEnv and a SymInt of it per name, with the value at capture as hint."""
    env, sizes = ShapeEnv(), {}
    for name, fact in facts.items():
        if not SYMBOL.fullmatch(name) or {type(v) for v in fact.values()} - {int, type(None)}:
            raise ValueError(f"expected a free size and its bounds, found {name!r}: {fact}")
        symbol = sympy.Symbol(name, positive=True, integer=True)  # as ShapeEnv makes its own
        add = getattr(env, "add_backed_var_to_val", None) or env.add_var_to_val  # its older name
        add(symbol, fact["hint"])
        high = int_oo if fact["high"] is None else fact["high"]
        env.constrain_symbol_range(symbol, fact["low"], high)
        sizes[name] = env.create_symintnode(symbol, hint=fact["hint"])
    return env, sizes


def _decode_size(data: Any, symbols: Mapping[str, Any]) -> Any:
    if type(data) is int:
        return data
    ((tag, content),) = data.items()
    if tag == "symbol":
        return symbols[content]
    parts = [_decode_size(part, symbols) for part in content]
    return sum(parts) if tag == "add" else math.prod(parts)


def is_path(name: str) -> bool:
    """Tell whether a dotted name of a tensor is one that code can have."""
    return name == writable(name) and all(name.split("."))


def encode_graph(gm: GraphModule) -> dict[str, Any]:
    """Return the nodes of `gm` with the meta fxq reads, and the symbolic sizes of its inputs.

    Raises:
        UnsupportedError: a node or value that a file cannot carry.
    """
    symbols: dict[str, Any] = {}  # name -> value at capture, and bounds
    nodes = []
    buffers = dict(gm.named_buffers(remove_duplicate=False))
    for node in gm.graph.nodes:
        entry: dict[str, Any] = {"name": node.name, "op": node.op}
        try:
            if node.op == "placeholder":
                entry["value"] = _encode_input(val_of(node), symbols)
            elif node.op == "get_attr":
                if node.target not in buffers:
                    raise UnsupportedError(f"expected a buffer, found {node.target!r}")
                entry["target"] = node.target
            else:
                if node.op == "call_function":
                    entry["target"] = encode_target(node.target)
                entry["args"] = [encode(arg) for arg in node.args]
                entry["kwargs"] = {key: encode(arg) for key, arg in node.kwargs.items()}
        except UnsupportedError as error:
            raise UnsupportedError(f"{node.name} of {owner_name(node)!r}: {error}") from error
        nodes.append(entry | _encode_meta(node))
    return {"nodes": nodes, "symbols": symbols}


def _encode_input(value: Any, symbols: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(value, Tensor):
        raise UnsupportedError(f"expected a tensor input, found {type(value).__name__}")
    return {
        "shape": [_encode_size(size, symbols) for size in value.shape],
        "stride": [_encode_size(step, symbols) for step in value.stride()],
        "dtype": encode(value.dtype),
    }


def _encode_meta(node: Node) -> dict[str, Any]:
    layer = encode_layer(node)
    meta: dict[str, Any] = {} if layer is None else {"layer": layer}
    if (name := owner_name(node)) != layer_of(node).origin:
        meta["module"] = name
    return {"meta": meta} if meta else {}


def decode_graph(data: Mapping[str, Any], device: torch.device) -> Graph:
    """Return a graph whose inputs have fake values; `graph.propagate` gives them to the rest.

    Raises:
        ValueError: a name or target a file may not use.
    """
    graph = Graph()
    nodes: dict[str, Node] = {}
    env, symbols = decode_symbols(data["symbols"])
    # No fallback: an operator without a fake version would run on real memory.
    mode = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True, allow_fallback_kernels=False)
    for entry in data["nodes"]:
        name, op = entry["name"], entry["op"]
        if not NAME.fullmatch(name) or name in nodes:
            raise ValueError(f"expected a new Python name for a node, found {name!r}")
        args = tuple(decode(arg, nodes, device) for arg in entry.get("args", []))
        kwargs = {k: decode(arg, nodes, device) for k, arg in entry.get("kwargs", {}).items()}
        if bad := [key for key in kwargs if not NAME.fullmatch(key)]:
            raise ValueError(f"expected names for keyword arguments of {name}, found {bad}")
        node = graph.create_node(op, _decode_node_target(entry), args, kwargs, name)
        _decode_meta(node, entry.get("meta", {}))
        if op == "placeholder":
            node.meta["val"] = _decode_input(entry["value"], symbols, mode, device)
        nodes[name] = node
    return graph


def _decode_node_target(entry: Mapping[str, Any]) -> Any:
    op, name, target = entry["op"], entry["name"], entry.get("target", "")
    if op == "call_function":
        return decode_target(target)
    if op == "get_attr" and is_path(target):
        return target
    if op in ("placeholder", "output"):
        return name
    raise ValueError(f"{name}: expected an input, buffer, operator or output, found {op} {target}")


def _decode_input(
    data: Mapping[str, Any], symbols: Mapping[str, Any], mode: FakeTensorMode, device: torch.device
) -> Tensor:
    shape = [_decode_size(size, symbols) for size in data["shape"]]
    stride = [_decode_size(step, symbols) for step in data["stride"]]
    dtype = decode(data["dtype"], {}, device)
    with mode:
        return torch.empty_strided(shape, stride, dtype=dtype, device=device)


def _decode_meta(node: Node, meta: Mapping[str, Any]) -> None:
    decode_layer(node, meta)
    if "module" in meta:
        node.meta["nn_module_stack"] = {"module": (meta["module"], "")}

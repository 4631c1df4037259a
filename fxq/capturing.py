"""From a model to a flat graph of canonical aten operators, and from a call to that graph's inputs.

`capture` uses torch.export. The graph it returns takes the tensors among the call's arguments, in
order, and returns the tensors among the results; a `Signature` remembers how both hang together.
Parameters and buffers are get_attr nodes that share the model's own tensors. `from_dynamo` brings
the graph that `torch.compile` hands to a backend to the same form.
"""

import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensor
from torch.export import Dim
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from fxq.canonicalize import canonicalize
from fxq.errors import UnsupportedError, did_you_mean
from fxq.graph import shape_of

Inputs = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]


@dataclass(frozen=True)
class Leaf:
    """One tensor input of a captured graph.

    Args:
        name: where it is in the call, e.g. `x` or `cond['text']`.
        shape: sizes; a string names a free one, which is the same wherever the name stands.
        dtype: its dtype.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: torch.dtype

    def check(self, value: Any, where: str) -> None:
        """Raise where `value` cannot stand for this input."""
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{where}: expected a tensor for {self.name!r}, found {type(value).__name__}"
            )
        if value.dtype != self.dtype:
            raise ValueError(
                f"{where}: expected {self.dtype} for {self.name!r}, found {value.dtype}; "
                f"convert it, or compress the model in {value.dtype}"
            )
        fits = len(value.shape) == len(self.shape) and all(
            isinstance(want, str) or want == size
            for want, size in zip(self.shape, value.shape, strict=True)
        )
        if not fits:
            want = ["any" if isinstance(size, str) else size for size in self.shape]
            raise ValueError(
                f"{where}: expected shape {want} for {self.name!r}, found {list(value.shape)}; "
                "capture with dynamic_shapes= if this size should be free"
            )


@dataclass(frozen=True)
class Signature:
    """How a call's arguments map to a flat graph's inputs, and its outputs back.

    Args:
        names: parameters that can be given by position, in order.
        known: every parameter the model takes.
        given: those the graph was captured with, in order; defaults among them.
        defaults: values of parameters that a call may leave out.
        in_spec: the pytree of the values of `given`.
        leaves: per leaf of that pytree a `Leaf` for a tensor, or the constant it was captured with.
        out_spec: the pytree of the result; the graph returns its leaves.
        ranges: smallest and largest value (None: any) of the free sizes that the model bounds.
        example_sizes: the free sizes' values in the example.
    """

    names: tuple[str, ...]
    known: tuple[str, ...]
    given: tuple[str, ...]
    defaults: Mapping[str, Any]
    in_spec: pytree.TreeSpec
    leaves: tuple[Any, ...]
    out_spec: pytree.TreeSpec
    ranges: Mapping[str, tuple[int, int | None]]
    example_sizes: Mapping[str, int]

    def flatten(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        where: str = "call",
        device: torch.device | None = None,
    ) -> list[Tensor]:
        """Return the graph's inputs for a call.

        Args:
            args: the call's positional arguments.
            kwargs: its keyword arguments.
            where: how messages name the call.
            device: where the tensors must be; None for anywhere.
        Raises:
            TypeError: arguments missing, unknown or given twice, or of another structure.
            ValueError: a constant, shape, dtype or device differs from what the graph was made for.
        """
        values = dict(self.defaults) | self._by_name(args, kwargs, where)
        for name in self.given:
            if name not in values:
                raise TypeError(f"{where}: argument {name!r} is missing; the example had it")
        for name, value in values.items():
            if name not in self.given and value is not None:
                raise ValueError(
                    f"{where}: expected no {name!r}, as in the example, found "
                    f"{type(value).__name__}; capture again with an example that has it"
                )
        flat, spec = pytree.tree_flatten([values[name] for name in self.given])
        if spec != self.in_spec:
            raise TypeError(f"{where}: expected the structure {self.in_spec}, found {spec}")
        inputs = []
        for leaf, value in zip(self.leaves, flat, strict=True):
            if isinstance(leaf, Leaf):
                leaf.check(value, where)
                if device is not None and value.device != device:
                    raise ValueError(
                        f"{where}: expected {leaf.name!r} on {device}, found {value.device}; move "
                        "it there"
                    )
                inputs.append(value)
            elif isinstance(value, Tensor) or value != leaf:
                raise ValueError(
                    f"{where}: expected the constant {leaf!r} of the example, found {value!r}; "
                    "capture again with an example that has this value"
                )
        self._check_free_sizes(inputs, where)
        return inputs

    def sizes_of(self, inputs: Sequence[Tensor]) -> dict[str, int]:
        """Return the values of the free sizes in the graph's inputs."""
        return _free_sizes(self.tensors, inputs)

    def _check_free_sizes(self, inputs: Sequence[Tensor], where: str) -> None:
        sizes: dict[str, tuple[int, str]] = {}
        for leaf, value in zip(self.tensors, inputs, strict=True):
            for dim, symbol in enumerate(leaf.shape):
                if not isinstance(symbol, str):
                    continue
                size = value.shape[dim]
                known, place = sizes.setdefault(symbol, (size, leaf.name))
                if known != size:
                    raise ValueError(
                        f"{where}: expected {known} in dimension {dim} of {leaf.name!r} as in "
                        f"{place!r}, found {size}"
                    )
                low, high = self.ranges.get(symbol, (1, None))
                if size < low or (high is not None and size > high):
                    raise ValueError(
                        f"{where}: expected {low} to {high or 'any'} in dimension {dim} of "
                        f"{leaf.name!r}, found {size}: the "
                        "model computes otherwise beyond; capture again with an example of that "
                        "size"
                    )

    def _by_name(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], where: str
    ) -> dict[str, Any]:
        if len(args) > len(self.names):
            raise TypeError(
                f"{where}: expected at most {len(self.names)} positional arguments "
                f"({', '.join(self.names)}), found {len(args)}"
            )
        values = dict(zip(self.names, args, strict=False))
        for name, value in kwargs.items():
            if name in values:
                raise TypeError(f"{where}: argument {name!r} given twice")
            if name not in self.known:
                raise TypeError(f"{where}: no argument {name!r}; {did_you_mean(name, self.known)}")
            values[name] = value
        return values

    def constant(self, name: str) -> Any:
        """Return the constant a parameter was captured with; None where it is no plain constant."""
        index = self.given.index(name) if name in self.given else None
        if index is None or not self.in_spec.child(index).is_leaf():
            return None
        before = sum(self.in_spec.child(i).num_leaves for i in range(index))
        leaf = self.leaves[before]
        return None if isinstance(leaf, Leaf) else leaf

    @property
    def tensors(self) -> list[Leaf]:
        """The graph's inputs, in order."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Leaf)]


@dataclass(frozen=True)
class Captured:
    """A model as a graph.

    Args:
        graph_module: flat, in the ATEN dialect; shares the model's parameters and buffers.
        signature: how a call of the model becomes a call of the graph.
        notes: what a person should know, e.g. why a batch size is fixed.
    """

    graph_module: GraphModule
    signature: Signature
    notes: tuple[str, ...] = ()


def capture(model: nn.Module, example_inputs: Inputs, dynamic_shapes: Any = "batch") -> Captured:
    """Return `model` as a flat graph of canonical aten operators.

    Args:
        model: in eval mode. It is not modified.
        example_inputs: a tensor, a tuple of positional arguments or a mapping of keyword arguments.
        dynamic_shapes: `"batch"` leaves dimension 0 of the inputs that share the first one's free;
            None fixes every size; a mapping from parameter names is handed to
            `torch.export.export`.
    Raises:
        TypeError: not a module, or arguments it does not take.
        ValueError: train mode, NaN or Inf in the example.
        UnsupportedError: torch.export cannot capture it; the message has its reason.
    """
    _check_model(model)
    values, names, known, defaults = _bind(model, example_inputs)
    _check_finite(values)
    exported, notes = _export(model, values, dynamic_shapes)
    if mutated := list(exported.graph_signature.buffers_to_mutate.values()):
        raise UnsupportedError(
            f"expected a model that does not write to its buffers, found writes to {mutated[:3]}; "
            "switch off its cache or running statistics"
        )
    gm = _unlift(exported)
    flat, in_spec = pytree.tree_flatten(list(values.values()))
    paths = [
        name + pytree.keystr(path)
        for name, value in values.items()
        for path, _ in pytree.tree_flatten_with_path(value)[0]
    ]
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    leaves = []
    for path, value, node in zip(paths, flat, placeholders, strict=True):
        if isinstance(value, Tensor):
            shape = tuple(s if isinstance(s, int) else str(s) for s in shape_of(node))
            leaves.append(Leaf(path, shape, value.dtype))
        else:
            leaves.append(value)
            gm.graph.erase_node(node)
    out_spec = exported.call_spec.out_spec
    assert out_spec is not None
    signature = Signature(
        names,
        known,
        tuple(values),
        defaults,
        in_spec,
        tuple(leaves),
        out_spec,
        _ranges(exported),
        _free_sizes(leaves, flat),
    )
    if dynamic_shapes == "batch" and not notes:
        fixed = [leaf for leaf in signature.tensors if leaf.shape]
        if fixed and all(isinstance(leaf.shape[0], int) for leaf in fixed):
            notes = (f"the model fixes its batch at {fixed[0].shape[0]}",)
    notes += tuple(f"holds only where {guard}" for guard in _unequal(exported))
    gm.recompile()
    return Captured(canonicalize(gm), signature, notes)


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, found {type(model).__name__}")
    training = [name or "the model" for name, module in model.named_modules() if module.training]
    if training:
        raise ValueError(
            f"model: expected eval mode, found {training[0]} in train mode; call model.eval() first"
        )


def _bind(
    model: nn.Module, example: Inputs
) -> tuple[dict[str, Any], tuple[str, ...], tuple[str, ...], dict[str, Any]]:
    """Return the call's values by name, positional names, all names, and constant defaults."""
    parameters = inspect.signature(model.forward).parameters
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = tuple(n for n, p in parameters.items() if p.kind in by_position)
    known = tuple(
        n for n, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    )
    args, kwargs = split_inputs(example)
    if len(args) > len(names):
        raise TypeError(
            f"example_inputs: the model takes {len(names)} positional arguments "
            f"({', '.join(names)}), found {len(args)}"
        )
    values = dict(zip(names, args, strict=False))
    for name, value in kwargs.items():
        if name not in known:
            raise TypeError(f"example_inputs: no argument {name!r}; {did_you_mean(name, known)}")
        values[name] = value
    missing = [
        n for n in known if parameters[n].default is inspect.Parameter.empty and n not in values
    ]
    if missing:
        raise TypeError(f"example_inputs: missing {', '.join(map(repr, missing))}")
    plain = (type(None), bool, int, float, str)
    defaults = {n: parameters[n].default for n in known if isinstance(parameters[n].default, plain)}
    return (
        {n: (defaults | values)[n] for n in known if n in defaults | values},
        names,
        known,
        defaults,
    )


def split_inputs(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and keyword arguments that a user's inputs stand for."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    return (inputs,), {}


def _check_finite(values: Mapping[str, Any]) -> None:
    for path, value in pytree.tree_flatten_with_path(dict(values))[0]:
        if isinstance(value, Tensor) and value.is_floating_point() and not value.isfinite().all():
            raise ValueError(
                f"example_inputs: expected finite values, found NaN or Inf in {pytree.keystr(path)}"
            )


def _export(
    model: nn.Module, values: dict[str, Any], dynamic_shapes: Any
) -> tuple[torch.export.ExportedProgram, tuple[str, ...]]:
    if dynamic_shapes != "batch":
        return _try_export(model, values, dynamic_shapes), ()
    sizes = [t.shape[0] for t in pytree.tree_leaves(values) if isinstance(t, Tensor) and t.ndim]
    batch = sizes[0] if sizes else None

    def has_batch(leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == batch

    # Tracing takes a size of 1 for a constant, and broadcasts on the strength of it: capture two
    # samples instead.
    traced = values
    if batch == 1:
        traced = pytree.tree_map(lambda v: torch.cat([v, v]) if has_batch(v) else v, values)
    dynamic = pytree.tree_map(lambda v: {0: Dim.AUTO} if has_batch(v) else None, values)
    try:
        return _try_export(model, traced, dynamic), ()
    except UnsupportedError as error:
        note = f"the batch is fixed at {batch}: capturing it free failed ({error.__cause__})"
        return _try_export(model, values, None), (note[:300],)


def _try_export(
    model: nn.Module, values: dict[str, Any], dynamic_shapes: Any
) -> torch.export.ExportedProgram:
    with torch.no_grad():
        try:
            return torch.export.export(model, (), values, dynamic_shapes=dynamic_shapes)
        except Exception as error:  # torch.export raises a dozen kinds
            reason = next((line for line in str(error).splitlines() if line.strip()), repr(error))
            raise UnsupportedError(
                f"{type(model).__name__} cannot be captured by torch.export: {reason.strip()} "
                "(torch.export.draft_export shows the place in its source)"
            ) from error


def _free_sizes(leaves: Sequence[Any], values: Sequence[Any]) -> dict[str, int]:
    return {
        symbol: value.shape[dim]
        for leaf, value in zip(leaves, values, strict=True)
        if isinstance(leaf, Leaf)
        for dim, symbol in enumerate(leaf.shape)
        if isinstance(symbol, str)
    }


def _ranges(exported: torch.export.ExportedProgram) -> dict[str, tuple[int, int | None]]:
    """Return the bounds the model's own branches put on free sizes.

    A lower bound of 2 is torch.export's own, which keeps sizes of 0 and 1 apart while tracing.
    """
    ranges = {}
    for symbol, found in exported.range_constraints.items():
        low = int(found.lower) if found.lower > 2 else 1
        high = int(found.upper) if found.upper < sys.maxsize // 2 else None
        if low > 1 or high is not None:
            ranges[str(symbol)] = (low, high)
    return ranges


def _unequal(exported: torch.export.ExportedProgram) -> list[str]:
    """Return the conditions on sizes that neither a name shared by sizes nor a range expresses."""
    guards: Sequence[str] = getattr(exported, "_guards_code", None) or ()
    return [guard for guard in guards if "!=" in guard]


def _unlift(exported: torch.export.ExportedProgram) -> GraphModule:
    """Return the exported program as a flat GraphModule with get_attr parameters."""
    takes_guards = "check_guards" in inspect.signature(exported.module).parameters
    module = exported.module(check_guards=False) if takes_guards else exported.module()
    graph = module.graph
    graph.set_codegen(CodeGen())
    for node in list(graph.nodes):
        if node.op == "call_module" and not node.users:  # guards of older torch
            graph.erase_node(node)
    return GraphModule(module, graph)


def from_dynamo(gm: GraphModule) -> GraphModule:
    """Return the graph that Dynamo hands to a backend as canonical aten operators.

    Placeholders keep their order; symbolic sizes stay Dynamo's. `meta["source"]` of a placeholder
    is the qualified name of the parameter behind it, where there is one.
    """
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    values = [n.meta["example_value"] for n in placeholders]
    mode = next(v.fake_mode for v in values if isinstance(v, FakeTensor))
    with tracing(TracingContext(mode)), mode, torch.no_grad():
        flat = make_fx(gm.forward, pre_dispatch=True, _allow_non_fake_inputs=True)(*values)
        for node, origin in zip(flat.graph.nodes, placeholders, strict=False):
            node.meta["source"] = _qualified_name(origin)
        return canonicalize(flat)


def _qualified_name(placeholder: Node) -> str:
    """Return `blocks.0.attn.qkv.weight` for a placeholder that stands for it in a Dynamo graph."""
    source = getattr(placeholder, "_dynamo_source", None)
    text = source.name if source is not None else ""
    text = text() if callable(text) else text
    parts = re.findall(r"\['([^']+)'\]|\.([A-Za-z]\w*)|\[(\d+)\]", text)
    stores = ("_modules", "_parameters", "_buffers")
    names = [a or b or c for a, b, c in parts][1:]  # the first is the local that holds the model
    names = [name for name in names if name not in stores]
    return ".".join(names) or placeholder.name

"""From a model to a flat graph of canonical aten operators, and from a call to that graph's inputs.

`capture` uses torch.export, or takes what it made. The graph it returns takes the tensors among the
call's arguments, in order, and returns the tensors among the results; a `Signature` remembers how
both hang together. Parameters and buffers are get_attr nodes that share the model's own tensors.
"""

import copy
import inspect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from fxq.autocast import outside_autocast, without_inert_regions
from fxq.binding import Bound, bind, bind_exported, check_finite, check_model
from fxq.canonicalize import canonicalize
from fxq.canonicalize.cleanup import refuse_train_mode
from fxq.checking import Checked
from fxq.errors import UnsupportedError
from fxq.exporting import (
    conditions_on_sizes,
    export,
    fixed_batches,
    n_free_sizes,
    noting_lengths,
    ranges_of,
    refusing,
    try_export,
)
from fxq.graph import is_transform, shape_of, why_unreadable, writable, writes
from fxq.module_state import restored, spared
from fxq.signature import Inputs, Leaf, Signature, described, free_sizes, split_inputs
from fxq.writes import drop_unseen_writes, is_unseen, lift_writes


@dataclass(frozen=True)
class Captured:
    """A model as a graph.

    Args:
        graph_module: flat, in the ATEN dialect; shares the model's parameters and buffers, but for
            those it writes to, which are inputs.
        signature: how a call of the model becomes a call of the graph.
        state: copies of the buffers that the model writes to, by name.
        notes: what a person should know, e.g. why a batch size is fixed.
    """

    graph_module: GraphModule
    signature: Signature
    state: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def inputs(self, example: Inputs) -> list[Tensor]:
        """Return the graph's inputs for a call of the model as it was captured."""
        args, kwargs = split_inputs(example)
        return [*self.signature.flatten(args, kwargs, "example_inputs"), *self.state.values()]


def capture(
    model: nn.Module | ExportedProgram, example_inputs: Inputs, dynamic_shapes: Any = "batch"
) -> Captured:
    """Return `model` as a flat graph of canonical aten operators, compared with the model itself on
    the example and on a second batch (`fxq.checking`).

    Args:
        model: in eval mode, or what torch.export made of such a model, whose sizes are then free
            where that export left them free. It is not modified.
        example_inputs: a tensor, a tuple of positional arguments or a mapping of keyword arguments.
        dynamic_shapes: `"batch"` leaves dimension 0 of the inputs that share the first one's free;
            None fixes every size; a mapping names those that are free, `{"ids": {1: "tokens"}}`
            (`fxq.dynamic_shapes`).
    Raises:
        TypeError: not a module, or arguments it does not take.
        ValueError: train mode, NaN or Inf in the example, a size named as free that the model
            fixes.
        UnsupportedError: torch.export cannot capture it, or what it captured is not what the model
            computes; the message has the reason.
    """
    try:
        with outside_autocast():
            return _capture(model, example_inputs, dynamic_shapes)
    except (TypeError, ValueError):
        raise
    except Exception as error:
        # Of torch: what is refused here has no cause.
        of_torch = error.__cause__ is not None or not isinstance(error, UnsupportedError)
        if isinstance(model, ExportedProgram) or not of_torch:
            raise
        if why := _own_error(model, example_inputs):
            raise ValueError(f"example_inputs: the model itself cannot take them: {why}") from error
        raise


def _own_error(model: nn.Module, example_inputs: Inputs) -> str:
    """Return what the model raises by itself where it is called with the example, and with what;
    "" where it runs."""
    bound = bind(model, example_inputs)
    forms = [
        f"{name} {described(value)}" for name, value in bound.values.items() if value is not None
    ]
    try:
        with torch.no_grad(), spared(model):
            args, kwargs = bound.split(pytree.tree_map_only(Tensor, torch.clone, bound.values))
            model(*args, **kwargs)
    except Exception as error:
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        return f"{type(error).__name__}: {first[:200]}; found {', '.join(forms)[:300]}"
    return ""


def _capture(
    model: nn.Module | ExportedProgram, example_inputs: Inputs, dynamic_shapes: Any
) -> Captured:
    lengths: list[str] = []
    if isinstance(model, ExportedProgram):
        bound = bind_exported(model, example_inputs)
        module: nn.Module = _module_of(model)
        exported, notes = model, tuple[str, ...]()
    else:
        check_model(model)
        bound = bind(model, example_inputs)
        module = model
        # Tracing leaves fake tensors in what the model keeps.
        with restored(model), noting_lengths(lengths), without_inert_regions():
            exported, notes = export(model, bound, dynamic_shapes)
    check_finite(bound.values)
    refuse_train_mode(exported.graph_module)
    if why := why_unreadable(exported.graph):
        raise UnsupportedError(why)
    if any(is_transform(n) or (writes(n) and not is_unseen(n)) for n in exported.graph.nodes):
        # A pass may put a read in front of a write to the same memory: leave no writes. This traces
        # once more, which is what writes that nobody sees can do without.
        free = n_free_sizes(exported)
        with refusing(type(module).__name__):
            exported = exported.run_decompositions({})
            if n_free_sizes(exported) < free and dynamic_shapes == "batch" and module is model:
                # It has fixed them at the sizes that were traced, which need not be the example's.
                exported = try_export(model, bound, bound.values, None).run_decompositions({})
    gm = _unlift(exported)
    drop_unseen_writes(gm)
    signature, state, remarks = _sign(gm, exported, bound)
    if dynamic_shapes == "batch" and not notes:
        notes = fixed_batches(signature, bound.values)
        if notes and lengths:
            notes = (f"{notes[0]}: len() makes a number of it at {lengths[0]}; use .shape[0]",)
    gm = canonicalize(gm)
    try:
        found = Checked(gm, signature, state, module, bound).compare(bound.values)
    except UnsupportedError:
        if dynamic_shapes != "batch" or 1 not in signature.example_sizes.values():
            raise
        fixed = capture(model, example_inputs, None)  # tracing takes no branch for a size of 1
        note = "the batch is fixed at 1: of more samples the model computes otherwise"
        return replace(fixed, notes=(note, *fixed.notes))
    conditions = signature.conditions + found.conditions
    signature = replace(signature, returned=found.returned, conditions=conditions)
    return Captured(gm, signature, state, notes + remarks + found.notes)


def _sign(
    gm: GraphModule, exported: ExportedProgram, bound: Bound
) -> tuple[Signature, dict[str, Tensor], tuple[str, ...]]:
    """Return the signature, copies of the buffers that the model writes to, and what to say; `gm`
    loses inputs that are no tensors, and its writes become results."""
    flat, in_spec = pytree.tree_flatten(list(bound.values.values()))
    paths = [
        name + pytree.keystr(path)
        for name, value in bound.values.items()
        for path, _ in pytree.tree_flatten_with_path(value)[0]
    ]
    placeholders = gm.graph.find_nodes(op="placeholder")
    leaves = []
    for path, value, node in zip(paths, flat, placeholders, strict=True):
        if isinstance(value, Tensor):
            shape = tuple(s if isinstance(s, int) else str(s) for s in shape_of(node))
            leaves.append(Leaf(path, shape, value.dtype))
        else:
            leaves.append(value)
            gm.graph.erase_node(node)
    state, written = lift_writes(gm)
    gm.recompile()
    if trained := [name for name, value in state.items() if isinstance(value, nn.Parameter)]:
        raise UnsupportedError(
            f"expected a model that writes to buffers, found that it writes to the parameters "
            f"{trained[:3]}; make them buffers, or compress the model after it has been trained"
        )
    conditions, notes = conditions_on_sizes(exported, leaves)
    out_spec = exported.call_spec.out_spec
    assert out_spec is not None
    signature = Signature(
        names=bound.names,
        known=bound.known,
        given=tuple(bound.values),
        defaults=bound.defaults,
        in_spec=in_spec,
        leaves=tuple(leaves),
        out_spec=out_spec,
        ranges=ranges_of(exported),
        example_sizes=free_sizes(leaves, flat),
        conditions=conditions,
        state=tuple(state),
        writes=written,
    )
    copies = {name: value.detach().clone() for name, value in state.items()}
    return signature, copies, notes


def _module_of(exported: ExportedProgram) -> GraphModule:
    """Return the exported program as a module, whose parameters are get_attr nodes."""
    exported = _with_writable_names(exported)
    takes_guards = "check_guards" in inspect.signature(exported.module).parameters
    return exported.module(check_guards=False) if takes_guards else exported.module()


def _with_writable_names(exported: ExportedProgram) -> ExportedProgram:
    """Return the exported program with names of parameters and buffers that code can have, with a
    number at the end of one that is another's already."""
    names = [*exported.state_dict, *exported.constants]
    renamed = {name: name for name in names if writable(name) == name}
    if len(renamed) == len(set(names)):
        return exported
    taken = set(renamed)
    for name in names:
        if name not in renamed:
            known = writable(name)
            numbered = (f"{known}_{count}" for count in itertools.count(1))
            renamed[name] = next(n for n in itertools.chain([known], numbered) if n not in taken)
            taken.add(renamed[name])
    signature = exported.graph_signature

    def named(specs: Sequence[Any]) -> list[Any]:
        return [replace(spec, target=renamed.get(spec.target, spec.target)) for spec in specs]

    copied = copy.copy(exported)
    copied._graph_signature = replace(
        signature,
        input_specs=named(signature.input_specs),
        output_specs=named(signature.output_specs),
    )
    copied._state_dict = {renamed[name]: value for name, value in exported.state_dict.items()}
    copied._constants = {renamed[name]: value for name, value in exported.constants.items()}
    return copied


def _unlift(exported: ExportedProgram) -> GraphModule:
    """Return the exported program as a flat GraphModule with get_attr parameters."""
    module = _module_of(exported)
    graph = module.graph
    graph.set_codegen(CodeGen())
    for node in list(graph.nodes):
        if node.op == "call_module" and not node.users:  # guards of older torch
            graph.erase_node(node)
    return GraphModule(module, graph)

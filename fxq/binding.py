"""From a user's example to the arguments of a model, by name."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from fxq.errors import UnsupportedError, did_you_mean
from fxq.numerics import is_inexact
from fxq.signature import RETURN_DICT, Inputs, split_inputs


@dataclass(frozen=True)
class Bound:
    """The arguments of an example.

    Args:
        values: by name, in the model's order, defaults among them.
        names: parameters that can be given by position, in order.
        known: every parameter the model takes.
        defaults: values of parameters that a call may leave out.
        n_args: how many of the values were given by position: the first ones.
    """

    values: dict[str, Any]
    names: tuple[str, ...]
    known: tuple[str, ...]
    defaults: dict[str, Any]
    n_args: int

    def split(self, values: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return values as the example gives them, by position and by keyword: hooks of a model
        see the difference."""
        names = [*values]
        by_position = tuple(values[name] for name in names[: self.n_args])
        return by_position, {name: values[name] for name in names[self.n_args :]}


def check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, found {type(model).__name__}")
    if hasattr(model, "_orig_mod"):
        raise TypeError(
            "model: expected the model itself, found what torch.compile made of it; compress the "
            "model (._orig_mod), and compile the program"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "model: expected a torch.nn.Module in Python, found TorchScript (torch.jit.trace or "
            "torch.jit.script); compress the module that it was made of"
        )
    training = [
        repr(name) if name else "the model"
        for name, module in model.named_modules()
        if module.training
    ]
    if training:
        raise ValueError(
            f"model: expected eval mode, found {training[0]} in train mode; call model.eval() first"
        )


def bind(model: nn.Module, example: Inputs) -> Bound:
    """Return the arguments that an example stands for."""
    parameters = inspect.signature(model.forward).parameters
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = tuple(n for n, p in parameters.items() if p.kind in by_position)
    known = tuple(
        n for n, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    )
    args, kwargs = split_inputs(example)
    variadic = [f"*{n}" for n, p in parameters.items() if p.kind is p.VAR_POSITIONAL]
    if len(args) > len(names) and variadic:
        raise UnsupportedError(
            f"example_inputs: expected arguments with names, found {len(args)} positional ones for "
            f"forward({variadic[0]}); wrap the model in a module whose forward has named arguments"
        )
    if len(args) > len(names):
        raise TypeError(
            f"example_inputs: the model takes {len(names)} positional arguments "
            f"({', '.join(names)}), found {len(args)}"
        )
    values = dict(zip(names, args, strict=False))
    for name, value in kwargs.items():
        if name == RETURN_DICT and name not in known:
            continue
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
    given = {n: (defaults | values)[n] for n in known if n in defaults | values}
    return Bound(given, names, known, defaults, len(args))


def bind_exported(program: ExportedProgram, example: Inputs) -> Bound:
    """Return what `bind` does for an exported program, which takes the arguments it was exported
    with and no others."""
    spec = program.call_spec.in_spec
    assert spec is not None
    positional, keyword = spec.children()
    called = program.module_call_graph[0].signature
    given = getattr(called, "forward_arg_names", None) or ()
    names = tuple(given[: positional.num_children])
    if len(names) < positional.num_children:  # older torch does not keep them
        names = tuple(f"args_{i}" for i in range(positional.num_children))
    known = (*names, *keyword.context)
    args, kwargs = split_inputs(example)
    values = dict(zip(names, args, strict=False)) | kwargs
    if len(args) > len(names) or set(values) != set(known):
        raise TypeError(
            f"example_inputs: this exported program takes {len(names)} positional and the keyword "
            f"arguments {list(keyword.context)}, found {len(args)} and {list(kwargs)}"
        )
    values = {name: values[name] for name in known}
    if pytree.tree_structure(tuple(values.values())).children() != [
        *positional.children(), *keyword.children()
    ]:  # fmt: skip
        raise TypeError(
            f"example_inputs: expected arguments nested as they were exported, {spec}, found others"
        )
    return Bound(values, names, known, {}, len(names))


def check_finite(values: Mapping[str, Any]) -> None:
    for path, value in pytree.tree_flatten_with_path(dict(values))[0]:
        if is_inexact(value) and not value.isfinite().all():
            raise ValueError(
                f"example_inputs: expected finite values, found NaN or Inf in {pytree.keystr(path)}"
            )

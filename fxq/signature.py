"""How a model is called: from a call's arguments to the inputs of a flat graph, and back from its
outputs.

A graph takes tensors only, in order. A `Signature` knows which argument each comes from, checks a
call against what the graph was captured with, and says what is wrong in the caller's own words.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxq.conditions import Condition
from fxq.errors import did_you_mean

# Models of transformers take it without naming it among their arguments. It says in which form the
# result comes, which a `Program` decides call by call.
RETURN_DICT = "return_dict"

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
            instead = ""
            if value.dtype.is_floating_point:  # a time-step is one with some schedulers
                whole = "model" if self.dtype.is_floating_point else "model for calls with it"
                instead = f", or compress the {whole} in {value.dtype}"
            raise ValueError(
                f"{where}: expected {self.dtype} for {self.name!r}, found {value.dtype}; "
                f"convert it{instead}"
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
        conditions: on the free sizes; where one does not hold the model computes otherwise.
        state: names of the buffers that the model writes to; the graph takes them after the tensors
            of the call.
        writes: which inputs of the graph, by index, the model writes to. The graph returns their
            new values after the leaves of the result.
        returned: which leaves of the result are, in the model, the very tensor that an input of the
            graph stands for, by index, and not a copy of it.
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
    conditions: tuple[Condition, ...] = ()
    state: tuple[str, ...] = ()
    writes: tuple[int, ...] = ()
    returned: Mapping[int, int] = field(default_factory=dict)

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
            if name not in self.given:  # its default is no plain value, so it is not None
                raise ValueError(
                    f"{where}: expected no {name!r}, as in the example, found "
                    f"{described(value)}; capture again with an example that has it"
                )
        flat, spec = pytree.tree_flatten([values[name] for name in self.given])
        if spec != self.in_spec:
            raise TypeError(f"{where}: {self._other_structure(spec, values)}")
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
            elif type(value) is not type(leaf) or value != leaf:  # 0 and False are not the same
                raise ValueError(
                    f"{where}: expected the constant {described(leaf)} of the example, found "
                    f"{described(value)}; capture again with an example that has this value"
                )
        self._check_free_sizes(inputs, where)
        return inputs

    def _other_structure(self, spec: pytree.TreeSpec, values: Mapping[str, Any]) -> str:
        """Return which argument is not nested as in the example, and how it is."""
        wanted, found = self.in_spec.children(), spec.children()
        index = next(i for i, want in enumerate(wanted) if want != found[i])
        name, want = self.given[index], wanted[index]
        expected = f"a {getattr(want.type, '__name__', '')} of {want.num_leaves} values"
        if want.is_leaf():
            leaf = self.leaves[sum(spec.num_leaves for spec in wanted[:index])]
            expected = "a tensor" if isinstance(leaf, Leaf) else described(leaf)
        return (
            f"expected {name!r} to be {expected}, as in the example, found a "
            f"{type(values[name]).__name__} of {found[index].num_leaves} values"
        )

    def sizes_of(self, inputs: Sequence[Tensor]) -> dict[str, int]:
        """Return the values of the free sizes in the graph's inputs, with or without its state."""
        return free_sizes(self.tensors, inputs[: len(self.tensors)])

    def takes(self, sizes: Mapping[str, int]) -> bool:
        """Tell whether the graph is the model's with some free sizes, the others as in the
        example."""
        every = {**self.example_sizes, **sizes}
        for name, size in sizes.items():
            low, high = self.ranges.get(name, (1, None))
            if size < low or (high is not None and size > high):
                return False
        return all(condition.holds(every) for condition in self.conditions)

    def results(self, returned: Sequence[Any]) -> list[Any]:
        """Return the leaves of the result among what the graph returned."""
        return list(returned[: self.out_spec.num_leaves])

    def next_state(self, inputs: Sequence[Tensor], results: Sequence[Any]) -> list[Tensor]:
        """Return the state after a call of the graph.

        Args:
            inputs: what the graph was called with, the state among it.
            results: what it returned, new values among it.
        """
        values = results[self.out_spec.num_leaves :]
        written = dict(zip(self.writes, values, strict=True))
        first = len(inputs) - len(self.state)
        return [written.get(i, inputs[i]) for i in range(first, len(inputs))]

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
                if size == 0:
                    raise ValueError(
                        f"{where}: expected at least 1 in dimension {dim} of {leaf.name!r}, found 0"
                    )
                if size < low or (high is not None and size > high):
                    raise ValueError(
                        f"{where}: expected {low} to {high or 'any'} in dimension {dim} of "
                        f"{leaf.name!r}, found {size}: the "
                        "model computes otherwise beyond; capture again with an example of that "
                        "size"
                    )
        known_sizes = {symbol: size for symbol, (size, _) in sizes.items()}
        for condition in self.conditions:
            if not condition.holds(known_sizes):
                raise ValueError(
                    f"{where}: expected sizes with {condition.written(self._places())}, found "
                    f"{', '.join(self._found(condition, known_sizes))}: the model computes "
                    "otherwise there; capture again with an example of that size"
                )

    def _places(self) -> dict[str, str]:
        """Return what a person calls each free size: a dimension of the first tensor that has
        it."""
        places: dict[str, str] = {}
        for leaf in self.tensors:
            for dim, symbol in enumerate(leaf.shape):
                if isinstance(symbol, str):
                    places.setdefault(symbol, f"{leaf.name}.shape[{dim}]")
        return places

    def _found(self, condition: Condition, sizes: Mapping[str, int]) -> list[str]:
        named = re.findall(r"[A-Za-z_]\w*", condition.text)
        places = self._places().items()
        return [f"{place} = {sizes[name]}" for name, place in places if name in named]

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
            if name == RETURN_DICT and name not in self.known:
                continue
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


def described(value: Any) -> str:
    """Return what a message calls a value: a tensor's form, the beginning of anything else."""
    if isinstance(value, Tensor):
        return f"a tensor {value.dtype} {list(value.shape)}"
    return repr(value)[:60]


def free_sizes(leaves: Sequence[Any], values: Sequence[Any]) -> dict[str, int]:
    """Return the values of the free sizes, by name, that tensors `values` have where `leaves` name
    them."""
    return {
        symbol: value.shape[dim]
        for leaf, value in zip(leaves, values, strict=True)
        if isinstance(leaf, Leaf)
        for dim, symbol in enumerate(leaf.shape)
        if isinstance(symbol, str)
    }


def split_inputs(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and keyword arguments that a user's inputs stand for."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    return (inputs,), {}

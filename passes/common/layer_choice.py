"""Which layers a pass is for: by qualified name, or by where they are in the data flow."""

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from torch import Tensor
from torch.fx import Node

from fxq.account import kind_of
from fxq.errors import MissingInputError, did_you_mean
from fxq.graph import dtype_of, input_name, is_op, owner_name, shape_of, val_of, weight_owner
from fxq.operators import Movement, of

FIRST = "<first>"  # override key: layers that no other layer comes before, by data flow
LAST = "<last>"  # override key: layers that no other layer comes after, by data flow
DEPTHWISE = "<depthwise>"  # override key: convolutions whose groups have one input channel
FIRST_OF, FIRST_INPUT = "<first of {}>", "the first input"
SHAPE_ONLY = of(Movement.SHAPE_ONLY)  # no data goes through these

Choice = TypeVar("Choice")


def overridden(
    layers: Sequence[Node], overrides: Sequence[tuple[str, Choice]], partial: bool = False
) -> dict[Node, tuple[str, Choice]]:
    """Return the first override that matches each layer, of those that one matches.

    A pattern is for the layers that have such names (`fxq.graph.owner_name`); where none has, for
    those whose weight is a module's of such a name: all layers that share it.

    Args:
        layers: of a graph.
        overrides: pairs of a pattern and what it chooses.
        partial: the graph may be a part of a model: patterns that match nothing are left out.
    Raises:
        ValueError: a pattern that matches no layer.
        MissingInputError: `first_of` an input that the model does not have.
    """
    names = {layer: owner_name(layer) for layer in layers}
    owners = {layer: owner for layer in layers if (owner := weight_owner(layer))}
    groups = {
        FIRST: first_layers(layers),
        LAST: last_layers(layers),
        DEPTHWISE: [n for n in layers if kind_of(n) == "conv" and shape_of(n.args[1])[1] == 1],
    }
    chosen: dict[Node, tuple[str, Choice]] = {}
    for pattern, spec in overrides:
        if pattern in groups:
            matched: Iterable[Node] = groups[pattern]
        elif is_of_graph(pattern):
            matched = _first_of(layers, pattern, partial)
        else:
            matched = _named(names, pattern) or _named(owners, pattern)
            if not matched and not partial:
                raise ValueError(
                    f"override {pattern!r} matches no layer; "
                    f"{did_you_mean(pattern, set(names.values()))}"
                )
        for layer in matched:
            chosen.setdefault(layer, (pattern, spec))
    return chosen


def _named(names: Mapping[Node, str], pattern: str) -> list[Node]:
    return [layer for layer, name in names.items() if fnmatch.fnmatchcase(name, pattern)]


def _first_of(layers: Sequence[Node], pattern: str, partial: bool) -> list[Node]:
    """Return the layers that read an input of the model with no layer between."""
    if not layers:
        return []
    inputs = {
        input_name(node): node
        for node in layers[0].graph.nodes
        if node.op == "placeholder" and isinstance(val_of(node), Tensor)
    }
    named = {FIRST_OF.format(name): node for name, node in inputs.items()}
    floating = [n for n in inputs.values() if dtype_of(n).is_floating_point]
    named |= {FIRST_OF.format(FIRST_INPUT): node for node in floating[:1]}
    if pattern not in named:
        if partial:
            return []
        name = pattern[len(FIRST_OF.format("")) - 1 : -1]
        raise MissingInputError(
            f"override {pattern!r}: no input {name!r} of the model is a tensor; "
            f"{did_you_mean(name, inputs)}"
        )
    ends = {*layers, *(n for n in layers[0].graph.nodes if is_op(n, *SHAPE_ONLY))}
    reached = _reachable([named[pattern]], lambda n: () if n in ends else n.users)
    return [layer for layer in layers if layer in reached]


def first_of(name: str | None = None) -> str:
    """Return the override key of the layers that read an input of the model with no layer between,
    by data flow.

    `FIRST` has a layer for each input that goes through one: of a diffusion model, that of the
    noisy sample and that of the time-step.

    Args:
        name: of the argument; None for the first floating-point one.
    """
    return FIRST_OF.format(FIRST_INPUT if name is None else name)


def is_of_graph(pattern: str) -> bool:
    """Tell whether an override goes by the data flow of a whole graph, not by a name."""
    return pattern in (FIRST, LAST) or pattern.startswith(FIRST_OF.format("")[:-1])


def first_layers(layers: Sequence[Node]) -> list[Node]:
    """Return the layers whose input does not depend on another layer."""
    downstream = _reachable(layers, lambda n: list(n.users))
    return [n for n in layers if n not in downstream]


def last_layers(layers: Sequence[Node]) -> list[Node]:
    """Return the layers whose output no other layer depends on."""
    upstream = _reachable(layers, lambda n: n.all_input_nodes)
    return [n for n in layers if n not in upstream]


def _reachable(starts: Sequence[Node], neighbours: Callable[[Node], Iterable[Node]]) -> set[Node]:
    seen: set[Node] = set()
    stack = [m for n in starts for m in neighbours(n)]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack += neighbours(node)
    return seen

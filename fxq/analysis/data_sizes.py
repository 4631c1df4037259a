"""A graph whose sizes depend on the data, at sizes that the data may have.

How many tokens a mask selects is known only when the model runs, and Dynamo's graph has a symbol
for it. Analyses want numbers: here a copy of the graph gets them, once with as much as there can be
and once with as little as is of interest. What holds for both, and whose sizes grow evenly, holds
in between.
"""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves, tree_map

from fxq.graph import depends_on_data, hint, val_of
from fxq.operators import MOVED, movement_of

UNLIMITED = 2**31 - 1  # ends a slice wherever it may end
LITTLE = 1  # not 0, of which nothing could be said

Numbers = dict[Any, int]  # symbol -> its value


def has_data_sizes(gm: GraphModule) -> bool:
    """Tell whether a size in a graph depends on the data."""
    return any(map(depends_on_data, gm.graph.nodes))


def at_data_sizes(gm: GraphModule, most: bool) -> tuple[GraphModule, dict[Node, Node]]:
    """Return a copy of a graph with numbers for sizes that depend on the data.

    Args:
        gm: the graph; its tensors are shared.
        most: as large as they can be, or as small as 1.
    Returns:
        the copy, and for each of its nodes the one it is a copy of. Sizes that remain unknown are
        symbols, as before.
    """
    graph, copies = Graph(), dict[Node, Node]()
    graph.output(graph.graph_copy(gm.graph, copies))
    numbers: Numbers = {}
    for node, copy in copies.items():
        copy.meta = dict(node.meta)
        if not depends_on_data(node):
            continue
        _find_numbers(node, copies, numbers, most)
        if _symbols(val_of(node)) <= numbers.keys():
            copy.meta["val"] = tree_map(lambda leaf: _with(leaf, numbers), val_of(node))
    originals = {copy: node for node, copy in copies.items()}
    first, last = gm.graph.output_node(), graph.output_node()
    originals[last] = first
    last.meta = dict(first.meta)
    return GraphModule(gm, graph), originals


def _find_numbers(node: Node, copies: dict[Node, Node], numbers: Numbers, most: bool) -> None:
    """Note the numbers of the symbols that begin with a node: a count, or a part of a tensor."""
    value = val_of(node)
    if movement_of(node) in MOVED:
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: val_of(copies[n]))
        if _symbols((args, kwargs)):
            return
        args, kwargs = tree_map(_on_meta, (args, kwargs))
        moved = node.target(*args, **kwargs)  # type: ignore[operator]
        for leaf, at in zip(tree_leaves(value), tree_leaves(moved), strict=True):
            for size, number in zip(leaf.shape, at.shape, strict=True):
                if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                    numbers.setdefault(size.node.expr, number)
        return
    for leaf in tree_leaves(value):
        for size in leaf.shape if isinstance(leaf, Tensor) else (leaf,):
            if isinstance(size, torch.SymInt) and free_unbacked_symbols(size):
                symbol, env = size.node.expr, size.node.shape_env
                if env is None or not symbol.is_Symbol:
                    continue
                limit = env.var_to_range[symbol].upper
                largest = int(limit) if limit.is_finite and limit < UNLIMITED else UNLIMITED
                numbers.setdefault(symbol, largest if most else LITTLE)


def _symbols(values: Any) -> set[Any]:
    """Return the symbols of numbers and sizes that depend on the data; strides do not matter."""
    leaves = tree_leaves(values)
    sizes = [s for leaf in leaves for s in (leaf.shape if isinstance(leaf, Tensor) else (leaf,))]
    by_data = [s for s in sizes if isinstance(s, torch.SymInt) and free_unbacked_symbols(s)]
    return {symbol for s in by_data for symbol in s.node.expr.free_symbols}


def _with(value: Any, numbers: Numbers) -> Any:
    if isinstance(value, torch.SymInt):
        return _number(value, numbers)
    if not isinstance(value, Tensor):
        return value
    sizes = [_number(size, numbers) for size in value.shape]
    return torch.empty(sizes, dtype=value.dtype, device="meta")


def _number(size: int | torch.SymInt, numbers: Numbers) -> int:
    if isinstance(size, int) or not free_unbacked_symbols(size):
        return hint(size)
    return int(size.node.expr.xreplace(numbers))


def _on_meta(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return hint(value) if isinstance(value, torch.SymInt) else value
    return torch.empty([hint(size) for size in value.shape], dtype=value.dtype, device="meta")

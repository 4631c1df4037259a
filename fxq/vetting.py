"""What a graph from a file may compute: nothing that exhausts the machine that loads it.

Names are settled before (`fxq.graph_json`): operators of torch and functions of one closed table.
Those functions are for sizes, but Python's operators also repeat lists, format strings and raise
numbers to any power, so here they get sizes and numbers only, in products of few factors. Results
are bounded while the graph runs on fake values, before anything real does.
"""

import operator
from collections.abc import Collection

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves

from fxq.graph import args_of, hint
from fxq.graph_json import FUNCTION_NAMES

MAX_NUMBER = 2**63  # what torch holds sizes in
MAX_DEGREE = 16  # sizes multiplied with each other
MAX_BYTES = 2**38  # of one value: more than a device has
NUMBERS = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)


def check_graph(graph: Graph, buffers: Collection[str]) -> None:
    """Raise `ValueError` for a graph that reads what is no buffer, or whose arithmetic may give
    numbers that do not end.

    Args:
        graph: as the file has it; nothing has run.
        buffers: names a get_attr node may have.
    """
    degrees: dict[Node, int] = {}
    for node in graph.nodes:
        degrees[node] = 1
        if node.op == "get_attr" and node.target not in buffers:
            raise ValueError(f"{node.name}: expected a buffer of the file, found {node.target!r}")
        if node.op != "call_function" or node.target not in FUNCTION_NAMES:
            continue
        if node.target is not operator.getitem:
            degrees[node] = _degree(node, degrees)
        if node.kwargs or degrees[node] > MAX_DEGREE:
            raise ValueError(
                f"{node.format_node()}: expected positional arguments and at most {MAX_DEGREE} "
                "sizes multiplied with each other"
            )


def _degree(node: Node, degrees: dict[Node, int]) -> int:
    """Return how many sizes a product in `node` multiplies; anything but sums, products and powers
    counts as the largest of its arguments."""
    for arg in node.args:
        small = isinstance(arg, int | float) and not abs(arg) >= MAX_NUMBER
        if not small and not isinstance(arg, Node):
            raise ValueError(
                f"{node.format_node()}: expected sizes and numbers below 2^63, found {arg!r:.40}"
            )
    found = [degrees[arg] if isinstance(arg, Node) else 0 for arg in node.args]
    if node.target is operator.mul:
        return sum(found)
    if node.target is operator.pow:
        exponent = args_of(node)[1]
        # Of a number, the exponent counts as for a size: 10 ** 16 is allowed, 10 ** 17 is not.
        return MAX_DEGREE + 1 if isinstance(exponent, Node) else int(max(found[0], 1) * exponent)
    return max(found)


def check_arithmetic(node: Node) -> None:
    """Raise `ValueError` where a function for sizes would get something else.

    Args:
        node: about to run on fake values, which the nodes it reads have.
    """
    if node.op != "call_function" or node.target not in FUNCTION_NAMES:
        return
    values = [arg.meta["val"] if isinstance(arg, Node) else arg for arg in node.args]
    if node.target is operator.getitem:
        fits = isinstance(values[0], tuple | list) and isinstance(values[1], int)
    else:
        fits = all(isinstance(value, NUMBERS) for value in values)
    if not fits:
        kinds = ", ".join(type(value).__name__ for value in values)
        raise ValueError(f"{node.format_node()}: expected sizes and numbers, found {kinds}")


def check_values(graph: Graph) -> None:
    """Raise `ValueError` for a graph with a value that no device holds.

    Args:
        graph: after it ran on fake values, which take no memory.
    """
    for node in graph.nodes:
        for leaf in tree_leaves(node.meta.get("val")):
            if isinstance(leaf, Tensor) and (size := _n_bytes(leaf)) > MAX_BYTES:
                raise ValueError(
                    f"{node.format_node()}: expected values of at most {MAX_BYTES} bytes, found "
                    f"one of {size}"
                )


def _n_bytes(value: Tensor) -> int:
    """Return the memory a fake value stands for: a view that repeats needs no more than its
    source."""
    steps = zip(value.shape, value.stride(), strict=True)
    return value.element_size() * (1 + sum((hint(size) - 1) * hint(step) for size, step in steps))

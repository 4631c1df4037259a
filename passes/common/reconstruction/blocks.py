"""Blocks: an observed graph cut into parts that follow one another, each a graph of its own.

A block is a run of neighbouring nodes, so it never reads what comes after it. Where to cut:

    named       modules whose qualified names match the patterns that the caller gives; otherwise
    residual    modules whose own code adds what a layer made to what that layer was made of (a
                transformer block, a residual block), the innermost where they are nested, and all
                modules of the same classes
    the rest    after each such sum where there is one, otherwise after each layer

Operations between two blocks that no layer is among belong to the block after them: a
concatenation lies with the layer that reads it. Constants and observers are in every block that
reads them; what changes between calls is an input.
"""

import fnmatch
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from torch.fx import Graph, GraphModule, Node

from fxq.account import kind_of
from fxq.errors import did_you_mean
from fxq.graph import args_of, is_constant, is_op, owner_name, shape_of
from fxq.layer import layer_of
from fxq.operators import ADD

MAX_LAYERS = 24  # in a block; a module with more is cut like what is in no block

Path = tuple[str, str]  # a module's qualified name and class
Judge = Callable[[Node], bool]  # whether a node is a layer to be treated


@dataclass(frozen=True, eq=False)
class Block:
    """A part of an observed graph.

    Args:
        name: the module it is, or its first layer.
        graph_module: takes the values of `inputs`, returns the tuple of those of `outputs`; shares
            tensors and observers with the whole.
        inputs: names of nodes of the whole: its inputs, its state, or outputs of blocks before.
        outputs: names of nodes of the whole that later blocks or its results read.
        layers: names of the nodes that are to be treated, in order.
    """

    name: str
    graph_module: GraphModule = field(repr=False)
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    layers: tuple[str, ...]


def cut(
    gm: GraphModule, patterns: Sequence[str] = (), layers: Collection[Node] | None = None
) -> list[Block]:
    """Cut a graph into blocks, in order; what is after the last layer is one without layers.

    Args:
        gm: in the ATEN or OBSERVED dialect.
        patterns: qualified names of modules with shell wildcards (`"blocks.*"`); of modules in one
            another the outermost match is the block. Empty: found from the graph.
        layers: nodes that are to be treated; those that are to be quantized unless given.
    Raises:
        ValueError: a pattern that matches no module.
    """
    is_layer = _is_pending if layers is None else layers.__contains__
    nodes = [node for node in gm.graph.nodes if _computes(node)]
    sums = _residual_sums(nodes)
    homes = _named(nodes, patterns) if patterns else _residual(nodes, sums)
    parts: list[tuple[str, list[Node]]] = []
    for home, group in groupby(nodes, key=lambda node: homes.get(node, "")):
        run = list(group)
        if home and sum(map(is_layer, run)) <= MAX_LAYERS:
            parts.append((home, run))
        else:
            parts += [("", piece) for piece in _pieces(run, sums, is_layer)]
    return [_extract(gm, name, part, is_layer) for name, part in _joined(parts, is_layer)]


def _computes(node: Node) -> bool:
    return node.op not in ("placeholder", "get_attr", "call_module", "output")


def _is_pending(node: Node) -> bool:
    return layer_of(node).is_pending


def _stack(node: Node) -> list[Path]:
    """Return the modules a node is in, from the outside in, without the model itself."""
    entries = node.meta.get("nn_module_stack", {}).values()
    return [(path, str(kind)) for path, kind in entries if path]


def _residual_sums(nodes: Sequence[Node]) -> set[Node]:
    """Return the sums of equal shapes where one operand went through a layer since the two were
    one. Sums of embeddings have nothing in common; those of a rotation no layer in between; those
    of a layer's own parts are in the layer's module."""
    given = [node for node in nodes[0].graph.nodes if node.op == "placeholder"] if nodes else []
    bits = {node: 1 << place for place, node in enumerate((*given, *nodes))}
    layers = sum(bits[node] for node in nodes if kind_of(node) is not None)
    seen = {node: bits[node] for node in given}
    found: set[Node] = set()
    for node in nodes:
        reads = [_source(arg) for arg in node.all_input_nodes]
        seen[node] = bits[node]
        for arg in reads:
            seen[node] |= seen.get(arg, 0)
        if _adds_alike(node, reads):
            one, other = (seen.get(arg, 0) for arg in reads)
            if one & other and (one ^ other) & layers:
                found.add(node)
    return found


def _adds_alike(node: Node, reads: Sequence[Node]) -> bool:
    """Tell whether a node adds two values of one shape that are not parts of one layer."""
    if not is_op(node, *ADD) or len(reads) != 2:
        return False
    parts = all(kind_of(arg) is not None and _stack(arg) == _stack(node) for arg in reads)
    return not parts and shape_of(reads[0]) == shape_of(reads[1])


def _source(node: Node) -> Node:
    """Return what an observed edge is the value of."""
    while node.op == "call_module":
        node = args_of(node)[0]
    return node


def _residual(nodes: Sequence[Node], sums: Iterable[Node]) -> dict[Node, str]:
    """Return the innermost residual module that each node is in."""
    kinds = {stack[-1][1] for stack in map(_stack, sums) if stack}
    return {
        node: next((path for path, kind in reversed(_stack(node)) if kind in kinds), "")
        for node in nodes
    }


def _named(nodes: Sequence[Node], patterns: Sequence[str]) -> dict[Node, str]:
    """Return the outermost module that each node is in and a pattern matches."""
    paths = {path for node in nodes for path, _ in _stack(node)}
    for pattern in patterns:
        if not fnmatch.filter(paths, pattern):
            raise ValueError(
                f"blocks: {pattern!r} matches no module; {did_you_mean(pattern, paths)}"
            )
    matched = {path for pattern in patterns for path in fnmatch.filter(paths, pattern)}
    return {node: next((path for path, _ in _stack(node) if path in matched), "") for node in nodes}


def _pieces(run: Sequence[Node], sums: set[Node], is_layer: Judge) -> list[list[Node]]:
    """Cut what is in no block after each residual sum; a piece without one after each layer."""
    pieces = _cut_after(run, sums)
    return [
        part
        for piece in pieces
        for part in ([piece] if piece[-1] in sums else _cut_after(piece, filter(is_layer, piece)))
    ]


def _cut_after(run: Sequence[Node], ends: Iterable[Node]) -> list[list[Node]]:
    ends, parts, part = set(ends), [], list[Node]()
    for node in run:
        part.append(node)
        if node in ends:
            parts.append(part)
            part = []
    return [*parts, part] if part else parts


def _joined(
    parts: Iterable[tuple[str, list[Node]]], is_layer: Judge
) -> list[tuple[str, list[Node]]]:
    """Give parts without a layer to the next one that has one, and name every part."""
    joined: list[tuple[str, list[Node]]] = []
    waiting: list[Node] = []
    for name, part in parts:
        waiting += part
        layers = [node for node in part if is_layer(node)]
        if layers:
            joined.append((name or owner_name(layers[0]), waiting))
            waiting = []
    return [*joined, ("results", waiting)] if waiting else joined


def _extract(gm: GraphModule, name: str, part: Sequence[Node], is_layer: Judge) -> Block:
    """Make a part a graph of its own."""
    inside, graph = set(part), Graph()
    copies: dict[Node, Node] = {}
    inputs: list[Node] = []

    def bring(node: Node) -> None:
        """Have `copies` hold what stands for a node that the part reads."""
        if node in copies:
            return
        if node.op == "call_module" or is_constant(node):
            for arg in node.all_input_nodes:
                bring(arg)
            copies[node] = graph.node_copy(node, copies.__getitem__)
        elif node not in inside:
            copies[node] = graph.placeholder(node.name)
            copies[node].meta = {"val": node.meta["val"]}  # and no record: it multiplies elsewhere
            inputs.append(node)

    # Placeholders first: inputs are brought before anything is copied.
    for node in part:
        for arg in node.all_input_nodes:
            for origin in _read_through(arg):
                if origin not in inside:
                    bring(origin)
    for node in part:
        for arg in node.all_input_nodes:
            bring(arg)
        copies[node] = graph.node_copy(node, copies.__getitem__)
    outputs = [
        node
        for node in part
        if not is_constant(node) and any(_is_outside(user, inside) for user in node.users)
    ]
    graph.output(tuple(copies[node] for node in outputs))
    graph.lint()
    return Block(
        name,
        GraphModule(gm, graph),
        tuple(node.name for node in inputs),
        tuple(node.name for node in outputs),
        tuple(node.name for node in part if is_layer(node)),
    )


def _read_through(node: Node) -> Iterable[Node]:
    """Yield the nodes that are read where `node` is: itself, or what its observers are given."""
    if node.op == "call_module":
        for arg in node.all_input_nodes:
            yield from _read_through(arg)
    elif not is_constant(node):
        yield node


def _is_outside(user: Node, inside: set[Node]) -> bool:
    """Tell whether a reader, or one that reads through it, is in no place inside."""
    if user.op == "call_module":
        return any(_is_outside(reader, inside) for reader in user.users)
    return user not in inside

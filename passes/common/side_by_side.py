"""Two graphs of one block, run on inputs of their own, and what both have on an edge side by side:
what quantized layers give, and what the float model has in its place."""

import operator
from collections.abc import Sequence

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from fxq.rewriting import with_outputs


def side_by_side(
    found: GraphModule, exact: GraphModule, names: Sequence[str]
) -> tuple[GraphModule, list[Node]]:
    """Return a graph that runs both, and its node for each edge, whose value is `[..., 2 K]`.

    Args:
        found: takes the first half of the inputs; its values are the first K.
        exact: takes the second half; has the nodes of `found`.
        names: of nodes of both, whose value is `[..., K]`.
    """
    root, graph = nn.Module(), Graph()
    n_inputs = len(found.graph.find_nodes(op="placeholder"))
    results = []
    for name, gm in (("found", found), ("exact", exact)):
        root.add_module(name, with_outputs(gm, names))
        inputs = [graph.placeholder(f"{name}_{k}") for k in range(n_inputs)]
        results.append(graph.call_module(name, tuple(inputs)))
    pairs = [
        [graph.call_function(operator.getitem, (result, k)) for result in results]
        for k in range(-len(names), 0)
    ]
    edges = [graph.call_function(torch.cat, (pair, -1)) for pair in pairs]
    graph.output(tuple(edges))
    return GraphModule(root, graph), edges

"""History: the graph as each pass of a recipe left it, for whoever wants to see what happened.

    stages = []
    fxq.compress(model, x, recipe, history=stages)
    for stage in stages:
        print(stage.name, f"{stage.seconds:.1f} s", len(stage.changed), "nodes")

A stage has a graph and observers of its own and shares parameters with its neighbours, so keeping
all of them costs a list of nodes each, and what the observers have seen.
"""

import copy
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule, Node

from fxq.dialect import observer_of
from fxq.graph import owning_module
from fxq.layer import LAYER
from fxq.observers import RangeObserver
from fxq.rewriting import copy_graph


@dataclass(frozen=True)
class Stage:
    """What one pass made.

    Args:
        name: of the pass; "capture" for the first stage.
        seconds: that it took; of "capture" tracing and the comparison with the model.
        graph_module: a copy, as the pass left it.
        changed: names of nodes that are new, or read or are known otherwise than before; an
            observer that has seen more is.
        removed: names of nodes that were there before.
    """

    name: str
    seconds: float
    graph_module: GraphModule
    changed: frozenset[str]
    removed: frozenset[str]


def stage(name: str, seconds: float, gm: GraphModule, before: GraphModule | None) -> Stage:
    """Return `gm` as the stage after the one that left `before`; in the first all is new."""
    old, new = ({} if g is None else _nodes(g) for g in (before, gm))
    changed = frozenset(name for name, node in new.items() if old.get(name) != node)
    removed = frozenset(old.keys() - new.keys())
    return Stage(name, seconds, _with_own_observers(copy_graph(gm)), changed, removed)


def _with_own_observers(copied: GraphModule) -> GraphModule:
    for name, module in list(copied.named_modules(remove_duplicate=False)):
        if isinstance(module, RangeObserver):
            copied.set_submodule(name, copy.deepcopy(module))
    return copied


def _nodes(gm: GraphModule) -> dict[str, Any]:
    return {node.name: _described(node) for node in gm.graph.nodes}


def _described(node: Node) -> tuple[Any, ...]:
    record = node.meta.get(LAYER)
    observer = observer_of(owning_module(node), node)
    seen = 0 if observer is None else observer.count
    return node.op, str(node.target), str(node.args), str(node.kwargs), record, seen

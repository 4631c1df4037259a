"""Regions of `torch.autocast` that cast nothing are as if they were not there.

Model libraries switch autocast off around what must stay in fp32, as rotary angles; where it is not
on to begin with, such a region does nothing. Regions that cast stay in a graph, and whoever reads
it refuses them.
"""

import contextlib
import copy
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.amp.autocast_mode import autocast
from torch.fx import Graph, GraphModule, Node

ENDS = ("_enter_autocast", "_exit_autocast")  # of a region in a graph of Dynamo's


def casts_nothing(region: autocast) -> bool:
    """Tell whether autocast is off in a region that is about to be entered, and outside of it.

    A region that asks for a dtype which its device cannot cast to, such as float32 on a CPU, is off
    too.
    """
    return not region._enabled and not torch.is_autocast_enabled(region.device)


@contextlib.contextmanager
def without_inert_regions() -> Iterator[None]:
    """Have regions that cast nothing leave no trace in what is traced inside."""
    enter, leave = autocast.__enter__, autocast.__exit__
    left_out = []  # regions, innermost last

    def entering(self: autocast) -> Any:
        if casts_nothing(self):
            left_out.append(self)
            return self
        return enter(self)

    def leaving(self: autocast, *why: Any) -> Any:
        if left_out and left_out[-1] is self:
            left_out.pop()
            return False
        return leave(self, *why)

    autocast.__enter__, autocast.__exit__ = entering, leaving  # type: ignore[method-assign]
    try:
        yield
    finally:
        autocast.__enter__, autocast.__exit__ = enter, leave  # type: ignore[method-assign]


@contextlib.contextmanager
def outside_autocast() -> Iterator[None]:
    """Switch autocast off where it is on: its casts would become part of what is captured, and
    happen wherever that is called."""
    with contextlib.ExitStack() as regions:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                regions.enter_context(torch.autocast(device, enabled=False))
        yield


def drop_inert_regions(gm: GraphModule) -> GraphModule:
    """Return a graph of Dynamo's without the ends of regions that cast nothing: `gm` itself where
    there are none, and else a copy with the same placeholders by name."""
    entries = [node for node in gm.graph.nodes if _named(node, ENDS[0]) and _is_inert(node)]
    if not entries:
        return gm
    ends = {*entries, *(user for node in entries for user in node.users)}
    found, graph, known = copy.copy(gm), Graph(), dict[Node, Node]()
    for node in gm.graph.nodes:
        if node not in ends:
            known[node] = graph.node_copy(node, known.__getitem__)
    found.graph = graph
    return found


def _named(node: Node, name: str) -> bool:
    return getattr(node.target, "__name__", None) == name


def _is_inert(node: Node) -> bool:
    """Tell it of a node that enters a region: it has what `torch.autocast` takes, in order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where the region was entered, it has been said
        return casts_nothing(autocast(*node.args))  # type: ignore[arg-type]

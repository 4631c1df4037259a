"""Apply a recipe while compiling, to the layers that a kernel of this device computes, and lower.

A quantized layer without a kernel quantizes and dequantizes at every call: an error, and time, for
nothing. So a layer that lowering declines stays as it was. What lowering declines is known only of
a quantized graph: the recipe is applied once to ask, and once more with these layers settled.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch.fx import GraphModule

from fxq.graph import SETTLED, is_settled
from fxq.layer import Skip, layer_of, treat
from fxq.lowering.lower import lower
from fxq.lowering.rule import Decision
from fxq.lowering.shared_constants import share_constants
from fxq.pipeline import Recipe
from fxq.rewriting import copy_graph

N_REASONS = 3


@dataclass(frozen=True)
class Applied:
    """What a recipe and lowering made of a graph.

    Args:
        quantized: the QUANTIZED graph.
        lowered: the LOWERED one.
        decisions: on each quantized layer, by name.
        left: why the recipe left a layer as it was for want of a kernel, by name.
    """

    quantized: GraphModule
    lowered: GraphModule
    decisions: Mapping[str, Decision]
    left: Mapping[str, str]

    @property
    def declined(self) -> dict[str, str]:
        """Why a layer that is quantized or sparse all the same has no kernel, by name: those of a
        program."""
        return {name: d.reason for name, d in self.decisions.items() if d.kernel is None}


def apply_where_it_pays(gm: GraphModule, recipe: Recipe | None, device: torch.device) -> Applied:
    """Apply `recipe` to the layers of `gm` that have a kernel on `device`, and lower the result.

    Args:
        gm: canonical; its settled nodes stay as they are. It is not modified.
        recipe: one without calibration; None where all is settled.
        device: to lower for.
    """
    left: dict[str, str] = {}
    while True:
        quantized = gm
        if recipe is not None:
            quantized = recipe.apply(_settled(gm, left))
            share_constants(quantized, gm)
        lowered, decisions = lower(quantized, device)
        share_constants(lowered, quantized)
        applied = Applied(quantized, lowered, decisions, left)
        if recipe is None or not (more := _unsettled_origins(gm, applied)):
            return applied
        left = left | more


def _settled(gm: GraphModule, left: Mapping[str, str]) -> GraphModule:
    """Return a copy of `gm` in which the named nodes are settled, with the reason."""
    copied = copy_graph(gm)
    for node in copied.graph.nodes:
        if node.name in left:
            node.meta[SETTLED] = True
            treat(node, "lowering", Skip(f"no kernel pays here: {left[node.name]}", intended=True))
    return copied


def _unsettled_origins(gm: GraphModule, applied: Applied) -> dict[str, str]:
    """Return which nodes of `gm` became layers that lowering declined, with its reasons."""
    sources = {node.name for node in gm.graph.nodes if not is_settled(node)} - set(applied.left)
    declined = applied.declined
    origins = {
        layer_of(node).origin: declined[node.name]
        for node in applied.quantized.graph.nodes
        if node.name in declined
    }
    return {name: why for name, why in origins.items() if name in sources}


def summary(reasons: Iterable[str]) -> str:
    """Return the most frequent reasons with their counts, as one line."""
    counts = Counter(reasons).most_common()
    parts = [f"{why} ({count})" for why, count in counts[:N_REASONS]]
    return "; ".join(parts) + ("; ..." if len(counts) > N_REASONS else "")

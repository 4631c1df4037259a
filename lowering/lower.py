"""Lower a QUANTIZED graph for a device: the list of rules, and what each decided."""

from collections.abc import Mapping

import torch
from torch.fx import GraphModule

from fxq.account import kind_of
from fxq.dialect import LOWERED
from fxq.graph import add_buffer, args_of, copy_graph, erase_dead, is_constant, is_op, tensor_of
from fxq.lowering.decision import Decision
from fxq.lowering.lower_attention import lower_attention
from fxq.lowering.lower_linear import LowerLinear
from fxq.operators import SPARSE_ATTENTION

ops = torch.ops.fxq


def lower(
    gm: GraphModule, device: torch.device, sizes: Mapping[str, int] | None = None
) -> tuple[GraphModule, dict[str, Decision]]:
    """Return a LOWERED copy of `gm` for `device`, and the decision on each quantized layer by name.

    The copy shares parameters and buffers with `gm`. Every kernel carries the name of the node
    whose value it computes in `meta["fxq_replaces"]`.
    """
    lowered = copy_graph(gm)
    decisions: dict[str, Decision] = {}
    rule = LowerLinear(lowered, device, sizes)
    for node in list(lowered.graph.nodes):
        if kind_of(node) in ("linear", "conv") and is_op(args_of(node)[1], ops.dequantize.default):
            decisions[node.name] = rule.apply(node)
        elif is_op(node, SPARSE_ATTENTION):
            decisions[node.name] = lower_attention(node, device, sizes)
    fold_dequantized_weights(lowered)
    erase_dead(lowered)
    lowered.graph.lint()
    LOWERED.check(lowered, after="lowering")
    return lowered, decisions


def fold_dequantized_weights(gm: GraphModule) -> None:
    """Dequantize once, now, the weights that no integer kernel took.

    Otherwise a layer that stays float would dequantize its weight at every call and run slower than
    before it was quantized. The price is a float copy of these weights in memory.
    """
    for node in list(gm.graph.nodes):
        if not is_op(node, ops.dequantize.default) or not node.users:
            continue
        parts = args_of(node)[:3]
        if all(part is None or is_constant(part) for part in parts):
            values = [None if part is None else tensor_of(gm, part) for part in parts]
            folded = ops.dequantize(*values, args_of(node)[3])
            name = str(parts[0].target).replace("_codes", "_dequantized")
            node.replace_all_uses_with(add_buffer(gm, name, folded, like=node))

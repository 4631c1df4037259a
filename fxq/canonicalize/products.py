"""`baddbmm`, which attention written by hand uses, becomes a product and a sum."""

import torch
from torch.fx import GraphModule, Node

from fxq.graph import args_of
from fxq.rewriting import insert_call

aten = torch.ops.aten


def bmm_of_baddbmm(gm: GraphModule) -> int:
    """baddbmm(c, a, b, beta, alpha) equals alpha * bmm(a, b) where beta is 0, which ignores c, and
    c + alpha * bmm(a, b) where it is 1."""
    count = 0
    for node in gm.graph.find_nodes(op="call_function", target=aten.baddbmm.default):
        beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
        if beta not in (0, 1):
            continue
        added, a, b = args_of(node)
        value: Node = insert_call(aten.bmm.default, (a, b), before=node)
        if alpha != 1:
            value = insert_call(aten.mul.Tensor, (value, alpha), before=node)
        if beta:
            value = insert_call(aten.add.Tensor, (value, added), before=node)
        node.replace_all_uses_with(value)
        count += 1
    return count

"""Views take one form each: `reshape`, `transpose` and `permute`."""

import torch
from torch.fx import GraphModule

from fxq.graph import args_of, val_of
from fxq.operators import canonical_form
from fxq.rewriting import insert_call

aten = torch.ops.aten


def reshape_of_view(gm: GraphModule) -> int:
    """view(x, sizes) equals reshape(x, sizes), which does not insist on how memory was laid out
    when the graph was captured: another rewrite in front of it may lay it out otherwise."""
    count = 0
    for node in gm.graph.nodes:
        if canonical_form(node) == "reshape":
            node.target = aten.reshape.default
            count += 1
    return count


def transpose_of_property(gm: GraphModule) -> int:
    """x.mT, x.T and, of real numbers, x.mH and x.H equal a transpose or permute of the axes."""
    count = 0
    for node in list(gm.graph.nodes):
        form = canonical_form(node)
        if form == "permute":
            source = args_of(node)[0]
            args = (source, list(reversed(range(val_of(source).ndim))))
            new = insert_call(aten.permute.default, args, before=node)
        elif form == "transpose":
            new = insert_call(aten.transpose.int, (args_of(node)[0], -2, -1), before=node)
        else:
            continue
        new.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(new)
        count += 1
    return count

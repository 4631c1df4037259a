"""Masks of pruned layers, held against the weights: a pass that writes where one is False breaks
what an earlier pass promised, and is told so."""

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxq.errors import PassError
from fxq.graph import args_of, constant_of, is_constant, is_op, is_settled, owner_name
from fxq.layer import check_mask, layer_of


def check_masks(gm: GraphModule, after: str) -> None:
    """Raise `PassError` where a layer's weight is not zero, or not known, where its mask is False.

    Args:
        gm: in any dialect but LOWERED.
        after: the pass that ran last.
    """
    for node in gm.graph.nodes:
        mask = None if is_settled(node) else layer_of(node).mask
        if mask is None:
            continue
        weight = _stored(args_of(node)[1])
        if weight is None:
            raise PassError(
                f"{owner_name(node)} after {after}: expected a constant weight, because it is "
                "pruned, found one that is computed; prune after that pass"
            )
        try:
            check_mask(mask, weight)
        except ValueError as error:
            raise PassError(
                f"{owner_name(node)} after {after}: {error}; or prune after that pass"
            ) from error


def _stored(node: Node) -> Tensor | None:
    """Return the value of a weight, float or of codes; None where it is not constant."""
    if is_constant(node):
        return constant_of(node)
    if not is_op(node, torch.ops.fxq.dequantize.default):
        return None
    codes, scale, zero, dtype = args_of(node)
    parts = [None if part is None else constant_of(part) for part in (codes, scale, zero)]
    value: Tensor = torch.ops.fxq.dequantize.default(*parts, dtype)
    return value

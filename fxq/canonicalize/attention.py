"""matmul, scale, mask, softmax, matmul become `aten.scaled_dot_product_attention`.

Provided nothing else reads the scores, the softmax runs over the keys in the dtype of the scores,
and a boolean mask leaves every query at least one key: only then is a large negative number the
same as minus infinity.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxq.constants import Constants, constant_value
from fxq.graph import args_of, dtype_of, is_op, shape_of, val_of
from fxq.operators import ADD, DIV, MATMUL, MUL, SOFTMAX, Movement, of
from fxq.rewriting import insert_call

aten = torch.ops.aten
WHERE = of(Movement.WHERE)
MOST_NEGATIVE = -1e4  # what is below vanishes in the softmax of a row with a real score


@dataclass
class _Scores:
    """What lies between the first product and the softmax."""

    constants: Constants
    product: Node | None = None
    scale: float = 1.0
    additive: list[Node] = field(default_factory=list)
    keep: Node | None = None
    windows: list[Any] | None = None  # sizes the scores are viewed to while masks are added


def scaled_dot_product_attention(gm: GraphModule) -> int:
    """Replace every attention that is provably one."""
    count, constants = 0, Constants()  # layers share masks
    for node in list(gm.graph.nodes):
        if not is_op(node, *MATMUL) or not is_op(args_of(node)[0], *SOFTMAX):
            continue
        softmax = args_of(node)[0]
        axis, last = args_of(softmax)[1], val_of(softmax).ndim - 1
        if axis not in (-1, last) or len(softmax.users) != 1:
            continue
        if dtype_of(softmax) != dtype_of(args_of(softmax)[0]):
            continue
        scores = _unwrap(args_of(softmax)[0], constants)
        if scores is not None:
            count += _rewrite(node, scores)
    return count


def _rewrite(node: Node, scores: _Scores) -> bool:
    """Replace one attention; `node` is its second product."""
    assert scores.product is not None
    q, k_transposed = args_of(scores.product)
    v = args_of(node)[1]
    if val_of(q).ndim < 3 or not _same_lead(q, k_transposed, v) or not _provable(scores):
        return False
    if any(dtype_of(term) != dtype_of(q) for term in scores.additive):
        return False
    k = _transposed(k_transposed, scores.product)
    q, q_scale = _unscaled(q)
    k, k_scale = _unscaled(k)
    mask = scores.keep
    for term in scores.additive:
        if mask is scores.keep and mask is not None:
            args = (mask, term, -math.inf)
            mask = insert_call(aten.where.ScalarOther, args, before=node)
        else:
            mask = term if mask is None else insert_call(aten.add.Tensor, (mask, term), before=node)
    if scores.windows is not None:
        q, k, v = (
            insert_call(aten.reshape.default, (n, _regrouped(n, scores.windows)), before=node)
            for n in (q, k, v)
        )
    scale = scores.scale * q_scale * k_scale
    target = aten.scaled_dot_product_attention.default
    result = insert_call(target, (q, k, v, mask), {"scale": scale}, before=node)
    if scores.windows is not None:
        shape = [-1, *shape_of(node)[1:]]
        result = insert_call(aten.reshape.default, (result, shape), before=node)
    result.meta["val"] = node.meta["val"] if scores.windows is None else result.meta["val"]
    node.replace_all_uses_with(result)
    return True


def _unwrap(node: Any, constants: Constants) -> _Scores | None:
    """Walk from the softmax's input to the product; None where something else is in between."""
    scores = _Scores(constants)
    grouped = False
    while isinstance(node, Node) and len(node.users) == 1:
        if is_op(node, *MATMUL):
            scores.product = node
            return None if grouped else scores
        if is_op(node, *MUL, *DIV) and (factor := _number(args_of(node)[1])) is not None:
            scores.scale *= factor if is_op(node, *MUL) else 1.0 / factor
            node = args_of(node)[0]
        elif is_op(node, *ADD) and isinstance(args_of(node)[1], Node) and not node.kwargs:
            inner, term = args_of(node)
            if not _leads_to_product(inner):
                inner, term = term, inner
            if scores.scale != 1.0:
                return None  # (scores + mask) * scale scales the mask too
            if scores.windows is not None and not grouped and shape_of(term)[0] != 1:
                return None
            value = constants.value(term)
            if value is None or value.any():
                scores.additive.append(term)
            node = inner
        elif is_op(node, *WHERE) and scores.keep is None and scores.scale == 1.0:
            keep, inner, other = args_of(node)
            number = _number(other)
            if number is None or number > MOST_NEGATIVE or dtype_of(keep) != torch.bool:
                return None
            scores.keep, node = keep, inner
        elif is_op(node, aten.reshape.default):
            outer, inner = list(shape_of(node)), list(shape_of(args_of(node)[0]))
            if scores.windows is None and outer[1:] == inner[2:] and len(outer) > 3:
                scores.windows, grouped = inner[1:-2], True
            elif grouped and outer[2:] == inner[1:]:
                grouped = False
            else:
                return None
            node = args_of(node)[0]
        else:
            return None
    return None


def _provable(scores: _Scores) -> bool:
    """Tell whether a boolean mask, if there is one, leaves every query a key."""
    if scores.keep is None:
        return True
    keep = scores.constants.value(scores.keep)
    if keep is None:
        return False
    for term in scores.additive:
        value = scores.constants.value(term)
        if value is None:
            return False
        keep = keep & (value > MOST_NEGATIVE)
    return bool(keep.any(-1).all())


def _regrouped(node: Node, windows: list[Any]) -> list[Any]:
    """Return the sizes of q, k or v with the batch split into (batch, windows)."""
    return [-1, windows[0], *shape_of(node)[1:]]


def _leads_to_product(node: Any) -> bool:
    while isinstance(node, Node):
        if is_op(node, *MATMUL):
            return True
        if not is_op(node, *MUL, *DIV, *ADD, *WHERE, aten.reshape.default):
            return False
        node = args_of(node)[1] if is_op(node, *WHERE) else args_of(node)[0]
    return False


def _number(value: Any) -> float | None:
    """Return a number given as such or as a constant of one element."""
    if isinstance(value, int | float):
        return float(value)
    tensor = constant_value(value) if isinstance(value, Node) else None
    return float(tensor) if tensor is not None and tensor.numel() == 1 else None


def _unscaled(node: Node) -> tuple[Node, float]:
    """Split a multiplication by a number off a query or key."""
    if is_op(node, *MUL) and (factor := _number(args_of(node)[1])) is not None:
        return args_of(node)[0], factor
    if is_op(node, *DIV) and (factor := _number(args_of(node)[1])) is not None:
        return args_of(node)[0], 1.0 / factor
    return node, 1.0


def _transposed(node: Node, user: Node) -> Node:
    """Return the node that `node` is the transpose of in its last two dimensions."""
    ndim = val_of(node).ndim
    dims = {int(d) % ndim for d in args_of(node)[1:3]} if is_op(node, aten.transpose.int) else set()
    if dims == {ndim - 2, ndim - 1}:
        return args_of(node)[0]
    return insert_call(aten.transpose.int, (node, -2, -1), before=user)


def _same_lead(q: Node, k: Node, v: Node) -> bool:
    leads = [list(map(str, shape_of(n)[:-2])) for n in (q, k, v)]
    return leads[0] == leads[1] == leads[2]

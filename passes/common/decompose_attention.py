"""DecomposeAttention: write attention out as product, scale, mask, softmax, product, so that a pass
can see the scores.

Fused attention is faster: this is for recipes that quantize the scores, as some papers do.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from fxq.dialect import ATEN, Dialect
from fxq.graph import dtype_of, is_op, is_settled, shape_of
from fxq.layer import Skip, hand_on, treat
from fxq.operators import ATTENTION, operand
from fxq.pipeline import Pass
from fxq.rewriting import insert_call

aten = torch.ops.aten


@dataclass(frozen=True)
class DecomposeAttention(Pass):
    """Replace every `scaled_dot_product_attention` by the operators it stands for."""

    reads: ClassVar[Dialect] = ATEN
    writes: ClassVar[Dialect] = ATEN

    def run(self, gm: GraphModule) -> PassResult:
        """Decompose; attention with a causal flag or dropout stays whole and says so."""
        found = [n for n in gm.graph.nodes if is_op(n, *ATTENTION) and not is_settled(n)]
        modified = False
        for node in found:
            why = _decompose(node)
            if why is not None:
                treat(node, type(self).__name__, Skip(why, intended=False))
            modified |= why is None
        return PassResult(gm, modified)


def _decompose(node: Node) -> str | None:
    """Rewrite one attention, or return why not."""
    if operand(node, "is_causal") or operand(node, "dropout_p"):
        return "its scores are not written out: is_causal or dropout"
    q, k, v = (operand(node, name) for name in ("query", "key", "value"))
    if operand(node, "enable_gqa"):
        groups = shape_of(q)[-3] // shape_of(k)[-3]
        k, v = (_call(aten.repeat_interleave.self_int, (x, groups, -3), node) for x in (k, v))
    scale = operand(node, "scale")
    scale = 1 / math.sqrt(shape_of(q)[-1]) if scale is None else scale
    transposed = _call(aten.transpose.int, (k, -2, -1), node)
    product = _call(aten.matmul.default, (q, transposed), node)
    scores = _call(aten.mul.Tensor, (product, scale), node)
    mask = operand(node, "attn_mask")
    if mask is not None and dtype_of(mask) == torch.bool:
        hidden = _call(aten.logical_not.default, (mask,), node)
        scores = _call(aten.masked_fill.Scalar, (scores, hidden, -math.inf), node)
    elif mask is not None:
        scores = _call(aten.add.Tensor, (scores, mask), node)
    weights = _call(aten.softmax.int, (scores, -1), node)
    result = _call(aten.matmul.default, (weights, v), node)
    for part in (product, result):
        hand_on(node, part)
        treat(part, DecomposeAttention.__name__, "a product of the attention, written out")
    node.replace_all_uses_with(result)
    node.graph.erase_node(node)  # dead code elimination keeps it: it may draw random numbers
    return None


def _call(target: Any, args: tuple[Any, ...], before: Node) -> Node:
    return insert_call(target, args, before=before)

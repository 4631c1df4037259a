"""Norms written out in elementary operators become `aten.rms_norm`."""

import torch
from torch.fx import GraphModule

from fxq.canonicalize.pattern import Call, Var, match_any
from fxq.graph import dtype_of, is_constant, shape_of, val_of
from fxq.operators import ADD, DIV, MUL
from fxq.rewriting import insert_call

aten = torch.ops.aten

X, EPS, WEIGHT = Var("x"), Var("eps"), Var("weight")
SQUARES = Call((aten.pow.Tensor_Scalar,), X, 2), Call((aten.square.default,), X)
VARIANCES = [
    Call(ADD, Call((aten.mean.dim,), square, Var("dims"), True), EPS) for square in SQUARES
]
UNSCALED = [Call(MUL, X, Call((aten.rsqrt.default,), variance)) for variance in VARIANCES]
UNSCALED += [Call(DIV, X, Call((aten.sqrt.default,), variance)) for variance in VARIANCES]
SCALED = [Call(MUL, WEIGHT, unscaled) for unscaled in UNSCALED]


def rms_norm(gm: GraphModule) -> int:
    """weight * (x * rsqrt(mean(x^2, -1) + eps)) equals rms_norm(x, [C], weight, eps), provided all
    of it is fp32 or fp64.

    In half precision the places where values are rounded differ between implementations, so it
    stays as written.
    """
    count = 0
    for node in list(gm.graph.nodes):
        found = match_any(SCALED, node)
        if found is None or not is_constant(found["weight"]):
            continue
        x, weight, eps = found["x"], found["weight"], found["eps"]
        width = shape_of(x)[-1]
        fits = (
            isinstance(eps, float)
            and list(found["dims"]) in ([-1], [val_of(x).ndim - 1])
            and val_of(weight).shape == (width,)
            and dtype_of(x) == dtype_of(weight) == dtype_of(node)
            and dtype_of(x) in (torch.float32, torch.float64)
        )
        if fits:
            new = insert_call(aten.rms_norm.default, (x, [width], weight, eps), before=node)
            node.replace_all_uses_with(new)
            count += 1
    return count

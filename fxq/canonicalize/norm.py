"""Norms become one operator each: `aten.rms_norm`, `aten.batch_norm`."""

import operator

import torch
from torch.fx import GraphModule

from fxq.canonicalize.pattern import Call, Var, match_any
from fxq.graph import args_of, depends_on_data, dtype_of, is_constant, is_op, shape_of, val_of
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
    stays as written; and so it does where a size depends on the data, because torch's operator asks
    whether the tensor is empty.
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
            and not depends_on_data(x)
        )
        if fits:
            new = insert_call(aten.rms_norm.default, (x, [width], weight, eps), before=node)
            node.replace_all_uses_with(new)
            count += 1
    return count


def batch_norm_of_native(gm: GraphModule) -> int:
    """_native_batch_norm_legit_no_training(x, weight, bias, mean, var, momentum, eps)[0] equals
    batch_norm of the same with training=False; the other results are empty."""
    count = 0
    native = aten._native_batch_norm_legit_no_training.default
    for node in gm.graph.find_nodes(op="call_function", target=native):
        results = [user for user in node.users if is_op(user, operator.getitem)]
        if len(results) != len(node.users) or any(user.args[1] != 0 for user in results):
            continue
        *operands, momentum, eps = args_of(node)
        args = (*operands, False, momentum, eps, True)
        new = insert_call(aten.batch_norm.default, args, before=node)
        for result in results:
            result.replace_all_uses_with(new)
        count += 1
    return count

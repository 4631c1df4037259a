"""Activation functions written out in elementary operators become one operator."""

import math
from typing import Any

import torch
from torch.fx import GraphModule

from fxq.canonicalize.pattern import Call, Var, match_any
from fxq.operators import ADD, DIV, MUL
from fxq.rewriting import insert_call

aten = torch.ops.aten

X = Var("x")
ERF = (aten.erf.default,)
TANH = (aten.tanh.default,)
SIGMOID = (aten.sigmoid.default,)


def _halved(inner: Call) -> list[Call]:
    """Return 0.5 * x * inner in the groupings people write."""
    return [
        Call(MUL, Call(MUL, 0.5, X), inner),
        Call(MUL, 0.5, Call(MUL, X, inner)),
        Call(MUL, X, Call(MUL, 0.5, inner)),
    ]


GELU_ERF = [
    pattern
    for argument in (Call(MUL, X, math.sqrt(0.5)), Call(DIV, X, math.sqrt(2.0)))
    for pattern in _halved(Call(ADD, Call(ERF, argument), 1.0))
]
CUBE = Call(ADD, X, Call(MUL, 0.044715, Call((aten.pow.Tensor_Scalar,), X, 3.0)))
GELU_TANH = _halved(Call(ADD, Call(TANH, Call(MUL, math.sqrt(2.0 / math.pi), CUBE)), 1.0))
SILU = [Call(MUL, X, Call(SIGMOID, X))]


def gelu_erf(gm: GraphModule) -> int:
    """0.5 x (1 + erf(x / sqrt 2)) equals gelu(x)."""
    return _rewrite(gm, GELU_ERF, aten.gelu.default)


def gelu_tanh(gm: GraphModule) -> int:
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) equals gelu(x, approximate="tanh")."""
    return _rewrite(gm, GELU_TANH, aten.gelu.default, {"approximate": "tanh"})


def silu(gm: GraphModule) -> int:
    """x sigmoid(x) equals silu(x)."""
    return _rewrite(gm, SILU, aten.silu.default)


def _rewrite(
    gm: GraphModule, patterns: list[Call], target: Any, kwargs: dict[str, Any] | None = None
) -> int:
    count = 0
    for node in list(gm.graph.nodes):
        found = match_any(patterns, node)
        if found is not None:
            node.replace_all_uses_with(insert_call(target, (found["x"],), kwargs, before=node))
            count += 1
    return count

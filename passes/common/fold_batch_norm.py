"""FoldBatchNorm: a batch norm that follows a convolution becomes part of its weight and bias.

    batch_norm(conv(x, w, b)) = conv(x, w * factor, (b - mean) * factor + beta)
    factor = gamma / sqrt(var + eps), one number per output channel

Exact but for rounding: it is worked out in fp64 and cast once. Quantized afterwards, a convolution
then has one epilogue instead of two, and nothing is left to compute between it and what follows.
A convolution that others read too, or whose batch norm uses the statistics of the batch, stays as
it is and says so.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from fxq.account import kind_of
from fxq.dialect import ATEN, Dialect
from fxq.graph import constant_of, is_constant, is_op, is_settled, owner_name
from fxq.layer import layer_of, treat
from fxq.operators import operand, set_operand
from fxq.pipeline import Pass
from fxq.rewriting import add_buffer, erase_dead

aten = torch.ops.aten
NORMALIZED = ("weight", "bias", "running_mean", "running_var")  # operands of the batch norm


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Fold every batch norm with constant statistics into the convolution that only it reads."""

    reads: ClassVar[Dialect] = ATEN
    writes: ClassVar[Dialect] = ATEN

    def run(self, gm: GraphModule) -> PassResult:
        """Fold, and say of each convolution in front of a batch norm what was done."""
        name, modified = type(self).__name__, False
        for norm in [n for n in gm.graph.nodes if is_op(n, aten.batch_norm.default)]:
            conv = operand(norm, "input")
            if kind_of(conv) != "conv" or is_settled(conv) or is_settled(norm):
                continue
            if why := _why_not(conv, norm):
                treat(conv, name, f"batch norm not folded: {why}")
                continue
            weight, bias = _folded(conv, norm)
            if not bool(weight.isfinite().all() and bias.isfinite().all()):
                treat(conv, name, f"batch norm not folded: not finite in {weight.dtype}")
                continue
            for operand_name, value in (("weight", weight), ("bias", bias)):
                buffer = add_buffer(gm, f"{owner_name(conv)}.{operand_name}", value, like=conv)
                set_operand(conv, operand_name, buffer)
            norm.replace_all_uses_with(conv)
            sides = tuple(sorted({*layer_of(conv).scaled, "output", "shift"}))
            remark = "its batch norm folded into it"
            treat(conv, name, "batch norm folded", remark, scaled=sides)
            modified = True
        erase_dead(gm)
        return PassResult(gm, modified)


def _why_not(conv: Node, norm: Node) -> str | None:
    """Return why a batch norm cannot become part of a convolution, None where it can."""
    if operand(conv, "transposed", False):
        return "the convolution is transposed"
    if len(conv.users) > 1:
        return "others read the convolution too"
    if operand(norm, "training"):
        return "it uses the statistics of the batch"
    parts = [operand(conv, name) for name in ("weight", "bias")]
    parts += [operand(norm, name) for name in NORMALIZED]
    if not all(part is None or is_constant(part) for part in parts):
        return "a weight or statistic is computed at run time"
    return None


def _folded(conv: Node, norm: Node) -> tuple[Tensor, Tensor]:
    """Return the weight and bias of the convolution that computes both."""

    def value(node: Node, name: str, default: float) -> Tensor:
        found = operand(node, name)
        fallback = weight.new_full((len(weight),), default, dtype=torch.float64)
        return fallback if found is None else constant_of(found).detach().double()

    weight = constant_of(operand(conv, "weight")).detach()
    gamma, beta = value(norm, "weight", 1.0), value(norm, "bias", 0.0)
    mean, variance = value(norm, "running_mean", 0.0), value(norm, "running_var", 1.0)
    factor = gamma / torch.sqrt(variance + operand(norm, "eps"))
    scaled = weight.double() * factor.reshape(-1, *[1] * (weight.ndim - 1))
    shifted = (value(conv, "bias", 0.0) - mean) * factor + beta
    return scaled.to(weight.dtype), shifted.to(weight.dtype)

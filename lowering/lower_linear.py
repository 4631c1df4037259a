"""What the rules of all devices share that turn `linear(dequantize(x), dequantize(w), bias)` into
`fxq::int8_linear`, with what follows as its epilogue, and what those for other layers with a
quantized weight share with them."""

import math
import platform
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from fxq.account import kind_of
from fxq.graph import args_of, dtype_of, hint, is_op, shape_of, tensor_of
from fxq.lowering.epilogue import (
    Takes,
    channels_apart,
    fusible_epilogue,
    is_finite,
    largest_product,
)
from fxq.lowering.int8_linear import accumulate
from fxq.lowering.rule import Decision, Lowering, Rule
from fxq.numerics import largest_sum
from fxq.rewriting import insert_call

aten = torch.ops.aten
ops = torch.ops.fxq


@dataclass(frozen=True)
class Operands:
    """The nodes of one quantized layer."""

    codes: Node
    scale: Node
    zero_point: Node | None
    weight: Node
    w_scale: Node
    bias: Node | None


@dataclass(frozen=True)
class Int8Layer(Rule):
    """A rule for layers with a quantized weight, as it is without a kernel; devices that have one
    say in `rewrite` what they make of the layers that it can compute exactly."""

    kind: ClassVar[str]

    def is_for(self, node: Node) -> bool:
        weight = node.args[1] if len(node.args) > 1 else None
        return is_op(weight, ops.dequantize.default) and kind_of(node) == self.kind

    def apply(self, node: Node, lowering: Lowering) -> Decision:
        found = self.match(node)
        if isinstance(found, str):
            return Decision(None, found)
        weight = tensor_of(lowering.gm, found.weight)
        if largest_sum(weight) > torch.iinfo(torch.int32).max:
            terms = f"{weight.shape[1]} input channels"
            if weight.ndim > 2:
                terms += f" and {weight[0, 0].numel()} positions"
            return Decision(None, f"sums over {terms} of such codes may exceed int32")
        return self.rewrite(node, found, lowering)

    @abstractmethod
    def match(self, layer: Node) -> Operands | str:
        """Return the operands that a kernel can take, or why it cannot."""

    def rewrite(self, layer: Node, operands: Any, lowering: Lowering) -> Decision:
        """Put a kernel in the place of `layer`, or decline."""
        return Decision(None, f"no int8 kernel for {lowering.device.type} ({platform.machine()})")


@dataclass(frozen=True)
class Int8Linear(Int8Layer):
    """`fxq::int8_linear`."""

    kind: ClassVar[str] = "linear"

    def match(self, layer: Node) -> Operands | str:
        return match(layer)

    def fuse(self, layer: Node, o: Operands, takes: Takes) -> tuple[Any, ...]:
        """Put the kernel in the place of `layer` and of as much of what follows as its epilogue
        takes in; return the op's arguments from `out_dtype` on."""
        start, apart = channels_apart(layer, takes.apart)
        bound = largest_product(apart["w_apart"]) if apart else 0.0
        finite = is_finite(o.bias) and math.isfinite(bound)
        last, epilogue, guard = fusible_epilogue(start, takes, finite=finite)
        args = (o.codes, o.scale, o.zero_point, o.weight, o.w_scale, o.bias, *epilogue)
        result = insert_call(ops.int8_linear.default, args, apart, before=last, like=layer)
        self.replace(layer, result, last=last)
        if guard is not None:
            rows = insert_call(guard.target, (o.scale, args_of(guard)[1]), before=guard)
            if apart:  # products of floats, so that even finite ones may give Inf
                products = insert_call(aten.mul.Scalar, (apart["apart"], bound), before=guard)
                rows = insert_call(guard.target, (products, rows), before=guard)
            guard.replace_all_uses_with(rows)
        return epilogue

    def check(
        self, expected: Any, found: Any, kernel: Node, value: Callable[[Node], Any]
    ) -> tuple[bool, bool]:
        codes_node, _, zero_node, weight_node = args_of(kernel)[:4]
        x, weight = value(codes_node), value(weight_node)
        zero = None if zero_node is None else value(zero_node)
        one = torch.ones(1, 1, device=x.device)
        # As the kernel gives them: whole numbers, or each rounded once.
        dtype = torch.int32 if args_of(kernel)[6] == torch.int32 else torch.float32
        accumulators = ops.int8_linear(x, one, zero, weight, one, None, dtype)
        equal = torch.equal(accumulators, accumulate(x, zero, weight).to(dtype))
        return equal, equal and super().check(expected, found, kernel, value)[1]


def operands_of(layer: Node, bias: Node | None) -> Operands | str:
    """Return the operands of a layer whose codes an integer kernel can take, or why it cannot."""
    x, w = args_of(layer)[:2]
    if not is_op(x, ops.dequantize.default):
        return "weight-only: the product is float, on a weight dequantized once when compiled"
    codes, scale, zero, _ = args_of(x)
    weight, w_scale, w_zero, _ = args_of(w)
    for part in (codes, weight):
        if dtype_of(part) not in (torch.int8, torch.uint8):
            return f"no kernel for codes of {dtype_of(part)}; it runs as float on their values"
    if w_zero is not None:
        return "no int8 kernel for an affine weight; use symmetric=True"
    if weight.op != "get_attr":
        return "its weight is computed at run time"
    return Operands(codes, scale, zero, weight, w_scale, bias)


def match(layer: Node, group_step: int | None = None) -> Operands | str:
    """Return the operands of a quantized linear the kernel can take, or why it cannot.

    Args:
        layer: the linear.
        group_step: what the size of a group of input channels with a weight scale of its own must
            be a multiple of; None where the kernel has no such groups.
    """
    _, _, *bias = args_of(layer)
    found = operands_of(layer, bias[0] if bias else None)
    if isinstance(found, str):
        return found
    n_groups, n_in = hint(shape_of(found.w_scale)[-1]), hint(shape_of(found.weight)[-1])
    if n_groups != 1 and (group_step is None or n_in // n_groups % group_step):
        return "no int8 kernel for a per-group weight scale; use PerChannel(0)"
    if shape_of(found.scale)[-1] != 1:
        return "no int8 kernel for a per-channel activation scale; use PerTensor() or PerToken()"
    return found

"""What the rules of all devices share that turn `conv(dequantize(x), dequantize(w), bias)` into
`fxq::int8_conv`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from fxq.graph import args_of, is_constant, is_op, shape_of
from fxq.lowering.epilogue import (
    GUARDS,
    Takes,
    fusible_epilogue,
    is_coded,
    is_finite,
    is_per_sample,
)
from fxq.lowering.int8_conv import accumulate
from fxq.lowering.lower_linear import Int8Layer, Operands, operands_of
from fxq.operators import operand
from fxq.rewriting import insert_call

ops = torch.ops.fxq


@dataclass(frozen=True)
class ConvOperands(Operands):
    """The nodes of one quantized convolution, and where its kernel goes.

    Args:
        stride: one number per spatial axis.
        padding: two per axis, before and after.
        dilation: one per axis.
        groups: of channels.
    """

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int


@dataclass(frozen=True)
class Int8Conv(Int8Layer):
    """`fxq::int8_conv`."""

    kind: ClassVar[str] = "conv"

    def match(self, layer: Node) -> ConvOperands | str:
        return match(layer)

    def fuse(self, layer: Node, o: ConvOperands, takes: Takes) -> None:
        """Put the kernel in the place of `layer` and of as much of what follows as its epilogue
        takes in."""
        guarded = is_op(o.scale, *GUARDS)
        finite = is_finite(o.bias) and (guarded or is_constant(o.scale))
        last, (_, activation, residual, *codes), guard = fusible_epilogue(
            layer, takes, finite=finite
        )
        coded: dict[str, Node | None] = {}
        if residual is not None and takes.residual_codes and is_coded(residual):
            residual, coded["residual_scale"], coded["residual_zero_point"] = args_of(residual)[:3]
        geometry = (o.stride, o.padding, o.dilation, o.groups)
        product = (o.codes, o.scale, o.zero_point, o.weight, o.w_scale, o.bias, *geometry)
        args = (*product, activation, residual, *codes)
        result = insert_call(ops.int8_conv.default, args, coded, before=last, like=layer)
        self.replace(layer, result, last=last)
        if guard is not None:
            seen = scale = args_of(guard)[1]
            if guarded:
                args = (o.scale, scale, o.codes, o.weight, *geometry)
                seen = insert_call(ops.guard_conv_scale.default, args, before=guard)
            if is_op(coded.get("residual_scale"), *GUARDS):
                args = (coded["residual_scale"], seen)
                seen = insert_call(ops.guard_scale.default, args, before=guard)
            guard.replace_all_uses_with(seen)

    def check(
        self, expected: Any, found: Any, kernel: Node, value: Callable[[Node], Any]
    ) -> tuple[bool, bool]:
        codes_node, _, zero_node, weight_node, _, _, *geometry = args_of(kernel)[:10]
        x, weight = value(codes_node), value(weight_node)
        zero = None if zero_node is None else value(zero_node)
        one = torch.ones(1, device=x.device)
        # Each sum rounded to fp32 once, as the kernel gives them.
        accumulators = ops.int8_conv(x, one, zero, weight, one, None, *geometry)
        equal = torch.equal(accumulators, accumulate(x, zero, weight, *geometry).float())
        return equal, equal and super().check(expected, found, kernel, value)[1]


def match(layer: Node) -> ConvOperands | str:
    """Return the operands of a quantized convolution the kernel can take, or why it cannot."""
    found = operands_of(layer, operand(layer, "bias"))
    if isinstance(found, str):
        return found
    kernel = shape_of(found.weight)[2:]
    if len(shape_of(found.codes)) != len(kernel) + 2:
        return "no int8 kernel for an input without a batch axis; give it one"
    if operand(layer, "transposed", False):
        return "no int8 kernel for a transposed convolution"
    if any(size != 1 for size in shape_of(found.w_scale)[1:]):
        return "no int8 kernel for a weight scale per input channel; use PerChannel(0)"
    if not is_per_sample(found.scale) or not is_per_sample(found.zero_point):
        return "no int8 kernel for an activation scale within a sample; use PerTensor()"
    n_axes = len(kernel)
    stride, dilation = (_per_axis(operand(layer, name), n_axes) for name in ("stride", "dilation"))
    padding = _padding(operand(layer, "padding"), kernel, dilation)
    numbers = (*stride, *padding, *dilation, groups := operand(layer, "groups"))
    if not all(isinstance(number, int) for number in numbers):
        return "no int8 kernel for a stride, padding or dilation computed at run time"
    parts = (found.codes, found.scale, found.zero_point, found.weight, found.w_scale, found.bias)
    return ConvOperands(*parts, stride, padding, dilation, groups)


def _per_axis(value: Any, n_axes: int) -> list[Any]:
    """Return an operand of one number for all axes, or one for each, as the latter."""
    values = list(value) if isinstance(value, tuple | list) else [value]
    return values * n_axes if len(values) == 1 else values


def _padding(value: Any, kernel: tuple[Any, ...], dilation: list[Any]) -> list[Any]:
    """Return padding before and after each axis; "same" puts what is odd after."""
    if value == "valid":
        return [0, 0] * len(kernel)
    if value == "same":
        totals = [d * (size - 1) for d, size in zip(dilation, kernel, strict=True)]
        return [side for total in totals for side in (total // 2, total - total // 2)]
    return [side for number in _per_axis(value, len(kernel)) for side in (number, number)]

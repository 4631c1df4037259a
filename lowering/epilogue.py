"""What follows a layer in the graph, as far as its kernel takes it in: bias and scale aside, casts,
an activation function, a residual, channels apart and the codes that the next layer reads."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fxq.constants import constant_value
from fxq.graph import args_of, dtype_of, hint, is_constant, is_op, shape_of
from fxq.lowering import guard_conv_scale  # noqa: F401  registers the operator
from fxq.lowering.int8_linear import ON_CUDA
from fxq.operators import LINEAR

aten = torch.ops.aten
ops = torch.ops.fxq
# Those without arguments; the name of others depends on theirs.
ACTIVATION_OF = {
    aten.silu.default: "silu",
    aten.relu.default: "relu",
    aten.relu6.default: "relu6",
    aten.hardswish.default: "hardswish",
}
GUARDS = (ops.guard_scale.default, ops.guard_conv_scale.default)  # the scale is their second


@dataclass(frozen=True)
class Takes:
    """What a kernel's epilogue takes in beside codes with one scale.

    Args:
        casts: one to another dtype, and what follows it, as if it did not round.
        activations: functions, of `fxq.lowering.int8_linear.ACTIVATIONS`.
        residual: an fp32 tensor of the result's shape that is added.
        residual_first: that is added before the activation function, not after it.
        residual_codes: which may be codes with one scale for each sample.
        channel_codes: codes with a scale for each channel of the last dimension, not only with one.
        row_codes: codes with a scale for each row, of a size along each axis or 1.
        largest_code: that its codes go to.
        apart: how many channels beside those with codes, in fp32.
    """

    casts: bool = True
    activations: tuple[str, ...] = ON_CUDA
    residual: bool = False
    residual_first: bool = False
    residual_codes: bool = False
    channel_codes: bool = True
    row_codes: bool = False
    largest_code: int = 127
    apart: int = 0


def unguarded(scale: Node) -> Node:
    """Return the scale that is NaN in some rows once it is guarded."""
    while is_op(scale, *GUARDS):
        scale = args_of(scale)[1]
    return scale


def is_per_sample(scale: Node | None) -> bool:
    """Tell whether a scale is one number, or one for each sample, `[B, 1, ...]`; or guarded rows of
    one that is. So is none."""
    if scale is None:
        return True
    return _all_one(shape_of(unguarded(scale))[1:])


def is_coded(values: Node) -> bool:
    """Tell whether values are those of 8-bit integer codes with a scale for each sample, which is
    NaN in rows that are not finite."""
    if not is_op(values, ops.dequantize.default) or dtype_of(values) != torch.float32:
        return False
    codes, scale, zero = args_of(values)[:3]
    integers = dtype_of(codes) in (torch.int8, torch.uint8)
    known = is_constant(scale) or is_op(scale, *GUARDS)
    return integers and known and is_per_sample(scale) and is_per_sample(zero)


def is_single(scale: Node) -> bool:
    """Tell whether a scale is one number."""
    return _all_one(shape_of(scale))


def is_single_or_per_channel(scale: Node) -> bool:
    """Tell whether a scale is one number, or one for each channel of the last dimension."""
    return _all_one(shape_of(scale)[:-1])


def _all_one(sizes: Sequence[Any]) -> bool:
    return all(isinstance(size, int) and size == 1 for size in sizes)


def is_per_row(scale: Node, values: Node) -> bool:
    """Tell whether a scale is one for each row of `values` `[..., N]`, or for rows of some axes."""
    sizes, rows = shape_of(scale), (*shape_of(values)[:-1], 1)
    return len(sizes) == len(rows) and all(
        isinstance(size, int) and (size == 1 or (isinstance(full, int) and size == full))
        for size, full in zip(sizes, rows, strict=True)
    )


def channels_apart(layer: Node, most: int) -> tuple[Node, dict[str, Node]]:
    """Return the addition to `layer` of a product of a few channels, and the op's arguments for it;
    the layer itself and none where there is no such product.

    Args:
        layer: a linear.
        most: channels that the kernel takes.
    """
    found = _residual(layer) if most else None
    if found is None:
        return layer, {}
    add, other = found
    x, weight, *bias = (*args_of(other), None)[:3] if is_op(other, *LINEAR) else (None, None)
    few = isinstance(weight, Node) and weight.op == "get_attr" and bias == [None]
    if not few or len(other.users) > 1 or hint(shape_of(weight)[1]) > most:
        return layer, {}
    return add, {"apart": x, "w_apart": weight}


def fusible_epilogue(
    layer: Node, takes: Takes, *, finite: bool
) -> tuple[Node, tuple[Any, ...], Node | None]:
    """Follow the only users of `layer` as far as the kernel's epilogue can go.

    Args:
        layer: a linear.
        takes: what the kernel can.
        finite: its result is where its input's scale is.
    Returns:
        the last node taken in, the op's arguments from `out_dtype` on, and the `guard_scale` that
        reads what only exists inside the kernel then.
    """
    last, dtype = layer, dtype_of(layer)
    cast = _only_user(last, aten._to_copy.default) if takes.casts else None
    if cast and set(cast.kwargs) == {"dtype"}:
        last, dtype = cast, dtype_of(cast)
    residual = None
    if takes.residual_first and (found := _residual(last)):
        last, residual = found
    last, activation = _activation(last, takes.activations)
    if takes.residual and not takes.residual_first and (found := _residual(last)):
        last, residual = found
    so_far = (dtype, activation, residual)
    if residual is not None and not (takes.residual_codes and is_coded(residual)):
        return last, so_far, None
    if not finite or dtype == torch.float16:  # whose rounding makes Inf of large values
        return last, so_far, None
    guard = next((user for user in last.users if is_op(user, ops.guard_scale.default)), None)
    quantize = _only_user(last, ops.quantize.default, apart_from=guard)
    if quantize and _takes_codes(quantize, last, takes):
        _, scale, zero, low, high = args_of(quantize)[:5]
        return quantize, (dtype, activation, residual, scale, zero, low, high), guard
    return last, so_far, None


def _takes_codes(quantize: Node, values: Node, takes: Takes) -> bool:
    scale, largest = args_of(quantize)[1], args_of(quantize)[4]
    fits = is_single(scale)
    fits |= takes.channel_codes and is_single_or_per_channel(scale)
    fits |= takes.row_codes and is_per_row(scale, values)
    return bool(fits and largest <= takes.largest_code)


def _activation(values: Node, allowed: tuple[str, ...]) -> tuple[Node, str]:
    """Return the activation function that is the only user of `values`, and its name; `values` and
    "none" where there is no such function."""
    name = "none"
    user = next(iter(values.users), None)
    if gelu := _only_user(values, aten.gelu.default):
        name = "gelu" if gelu.kwargs.get("approximate", "none") == "none" else "gelu_tanh"
    elif clamp := _only_user(values, aten.hardtanh.default):
        name = "relu6" if clamp.args[1:] == (0.0, 6.0) else "none"
    else:
        for target, found in ACTIVATION_OF.items():
            name = found if _only_user(values, target) else name
    return (user, name) if user is not None and name in allowed[1:] else (values, "none")


def _residual(values: Node) -> tuple[Node, Node] | None:
    """Return the addition that is the only user of `values`, and the fp32 tensor of the same shape
    that it adds."""
    add = _only_user(values, aten.add.Tensor, at=None)
    if add is None or set(add.kwargs) - {"alpha"} or add.kwargs.get("alpha", 1) != 1:
        return None
    other = next((arg for arg in add.args[:2] if arg is not values), None)
    if not isinstance(other, Node) or {dtype_of(values), dtype_of(other)} != {torch.float32}:
        return None
    return (add, other) if shape_of(other) == shape_of(values) else None


def largest_product(weight: Node) -> float:
    """Return how large a sum of products of values up to one with a row of a weight can be, twice
    over so that its rounding and what it is added to are within; Inf where it is unknown."""
    value = constant_value(weight)
    return math.inf if value is None else 2 * float(value.double().abs().sum(-1).max())


def is_finite(bias: Node | None) -> bool:
    if bias is None:
        return True
    value = constant_value(bias)
    return value is not None and bool(value.isfinite().all())


def _only_user(
    node: Node, target: object, apart_from: Node | None = None, at: int | None = 0
) -> Node | None:
    """Return the only user of `node`, if it calls `target` with `node` at a position, None for
    any."""
    users = [user for user in node.users if user is not apart_from]
    if len(users) != 1 or not is_op(users[0], target):
        return None
    return users[0] if at is None or users[0].args[at] is node else None

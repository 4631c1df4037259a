"""The rule that turns `linear(dequantize(x), dequantize(w), bias)` into `fxq::int8_linear`.

On x86 the codes of the activations become uint8 (codes and zero-point plus 128: the same values).
With one scale for the whole tensor the kernel does everything; with a scale per token, or a static
one that is guarded against NaN token by token, it gives the integer accumulators, and scale,
zero-point and bias become plain aten operators, which Inductor fuses with whatever follows; in
int32 where a sum may not be exact in fp32, so that it is rounded once. On CUDA the kernel's
epilogue takes the activation function and the next layer's quantize with it, where nothing but a
scale of NaN can make its result NaN or Inf: the next guard then reads that scale.
"""

import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

import fxq.lowering.int8_linear  # noqa: F401  registers the op
from fxq.constants import constant_value
from fxq.graph import (
    add_buffer,
    args_of,
    dtype_of,
    hint,
    insert_call,
    is_op,
    shape_of,
    tensor_of,
)
from fxq.lowering.cpu.profit import slower_than_float
from fxq.lowering.decision import Decision
from fxq.lowering.device import cpu_int8
from fxq.numerics import EXACT_IN_FP32, is_pair_safe, largest_sum

aten = torch.ops.aten
ops = torch.ops.fxq
SIGN = 128  # uint8 codes are int8 codes plus this


@dataclass(frozen=True)
class Operands:
    """The nodes of one quantized linear."""

    codes: Node
    scale: Node
    zero_point: Node | None
    weight: Node
    w_scale: Node
    bias: Node | None


class LowerLinear:
    """One run of the rule over a graph on a device."""

    def __init__(
        self, gm: GraphModule, device: torch.device, sizes: Mapping[str, int] | None = None
    ) -> None:
        self.gm, self.device, self.sizes = gm, device, sizes
        self.unsigned: dict[tuple[Node, Node | None], tuple[Node, Node]] = {}

    def apply(self, layer: Node) -> Decision:
        """Rewrite `layer` where a kernel computes it exactly and no slower than float."""
        found = match(layer)
        if isinstance(found, str):
            return Decision(None, found)
        weight = tensor_of(self.gm, found.weight)
        if largest_sum(weight) > torch.iinfo(torch.int32).max:
            return Decision(
                None, f"sums over {weight.shape[1]} input channels of such codes may exceed int32"
            )
        if self.device.type == "cuda":
            return self._for_cuda(layer, found)
        if self.device.type == "cpu" and cpu_int8().available:
            return self._for_x86(layer, found)
        return Decision(None, f"no int8 kernel for {self.device.type} ({platform.machine()})")

    def _for_cuda(self, layer: Node, o: Operands) -> Decision:
        last, epilogue, guard = fusible_epilogue(layer, finite=_is_finite(o.bias))
        args = (o.codes, o.scale, o.zero_point, o.weight, o.w_scale, o.bias)
        result = insert_call(ops.int8_linear.default, (*args, *epilogue), before=last, like=layer)
        self._replace(last, result)
        if guard is not None:
            rows = (o.scale, args_of(guard)[1])
            guard.replace_all_uses_with(insert_call(guard.target, rows, before=guard))
        return Decision("int8_linear (Triton)")

    def _for_x86(self, layer: Node, o: Operands) -> Decision:
        weight = tensor_of(self.gm, o.weight)
        exact = not cpu_int8().saturates or is_pair_safe(weight)
        n_rows = math.prod(hint(size, self.sizes) for size in shape_of(o.codes)[:-1])
        if why := slower_than_float(n_rows, *weight.shape, exact=exact):
            return Decision(None, why)
        codes, zero = self._to_unsigned(o)
        if is_single(o.scale):
            args = (codes, o.scale, zero, o.weight, o.w_scale, o.bias, torch.float32)
            result = insert_call(ops.int8_linear.default, args, before=layer)
        else:
            result = self._per_row(layer, o, codes, zero)
        self._replace(layer, result)
        if exact:
            return Decision("int8_linear (oneDNN)")
        return Decision(
            "int8_linear (oneDNN + sparse excess)",
            "this CPU lacks VNNI and the weight has unsafe pairs; QuantSpec(pair_safe=True) is "
            "faster",
        )

    def _to_unsigned(self, o: Operands) -> tuple[Node, Node | None]:
        """Return the activations' codes as uint8 with their zero-point, made once per quantize."""
        key = (o.codes, o.zero_point)
        if not is_op(o.codes, ops.quantize.default):
            return key
        if key not in self.unsigned:
            source, scale, _, low, high = args_of(o.codes)
            zero = self._plus_sign(o)
            args = (source, scale, zero, low + SIGN, high + SIGN)
            self.unsigned[key] = insert_call(ops.quantize.default, args, before=o.codes), zero
        return self.unsigned[key]

    def _plus_sign(self, o: Operands) -> Node:
        zero = o.zero_point
        if zero is None:
            value = torch.full([1] * len(shape_of(o.scale)), SIGN, dtype=torch.int32)
            return self._constant("unsigned_zero_point", value, o.codes)
        if zero.op == "get_attr":
            value = tensor_of(self.gm, zero) + SIGN
            return self._constant(f"{zero.target}_unsigned", value, o.codes)
        return insert_call(aten.add.Tensor, (zero, SIGN), after=zero)

    def _constant(self, name: str, value: Tensor, like: Node) -> Node:
        return add_buffer(self.gm, name, value.to(self.device), like=like)

    def _per_row(self, layer: Node, o: Operands, codes: Node, zero: Node | None) -> Node:
        """Return `(acc - zero_point * row_sums) * (scale * w_scale) + bias` as nodes before
        `layer`; a zero-point of all rows is the kernel's to subtract.

        Where acc may not be exact in fp32 the difference is one of int32, rounded once.
        """
        weight, w_scale = tensor_of(self.gm, o.weight), tensor_of(self.gm, o.w_scale)
        name = str(o.weight.target)
        unit = self._constant("unit_scale", torch.ones(1, 1), layer)
        w_row = self._constant(f"{name}_row_scale", w_scale.reshape(-1).expand(len(weight)), layer)
        centre = zero
        single = zero is None or is_single(zero)
        if not single:
            value = torch.tensor([[SIGN]], dtype=torch.int32)
            centre = None if codes is o.codes else self._constant("sign", value, layer)
        exact = single or largest_sum(weight) < EXACT_IN_FP32
        dtype = torch.float32 if exact else torch.int32
        args = (codes, unit, centre, o.weight, unit, None, dtype)
        y = insert_call(ops.int8_linear.default, args, before=layer)
        y.meta["fxq_accumulates"] = True
        if not single:
            sums = weight.sum(1, dtype=torch.int32).to(dtype)
            sums_node = self._constant(f"{name}_row_sums", sums, layer)
            shift = insert_call(aten.mul.Tensor, (o.zero_point, sums_node), before=layer)
            y = insert_call(aten.sub.Tensor, (y, shift), before=layer)
        if not exact:
            y = insert_call(aten._to_copy.default, (y,), {"dtype": torch.float32}, before=layer)
        scale = insert_call(aten.mul.Tensor, (o.scale, w_row), before=layer)
        y = insert_call(aten.mul.Tensor, (y, scale), before=layer)
        return y if o.bias is None else insert_call(aten.add.Tensor, (y, o.bias), before=layer)

    def _replace(self, old: Node, new: Node) -> None:
        new.meta["fxq_replaces"] = old.name
        old.replace_all_uses_with(new)


def match(layer: Node) -> Operands | str:
    """Return the operands of a quantized linear the kernel can take, or why it cannot."""
    if not is_op(layer, aten.linear.default):
        return "no int8 kernel for this operator; it runs as float on dequantized values"
    x, w, *bias = args_of(layer)
    if not is_op(x, ops.dequantize.default):
        return "weight-only: the product is float, on a weight dequantized once when compiled"
    codes, scale, zero, _ = args_of(x)
    weight, w_scale, w_zero, _ = args_of(w)
    if w_zero is not None:
        return "no int8 kernel for an affine weight; use symmetric=True"
    if hint(shape_of(w_scale)[-1]) != 1:
        return "no int8 kernel for a per-group weight scale; use PerChannel(0)"
    if shape_of(scale)[-1] != 1:
        return "no int8 kernel for a per-channel activation scale; use PerTensor() or PerToken()"
    if weight.op != "get_attr":
        return "its weight is computed at run time"
    return Operands(codes, scale, zero, weight, w_scale, bias[0] if bias else None)


def is_single(scale: Node) -> bool:
    """Tell whether a scale is one number."""
    return all(isinstance(size, int) and size == 1 for size in shape_of(scale))


def is_single_or_per_channel(scale: Node) -> bool:
    """Tell whether a scale is one number, or one for each channel of the last dimension."""
    return all(isinstance(size, int) and size == 1 for size in shape_of(scale)[:-1])


def fusible_epilogue(
    layer: Node, *, finite: bool = True
) -> tuple[Node, tuple[object, ...], Node | None]:
    """Follow the only users of `layer` as far as the kernel's epilogue can go.

    Args:
        layer: a linear.
        finite: its result is where its input's scale is.
    Returns:
        the last node taken in, the op's arguments from `out_dtype` on, and the `guard_scale` that
        reads what only exists inside the kernel then.
    """
    last, dtype, activation = layer, dtype_of(layer), "none"
    if (cast := _only_user(last, aten._to_copy.default)) and set(cast.kwargs) == {"dtype"}:
        last, dtype = cast, dtype_of(cast)
    if gelu := _only_user(last, aten.gelu.default):
        last = gelu
        activation = "gelu" if gelu.kwargs.get("approximate", "none") == "none" else "gelu_tanh"
    elif silu := _only_user(last, aten.silu.default):
        last, activation = silu, "silu"
    if not finite or dtype == torch.float16:  # whose rounding makes Inf of large values
        return last, (dtype, activation), None
    guard = next((user for user in last.users if is_op(user, ops.guard_scale.default)), None)
    quantize = _only_user(last, ops.quantize.default, apart_from=guard)
    if quantize and is_single_or_per_channel(args_of(quantize)[1]) and args_of(quantize)[4] <= 127:
        _, scale, zero, low, high = args_of(quantize)
        return quantize, (dtype, activation, None, scale, zero, low, high), guard
    return last, (dtype, activation), None


def _is_finite(bias: Node | None) -> bool:
    if bias is None:
        return True
    value = constant_value(bias)
    return value is not None and bool(value.isfinite().all())


def _only_user(node: Node, target: object, apart_from: Node | None = None) -> Node | None:
    users = [user for user in node.users if user is not apart_from]
    if len(users) != 1 or not is_op(users[0], target) or users[0].args[0] is not node:
        return None
    return users[0]

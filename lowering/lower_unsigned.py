"""Activations' codes as uint8, which oneDNN multiplies: codes and zero-point plus 128, the same
values."""

import torch
from torch import Tensor
from torch.fx import Node

from fxq.graph import args_of, is_op, shape_of, tensor_of
from fxq.lowering.lower_linear import Operands
from fxq.lowering.rule import Lowering
from fxq.numerics import SIGN
from fxq.rewriting import add_buffer, insert_call

aten = torch.ops.aten
ops = torch.ops.fxq


def to_unsigned(o: Operands, lowering: Lowering) -> tuple[Node, Node | None]:
    """Return the activations' codes as uint8 with their zero-point, made once per quantize."""
    key = (o.codes, o.zero_point)
    if not is_op(o.codes, ops.quantize.default):
        return key
    if key not in lowering.shared:
        source, scale, _, low, high = args_of(o.codes)
        zero = _plus_sign(o, lowering)
        args = (source, scale, zero, low + SIGN, high + SIGN)
        codes = insert_call(ops.quantize.default, args, before=o.codes)
        lowering.shared[key] = codes, zero
    return lowering.shared[key]


def _plus_sign(o: Operands, lowering: Lowering) -> Node:
    zero = o.zero_point
    if zero is None:
        value = torch.full([1] * len(shape_of(o.scale)), SIGN, dtype=torch.int32)
        return constant("unsigned_zero_point", value, o.codes, lowering)
    if zero.op == "get_attr":
        value = tensor_of(lowering.gm, zero) + SIGN
        return constant(f"{zero.target}_unsigned", value, o.codes, lowering)
    return insert_call(aten.add.Tensor, (zero, SIGN), after=zero)


def constant(name: str, value: Tensor, like: Node, lowering: Lowering) -> Node:
    """Add a buffer on the device that is lowered for, and return its node."""
    return add_buffer(lowering.gm, name, value.to(lowering.device), like=like)

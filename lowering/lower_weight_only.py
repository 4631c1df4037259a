"""`fxq::weight_only_linear` for linears whose weight alone is quantized.

When it pays is read off `benchmarks/results/cpu_weight_only_linear_*.md`. Few rows are up to nine
times as fast as fp32, because memory holds a quarter or an eighth of the bytes; many are about as
fast, because a block of codes is dequantized once for all of them. Where the number of rows is
known and large the layer stays float; where it changes from call to call, the kernel takes all.
"""

import math
from dataclasses import dataclass

import torch
from torch.fx import Node

from fxq.account import kind_of
from fxq.graph import args_of, dtype_of, is_op, shape_of, tensor_of
from fxq.lowering.cpu.native import native
from fxq.lowering.rule import Decision, Lowering, Rule
from fxq.lowering.weight_only_linear import STEP, bits_of, pack
from fxq.rewriting import add_buffer, insert_call

ops = torch.ops.fxq

MIN_WEIGHT = 1 << 17  # elements; below, a call costs more than fewer bytes gain
LARGE_WEIGHT = 1 << 20  # elements from which on more rows gain too
MANY_ROWS = 128  # with which smaller weights gain nothing
MOST_ROWS = 512  # with which no weight gains, and the largest lose a quarter


def slower_than_float(n_rows: int, n_out: int, n_in: int) -> str | None:
    """Return why `[n_rows, n_in] @ [n_out, n_in].T` is not faster on codes, None where it is.

    Args:
        n_rows: rows of the activations; 1 where they change from call to call.
        n_out: output channels.
        n_in: input channels.
    """
    shape = f"[{n_rows}, {n_in}] x [{n_in}, {n_out}]"
    if n_out * n_in < MIN_WEIGHT:
        return f"{shape} is too small for reading codes to pay"
    if n_rows >= (MOST_ROWS if n_out * n_in >= LARGE_WEIGHT else MANY_ROWS):
        return f"{shape} has so many rows that reading codes gains nothing"
    return None


@dataclass(frozen=True)
class WeightOnlyLinear(Rule):
    """`fxq.lowering.cpu.weight_only_linear`."""

    def is_for(self, node: Node) -> bool:
        if kind_of(node) != "linear" or not is_op(node.args[1], ops.dequantize.default):
            return False
        return not is_op(node.args[0], ops.dequantize.default)

    def apply(self, node: Node, lowering: Lowering) -> Decision:
        x, weight, *bias = args_of(node)
        if why := _why_not(x, weight, lowering):
            return Decision(None, why)
        if isinstance(unavailable := native("weight_only_linear"), str):
            return Decision(None, unavailable)
        codes, factors = _packed(weight, lowering)
        bits = bits_of(tensor_of(lowering.gm, codes))
        n_out = int(shape_of(weight)[0])
        args = (x, codes, factors, bias[0] if bias else None, n_out)
        self.replace(node, insert_call(ops.weight_only_linear.default, args, before=node))
        return Decision(f"weight_only_linear (AVX2, int{bits})")


def _why_not(x: Node, weight: Node, lowering: Lowering) -> str | None:
    """Return why the kernel does not take a layer, None where it does."""
    codes, scale, zero, dtype = args_of(weight)
    parts = [part for part in (codes, scale, zero) if part is not None]
    if any(part.op != "get_attr" for part in parts):
        return "its weight is computed at run time"
    if {dtype_of(x), dtype} != {torch.float32}:
        return f"the kernel multiplies float32 activations, found {dtype_of(x)}"
    if dtype_of(codes) not in (torch.int8, torch.uint8):
        return f"no kernel for codes of {dtype_of(codes)}"
    (n_out, n_in), n_groups = shape_of(codes), shape_of(scale)[1]
    if n_groups > 1 and n_in // n_groups % STEP:
        return f"groups of {n_in // n_groups} input channels are no multiple of {STEP}"
    sizes = shape_of(x)[:-1]
    n_rows = math.prod(sizes) if all(isinstance(size, int) for size in sizes) else 1
    return slower_than_float(int(n_rows), int(n_out), int(n_in))


def _packed(weight: Node, lowering: Lowering) -> tuple[Node, Node]:
    """Return the codes and factors of a packed weight, made once for all layers it is in."""
    parts = args_of(weight)[:3]
    key = ("weight_only_linear", *parts)
    if key not in lowering.shared:
        values = [None if part is None else tensor_of(lowering.gm, part) for part in parts]
        packed = pack(*values)  # type: ignore[arg-type]
        name = str(parts[0].target)
        lowering.shared[key] = (
            add_buffer(lowering.gm, f"{name}_packed", packed.codes, like=weight),
            add_buffer(lowering.gm, f"{name}_factors", packed.factors, like=weight),
        )
    return lowering.shared[key]

"""x86: int8 products and convolutions, where they are exact and no slower than fp32. Without VNNI
they are fxq's own (`fxq.lowering.cpu.avx2_linear`, `avx2_conv`) where the weight is pair-safe:
activations keep their codes, scales and zero-points are applied in the kernel, and so is what
follows, as far as `TAKES` and `CONV_TAKES` say. Weight-only products and attention to an int8 cache
are fxq's own too. All else is oneDNN's.

For oneDNN the codes of the activations become uint8 (codes and zero-point plus 128: the same
values). With one scale for the whole tensor the kernel does everything; with a scale per token, or
a static one that is guarded against NaN token by token, it gives the integer accumulators, and
scale, zero-point and bias become plain aten operators, which Inductor fuses with whatever follows;
in int32 where a sum may not be exact in fp32, so that it is rounded once.

When oneDNN's int8 pays is read off `benchmarks/results/cpu_int8_linear_*.md`, which were measured
before there was `avx2_linear`; for that it is where single products, one and two threads, were 0.97
times fp32 and more (8-bit weights; 4-bit ones begin at half the work). Frozen numbers instead of a
timing at compile time: the same program must compile to the same graph every time. oneDNN takes
about 80 microseconds a call before it multiplies anything. Large weights repay that at any number
of rows, because fp32 has to read four times the bytes; small ones need work. Its convolutions, read
off `cpu_int8_conv_avx2.md`, need it too, and input channels to multiply: depthwise ones are slower
in int8, and those of images faster or slower, by kernel and stride. They are measured without VNNI,
and the same numbers are used with it. Those of fxq's own need windows of some size instead, because
each is gathered and its output is written whatever it is multiplied with.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from fxq.graph import dtype_of, hint, shape_of, tensor_of
from fxq.lowering.cpu import avx2_conv, avx2_linear
from fxq.lowering.cpu.native import native
from fxq.lowering.cpu.onednn import cpu_int8
from fxq.lowering.devices.other import TorchAttention
from fxq.lowering.epilogue import Takes, is_single
from fxq.lowering.lower_cache_attention import CacheAttention
from fxq.lowering.lower_conv import ConvOperands, Int8Conv
from fxq.lowering.lower_linear import Int8Linear, Operands, match
from fxq.lowering.lower_unsigned import constant, to_unsigned
from fxq.lowering.lower_weight_only import WeightOnlyLinear
from fxq.lowering.rule import Decision, Device, Lowering
from fxq.numerics import EXACT_IN_FP32, SIGN, is_pair_safe, largest_sum
from fxq.rewriting import insert_call

aten = torch.ops.aten
ops = torch.ops.fxq


class Thresholds(NamedTuple):
    """Where int8 overtakes fp32.

    Args:
        min_macs: multiply-adds that a product with a smaller weight needs.
        large_weight: elements of a weight that pays at any number of rows.
    """

    min_macs: int
    large_weight: int


WITH_VNNI = Thresholds(16 << 20, 1 << 17)  # up to 7.9 times faster than fp32
WITHOUT_VNNI = Thresholds(24 << 20, 1 << 20)  # of `avx2_linear`: up to 2.5 times
HUGE_WEIGHT = 1 << 24  # elements: pays with the sparse excess too
CHANNEL_BLOCK = 4  # input channels of a group that oneDNN multiplies at a time
# Input channels without groups. With 3 or 4, int8 has 1.4 times the speed of fp32 for a 7x7 kernel
# with stride 2, 0.65 and 0.73 for 3x3: no size tells which, so all stay float.
MIN_CONV_CHANNELS = 8
# Without groups, int8 has 0.1 to 1.2 times the speed of fp32 below, 1.07 to 2.3 times above.
MIN_CONV_MACS = 16 << 20
# Of `avx2_conv`: elements of a window, without groups and with. With 24 to 72 int8 has 0.3 to 1.0
# times the speed of fp32, with these and more 1.0 to 3.2 times; in groups, 0.8 to 0.9 below. fp32
# results are measured: those that go on as codes, or through an activation function, gain more.
MIN_WINDOW, MIN_WINDOW_OF_GROUP = 128, 256
# Where there is enough work for oneDNN, the choice is between two int8 kernels. Its is 1.3 to 1.5
# times as fast by itself; what this one's epilogue takes in makes a whole ResNet-50 1.07 times so.
MIN_WINDOW_OF_MUCH = 64
# With less than `MIN_CONV_CHANNELS`, as images have: 0.8 for a 7x7 kernel, 1.5 to 1.8 for patches.
MIN_WINDOW_OF_IMAGE = 512
MIN_CONV_OUTPUTS = avx2_linear.PANEL  # channels of a group: what is left of a panel is zeros
MIN_AVX2_CONV_MACS = 4 << 20
MAX_ROWS_EXCESS = 512  # beyond, the excess of a merely large weight costs more than int8 gains


def slower_than_float(n_rows: int, n_out: int, n_in: int, *, exact: bool) -> str | None:
    """Return why `[n_rows, n_in] @ [n_out, n_in].T` is not faster in int8 here, None where it is.

    Args:
        n_rows: rows of the activations.
        n_out: output channels.
        n_in: input channels.
        exact: the plain kernel is exact for this weight; otherwise the sparse excess is added.
    """
    weight = n_out * n_in
    if not exact:
        few_rows = n_rows <= MAX_ROWS_EXCESS
        if weight >= HUGE_WEIGHT or (weight >= onednn_without_vnni().large_weight and few_rows):
            return None
        return (
            f"[{n_rows}, {n_in}] x [{n_in}, {n_out}]: unsafe pairs on a CPU without VNNI, whose "
            "sparse excess costs more than int8 gains; QuantSpec(pair_safe=True) avoids them"
        )
    limits = onednn_without_vnni() if cpu_int8().saturates else WITH_VNNI
    return too_small(n_rows, n_out, n_in, limits)


def onednn_without_vnni() -> Thresholds:
    """Return where oneDNN overtakes fp32 without VNNI: its calls cost more than those of
    `avx2_linear`, which needs no other weight than a pair-safe one, and a compiler."""
    return Thresholds(2 * WITHOUT_VNNI.min_macs, 2 * WITHOUT_VNNI.large_weight)


def too_small(n_rows: int, n_out: int, n_in: int, limits: Thresholds) -> str | None:
    """Return why a product does not have enough work for integers to pay, None where it has."""
    weight = n_out * n_in
    if weight < limits.large_weight and n_rows * weight < limits.min_macs:
        return f"[{n_rows}, {n_in}] x [{n_in}, {n_out}] is too small for int8 to pay"
    return None


TAKES = Takes(
    casts=False,
    activations=avx2_linear.ACTIVATIONS,
    residual=True,
    row_codes=True,
    largest_code=255,
    apart=16,
)
CONV_TAKES = replace(
    TAKES,
    residual_first=True,
    residual_codes=True,
    channel_codes=False,
    row_codes=False,
    apart=0,
)


@dataclass(frozen=True)
class Avx2Linear(Int8Linear):
    """`fxq.lowering.cpu.avx2_linear`, with as much of what follows as its epilogue computes."""

    def match(self, layer: Node) -> Operands | str:
        return match(layer, group_step=avx2_linear.RUN)

    def rewrite(self, layer: Node, operands: Operands, lowering: Lowering) -> Decision:
        weight = tensor_of(lowering.gm, operands.weight)
        if not avx2_linear.fits(weight, hint(shape_of(operands.w_scale)[-1])):
            return Decision(None)
        if isinstance(unavailable := native("avx2_linear"), str):
            return Decision(None, unavailable)
        n_out, n_in = weight.shape
        if why := too_small(_n_rows(operands, lowering), n_out, n_in, WITHOUT_VNNI):
            return Decision(None, why)
        self.fuse(layer, operands, TAKES)
        bits = 4 if avx2_linear.is_narrow(weight) else 8
        return Decision(f"int{bits}_linear (AVX2)")


@dataclass(frozen=True)
class OneDnnInt8Linear(Int8Linear):
    """`fxq.lowering.cpu.int8_linear`."""

    def rewrite(self, layer: Node, operands: Operands, lowering: Lowering) -> Decision:
        weight = tensor_of(lowering.gm, operands.weight)
        exact = not cpu_int8().saturates or is_pair_safe(weight)
        n_rows = _n_rows(operands, lowering)
        if why := slower_than_float(n_rows, *weight.shape, exact=exact):
            return Decision(None, why)
        codes, zero = to_unsigned(operands, lowering)
        if is_single(operands.scale):
            o = operands
            args = (codes, o.scale, zero, o.weight, o.w_scale, o.bias, torch.float32)
            kernel = result = insert_call(ops.int8_linear.default, args, before=layer)
        else:
            kernel, result = _per_row(layer, operands, codes, zero, lowering)
        self.replace(layer, result, kernel=kernel)
        if exact:
            return Decision("int8_linear (oneDNN)")
        return Decision(
            "int8_linear (oneDNN + sparse excess)",
            "this CPU lacks VNNI and the weight has unsafe pairs; QuantSpec(pair_safe=True) is "
            "faster",
        )


def _n_rows(operands: Operands, lowering: Lowering) -> int:
    return math.prod(hint(size, lowering.sizes) for size in shape_of(operands.codes)[:-1])


def conv_slower_than_float(n_outputs: int, weight: Tensor, groups: int) -> str | None:
    """Return why a convolution is not faster in int8 here, None where it is.

    Args:
        n_outputs: of one channel: batch and positions.
        weight: codes `[N, C / groups, *kernel]`.
        groups: of channels.
    """
    n_in = weight.shape[1]
    if groups == 1 and n_in < MIN_CONV_CHANNELS:
        return (
            f"fewer than {MIN_CONV_CHANNELS} input channels ({n_in}): int8 is slower than fp32 "
            "with some kernels and strides, faster with others"
        )
    if n_in == 1:
        return "depthwise: memory, not arithmetic, takes its time, and int8 is slower"
    if groups > 1 and n_in % CHANNEL_BLOCK:
        return (
            f"oneDNN has no int8 kernel for groups of {n_in} input channels; "
            f"multiples of {CHANNEL_BLOCK} have one"
        )
    if cpu_int8().saturates and not is_pair_safe(weight):
        return (
            "unsafe pairs on a CPU without VNNI, where int8 would not be exact; "
            "QuantSpec(pair_safe=True) avoids them"
        )
    if n_outputs * weight.numel() < MIN_CONV_MACS:
        kernel = "x".join(str(size) for size in weight.shape[2:])
        shape = f"{n_in} to {len(weight) // groups} channels, {kernel}, {n_outputs} positions"
        return f"{shape} is too small for int8 to pay"
    return None


def own_conv_pays(n_outputs: int, weight: Tensor, groups: int) -> bool:
    """Tell whether `avx2_conv` is faster than fp32 and oneDNN; `conv_slower_than_float` has the
    arguments."""
    window, channels = weight[0].numel(), weight.shape[1]
    macs = n_outputs * weight.numel()
    least = MIN_WINDOW if macs < MIN_CONV_MACS else MIN_WINDOW_OF_MUCH
    if groups > 1:
        least = MIN_WINDOW_OF_GROUP
    elif channels < MIN_CONV_CHANNELS:
        least = MIN_WINDOW_OF_IMAGE
    enough = macs >= MIN_AVX2_CONV_MACS
    fills = len(weight) // groups >= MIN_CONV_OUTPUTS
    return enough and fills and window >= least and avx2_conv.is_faster(weight, groups)


@dataclass(frozen=True)
class Avx2Conv(Int8Conv):
    """`fxq.lowering.cpu.avx2_conv`, with as much of what follows as its epilogue computes."""

    def rewrite(self, layer: Node, operands: ConvOperands, lowering: Lowering) -> Decision:
        weight, groups = tensor_of(lowering.gm, operands.weight), operands.groups
        pays = own_conv_pays(_n_outputs(layer, lowering), weight, groups)
        if not pays or dtype_of(layer) != torch.float32:
            return Decision(None)
        if cpu_int8().saturates and isinstance(unavailable := native("avx2_conv"), str):
            return Decision(None, unavailable)
        if avx2_conv.packed(weight, groups) is None:
            return Decision(None)
        self.fuse(layer, operands, CONV_TAKES)
        bits = 4 if avx2_linear.is_narrow(weight) else 8
        return Decision(f"int{bits}_conv (AVX2)")


def _n_outputs(layer: Node, lowering: Lowering) -> int:
    """Return how many elements an output channel of a convolution has."""
    batch, _, *sizes = (hint(size, lowering.sizes) for size in shape_of(layer))
    return batch * math.prod(sizes)


@dataclass(frozen=True)
class OneDnnInt8Conv(Int8Conv):
    """`fxq.lowering.cpu.int8_conv`."""

    def rewrite(self, layer: Node, operands: ConvOperands, lowering: Lowering) -> Decision:
        if not cpu_int8().convolves:
            return super().rewrite(layer, operands, lowering)
        o, weight = operands, tensor_of(lowering.gm, operands.weight)
        if why := conv_slower_than_float(_n_outputs(layer, lowering), weight, o.groups):
            return Decision(None, why)
        codes, zero = to_unsigned(o, lowering)
        geometry = (o.stride, o.padding, o.dilation, o.groups)
        args = (codes, o.scale, zero, o.weight, o.w_scale, o.bias, *geometry)
        self.replace(layer, insert_call(ops.int8_conv.default, args, before=layer))
        return Decision("int8_conv (oneDNN)")


def _per_row(
    layer: Node, o: Operands, codes: Node, zero: Node | None, lowering: Lowering
) -> tuple[Node, Node]:
    """Return the kernel and `(acc - zero_point * row_sums) * (scale * w_scale) + bias` of its
    accumulators, as nodes before `layer`; a zero-point of all rows is the kernel's to subtract.

    Where acc may not be exact in fp32 the difference is one of int32, rounded once.
    """
    weight, w_scale = tensor_of(lowering.gm, o.weight), tensor_of(lowering.gm, o.w_scale)
    name = str(o.weight.target)
    w_rows = w_scale.reshape(-1).expand(len(weight))
    unit = constant("unit_scale", torch.ones(1, 1), layer, lowering)
    w_row = constant(f"{name}_row_scale", w_rows, layer, lowering)
    centre = zero
    single = zero is None or is_single(zero)
    if not single:
        value = torch.tensor([[SIGN]], dtype=torch.int32)
        centre = None if codes is o.codes else constant("sign", value, layer, lowering)
    exact = single or largest_sum(weight) < EXACT_IN_FP32
    dtype = torch.float32 if exact else torch.int32
    args = (codes, unit, centre, o.weight, unit, None, dtype)
    y = kernel = insert_call(ops.int8_linear.default, args, before=layer)
    if not single:
        sums = weight.sum(1, dtype=torch.int32).to(dtype)
        sums_node = constant(f"{name}_row_sums", sums, layer, lowering)
        shift = insert_call(aten.mul.Tensor, (o.zero_point, sums_node), before=layer)
        y = insert_call(aten.sub.Tensor, (y, shift), before=layer)
    if not exact:
        y = insert_call(aten._to_copy.default, (y,), {"dtype": torch.float32}, before=layer)
    scale = insert_call(aten.mul.Tensor, (o.scale, w_row), before=layer)
    y = insert_call(aten.mul.Tensor, (y, scale), before=layer)
    if o.bias is not None:
        y = insert_call(aten.add.Tensor, (y, o.bias), before=layer)
    return kernel, y


X86 = Device(
    "x86",
    lambda device: device.type == "cpu" and cpu_int8().available,
    (
        WeightOnlyLinear(),
        CacheAttention(),
        Avx2Linear(),
        OneDnnInt8Linear(),
        Avx2Conv(),
        OneDnnInt8Conv(),
        TorchAttention(),
    ),
)

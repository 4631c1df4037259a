"""int8_conv: the convolution of quantized activations with a quantized weight, with its epilogue.

    acc = conv(x - x_zero_point, weight)                  int32, exact; padding is real 0
    y   = acc * (x_scale * w_scale) + bias                fp32
    y   = activation(y + residual)                        fp32; residual may be codes
    out = y, or its codes where out_scale is given

`reference` is the definition. On x86 without VNNI the op is a kernel of fxq's own where that is
faster (`fxq.lowering.cpu.avx2_conv`), for weights that it multiplies exactly; for others and with
VNNI it is oneDNN (`fxq.lowering.cpu.int8_conv`), elsewhere the reference itself.

x `[B, C, *size]` int8 or uint8, with one to three spatial axes; x_zero_point int32, one element or
one per sample `[B, 1, ...]`, on the grid of the codes; weight `[N, C / groups, *kernel]` int8;
w_scale fp32, N elements or one; bias `[N]`; stride and dilation one number per axis, padding two,
before and after, in the order of the axes; residual `[B, N, *size]` fp32, or codes with
residual_scale and residual_zero_point, as those of x are; out_scale fp32 and out_zero_point int32
one element or `[1, N, 1, ...]`; out `[B, N, *size]`, channels last in memory, as kernels write it.
A residual is added before the activation function, as residual networks do, not after it, as in
`fxq::int8_linear`.

x_scale fp32 is one element or one per sample; or, where it is guarded against NaN and Inf, one per
row of x (`[B, C, ..., 1]`): the same number in all rows of a sample, but NaN in a row that holds
one of them. An output that reads such a row is NaN, as that of a convolution of the dequantized
values is. Kernels take one scale and zero-point: samples with others are another call of theirs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxq.lowering.cpu import avx2_conv
from fxq.lowering.cpu.int8_conv import can_launch
from fxq.lowering.cpu.int8_conv import launch as cpu_launch
from fxq.lowering.int8_linear import activate
from fxq.lowering.registering import register
from fxq.numerics import codes_dtype, dequantize, quantize

CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}  # by the number of spatial axes


def padded(x: Tensor, padding: list[int], value: int = 0) -> Tensor:
    """Return x with `padding` (before and after, axis by axis) around its spatial axes."""
    pairs = [padding[i : i + 2] for i in range(0, len(padding), 2)]
    return F.pad(x, [n for pair in reversed(pairs) for n in pair], value=value)


def output_sizes(
    x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]
) -> list[int]:
    """Return the sizes of the output's spatial axes."""
    return [
        (size + padding[2 * i] + padding[2 * i + 1] - dilation[i] * (kernel - 1) - 1) // stride[i]
        + 1
        for i, (size, kernel) in enumerate(zip(x.shape[2:], weight.shape[2:], strict=True))
    ]


def accumulate(
    x: Tensor,
    x_zero_point: Tensor | None,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """Return the exact integer convolution of `x - x_zero_point` as int32.

    Computed in float64, whose 53 bits hold every sum of up to 2^37 products of codes.
    """
    centred = x.double()
    if x_zero_point is not None:
        centred = centred - x_zero_point.double().reshape(-1, *[1] * (x.ndim - 1))
    convolve = CONVOLVE[x.ndim - 2]
    around = padded(centred, padding)
    return convolve(around, weight.double(), None, stride, 0, dilation, groups).to(torch.int32)


def sample_scales(x_scale: Tensor) -> Tensor:
    """Return the number that a scale is in each sample where it is not NaN: `[B]`, or `[1]` where
    there is one element. Where it is NaN only, that of another sample, or 1."""
    if not x_scale.numel():
        return x_scale.new_ones(1)
    rows = x_scale.flatten(1) if x_scale.ndim > 1 else x_scale.reshape(-1, 1)
    numbers = torch.where(rows.isnan(), -torch.inf, rows).amax(1)
    numbers = torch.where(numbers.isinf(), numbers.amax(), numbers)
    return torch.where(numbers.isinf(), 1.0, numbers)


def reads_nan(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """Tell which outputs read a value whose scale is NaN, of each group: `[B, groups, *size]`."""
    marked = padded(x_scale.isnan().float().expand(x.shape), padding)
    kernel = torch.ones((groups, *weight.shape[1:]), device=x.device)
    counts = CONVOLVE[x.ndim - 2](marked, kernel, None, stride, 0, dilation, groups)
    return counts > 0.5


def spoiled(y: Tensor, reads: Tensor) -> Tensor:
    """Return `y` `[B, N, *size]` with NaN where `reads_nan` says so."""
    return y.masked_fill(reads.repeat_interleave(y.shape[1] // reads.shape[1], 1), torch.nan)


def finish(
    y: Tensor,
    activation: str = "none",
    residual: Tensor | None = None,
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    quant_min: int = -128,
    quant_max: int = 127,
    residual_scale: Tensor | None = None,
    residual_zero_point: Tensor | None = None,
) -> Tensor:
    """Apply the epilogue to `y` `[B, N, *size]`, fp32."""
    if residual is not None and residual_scale is not None:
        residual = dequantize(residual, residual_scale, residual_zero_point, torch.float32)
    y = activate(y if residual is None else y + residual.float(), activation)
    if out_scale is None:
        return y
    return quantize(y, out_scale, out_zero_point, quant_min, quant_max)


def reference(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    weight: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str = "none",
    residual: Tensor | None = None,
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    quant_min: int = -128,
    quant_max: int = 127,
    residual_scale: Tensor | None = None,
    residual_zero_point: Tensor | None = None,
) -> Tensor:
    """Compute the definition above on any device."""
    geometry = (stride, padding, dilation, groups)
    channels = (-1, *[1] * (x.ndim - 2))
    y = accumulate(x, x_zero_point, weight, *geometry).float()
    per_sample = sample_scales(x_scale).reshape(-1, *[1] * (x.ndim - 1))
    y = y * (per_sample * w_scale.reshape(channels))
    y = y if bias is None else y + bias.float().reshape(channels)
    y = spoiled(y, reads_nan(x, x_scale, weight, *geometry))
    codes = (out_scale, out_zero_point, quant_min, quant_max)
    epilogue = (activation, residual, *codes, residual_scale, residual_zero_point)
    return _channels_last(finish(y, *epilogue))


def int8_conv(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    weight: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str = "none",
    residual: Tensor | None = None,
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    quant_min: int = -128,
    quant_max: int = 127,
    residual_scale: Tensor | None = None,
    residual_zero_point: Tensor | None = None,
) -> Tensor:
    """Compute `reference` with the fastest exact implementation for the device of `x`."""
    product = (x, x_scale, x_zero_point, weight, w_scale, bias, stride, padding, dilation, groups)
    codes = (out_scale, out_zero_point, quant_min, quant_max)
    epilogue = (activation, residual, *codes, residual_scale, residual_zero_point)
    own = _own_kernel(x, weight, groups)
    if own is None and not can_launch(x, weight):
        return reference(*product, *epilogue)
    params = (x_scale, x_zero_point, residual_scale, residual_zero_point)
    if all(each is None or _is_one(each) for each in params):
        y = _launch(own, *product, *epilogue)
        return y if own is not None else _channels_last(y)
    y = _by_sample(own, x, sample_scales(x_scale), x_zero_point, *product[3:])
    if x_scale.isnan().any():
        y = spoiled(y, reads_nan(x, x_scale, weight, *product[6:]))
    return _channels_last(finish(y, *epilogue))


def _own_kernel(x: Tensor, weight: Tensor, groups: int) -> avx2_conv.Packed | None:
    """Return the weight for the kernel of fxq's own, None where it is not the one to use."""
    if x.device.type != "cpu" or not x.numel() or not avx2_conv.is_faster(weight, groups):
        return None
    return avx2_conv.packed(weight, groups)


def _is_one(values: Tensor) -> bool:
    """Tell whether all are the same number, which NaN is not."""
    ends = values.aminmax() if values.numel() > 1 else (values, values)
    smallest, largest = (float(end) for end in ends)
    return smallest == largest


def _by_sample(
    own: avx2_conv.Packed | None,
    x: Tensor,
    scales: Tensor,
    x_zero_point: Tensor | None,
    *others: Any,
) -> Tensor:
    """Compute samples together that have the same scale and zero-point.

    Args:
        own: the weight for fxq's own kernel, where it computes.
        x: as everywhere.
        scales: of each sample `[B]`, or of all `[1]`.
        x_zero_point: likewise.
        others: weight and all that follows.
    """
    zeros = torch.zeros(1) if x_zero_point is None else x_zero_point.flatten()
    pairs = torch.stack([part.double().expand(len(x)) for part in (scales, zeros)], 1)
    rows, row_of = pairs.unique(dim=0, return_inverse=True)
    parts, order = [], []
    for number, row in enumerate(rows):
        mine = (row_of == number).nonzero().flatten()
        order.append(mine)
        parts.append(_launch(own, x[mine], row[:1].float(), row[1:].int(), *others))
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts)[torch.cat(order).argsort()]


def _launch(
    own: avx2_conv.Packed | None,
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    weight: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    *epilogue: Any,
) -> Tensor:
    """Call a kernel; scales and zero-points are the same number, whatever their shape."""
    if own is not None:
        others = (w_scale, bias, stride, padding, dilation, *epilogue)
        return avx2_conv.launch(x, x_scale, x_zero_point, own, *others)
    zero = 0 if x_zero_point is None else int(x_zero_point.flatten()[0])
    codes, sides = x, padding[::2]
    if sides != padding[1::2]:  # the kernel pads both sides alike
        codes, sides = padded(x, padding, zero), [0] * len(sides)
    geometry = (stride, sides, dilation, groups)
    scale = float(x_scale.flatten()[0])
    y = cpu_launch(codes, scale, zero, weight, w_scale, bias, *geometry)
    return finish(y, *epilogue)


def _channels_last(y: Tensor) -> Tensor:
    rows = y.movedim(1, -1)
    return y if rows.is_contiguous() else rows.contiguous().movedim(-1, 1)


def _fake(
    x: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    out_scale: Tensor | None,
    quant_max: int,
    **_: object,
) -> Tensor:
    sizes = output_sizes(x, weight, stride, padding, dilation)
    dtype = torch.float32 if out_scale is None else codes_dtype(quant_max)
    y = x.new_empty((x.shape[0], *sizes, weight.shape[0]), dtype=dtype)
    return y.movedim(-1, 1)


register(reference, int8_conv, _fake)

"""Quantization arithmetic: one `choose_qparams`, one `quantize`, one `dequantize`.

    codes = clamp(round(x * (1 / scale)) + zero_point, quant_min, quant_max)
    x_hat = (codes - zero_point) * scale

in fp32, rounding half to even; `x_hat` is then cast once. `scale` and `zero_point` have as many
dimensions as the tensor; along each, their size is 1, the tensor's, or a divisor of it (a group of
neighbours shares the entry). Multiplying with the reciprocal instead of dividing is part of the
definition: division is not correctly rounded in every compiled kernel, a product is, so every
implementation gives the same code.

NaN and Inf never become finite values, though no code stands for them: a scale that is computed
from a block with one of them is NaN (`choose_qparams`), and one from calibration becomes NaN for
each row that holds one (`guard_scale`). The row's values are then NaN, whatever their codes, which
are unspecified. Other rows are untouched.
"""

from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from fxq.spec import ALL

EXACT_IN_FP32 = 2**24  # integers up to this are fp32 numbers
PAIR_LIMIT = 128  # largest |w[2j] + w[2j+1]| in codes for which 255 * |sum| fits int16
SIGN = 128  # int8 codes become uint8 by adding this to the codes and to their zero-point


def expand_blocks(param: Tensor, shape: Sequence[int]) -> Tensor:
    """Repeat each entry of `param` over its group of neighbours, so that it broadcasts against a
    tensor of `shape`.

    Args:
        param: scale or zero-point, same number of dimensions as `shape` (or 0).
        shape: the quantized tensor's shape.
    """
    for dim, (own, full) in enumerate(zip(param.shape, shape, strict=False)):
        if own != 1 and own != full:
            param = param.repeat_interleave(full // own, dim)
    return param


def block_amin_amax(x: Tensor, block: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the smallest and largest value of each block of `x`, in fp32, in the shape of its
    scale.

    Args:
        x: any float dtype, any shape.
        block: neighbours per dimension that share a scale, `fxq.spec.ALL` for a whole dimension.
    """
    blocks, reduce, shape = _blocks(x, block)
    low, high = (blocks.amin(reduce), blocks.amax(reduce)) if reduce else (blocks, blocks)
    return low.reshape(shape).float(), high.reshape(shape).float()


def block_mean(x: Tensor, block: Sequence[int]) -> Tensor:
    """Return the mean of each block of `x`, in fp32, in the shape of its scale; arguments as for
    `block_amin_amax`."""
    blocks, reduce, shape = _blocks(x.float(), block)
    return (blocks.mean(reduce) if reduce else blocks).reshape(shape)


def _blocks(x: Tensor, block: Sequence[int]) -> tuple[Tensor, list[int], list[int]]:
    """Return `x` with dimensions of their own within blocks, which these are, and the scale's
    shape."""
    shape: list[int] = []
    reduce: list[int] = []
    for size, width in zip(x.shape, block, strict=True):
        if width == ALL:
            reduce.append(len(shape))
            shape.append(size)
        elif width == 1:
            shape.append(size)
        else:
            reduce.append(len(shape) + 1)
            shape += [size // width, width]
    out_shape = [
        1 if width == ALL else size // width for size, width in zip(x.shape, block, strict=True)
    ]
    return x.reshape(shape), reduce, out_shape


def choose_qparams(
    low: Tensor, high: Tensor, quant_min: int, quant_max: int, *, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Return the scale (fp32, > 0) and zero-point (int32, on the grid) for values in `[low, high]`.

    The range is first widened to contain zero, so that zero is always a code's exact value. A range
    of zero width gets scale 1. The scale never underflows: its reciprocal is finite. A range that
    is not finite has scale NaN.

    Args:
        low: smallest value `[...]`, fp32.
        high: largest value `[...]`, fp32.
        quant_min: smallest code.
        quant_max: largest code.
        symmetric: zero-point 0.
    """
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    if symmetric:
        scale = torch.maximum(-low, high) * (1.0 / min(-quant_min, quant_max))
        zero_point = torch.zeros_like(scale, dtype=torch.int32)
    else:
        scale = high * (1.0 / (quant_max - quant_min)) - low * (1.0 / (quant_max - quant_min))
        scale = _positive(scale)
        zero_point = (
            torch.round(quant_min - low * (1.0 / scale))
            .clamp(quant_min, quant_max)
            .nan_to_num(quant_min)
            .to(torch.int32)
        )
    return _positive(scale), zero_point


def _positive(scale: Tensor) -> Tensor:
    tiny = torch.finfo(torch.float32).tiny
    scale = torch.where(scale == 0, 1.0, scale.clamp(min=tiny))
    return torch.where(scale.isfinite(), scale, torch.nan)


def guard_scale(x: Tensor, scale: Tensor) -> Tensor:
    """Return `scale` for each row of `x`, NaN for rows that hold NaN or Inf.

    Args:
        x: what is quantized `[..., K]`, any float dtype; or anything else whose rows are not finite
            where those are.
        scale: fp32, broadcasts against `x`.
    Returns:
        fp32, `scale` broadcast against `[..., 1]`; bit-equal to it where the row is finite.
    """
    x = x.float()  # Inf - Inf is NaN; Inductor of torch 2.11 takes x * 0 for 0
    return scale + (x - x).sum(-1, keepdim=True)


def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the codes of `x`: int8, uint8 where `quant_max` exceeds 127, or `dtype`.

    Args:
        x: values, any float dtype.
        scale: fp32, > 0, one entry per block of `x`.
        zero_point: int32 in the shape of `scale`, or None for 0.
        quant_min: smallest code.
        quant_max: largest code.
        dtype: of codes in floating point, which the cast to it rounds.
    """
    codes = x.float() * expand_blocks(1.0 / scale, x.shape)
    if dtype is not None:
        return codes.clamp(quant_min, quant_max).to(dtype)
    codes = torch.round(codes)
    if zero_point is not None:
        codes = codes + expand_blocks(zero_point, x.shape)
    return codes.clamp(quant_min, quant_max).to(codes_dtype(quant_max))


def codes_dtype(quant_max: int) -> torch.dtype:
    """Return the container of codes up to `quant_max`."""
    return torch.uint8 if quant_max > 127 else torch.int8


def dequantize(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return the values that `codes` stand for.

    Args:
        codes: int8, uint8 or 8-bit floating point.
        scale: fp32, one entry per block of `codes`.
        zero_point: int32 in the shape of `scale`, or None for 0.
        dtype: float dtype of the result; the product is computed in fp32.
    """
    values = codes.to(torch.float32)
    if zero_point is not None:
        values = values - expand_blocks(zero_point, codes.shape)
    return (values * expand_blocks(scale, codes.shape)).to(dtype)


def channel_pairs(weight: Tensor) -> Tensor:
    """Return the sums over input channels 2j and 2j+1, position by position of a convolution.

    An odd last channel is a pair with nothing. Grouped convolutions count channels within a group,
    as their weights do.

    Args:
        weight: `[N, C]` or `[N, C, *kernel]`.
    Returns:
        `[N, ceil(C / 2), *kernel]`.
    """
    padding = [0, 0] * (weight.ndim - 2) + [0, weight.shape[1] % 2]
    return torch.nn.functional.pad(weight, padding).unflatten(1, (-1, 2)).sum(2)


def pair_safe_amax(weight: Tensor) -> Tensor:
    """Return the maxima to scale by, per output channel, so that no pair of 8-bit codes
    (`channel_pairs`) exceeds `PAIR_LIMIT`.

    With codes up to 127, `scale = amax / 127`: a pair sums to at most 127 before rounding, and
    rounding two codes adds at most 1.

    Args:
        weight: `[N, C]` or `[N, C, *kernel]`, any float dtype.
    Returns:
        `[N]`, fp32, at least the largest magnitude of the row.
    """
    weight = weight.detach().float()
    largest, pairs = weight.abs().flatten(1).amax(1), channel_pairs(weight).abs().flatten(1)
    return torch.maximum(largest, pairs.amax(1))


def is_pair_safe(codes: Tensor) -> bool:
    """Tell whether no two codes of input channels 2j and 2j+1 of `codes` `[N, C]` or
    `[N, C, *kernel]`, at the same position, sum beyond `PAIR_LIMIT`."""
    return bool((channel_pairs(codes.int()).abs() <= PAIR_LIMIT).all())


def largest_sum(codes: Tensor) -> int:
    """Return a bound on `|sum((x - zero_point) * w)|` over each row of `codes` `[N, ...]` and each
    part of the sum, for any 8-bit x and zero-points on their grid.

    With a zero-point z from 0 to 255, `x - z` is between -z and 255 - z: the worst sum has all
    positive codes, or all negative ones, times 255. 256 leaves room for a sum about 128.
    """
    above, below = codes.flatten(1).clamp(min=0), codes.flatten(1).clamp(max=0)
    sums = torch.maximum(above.sum(1, dtype=torch.int64), -below.sum(1, dtype=torch.int64))
    return 256 * int(sums.max())


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return `a @ b` as fp32, whatever torch's switches say of the precision of products.

    `allow_tf32` and `torch.set_float32_matmul_precision` make fp32 products on a GPU, and some on a
    CPU, round their operands to 10 bits and fewer: enough to change which blocks attention selects.
    No switch touches float64, and data-center GPUs multiply it as fast as fp32.

    Args:
        a: `[..., M, K]`, any float dtype.
        b: `[..., K, N]`, likewise.
    """
    return (a.double() @ b.double()).float()


def is_inexact(value: object) -> TypeGuard[Tensor]:
    """Tell whether a value is a tensor of floating-point numbers, real or complex."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def as_real(x: Tensor) -> Tensor:
    """Return complex numbers as pairs, real and imaginary part, along a further axis; others as
    they are. To cast them to a real dtype would drop the imaginary part."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def sqnr_db(reference: Tensor, other: Tensor) -> float:
    """Return the signal-to-quantization-noise ratio in dB: 10 log10(|ref|^2 / |ref - other|^2), inf
    where equal. NaN and infinities that both have at the same places are equal; others give NaN or
    -inf. Of complex numbers, real and imaginary parts count alike."""
    reference, other = as_real(reference.detach()).double(), as_real(other.detach()).double()
    same = (reference == other) | (reference.isnan() & other.isnan())
    noise = torch.where(same, 0.0, reference - other).square().sum()
    if noise == 0:
        return float("inf")
    signal = torch.where(reference.isfinite(), reference, 0.0).square().sum()
    return float(10 * torch.log10(signal / noise))

"""int8_linear: the product of quantized activations and a quantized weight, with its epilogue.

    acc = (x - x_zero_point) @ weight.T                   int32, exact
    y   = acc * (x_scale * w_scale) + bias                fp32
    y   = activation(y + apart @ w_apart.T) + residual    fp32
    out = y as out_dtype, or its codes where out_scale is given; acc itself where out_dtype is int32

`reference` is the definition. On CUDA the op is one Triton kernel
(`fxq.lowering.kernels.int8_linear`), on x86 without VNNI one of fxq's own, for pair-safe weights
(`fxq.lowering.cpu.avx2_linear`); for others and with VNNI it is oneDNN
(`fxq.lowering.cpu.int8_linear`), elsewhere the reference itself.

x `[..., K]` int8 or uint8; x_scale fp32 and x_zero_point int32 `[..., 1]`, broadcast against x,
one element in any number of axes;
weight `[N, K]` int8; w_scale `[N, 1]` or `[1, 1]` fp32, or `[N, G]` for G groups of neighbouring
input channels, whose sums are scaled before they are added; bias `[N]`;
apart `[..., J]` and w_apart `[N, J]` fp32, a few channels that are not among those of x;
residual and out `[..., N]`;
out_scale one element or `[1, ..., N]`, out_zero_point one element; on a CPU both may be one for
each row too, `[..., 1]`.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxq.lowering.cpu import avx2_linear
from fxq.lowering.cpu.int8_linear import accumulators as cpu_accumulators
from fxq.lowering.cpu.int8_linear import launch as cpu_launch
from fxq.lowering.cpu.onednn import cpu_int8
from fxq.lowering.derived import derived
from fxq.lowering.registering import register
from fxq.numerics import codes_dtype, quantize

ACTIVATIONS = avx2_linear.ACTIVATIONS
ON_CUDA = ACTIVATIONS[:4]  # those of the Triton kernel


def activate(y: Tensor, activation: str) -> Tensor:
    """Apply one of `ACTIVATIONS`."""
    match activation:
        case "none":
            return y
        case "gelu":
            return F.gelu(y)
        case "gelu_tanh":
            return F.gelu(y, approximate="tanh")
        case "silu":
            return F.silu(y)
        case "relu":
            return F.relu(y)
        case "relu6":
            return F.relu6(y)
        case "hardswish":
            return F.hardswish(y)
    raise ValueError(f"activation: expected one of {ACTIVATIONS}, found {activation!r}")


def accumulate(x: Tensor, x_zero_point: Tensor | None, weight: Tensor) -> Tensor:
    """Return the exact integer product `(x - x_zero_point) @ weight.T` as int32.

    Computed in float64, whose 53 bits hold every sum of up to 2^37 products of codes.
    """
    centred = x.double() if x_zero_point is None else x.double() - x_zero_point.double()
    product = (centred @ weight.double().mT).to(torch.int32)
    return product.reshape(*x.shape[:-1], weight.shape[0])  # a zero-point may have an axis more


def scaled(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    weight: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """Return the product in real units, before the epilogue, as fp32 `[..., N]`."""
    if (n_groups := w_scale.shape[-1]) > 1:
        parts = zip(x.chunk(n_groups, -1), weight.chunk(n_groups, 1), w_scale.mT, strict=True)
        sums = (accumulate(xg, x_zero_point, wg).float() * scale for xg, wg, scale in parts)
        y = functools.reduce(torch.add, sums) * x_scale
        return y if bias is None else y + bias.float()
    y = accumulate(x, x_zero_point, weight).float()
    y = (y * (x_scale * w_scale.mT)).reshape(y.shape)
    return y if bias is None else y + bias.float()


def finish(
    y: Tensor,
    out_dtype: torch.dtype,
    activation: str,
    residual: Tensor | None,
    out_scale: Tensor | None,
    out_zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
) -> Tensor:
    """Apply the epilogue to `y` `[..., N]`, fp32."""
    y = activate(y, activation)
    if residual is not None:
        y = y + residual.float()
    if out_scale is not None:
        return quantize(y, out_scale, out_zero_point, quant_min, quant_max)
    return y.to(out_dtype)


def reference(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    weight: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    activation: str = "none",
    residual: Tensor | None = None,
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    quant_min: int = -128,
    quant_max: int = 127,
    apart: Tensor | None = None,
    w_apart: Tensor | None = None,
) -> Tensor:
    """Compute the definition above on any device."""
    if out_dtype == torch.int32:
        return accumulate(x, x_zero_point, weight)
    y = scaled(x, x_scale, x_zero_point, weight, w_scale, bias)
    if apart is not None and w_apart is not None:
        y = y + F.linear(apart, w_apart)
    return finish(
        y, out_dtype, activation, residual, out_scale, out_zero_point, quant_min, quant_max
    )


def int8_linear(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    weight: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    activation: str = "none",
    residual: Tensor | None = None,
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    quant_min: int = -128,
    quant_max: int = 127,
    apart: Tensor | None = None,
    w_apart: Tensor | None = None,
) -> Tensor:
    """Compute `reference` with the fastest exact implementation for the device of `x`."""
    product = (x, x_scale, x_zero_point, weight, w_scale, bias)
    epilogue = (activation, residual, out_scale, out_zero_point, quant_min, quant_max)
    on_x86 = x.device.type == "cpu" and cpu_int8().available
    if on_x86 and (packed := avx2_linear.packed(weight, w_scale.shape[-1])):
        parts = (x, x_scale, x_zero_point, packed, w_scale, bias)
        return avx2_linear.launch(*parts, out_dtype, *epilogue, apart, w_apart)
    if out_dtype == torch.int32:
        exact = cpu_accumulators if on_x86 else accumulate
        return exact(x, x_zero_point, weight).to(torch.int32)
    if x.device.type == "cuda" and apart is None and activation in ON_CUDA:
        return _on_cuda(*product, out_dtype, *epilogue)
    y = cpu_launch(*product) if on_x86 and w_scale.shape[-1] == 1 else scaled(*product)
    if apart is not None and w_apart is not None:
        y = y + F.linear(apart, w_apart)
    return finish(y, out_dtype, *epilogue)


def _fake(
    x: Tensor,
    weight: Tensor,
    out_dtype: torch.dtype,
    out_scale: Tensor | None,
    quant_max: int,
    **_: object,
) -> Tensor:
    dtype = out_dtype if out_scale is None else codes_dtype(quant_max)
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


register(reference, int8_linear, _fake)


def _on_cuda(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    weight: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    activation: str,
    residual: Tensor | None,
    out_scale: Tensor | None,
    *requantize: Any,
) -> Tensor:
    from fxq.lowering.kernels.int8_linear import launch  # loads Triton

    n_in, n_out = x.shape[-1], weight.shape[0]
    out = launch(
        x.reshape(-1, n_in).contiguous(),
        _per_row(x_scale, x),
        None if x_zero_point is None else _per_row(x_zero_point, x),
        weight.contiguous(),
        w_scale.reshape(-1).expand(n_out).contiguous(),
        derived.get(weight, "row_sums", lambda w: w.sum(1, dtype=torch.int32)),
        None if bias is None else bias.float(),
        out_dtype,
        activation,
        None if residual is None else residual.reshape(-1, n_out).contiguous(),
        None if out_scale is None else out_scale.reshape(-1).contiguous(),
        *requantize,
    )
    return out.reshape(*x.shape[:-1], n_out)


def _per_row(param: Tensor, x: Tensor) -> Tensor:
    """Return a scale or zero-point of `x` `[..., K]` as one element, or one per row of `x`."""
    if param.numel() == 1:
        return param.reshape(1)
    return param.expand(*x.shape[:-1], 1).reshape(-1).contiguous()

"""The operators of the QUANTIZED dialect: `fxq::quantize`, `fxq::dequantize`,
`fxq::choose_qparams`, `fxq::guard_scale`.

Each is a `torch.library` custom op whose body is the function of the same name in `fxq.numerics`,
so a QUANTIZED graph runs on any device as it stands. `decompositions` gives the same functions to a
compiler that wants to fuse them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fxq import numerics
from fxq.spec import scale_shape


@torch.library.custom_op("fxq::quantize", mutates_args=())
def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the codes of `x`. Shapes and dtypes: `fxq.numerics.quantize`."""
    return numerics.quantize(x, scale, zero_point, quant_min, quant_max, dtype)


@quantize.register_fake
def _(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    return torch.empty_like(x, dtype=dtype or numerics.codes_dtype(quant_max))


@torch.library.custom_op("fxq::dequantize", mutates_args=())
def dequantize(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return the values of `codes`. Shapes and dtypes: `fxq.numerics.dequantize`."""
    return numerics.dequantize(codes, scale, zero_point, dtype)


@dequantize.register_fake
def _(codes: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(codes, dtype=dtype)


def _choose_qparams(
    x: Tensor, block: Sequence[int], quant_min: int, quant_max: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    low, high = numerics.block_amin_amax(x, block)
    return numerics.choose_qparams(low, high, quant_min, quant_max, symmetric=symmetric)


@torch.library.custom_op("fxq::choose_qparams", mutates_args=())
def choose_qparams(
    x: Tensor, block: Sequence[int], quant_min: int, quant_max: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Return scale (fp32) and zero-point (int32) of `x`'s blocks, one entry per `block` of
    neighbours.

    Args:
        x: values, any float dtype.
        block: neighbours per dimension that share a scale, -1 for a whole dimension
            (`fxq.spec.block_of`).
        quant_min: smallest code.
        quant_max: largest code.
        symmetric: zero-point 0.
    """
    return _choose_qparams(x, block, quant_min, quant_max, symmetric)


@choose_qparams.register_fake
def _(
    x: Tensor, block: Sequence[int], quant_min: int, quant_max: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    shape = scale_shape(x.shape, block)
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.int32)


@torch.library.custom_op("fxq::guard_scale", mutates_args=())
def guard_scale(x: Tensor, scale: Tensor) -> Tensor:
    """Return `scale` for each row of `x`, NaN for rows that hold NaN or Inf. Shapes and dtypes:
    `fxq.numerics.guard_scale`."""
    return numerics.guard_scale(x, scale)


@guard_scale.register_fake
def _(x: Tensor, scale: Tensor) -> Tensor:
    shape = torch.broadcast_shapes(scale.shape, (*x.shape[:-1], 1))
    return x.new_empty(shape, dtype=torch.float32)


def decompositions() -> dict[torch._ops.OpOverload, Callable[..., Any]]:
    """Return each op's definition as a decomposition table for AOT tracing."""
    return {
        torch.ops.fxq.quantize.default: numerics.quantize,
        torch.ops.fxq.dequantize.default: numerics.dequantize,
        torch.ops.fxq.choose_qparams.default: _choose_qparams,
        torch.ops.fxq.guard_scale.default: numerics.guard_scale,
    }

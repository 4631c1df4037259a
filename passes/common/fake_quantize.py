"""Fake quantization that can be trained through.

    forward   x_hat = dequantize(quantize(x))        backward   1 where x is in range, 0 outside

Rounding has no slope anywhere, so its gradient is taken for that of the identity; values outside
the range are clipped, and clipping's own gradient is kept. Of the scale, that makes the gradient
`(x_hat - x) / scale` in range and `x_hat / scale` outside (LSQ, arXiv:1902.08153, Eq. 3).
"""

from typing import Any

import torch
from torch import Tensor

from fxq import numerics


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor | None, *grid: Any
    ) -> Tensor:
        codes = numerics.quantize(x, scale, zero_point, *grid)
        value = numerics.dequantize(codes, scale, zero_point, x.dtype)
        wide = numerics.expand_blocks(scale, x.shape)
        # In range is what no clamp moved: at most half a step from its code's value, which in
        # floating point is a step of the largest codes.
        step = 1.0 if len(grid) == 2 else torch.finfo(grid[2]).eps * grid[1]
        inside = (value.float() - x.float()).abs() <= wide * (step * (0.5 + 2**-10))
        slope = (value.float() - x.float() * inside) / wide if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(inside, slope, scale)
        ctx.n_constants = 1 + len(grid)
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inside, slope, scale = ctx.saved_tensors
        of_scale = None
        if slope is not None:
            with torch.enable_grad():
                leaf = scale.detach().requires_grad_()
                wide = numerics.expand_blocks(leaf, slope.shape).expand(slope.shape)
            (of_scale,) = torch.autograd.grad(wide, leaf, grads[0].float() * slope)
        return grads[0] * inside, of_scale, *[None] * ctx.n_constants


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, *grid: Any) -> Tensor:
    """Return `x` rounded to codes and back, in its dtype; bit-equal to quantize and dequantize.

    Args:
        x: float, any shape.
        scale: fp32, > 0, one entry per block of `x`.
        zero_point: int32 in the shape of `scale`, or None for 0.
        grid: of the codes (`QuantSpec.grid`).
    """
    value: Tensor = _StraightThrough.apply(x, scale, zero_point, *grid)
    return value

"""The codes of a cache that is kept as int8.

    codes = clamp(round(x * (1 / scale)), -127, 127)
    x_hat = codes * scale

NaN and Inf, for which there is no code of a finite value, have one of their own, -128, and are read
as NaN.
"""

import torch
from torch import Tensor

from fxq import numerics

LIMIT = 127  # largest code of a finite value, and minus the smallest
NOT_FINITE = -128


def encode(x: Tensor, scale: Tensor) -> Tensor:
    """Return the codes of values: int8, `NOT_FINITE` for NaN and Inf.

    Args:
        x: values `[...]`, any float dtype.
        scale: fp32, broadcasts against `x`.
    """
    return torch.where(x.isfinite(), numerics.quantize(x, scale, None, -LIMIT, LIMIT), NOT_FINITE)


def decode(codes: Tensor, scale: Tensor) -> Tensor:
    """Return the values of codes, fp32.

    Args:
        codes: int8 `[...]`.
        scale: fp32, broadcasts against `codes`.
    """
    values = numerics.dequantize(codes, scale, None, torch.float32)
    return values.masked_fill(codes == NOT_FINITE, float("nan"))

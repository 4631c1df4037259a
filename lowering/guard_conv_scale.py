"""guard_conv_scale: which rows of a convolution's output hold NaN, told from its input.

A kernel that gives its output as codes has no values in which `fxq::guard_scale` could look for
NaN. Codes times scales are finite, so that an output is NaN just where it reads a row of the input
whose scale is.
"""

import math

from torch import Tensor

from fxq.lowering.int8_conv import output_sizes, reads_nan, spoiled
from fxq.lowering.registering import register


def guard_conv_scale(
    x_scale: Tensor,
    scale: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """Return `scale` for each row of a convolution's output, NaN for rows that hold NaN: what
    `fxq::guard_scale` returns for an output that exists only as codes.

    Args:
        x_scale: of the convolution's input, guarded.
        scale: of its output, one element.
        x: the input's codes; like `weight`, only its shape is read.
        weight: of the convolution.
        stride: of the convolution.
        padding: of the convolution.
        dilation: of the convolution.
        groups: of the convolution.
    Returns:
        `[B, N, ..., 1]`, fp32; `[B, 1, ..., 1]` without groups, where all channels read the same.
    """
    geometry = (stride, padding, dilation)
    rows = scale.new_full(_shape(x, weight, *geometry, groups), float(scale))
    if not math.isnan(float(x_scale.sum())):  # of numbers above 0
        return rows
    return spoiled(rows, reads_nan(x, x_scale, weight, *geometry, groups).any(-1, keepdim=True))


def _shape(
    x: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> tuple[int, ...]:
    channels = 1 if groups == 1 else weight.shape[0]
    return x.shape[0], channels, *output_sizes(x, weight, stride, padding, dilation)[:-1], 1


def _fake(
    scale: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    **_: object,
) -> Tensor:
    return scale.new_empty(_shape(x, weight, stride, padding, dilation, groups))


register(guard_conv_scale, guard_conv_scale, _fake)

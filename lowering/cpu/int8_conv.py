"""int8_conv on x86: oneDNN's u8 x s8 convolution, where it is exact.

What it adds in int16 with saturation on processors without VNNI was found by experiment, with
weights of two codes of 127 and activations of 255, for every pair of elements of a kernel:

- the products of input channels 2j and 2j+1 of a group, at the same position of the kernel, and no
  others: neither channels 2j+1 and 2j+2, nor neighbouring positions, nor an odd last channel with
  the first of the next position, because channels are padded to blocks of four;
- with any stride, padding and dilation, with one to three axes, few channels or many;
- nothing in depthwise convolutions, nor where groups have a number of channels that is no multiple
  of four: those run in plain code, a hundred times slower than fp32.

So pairs are those of a linear, at each position (`numerics.channel_pairs`), and a weight whose
pairs sum to at most 128 is multiplied exactly. Padding is with the zero-point, which makes it real
0. oneDNN sums in int32 and rounds to fp32 once, as the definition does.
"""

import torch
from torch import Tensor

from fxq.lowering.cpu.int8_linear import needs_no_excess, to_unsigned
from fxq.lowering.cpu.onednn import cpu_int8
from fxq.lowering.derived import derived
from fxq.numerics import SIGN

LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}  # by the number of all axes


def can_launch(x: Tensor, weight: Tensor) -> bool:
    """Tell whether this machine convolves with `weight` exactly and there is something to do."""
    if not x.numel() or x.device.type != "cpu" or not cpu_int8().convolves:
        return False
    return derived.get(weight, "needs_no_excess", needs_no_excess)


def launch(
    x: Tensor,
    x_scale: float,
    x_zero_point: int,
    weight: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """Return `conv(x - x_zero_point, weight) * (x_scale * w_scale) + bias` as fp32.

    Shapes as in `fxq.lowering.int8_conv`, but padding is one number per axis, of both its sides.
    """
    if x.ndim == 3:  # one axis is the second of two
        y = launch(
            x.unsqueeze(2), x_scale, x_zero_point, weight.unsqueeze(2), w_scale, bias,
            [1, *stride], [0, *padding], [1, *dilation], groups,
        )  # fmt: skip
        return y.squeeze(2)
    codes, zero = x, x_zero_point
    if x.dtype == torch.int8:
        codes, zero = to_unsigned(x), x_zero_point + SIGN
    n_out, geometry = len(weight), (stride, padding, dilation, groups)

    def pack(w: Tensor) -> tuple[Tensor, Tensor]:
        ones, shape = torch.ones(n_out), list(codes.shape)
        packed = torch.ops.onednn.qconv_prepack(w.contiguous(), ones, 1.0, zero, *geometry, shape)
        return packed, torch.zeros(n_out, dtype=torch.int32)

    packed, no_zero_points = derived.get(weight, f"onednn conv {geometry}", pack)
    scales = w_scale.reshape(-1).expand(n_out).contiguous()
    return torch.ops.onednn.qconv_pointwise(
        codes.contiguous(memory_format=LAYOUTS[x.ndim]), x_scale, zero, packed, scales,
        no_zero_points, None if bias is None else bias.float(), *geometry,
        1.0, 0, torch.float32, "none", [], "",
    )  # fmt: skip

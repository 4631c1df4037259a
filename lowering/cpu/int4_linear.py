"""int8_linear for weights of 4 bits on x86 without VNNI: `int4_linear.cpp`.

Where every |w| is at most 8, the products of 16 input channels fit int16 together, so they are
added there before they are widened: exact, and faster than oneDNN, which widens after two. Scales
and zero-points of rows, the scale of each output channel and the bias are applied to the integer
sums in the order of the definition, so results are bit-equal to it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fxq.lowering.cpu.native import address, native
from fxq.lowering.cpu.onednn import cpu_int8
from fxq.lowering.derived import derived
from fxq.lowering.kernels import buffers

LARGEST = 8  # |w| for which int16 holds 16 products with activations up to 255
PANEL = 16  # output channels
STEP = 4  # input channels of one instruction
RUN = 32  # input channels that are summed before sums are widened, twice 16
SIGN = 128  # int8 codes become uint8 by adding this to the codes and to their zero-point


def fits(weight: Tensor) -> bool:
    """Tell whether the kernel is for `weight` `[N, K]` on this processor. With VNNI it is for none:
    oneDNN multiplies any codes exactly there, and faster."""
    if not cpu_int8().saturates or weight.dtype != torch.int8 or not weight.numel():
        return False
    return bool((weight >= -LARGEST).all() and (weight <= LARGEST).all())


def takes(weight: Tensor) -> bool:
    """Tell whether the kernel multiplies with `weight` here; found out once for each."""
    return derived.get(
        weight,
        "int4_linear takes it",
        lambda w: fits(w) and not isinstance(native("int4_linear"), str),
    )


class Packed:
    """A weight in panels: `[P, K / 4, 16, 4]`, and the sums of its rows `[P * 16]`, int32."""

    def __init__(self, weight: Tensor) -> None:
        n_out, n_in = weight.shape
        padded = F.pad(weight, (0, -n_in % RUN, 0, -n_out % PANEL))
        panels = padded.unflatten(0, (-1, PANEL)).unflatten(2, (-1, STEP))
        self.codes = panels.transpose(1, 2).contiguous()
        self.row_sums = padded.sum(1, dtype=torch.int32)


def launch(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    weight: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Return `(x - x_zero_point) @ weight.T * (x_scale * w_scale) + bias` `[..., N]` as fp32, or
    the sums alone, as int32.

    Shapes as in `fxq.lowering.int8_linear`; `weight` is one that `takes` accepts.
    """
    kernel, n_out = native("int4_linear"), weight.shape[0]
    packed = derived.get(weight, "int4_linear", Packed)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    shift = SIGN if x.dtype == torch.int8 else 0
    zero = torch.zeros(1, dtype=torch.int32) if x_zero_point is None else x_zero_point
    zero, scale = _per_row(zero + shift, x), _per_row(x_scale, x)
    w_scales = _padded(w_scale.reshape(-1).expand(n_out))
    bias = None if bias is None else _padded(bias.float())
    out = buffers.allocate((*x.shape[:-1], n_out), out_dtype, x.device)
    whole = out_dtype == torch.int32
    kernel(
        address(rows), *rows.shape, shift != 0, address(packed.codes), address(packed.row_sums),
        address(scale), scale.numel() > 1, address(zero), zero.numel() > 1, address(w_scales),
        address(bias), None if whole else address(out), address(out) if whole else None, n_out,
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def _per_row(param: Tensor, x: Tensor) -> Tensor:
    """Return a scale or zero-point of `x` `[..., K]` as one element, or one per row of `x`."""
    if param.numel() == 1:
        return param.reshape(1)
    return param.expand(*x.shape[:-1], 1).reshape(-1).contiguous()


def _padded(channels: Tensor) -> Tensor:
    """Return one number per output channel with zeros for what is missing in the last panel."""
    return F.pad(channels, (0, -len(channels) % PANEL)).contiguous()

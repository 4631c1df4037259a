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


class Packed:
    """A weight in panels: `[P, K / 4, 16, 4]`, and the sums of its rows `[P * 16]`, int32."""

    def __init__(self, weight: Tensor) -> None:
        n_in = weight.shape[1]
        padded = F.pad(weight, (0, -n_in % RUN, 0, -len(weight) % PANEL))
        panels = padded.unflatten(0, (-1, PANEL)).unflatten(2, (-1, STEP))
        self.codes = panels.transpose(1, 2).contiguous()
        self.row_sums = padded.sum(1, dtype=torch.int32)


def packed(weight: Tensor) -> Packed | None:
    """Return a weight for `launch`, packed once; None where the kernel does not multiply with it
    here."""
    return derived.get(weight, "int4_linear", _packed)


def _packed(weight: Tensor) -> Packed | None:
    if not fits(weight) or isinstance(native("int4_linear"), str):
        return None
    return Packed(weight)


def launch(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    weight: Packed,
    w_scale: Tensor,
    bias: Tensor | None,
    n_out: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """Return `(x - x_zero_point) @ weight.T * (x_scale * w_scale) + bias` `[..., N]` as fp32, or
    the sums alone, as int32. Shapes as in `fxq.lowering.int8_linear`."""
    kernel = native("int4_linear")
    assert not isinstance(kernel, str)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    scale, w_scale = _per_row(x_scale, x), w_scale.reshape(-1).contiguous()
    zero = None if x_zero_point is None else _per_row(x_zero_point, x)
    bias = None if bias is None else bias.float().contiguous()
    out = buffers.allocate((*x.shape[:-1], n_out), out_dtype, x.device)
    whole = out_dtype == torch.int32
    kernel(
        address(rows), *rows.shape, SIGN if x.dtype == torch.int8 else 0,
        address(zero), zero is not None and zero.numel() > 1, address(scale), scale.numel() > 1,
        address(weight.codes), address(weight.row_sums), address(w_scale), w_scale.numel() > 1,
        address(bias), None if whole else address(out), address(out) if whole else None, n_out,
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def _per_row(param: Tensor, x: Tensor) -> Tensor:
    """Return a scale or zero-point of `x` `[..., K]` as one element, or one per row of `x`."""
    if param.numel() == 1:
        return param.reshape(1)
    return param.expand(*x.shape[:-1], 1).reshape(-1).contiguous()

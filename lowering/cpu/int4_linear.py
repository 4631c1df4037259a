"""int8_linear for weights of 4 bits on x86 without VNNI: `int4_linear.cpp`.

Where every |w| is at most 8, the products of 16 input channels fit int16 together, so they are
added there before they are widened: exact, and faster than oneDNN, which widens after two. Scales
and zero-points of rows, the scale of each output channel and the bias are applied to the integer
sums in the order of the definition, so results are bit-equal to it. With scales for groups of input
channels the integer sums of each group are exact, and their scaled values are added in fp32.
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


def fits(weight: Tensor, n_groups: int = 1) -> bool:
    """Tell whether the kernel is for `weight` `[N, K]` on this processor. With VNNI it is for none:
    oneDNN multiplies any codes exactly there, and faster.

    Args:
        weight: codes.
        n_groups: of neighbouring input channels that share a scale: of a multiple of 32.
    """
    if n_groups > 1 and weight.shape[1] % (n_groups * RUN):
        return False
    if not cpu_int8().saturates or weight.dtype != torch.int8 or not weight.numel():
        return False
    return bool((weight >= -LARGEST).all() and (weight <= LARGEST).all())


class Packed:
    """A weight in panels: `[P, K / 4, 16, 4]`, and the sums of its rows `[P, G, 16]`, int32."""

    def __init__(self, weight: Tensor, n_groups: int) -> None:
        n_in = weight.shape[1]
        padded = F.pad(weight, (0, -n_in % RUN, 0, -len(weight) % PANEL)).unflatten(0, (-1, PANEL))
        self.codes = padded.unflatten(2, (-1, STEP)).transpose(1, 2).contiguous()
        groups = padded.unflatten(2, (n_groups, -1))
        self.row_sums = groups.sum(3, dtype=torch.int32).mT.contiguous()


def packed(weight: Tensor, n_groups: int) -> Packed | None:
    """Return a weight for `launch`, packed once; None where the kernel does not multiply with it
    here.

    Args:
        weight: codes `[N, K]`.
        n_groups: of neighbouring input channels that share a scale.
    """

    def pack(weight: Tensor) -> Packed | None:
        if not fits(weight, n_groups) or isinstance(native("int4_linear"), str):
            return None
        return Packed(weight, n_groups)

    return derived.get(weight, f"int4_linear {n_groups}", pack)


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
    scale, w_scale, n_groups = _per_row(x_scale, x), w_scale.contiguous(), w_scale.shape[-1]
    zero = None if x_zero_point is None else _per_row(x_zero_point, x)
    bias = None if bias is None else bias.float().contiguous()
    out = buffers.allocate((*x.shape[:-1], n_out), out_dtype, x.device)
    whole = out_dtype == torch.int32
    kernel(
        address(rows), *rows.shape, SIGN if x.dtype == torch.int8 else 0,
        address(zero), zero is not None and zero.numel() > 1, address(scale), scale.numel() > 1,
        address(weight.codes), address(weight.row_sums), address(w_scale),
        n_groups if w_scale.numel() > n_groups else 0, n_groups,
        address(bias), None if whole else address(out), address(out) if whole else None, n_out,
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def _per_row(param: Tensor, x: Tensor) -> Tensor:
    """Return a scale or zero-point of `x` `[..., K]` as one element, or one per row of `x`."""
    if param.numel() == 1:
        return param.reshape(1)
    return param.expand(*x.shape[:-1], 1).reshape(-1).contiguous()

"""int8_linear on x86 without VNNI, whole, with its epilogue: `avx2_linear.cpp`.

Weights are those whose products the fast instruction adds without saturating: pair-safe ones
(`numerics.is_pair_safe`), and at nearly twice the speed those of 4 bits, every |w| at most 8, where
the products of 16 input channels fit int16 together. Integer sums are exact. Scales, zero-points
and bias are applied to them in the order of the definition, and so are residual and rounding to
codes: without an activation function results are bit-equal to the definition, with one within
fp32 rounding of it. With scales for groups of input channels the integer sums of each group are
exact, and their scaled values are added in fp32.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fxq.lowering.cpu.native import address, native
from fxq.lowering.cpu.onednn import cpu_int8
from fxq.lowering.derived import derived
from fxq.lowering.kernels import buffers
from fxq.numerics import SIGN, codes_dtype, is_pair_safe

LARGEST = 8  # |w| for which int16 holds 16 products with activations up to 255
PANEL = 16  # output channels
STEP = 4  # input channels of one instruction
TILE = 6  # rows that are multiplied together
RUN = 32  # input channels of one turn of the loop
# As `activation.h` numbers them.
ACTIVATIONS = ("none", "gelu", "gelu_tanh", "silu", "relu", "relu6", "hardswish")
WHOLE, REAL, CODES = range(3)  # results: int32, fp32, codes


def is_narrow(weight: Tensor) -> bool:
    """Tell whether every |w| of a weight is at most 8."""
    return bool((weight >= -LARGEST).all() and (weight <= LARGEST).all())


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
    return is_pair_safe(weight)


class Packed:
    """A weight in panels of 16 output channels, for `product.h`: what its `Weight` has, and the
    sums of its rows `[P, G, 16]`, int32."""

    def __init__(self, weight: Tensor, n_groups: int) -> None:
        self.n_out, n_in = weight.shape
        self.is_narrow = is_narrow(weight)
        padded = F.pad(weight, (0, -n_in % RUN, 0, -len(weight) % PANEL)).unflatten(0, (-1, PANEL))
        groups = padded.unflatten(2, (n_groups, -1))
        self.row_sums = groups.sum(3, dtype=torch.int32).mT.contiguous()
        self.codes = groups.unflatten(3, (-1, STEP)).movedim(1, 3).contiguous()  # [P, G, S, 16, 4]
        self.places: Tensor | None = None
        self.matched: Tensor | None = None
        if not self.is_narrow:
            order, self.matched = match_steps(self.codes)
            self.places = order * (TILE * STEP)
            steps = self.codes.flatten(0, 2)
            first = torch.arange(0, len(steps), order.shape[2]).view(*order.shape[:2], 1)
            self.codes = steps[(first + order).flatten()].view_as(self.codes)

    def addresses(self) -> tuple[int | None, ...]:
        """Return where the kernel finds it."""
        return tuple(map(address, (self.codes, self.places, self.matched, self.row_sums)))


def match_steps(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the order in which the steps of a weight are multiplied, and how many of the first
    ones are matched: two by two their products can be added in int16.

    Args:
        codes: pair-safe, `[P, G, S, 16, 4]` int8, contiguous.
    Returns:
        `[P, G, S]` and `[P, G]`, int32.
    """
    n_steps = codes.shape[2]
    order = torch.arange(n_steps, dtype=torch.int32).repeat(*codes.shape[:2], 1)
    matched = torch.zeros(codes.shape[:2], dtype=torch.int32)
    if not isinstance(match := native("match_steps"), str):  # else none are
        results = address(order), address(matched)
        match(address(codes), matched.numel(), n_steps, *results, torch.get_num_threads())
    return order, matched


def packed(weight: Tensor, n_groups: int) -> Packed | None:
    """Return a weight for `launch`, packed once; None where the kernel does not multiply with it
    here.

    Args:
        weight: codes `[N, K]`.
        n_groups: of neighbouring input channels that share a scale.
    """

    def pack(weight: Tensor) -> Packed | None:
        if not fits(weight, n_groups) or isinstance(native("avx2_linear"), str):
            return None
        return Packed(weight, n_groups)

    return derived.get(weight, f"avx2_linear {n_groups}", pack)


class Spread(NamedTuple):
    """A value for each row, each channel or all, and which."""

    values: Tensor | None = None
    row_step: int = 0
    channel_step: int = 0


def launch(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    weight: Packed,
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
    """Compute `fxq.lowering.int8_linear.reference`; arguments as there but for the packed weight.

    `out_scale` may have an entry for each row too, `[..., 1]`.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {ACTIVATIONS}, found {activation!r}")
    kernel = native("avx2_linear")
    assert not isinstance(kernel, str)
    kind = WHOLE if out_dtype == torch.int32 else REAL if out_scale is None else CODES
    dtype = (torch.int32, torch.float32, codes_dtype(quant_max))[kind]
    out = buffers.allocate((*x.shape[:-1], weight.n_out), dtype, x.device)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    scale, zero = _spread(x_scale, out), _spread(x_zero_point, out)
    w_scale, n_groups = w_scale.contiguous(), w_scale.shape[-1]
    bias = None if bias is None else bias.float().contiguous()
    if residual is not None:
        residual = residual.float().expand(out.shape).contiguous()
    if apart is not None and w_apart is not None:
        apart = apart.expand(*out.shape[:-1], -1).contiguous()
        w_apart = w_apart.contiguous()
    step, to_zero = _spread(out_scale, out), _spread(out_zero_point, out)
    kernel(
        address(rows), *rows.shape, SIGN if x.dtype == torch.int8 else 0,
        address(zero.values), zero.row_step, address(scale.values), scale.row_step,
        *weight.addresses(), address(w_scale),
        n_groups if w_scale.numel() > n_groups else 0, n_groups,
        address(bias), address(apart), address(w_apart), 0 if apart is None else apart.shape[-1],
        ACTIVATIONS.index(activation), address(residual),
        address(step.values), step.row_step, step.channel_step,
        address(to_zero.values), to_zero.row_step, to_zero.channel_step, quant_min, quant_max,
        address(out), kind, weight.n_out, torch.get_num_threads(),
    )  # fmt: skip
    return out if kind != REAL else out.to(out_dtype)


def _spread(param: Tensor | None, out: Tensor) -> Spread:
    """Return a scale or zero-point that broadcasts against `out` `[..., N]`, or has an axis more
    than its rows, as the kernel wants it."""
    if param is None:
        return Spread()
    if param.numel() == 1:
        return Spread(param.reshape(1))
    if param.shape[-1] != 1:
        return Spread(
            param.expand(*[1] * (out.ndim - 1), out.shape[-1]).reshape(-1).contiguous(),
            channel_step=1,
        )
    return Spread(param.expand(*out.shape[:-1], 1).reshape(-1).contiguous(), row_step=1)

"""weight_only_linear: float activations times a weight that stays codes in memory.

    weight = codes * scale + shift                        fp32, shift = -zero_point * scale
    y      = x @ weight.T + bias                          fp32

`reference` is the definition. On x86 the op is a kernel of fxq's own
(`fxq.lowering.cpu.weight_only_linear`), elsewhere the reference itself. Both sum in fp32, in orders
of their own.

Weights are packed by `pack` into panels of 16 output channels, zeros after the last. Within a panel
the codes of one input channel are neighbours; input channels are padded to a multiple of 8.

- 8 bits: `[P, ceil(K / 8) * 8, 16]`, a byte a code;
- 4 bits: `[P, ceil(K / 8), 16, 4]`, four bytes for 8 input channels of an output channel, the first
  in the lowest four bits of the first byte.

x `[..., K]` fp32; codes as above, uint8; factors fp32 `[P, G, 2, 16]`, scale and shift of G groups
of neighbouring input channels, or `[P, G, 1, 16]` without shift; bias `[N]` fp32.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fxq.lowering.cpu.native import native
from fxq.lowering.cpu.weight_only_linear import launch
from fxq.lowering.registering import register
from fxq.numerics import SIGN, expand_blocks

PANEL = 16  # output channels
STEP = 8  # input channels that a group's size is a multiple of
INT4 = (-8, 7)


class Packed(NamedTuple):
    """A weight for the op."""

    codes: Tensor
    factors: Tensor


def pack(codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Packed:
    """Pack a quantized weight, with 4 bits where all codes fit them and with 8 otherwise.

    Args:
        codes: `[N, K]`, int8 or uint8.
        scale: fp32, one entry per block of `codes`: `[N, G]`, or fewer rows.
        zero_point: int32 in the shape of `scale`, or None for 0.
    """
    (n_out, n_in), n_groups = codes.shape, scale.shape[1]
    scale = expand_blocks(scale, (n_out, n_groups)).expand(n_out, n_groups)
    zero = torch.zeros_like(scale) if zero_point is None else zero_point.float()
    zero = expand_blocks(zero, scale.shape).expand_as(scale)
    if codes.dtype == torch.uint8:
        codes, zero = (codes ^ SIGN).view(torch.int8), zero - SIGN
    shifts = [-zero * scale] if bool(zero.any()) else []
    factors = torch.stack([scale, *shifts], 1)  # [N, 1 or 2, G]
    rows, columns = -n_out % PANEL, -n_in % STEP
    factors = F.pad(factors, (0, 0, 0, 0, 0, rows)).unflatten(0, (-1, PANEL)).permute(0, 3, 2, 1)
    fits = bool(((codes >= INT4[0]) & (codes <= INT4[1])).all())
    padded = F.pad(codes, (0, columns, 0, rows)).unflatten(0, (-1, PANEL))  # [P, 16, K]
    if not fits:
        return Packed(padded.mT.contiguous().view(torch.uint8), factors.contiguous())
    pairs = padded.view(torch.uint8).unflatten(2, (-1, STEP // 2, 2)) & 0xF  # [P, 16, K/8, 4, 2]
    both = pairs[..., 0] | pairs[..., 1] << 4
    return Packed(both.transpose(1, 2).contiguous(), factors.contiguous())


def unpack(codes: Tensor, n_out: int, n_in: int) -> Tensor:
    """Return the codes `[N, K]`, int8, of a packed weight."""
    if bits_of(codes) == 8:
        return codes.view(torch.int8).mT.flatten(0, 1)[:n_out, :n_in]
    pairs = torch.stack([codes << 4, codes & 0xF0], -1).view(torch.int8) >> 4  # repeats the sign
    return pairs.flatten(3).transpose(1, 2).flatten(2).flatten(0, 1)[:n_out, :n_in]


def bits_of(codes: Tensor) -> int:
    """Return with how many bits codes are packed."""
    return 8 if codes.ndim == 3 else 4


def reference(x: Tensor, codes: Tensor, factors: Tensor, bias: Tensor | None, n_out: int) -> Tensor:
    """Compute the definition above on any device."""
    n_in, n_groups = x.shape[-1], factors.shape[1]
    weight = unpack(codes, n_out, n_in).float().unflatten(1, (n_groups, n_in // n_groups))
    rows = factors.permute(2, 0, 3, 1).flatten(1, 2)[:, :n_out, :, None]  # [1 or 2, N, G, 1]
    weight = weight * rows[0]
    if len(rows) > 1:
        weight = weight + rows[1]
    return F.linear(x, weight.flatten(1), bias)


def weight_only_linear(
    x: Tensor, codes: Tensor, factors: Tensor, bias: Tensor | None, n_out: int
) -> Tensor:
    """Compute `reference` with the fastest implementation for the device of `x`."""
    if x.device.type == "cpu" and not isinstance(native("weight_only_linear"), str):
        rows = math.prod(x.shape[:-1])
        y = launch(x.reshape(rows, x.shape[-1]), codes, factors, bias, n_out, bits_of(codes))
        return y.reshape(*x.shape[:-1], n_out)
    return reference(x, codes, factors, bias, n_out)


def _fake(x: Tensor, n_out: int, **_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], n_out))


register(reference, weight_only_linear, _fake)

"""int8_linear on x86: oneDNN's u8 x s8 product, made exact on processors without VNNI.

Without VNNI oneDNN uses `vpmaddubsw`, which adds the products of input channels 2j and 2j+1 in
int16 with saturation. That is a
property of the weight: where every pair of codes sums to at most 128 in magnitude
(`numerics.is_pair_safe`) nothing can saturate, because 255 * 128 < 2^15. Any other weight is split
into a pair-safe part and the sparse excess (about 1 % of a Gaussian weight),

    x @ W.T = x @ safe.T + x @ excess.T,

both exact in fp32 as long as their sums stay below 2^24.
"""

import warnings

import torch
from torch import Tensor

from fxq.lowering.derived import derived
from fxq.lowering.device import cpu_int8, onednn_qlinear
from fxq.numerics import PAIR_LIMIT, is_pair_safe

SIGN = 128  # int8 codes become uint8 by adding this to the codes and to their zero-point


def split_pairs(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Split codes into a pair-safe part and what exceeds it: `weight == safe + excess`.

    The excess of a pair sits on its larger member, so that it has one non-zero per unsafe pair.

    Args:
        weight: `[N, K]`, int8.
    Returns:
        safe `[N, K]` int8, excess `[N, K]` int8.
    """
    n_columns = weight.shape[1]
    pairs = torch.nn.functional.pad(weight, (0, n_columns % 2)).unflatten(1, (-1, 2)).int()
    total = pairs.sum(-1)  # [N, K/2]
    over = torch.sign(total) * (total.abs() - PAIR_LIMIT).clamp(min=0)
    first = pairs[..., 0].abs() >= pairs[..., 1].abs()
    excess = torch.stack([torch.where(first, over, 0), torch.where(first, 0, over)], -1)
    excess = excess.flatten(1)[:, :n_columns].to(torch.int8)
    return weight - excess, excess


class PackedWeight:
    """A weight in oneDNN's layout, with the excess of its unsafe pairs where this CPU saturates."""

    def __init__(self, weight: Tensor, n_rows: int) -> None:
        self.excess: Tensor | None = None
        if cpu_int8().saturates and not is_pair_safe(weight):
            weight, excess = split_pairs(weight)
            with warnings.catch_warnings():  # torch announces that CSR is in beta
                warnings.simplefilter("ignore")
                self.excess = excess.float().to_sparse_csr()
        self.codes = torch.ops.onednn.qlinear_prepack(
            weight.contiguous(), [n_rows, weight.shape[1]]
        )
        self.ones = torch.ones(weight.shape[0])
        self.no_zero_points = torch.zeros(weight.shape[0], dtype=torch.int32)


def accumulators(codes: Tensor, zero_point: int, packed: PackedWeight) -> Tensor:
    """Return `(codes - zero_point) @ weight.T` `[M, N]` as fp32 for uint8 codes `[M, K]`."""
    total = onednn_qlinear(codes, zero_point, packed.codes, packed.ones)
    if packed.excess is not None:
        centred = codes.float().sub_(zero_point)  # [M, K]
        total += (packed.excess @ centred.mT).mT
    return total


def launch(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    weight: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """Return `(x - x_zero_point) @ weight.T * (x_scale * w_scale) + bias` as fp32 `[..., N]`.

    Shapes as in `fxq.lowering.int8_linear`. With one scale for all of x everything happens inside
    oneDNN; a scale per token is applied to the accumulators.
    """
    codes = x.flatten(0, -2) if x.dtype == torch.uint8 else to_unsigned(x.flatten(0, -2))
    shift = 0 if x.dtype == torch.uint8 else SIGN
    packed = derived.get(weight, "onednn", lambda w: PackedWeight(w, codes.shape[0]))
    per_tensor_zero = x_zero_point is None or x_zero_point.numel() == 1
    zero = (0 if x_zero_point is None else int(x_zero_point)) + shift if per_tensor_zero else SIGN
    n_out = weight.shape[0]
    if x_scale.numel() == 1 and per_tensor_zero and packed.excess is None:
        w_scales = w_scale.reshape(-1).expand(n_out).contiguous()
        y = torch.ops.onednn.qlinear_pointwise(
            codes.contiguous(), float(x_scale), zero, packed.codes, w_scales, packed.no_zero_points,
            None if bias is None else bias.float(), 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        return y.reshape(*x.shape[:-1], n_out)
    y = accumulators(codes.contiguous(), zero, packed).reshape(*x.shape[:-1], n_out)
    if not per_tensor_zero:
        row_sums = derived.get(weight, "row_sums", lambda w: w.sum(1, dtype=torch.int32).float())
        y = y - (x_zero_point + (shift - SIGN)) * row_sums  # type: ignore[operator]
    y = y * (x_scale * w_scale.mT)
    return y if bias is None else y + bias.float()


def to_unsigned(codes: Tensor) -> Tensor:
    """Return int8 codes plus 128 as uint8."""
    return codes.view(torch.uint8) ^ SIGN

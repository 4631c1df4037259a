"""int8_linear on x86: oneDNN's u8 x s8 product, made exact on processors without VNNI.

Without VNNI oneDNN uses `vpmaddubsw`, which adds the products of input channels 2j and 2j+1 in
int16 with saturation. Whether it can saturate is a property of the weight: where every pair of
codes sums to at most 128 in magnitude (`numerics.is_pair_safe`) it cannot, because 255 * 128 <
2^15. Any other weight is split into a pair-safe part and the sparse excess (about 1 % of a Gaussian
weight),

    x @ W.T = x @ safe.T + x @ excess.T.

oneDNN sums in int32 and rounds to fp32 once, as the definition does. Where several such results
are summed, each must be exact: columns are split into parts whose sums stay below 2^24, by a bound
that the weight's codes prove (`numerics.largest_sum`), and the parts are summed in int32.
"""

import math
import warnings

import torch
from torch import Tensor

from fxq.lowering.cpu.onednn import cpu_int8, onednn_qlinear
from fxq.lowering.derived import derived
from fxq.numerics import EXACT_IN_FP32, PAIR_LIMIT, SIGN, is_pair_safe, largest_sum

ALIGN = 64  # columns of a part: what oneDNN's tiles hold


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


def needs_no_excess(weight: Tensor) -> bool:
    """Tell whether this CPU multiplies with `weight` `[N, K]` exactly as it is."""
    return not cpu_int8().saturates or is_pair_safe(weight)


class PackedWeight:
    """A weight in oneDNN's layout, with the excess of its unsafe pairs where this CPU saturates."""

    def __init__(self, weight: Tensor, n_rows: int) -> None:
        self.excess: Tensor | None = None
        if not needs_no_excess(weight):
            weight, excess = split_pairs(weight)
            with warnings.catch_warnings():  # torch announces that CSR is in beta
                warnings.simplefilter("ignore")
                self.excess = excess.float().to_sparse_csr()
        self.codes = torch.ops.onednn.qlinear_prepack(
            weight.contiguous(), [n_rows, weight.shape[1]]
        )
        self.ones = torch.ones(weight.shape[0])
        self.no_zero_points = torch.zeros(weight.shape[0], dtype=torch.int32)

    def product(self, codes: Tensor, zero_point: int) -> Tensor:
        """Return `(codes - zero_point) @ weight.T` `[M, N]` as fp32 for uint8 codes `[M, K]`."""
        total = onednn_qlinear(codes.contiguous(), zero_point, self.codes, self.ones)
        if self.excess is not None:
            centred = codes.float().sub_(zero_point)  # [M, K]
            total += (self.excess @ centred.mT).mT
        return total


def exact_columns(weight: Tensor) -> int:
    """Return how many columns of `weight` `[N, K]` to sum at a time, so that every sum is exact in
    fp32: all K where that is enough."""
    n_columns = weight.shape[1]
    n_parts = 1
    while True:
        width = math.ceil(n_columns / n_parts / ALIGN) * ALIGN
        if all(largest_sum(part) < EXACT_IN_FP32 for part in weight.split(width, 1)):
            return min(width, n_columns)
        n_parts += 1


class Parts:
    """A weight in parts of its columns whose products are exact in fp32."""

    def __init__(self, weight: Tensor, n_rows: int) -> None:
        self.width = exact_columns(weight)
        self.weights = [PackedWeight(part, n_rows) for part in weight.split(self.width, 1)]

    def product(self, codes: Tensor, zero_point: int) -> Tensor:
        """Return `(codes - zero_point) @ weight.T` `[M, N]` for uint8 codes `[M, K]`: exact, as
        fp32 where one part is enough, else as int32."""
        products = (
            packed.product(part, zero_point)
            for packed, part in zip(self.weights, codes.split(self.width, 1), strict=True)
        )
        total = next(products)
        if len(self.weights) > 1:
            total = total.to(torch.int32)
        for product in products:
            total += product.to(torch.int32)
        return total


def accumulators(x: Tensor, x_zero_point: Tensor | None, weight: Tensor) -> Tensor:
    """Return `(x - x_zero_point) @ weight.T` `[..., N]`, exact, as fp32 or int32: whichever holds
    it. Shapes as in `fxq.lowering.int8_linear`."""
    codes, zero, left = _unsigned(x, x_zero_point)
    parts = derived.get(weight, "onednn parts", lambda w: Parts(w, codes.shape[0]))
    y = parts.product(codes, zero).reshape(*x.shape[:-1], weight.shape[0])
    if left is not None:
        y = y - left * derived.get(weight, "row_sums", lambda w: w.sum(1, dtype=torch.int32))
    return y


def _unsigned(x: Tensor, x_zero_point: Tensor | None) -> tuple[Tensor, int, Tensor | None]:
    """Return x as uint8 codes `[M, K]`, the zero-point that oneDNN subtracts, and what is left to
    subtract of zero-points that differ from row to row."""
    shift = 0 if x.dtype == torch.uint8 else SIGN
    rows = x.reshape(-1, x.shape[-1])  # a single vector is one row
    codes = rows if x.dtype == torch.uint8 else to_unsigned(rows)
    if x_zero_point is None or x_zero_point.numel() == 1:
        return codes, (0 if x_zero_point is None else int(x_zero_point)) + shift, None
    return codes, SIGN, x_zero_point + (shift - SIGN)


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
    single = x_scale.numel() == 1 and (x_zero_point is None or x_zero_point.numel() == 1)
    if single and derived.get(weight, "needs_no_excess", needs_no_excess):
        codes, zero, _ = _unsigned(x, x_zero_point)
        packed = derived.get(weight, "onednn", lambda w: PackedWeight(w, codes.shape[0]))
        n_out = weight.shape[0]
        w_scales = w_scale.reshape(-1).expand(n_out).contiguous()
        y = torch.ops.onednn.qlinear_pointwise(
            codes.contiguous(), float(x_scale), zero, packed.codes, w_scales, packed.no_zero_points,
            None if bias is None else bias.float(), 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        return y.reshape(*x.shape[:-1], n_out)
    y = accumulators(x, x_zero_point, weight).float()
    y = (y * (x_scale * w_scale.mT)).reshape(y.shape)  # scales of a vector have an axis more
    return y if bias is None else y + bias.float()


def to_unsigned(codes: Tensor) -> Tensor:
    """Return int8 codes plus 128 as uint8."""
    return codes.view(torch.uint8) ^ SIGN

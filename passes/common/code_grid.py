"""The codes of a weight while a method chooses them, column by column, and their refinement.

refine   each group's scale, then each column's codes, at their best given all others; the
         output error `tr((W - Q) G (W - Q)^T)` never rises
"""

import torch
from torch import Tensor

from fxq import numerics
from fxq.passes.common.convert import quantize_weight
from fxq.spec import QuantSpec


class Grid:
    """The codes of a weight, column by column.

    Args:
        spec: how it is quantized.
        mask: False where the code is that of 0.
        codes: in the weight's shape; to be overwritten, like the others.
        scale: of the weight as it is at first.
        zero: likewise, None for 0.
    """

    def __init__(
        self, spec: QuantSpec, mask: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None
    ) -> None:
        self.spec, self.mask, self.codes, self.scale, self.zero = spec, mask, codes, scale, zero
        self.done = [False] * codes.shape[1]

    def find_range(self, work: Tensor, column: int, width: int) -> None:
        """Give a group of columns the range of what is in them now."""
        now = (work * self.mask)[:, column : column + width].float()
        _, scale, zero = quantize_weight(now, self.spec)
        place = column // width
        self.scale[:, place] = scale[:, 0]
        if self.zero is not None and zero is not None:
            self.zero[:, place] = zero[:, 0]

    def fix(self, values: Tensor, column: int) -> Tensor:
        """Set the codes of a column, and return what they stand for `[N]`, fp64."""
        place = column * self.scale.shape[1] // self.codes.shape[1]
        scale = self.scale[:, place]
        zero = None if self.zero is None else self.zero[:, place]
        kept = torch.where(self.mask[:, column], values, 0.0)
        codes = numerics.quantize(kept, scale, zero, *self.spec.grid)
        partner = column ^ 1
        if self.spec.pair_safe and partner < len(self.done) and self.done[partner]:
            other = self.codes[:, partner].int()
            limit = numerics.PAIR_LIMIT
            codes = codes.int().clamp(-limit - other, limit - other).to(codes.dtype)
        self.codes[:, column], self.done[column] = codes, True
        return numerics.dequantize(codes, scale, zero, torch.float64)

    def values(self, columns: slice) -> Tensor:
        """Return what the codes of columns of one group stand for `[N, columns]`, fp64."""
        place = columns.start * self.scale.shape[1] // self.codes.shape[1]
        part = slice(place, place + 1)
        zero = None if self.zero is None else self.zero[:, part]
        return numerics.dequantize(self.codes[:, columns], self.scale[:, part], zero, torch.float64)


def refine(grid: Grid, weight: Tensor, moments: Tensor, rounds: int) -> None:
    """Lower a weight's output error by coordinate descent.

    Args:
        grid: codes and scales, to be changed.
        weight: what they are to stand for `[N, K]`, fp64.
        moments: G `[K, K]`, fp64, with a positive diagonal.
        rounds: over all groups.
    """
    width = weight.shape[1] // grid.scale.shape[1]
    groups = [slice(start, start + width) for start in range(0, weight.shape[1], width)]
    values = torch.cat([grid.values(group) for group in groups], 1)
    slope = (weight - values) @ moments  # minus half the gradient  [N, K]
    for group in groups * rounds:
        before = values[:, group].clone()
        _take_best_scale(grid, slope, moments, group)
        values[:, group] = grid.values(group)
        slope -= (values[:, group] - before) @ moments[group]
        for j in range(group.start, group.stop):
            best = grid.fix(values[:, j] + slope[:, j] / moments[j, j], j)
            slope -= torch.outer(best - values[:, j], moments[j])
            values[:, j] = best


def _take_best_scale(grid: Grid, slope: Tensor, moments: Tensor, group: slice) -> None:
    """Give a group the scale with the least error; it stays where that is not above 0."""
    place = group.start * grid.scale.shape[1] // len(moments)
    scale = grid.scale[:, place].double()
    unit = grid.values(group) / scale[:, None]
    gain = (unit * slope[:, group]).reshape(len(scale), -1).sum(1)  # of all rows with one scale
    curvature = ((unit @ moments[group, group]) * unit).reshape(len(scale), -1).sum(1)
    best = scale + gain / curvature
    grid.scale[:, place] = torch.where((curvature > 0) & (best > 0), best, scale).float()

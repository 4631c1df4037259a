"""SparseGPT: weights go by what it costs the output, and those that stay make up for it
(arXiv:2301.00774).

A column's weight costs `w_j^2 / U_jj^2`, U the upper Cholesky factor of the inverse second moments.
Which go is chosen for a block of columns, or for the neighbours of an N:M pattern, when the sweep
comes to them.

Departures: dead inputs cost nothing, but their weights are not set to zero beyond the pattern;
damping goes by the inputs that live; a block's share of the weights that go is rounded so that the
total is exact.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fxq.passes.common.column_sweep import sweep_columns
from fxq.passes.common.second_moments import inverse_factor
from fxq.passes.pruning.patterns import Group, Pattern, keep_all_but
from fxq.passes.pruning.prune import Prune


@dataclass(frozen=True)
class SparseGPT(Prune):
    """Prune and make up for it.

    Args:
        pattern: `Unstructured` counts within a block of columns: of each row, or of all rows.
        damping: added to the diagonal, as a share of its mean.
        columns: in a block.
    """

    damping: float = 0.01  # as the paper's code
    columns: int = 128  # the paper's mask-selection block size

    def scores(self, weight: Tensor, moments: Tensor) -> Tensor:
        """Return the root of what it costs to prune each weight alone, later columns making up for
        it; `moments` are the sum of `x x^T` `[K, K]`."""
        return weight.abs() * _price(*inverse_factor(moments, self.damping)).sqrt()

    def prune(
        self, weight: Tensor, moments: Tensor, pattern: Pattern, factor: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Prune a weight; `moments` are the sum of `x x^T` `[K, K]`. Costs are multiplied by the
        square of `factor`."""
        inverse, dead = inverse_factor(moments, self.damping)
        price = _price(inverse, dead) * (1.0 if factor is None else factor**2)
        mask = torch.ones_like(weight, dtype=torch.bool)
        size = pattern.size if isinstance(pattern, Group) else self.columns
        block = -(-self.columns // size) * size

        def fix(work: Tensor, column: int, end: int) -> Tensor:
            if column % size == 0:
                some = slice(column, min(column + size, end))
                mask[:, some] = _keep(work[:, some] ** 2 * price[some], pattern, column, weight)
            return torch.where(mask[:, column], work[:, column], 0.0)

        return sweep_columns(weight.double(), inverse, block, fix).float(), mask


def _price(inverse: Tensor, dead: Tensor) -> Tensor:
    return torch.where(dead, 0.0, inverse.diagonal() ** -2)  # eq. (5)


def _keep(cost: Tensor, pattern: Pattern, start: int, weight: Tensor) -> Tensor:
    """Return which of some columns stay, so that all columns up to them have the exact count."""
    if isinstance(pattern, Group):
        return pattern.keep(cost)
    unit = 1 if pattern.per == "row" else len(weight)
    before, after = (pattern.removed(unit * c) for c in (start, start + cost.shape[1]))
    rows = cost if pattern.per == "row" else cost.flatten()[None]
    return keep_all_but(rows, after - before).reshape(cost.shape)

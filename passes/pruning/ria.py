"""RIA: weights go by their share of their row and column, times their input (arXiv:2402.04997).

Departure: the paper's permutation of channels for N:M patterns is not part of this pass.
"""

from dataclasses import dataclass

from torch import Tensor

from fxq.passes.common.second_moments import energy
from fxq.passes.pruning.prune import Prune


@dataclass(frozen=True)
class RIA(Prune):
    """Prune by `(|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) * ||X_j||^power`.

    Args:
        power: of the input's norm.
    """

    power: float = 0.5  # the paper's choice

    def moments(self, x: Tensor) -> Tensor:
        """Return what is summed over batches."""
        return energy(x)

    def of_gram(self, moments: Tensor) -> Tensor:
        """Return `||X_j||^2` `[K]`."""
        return moments.diagonal()

    def scores(self, weight: Tensor, moments: Tensor) -> Tensor:
        """Return the importance of each weight; `moments` are `||X_j||^2` `[K]`."""
        size = weight.double().abs()
        columns, rows = (size / _or_one(size.sum(dim, keepdim=True)) for dim in (0, 1))
        return (columns + rows) * moments.sqrt() ** self.power  # eq. (3), (4)


def _or_one(total: Tensor) -> Tensor:
    """Return sums; 1 for those of zeros alone, whose shares are 0."""
    return total.where(total > 0, 1.0)

"""Wanda: weights go by their magnitude times that of their input (arXiv:2306.11695)."""

from dataclasses import dataclass

from torch import Tensor

from fxq.passes.common.second_moments import energy
from fxq.passes.pruning.prune import Prune


@dataclass(frozen=True)
class Wanda(Prune):
    """Prune by `|W_ij| * ||X_j||`, compared within a row, as the default pattern has it."""

    def moments(self, x: Tensor) -> Tensor:
        """Return what is summed over batches."""
        return energy(x)

    def of_gram(self, moments: Tensor) -> Tensor:
        """Return `||X_j||^2` `[K]`."""
        return moments.diagonal()

    def scores(self, weight: Tensor, moments: Tensor) -> Tensor:
        """Return the importance of each weight; `moments` are `||X_j||^2` `[K]`."""
        return weight.abs() * moments.sqrt()  # eq. (1)

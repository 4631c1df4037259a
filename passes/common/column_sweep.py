"""The column sweep of optimal brain surgery: fix a weight column by column, and let the columns
that are still free make up for it.

    error_j  = (w_j - fixed_j) / U_jj
    w_k     -= error_j U_jk          for all k > j          (arXiv:2210.17323 eq. 2, 3)

with U the upper Cholesky factor of the inverse second moments, whose row j is that of the inverse
for columns j, j + 1, ... alone. Updates beyond a block of columns are made at its end, in one
product; the result is the same.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def sweep_columns(
    weight: Tensor, factor: Tensor, block: int, fix: Callable[[Tensor, int, int], Tensor]
) -> Tensor:
    """Return the weight whose columns are fixed from first to last.

    Args:
        weight: `[N, K]`, fp64; it is not modified.
        factor: U `[K, K]`, fp64.
        block: columns between products.
        fix: given the weight as it is now, a column's index and where its block ends, returns the
            column's final values `[N]`. Columns of the block are up to date, later ones are not.
    """
    work, result = weight.clone(), torch.empty_like(weight)
    for start in range(0, weight.shape[1], block):
        end = min(start + block, weight.shape[1])
        errors = weight.new_zeros(len(weight), end - start)
        for j in range(start, end):
            result[:, j] = fix(work, j, end)
            error = (work[:, j] - result[:, j]) / factor[j, j]
            work[:, j + 1 : end] -= error[:, None] * factor[j, j + 1 : end]
            errors[:, j - start] = error
        work[:, end:] -= errors @ factor[start:end, end:]
    return result

"""Second moments of what layers are given: what pruning and rounding along the data go by.

    G = sum over rows of x x^T          `gram`
    diag(G)                             `energy`

In float64: products of float32 numbers are exact in it, sums to 1e-16, so batches and processes may
come in any order. Sums, not means: every method here gives the same for a multiple of G.
"""

import torch
from torch import Tensor


def gram(x: Tensor) -> Tensor:
    """Return the sum of `x x^T` over rows `[K, K]`, fp64.

    Args:
        x: what a linear is given `[..., K]`, any float dtype.
    """
    rows = x.detach().flatten(0, -2).double()
    return rows.T @ rows


def energy(x: Tensor) -> Tensor:
    """Return the sum of squares over rows `[K]`, fp64; arguments as for `gram`."""
    return x.detach().flatten(0, -2).double().square().sum(0)


def output_error(change: Tensor, moments: Tensor) -> float:
    """Return the squared error of a layer's outputs over all rows, `tr(change G change^T)`.

    Args:
        change: of its weight `[N, K]`.
        moments: of its input `[K, K]`, fp64.
    """
    change = change.double()
    return float(((change @ moments) * change).sum())


def inverse_factor(moments: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Return the upper U with `U^T U = (G + damping mean(diag G) I)^-1`, and which inputs are dead.

    A dead input, always 0, neither changes the output nor takes part: its row and column of U are
    those of the identity.

    Args:
        moments: `[K, K]`, fp64.
        damping: share of the mean over live inputs, >= 0.
    Returns:
        `[K, K]`, fp64; `[K]`, bool.
    Raises:
        ValueError: the damped matrix is not positive definite.
    """
    diagonal = moments.diagonal()
    dead = diagonal == 0
    mean = diagonal.sum() / max(1, int((~dead).sum()))
    damped = moments + torch.diag(torch.where(dead, 1.0, damping * mean))
    factor, info = torch.linalg.cholesky_ex(damped)
    if int(info) or not bool(factor.isfinite().all()):
        raise ValueError(
            f"expected positive definite second moments, found singular ones with damping="
            f"{damping}; use a larger one, or more data"
        )
    return torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True), dead

"""Second moments of what layers are given: what pruning and rounding along the data go by.

    G = sum over rows of x x^T          `gram`
    diag(G)                             `energy`
    sum over rows of y (y, x)^T         `cross_gram`

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


def cross_gram(x: Tensor) -> Tensor:
    """Return the sum of `y (y, x)^T` over rows `[K, 2 K]`, fp64.

    Args:
        x: two inputs of a linear side by side, y and x `[..., 2 K]`, any float dtype.
    """
    rows = x.detach().flatten(0, -2).double()
    return rows[:, : rows.shape[1] // 2].T @ rows


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


def damped(moments: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Return `G + damping mean(diag G) I`, 1 on the diagonal of dead inputs, and which are dead;
    arguments as for `inverse_factor`."""
    diagonal = moments.diagonal()
    dead = diagonal == 0
    mean = diagonal.sum() / max(1, int((~dead).sum()))
    return moments + torch.diag(torch.where(dead, 1.0, damping * mean)), dead


def fitted(weight: Tensor, own: Tensor, cross: Tensor, damping: float) -> Tensor:
    """Return the weight that gives, for inputs y, most nearly what `weight` gives for inputs x
    `[N, K]`: `W + W E[(x - y) y^T] (E[y y^T] + damping)^-1`, damped towards the weight itself.

    Args:
        weight: W `[N, K]`.
        own: sum of `y y^T` `[K, K]`, fp64.
        cross: sum of `y x^T` `[K, K]`, fp64.
        damping: as for `inverse_factor`.
    """
    factor, _ = inverse_factor(own, damping)
    change = weight.double() @ (cross - own).T @ factor.T @ factor
    return (weight + change).to(weight.dtype)


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
    safe, dead = damped(moments, damping)
    factor, info = torch.linalg.cholesky_ex(safe)
    if int(info) or not bool(factor.isfinite().all()):
        raise ValueError(
            f"expected positive definite second moments, found singular ones with damping="
            f"{damping}; use a larger one, or more data"
        )
    return torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True), dead

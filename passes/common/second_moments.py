"""Second moments of what layers are given: what pruning and rounding along the data go by.

    G = sum over rows of x x^T          `gram`
    diag(G)                             `energy`
    sum over half the rows of y (y, x)^T, and over the others    `cross_gram`

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
    """Return the sum of `y (y, x)^T` over the first half of the rows and the second `[2, K, 2 K]`,
    fp64.

    Args:
        x: two inputs of a linear side by side, y and x `[..., 2 K]`, any float dtype.
    """
    rows = x.detach().flatten(0, -2).double()
    parts = rows.split([len(rows) // 2, len(rows) - len(rows) // 2])
    return torch.stack([part[:, : part.shape[1] // 2].T @ part for part in parts])


def alike(x: Tensor, width: int) -> Tensor:
    """Return rows over the root mean square of their first `width` values, fp64; rows of zeros
    stay. In sums of them no row outweighs others by its size."""
    rows = x.detach().double()
    size = rows[..., :width].square().mean(-1, keepdim=True).sqrt()
    return rows / torch.where(size > 0, size, 1.0)


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


def fitted(weight: Tensor, halves: Tensor, damping: float) -> Tensor:
    """Return the weight that gives, for inputs y, most nearly what `weight` gives for inputs x
    `[N, K]`, as far as the rows bear it out.

    Least squares say `W + D` with `D = W E[(x - y) y^T] (E[y y^T] + damping)^-1`, which learns the
    noise of few rows too. So it is `W + share D`, with the share that is best for D of one half of
    the rows on the other half, 0 to 1.

    Args:
        weight: W `[N, K]`.
        halves: as `cross_gram` gives them `[2, K, 2 K]`, fp64.
        damping: as for `inverse_factor`.
    """
    changes = [_least_squares(weight.double(), half, damping) for half in (*halves, halves.sum(0))]
    gain, curvature = 0.0, torch.finfo(torch.float64).tiny
    for change, (own, cross) in zip(changes[1::-1], map(_split, halves), strict=True):
        gain += float((change * (weight.double() @ (cross - own).T)).sum())
        curvature += output_error(change, own)
    share = min(1.0, max(0.0, gain / curvature))
    return (weight + share * changes[2]).to(weight.dtype)


def _least_squares(weight: Tensor, moments: Tensor, damping: float) -> Tensor:
    own, cross = _split(moments)
    factor, _ = inverse_factor(own, damping)
    return weight @ (cross - own).T @ factor.T @ factor


def _split(moments: Tensor) -> tuple[Tensor, Tensor]:
    own, cross = moments.split(len(moments), 1)
    return own, cross


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

"""The equations of Sparsity Induction (arXiv:2602.21652), one function each.

Letters: W a weight `[N, K]`, u the log of a factor per input channel, s = exp(u), M a mask, H the
second moments of the input. Everything is float64.
"""

import torch
from torch import Tensor

from fxq.layer import Concentration

TINY = torch.finfo(torch.float64).tiny
EPSILON = 1e-6  # of a channel's spread, relative to the mean of all: it keeps factors above 0


def spread_start(median: Tensor, mean: Tensor) -> Tensor:
    """Return what the paper starts its factors from, `(median - mean)^2` `[K]`, >= 0.

    0 for a channel whose values lie symmetric, which no factor can be: see `log_factor`.

    Source: eq. (5), with the identity for g and the channels of the layer's input, which eq. (3)
    needs; the text has those of its output.
    """
    return (median - mean).square()  # eq. (5)


def log_factor(values: Tensor, power: float = 1.0) -> Tensor:
    """Return logs of factors in the order of some values, with a sum of 0 `[K]`.

    Args:
        values: `[K]`, >= 0; zeros become small positive numbers.
        power: of the values.
    """
    logs = (values + EPSILON * values.mean() + TINY).log()
    return power * (logs - logs.mean())


def bounded(u: Tensor, bound: float) -> Tensor:
    """Return the nearest logs of factors with a sum of 0 and magnitudes of at most `bound`.

    A factor that all channels share changes nothing; the sum says which of those is meant. Nearest
    are `clamp(u - c)` for one c, which is found by taking means until the sum is 0.

    Args:
        u: `[K]`.
        bound: > 0.
    """
    result = u
    for _ in range(100):  # one, where nothing meets the bound
        u = u - result.mean()
        result = u.clamp(-bound, bound)
        if abs(float(result.mean())) < 1e-14:
            break
    return result


def centred(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Return the second moments of `x - mean` `[K, K]`, and the mean `[K]`.

    The mean is the shift that leaves the least error for any mask: `E |R (x - d)|^2` has its
    minimum over d there.

    Args:
        moments: sum of `z z^T` for `z = (x, 1)` `[K + 1, K + 1]`.
    """
    mean = moments[:-1, -1] / moments[-1, -1]
    return moments[:-1, :-1] - moments[-1, -1] * torch.outer(mean, mean), mean


def absorbed_shift(weight: Tensor, pruned: Tensor, shift: Tensor) -> Tensor:
    """Return what a shift adds to the bias of a pruned layer, `(W - W') d` `[N]`.

    `W' (x - d) + W d + b  =  W' x + (b + (W - W') d)`, the layer of eq. (3) with its weight pruned:
    nothing in front of the layer has to take the shift.
    """
    return (weight - pruned) @ shift


def boundary(log_scores: Tensor, stays: Tensor, goes: Tensor) -> Tensor:
    """Return the middle between what just stays and what just goes `[..., 1]`, not finite where
    nothing stays or nothing goes.

    Args:
        log_scores: `[..., S]`, compared along the last dimension.
        stays: which do `[..., S]`, bool; what neither stays nor goes is padding.
        goes: likewise.
    """
    least = torch.where(stays, log_scores, torch.inf).amin(-1, keepdim=True)
    most = torch.where(goes, log_scores, -torch.inf).amax(-1, keepdim=True)
    return (least + most) / 2


def mask_slope(distance: Tensor, temperature: float) -> Tensor:
    """Return the derivative that a mask is given by its log score, a sigmoid's in its place.

    Args:
        distance: log score less the boundary; 0 where it is not finite, so that nothing is learned.
        temperature: slope of the sigmoid's argument.
    """
    soft = torch.sigmoid(temperature * distance)
    slope = temperature * soft * (1 - soft)
    return torch.where(distance.isfinite(), slope, 0.0)


def power_iteration(weight: Tensor, vector: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Return the largest singular value and its right vector `[K]`.

    Args:
        weight: `[N, K]`; of zeros alone it has 0, and the right vector stays.
        vector: where to start, of length 1 `[K]`.
        steps: products with `W^T W`.
    """
    for _ in range(steps):
        moved = weight.T @ (weight @ vector)
        size = moved.norm()
        vector = torch.where(size > 0, moved / size.clamp(min=TINY), vector)
    return (weight @ vector).norm(), vector


def spectral_norm_loss(norms: Tensor, alpha: float) -> Tensor:
    """Return `R = exp(-alpha * sum of norms)`, over layers.

    Source: eq. (8). As printed it has the norms themselves, and grows smaller with any common
    factor; the default of `SpectralNorm` has each divided by the Frobenius norm, over the number of
    layers, which no common factor changes.
    """
    return torch.exp(-alpha * norms.sum())  # eq. (8)


def log_norm_slope(weight: Tensor, right: Tensor, normalized: bool) -> Tensor:
    """Return the derivative of `log |W|` by the log factors of its columns `[K]`: `v^2` for the
    spectral norm; less `|W_:j|^2 / |W|_F^2` for that over the Frobenius norm.

    Args:
        weight: with its factors `[N, K]`.
        right: its right singular vector v `[K]`.
        normalized: over the Frobenius norm.
    """
    slope = right.square()
    if normalized:
        energy = weight.square().sum(0)
        slope = slope - energy / energy.sum().clamp(min=TINY)
    return slope


def unit_vector(size: int, device: torch.device) -> Tensor:
    """Return a start for `power_iteration` `[size]`, fp64, the same in every run."""
    vector = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (vector / vector.norm()).to(device)


def hoyer(values: Tensor) -> float:
    """Return how sparse some values are, `(sqrt n - l1 / l2) / (sqrt n - 1)`: 0 where all are
    equal, 1 where one is not 0."""
    flat = values.double().abs().flatten()
    root, size = len(flat) ** 0.5, flat.norm()
    if len(flat) < 2 or not size:
        return 0.0
    return float((root - flat.sum() / size) / (root - 1))


def gini(values: Tensor) -> float:
    """Return how unequal some values are: 0 where all are equal, near 1 where one has all."""
    flat = values.double().abs().flatten().sort().values
    count, total = len(flat), flat.sum()
    if not total:
        return 0.0
    ranks = torch.arange(1, count + 1, dtype=torch.float64, device=flat.device)
    return float(((2 * ranks - count - 1) * flat).sum() / (count * total))


def stable_rank(weight: Tensor, steps: int = 100) -> float:
    """Return `|W|_F^2 / |W|_2^2`: 1 for one direction alone, the rank where all count alike; 0 for
    zeros.

    Args:
        weight: `[N, K]`.
        steps: of power iteration; where few leave the largest singular value too small, the result
            is too large.
    """
    values = weight.double()
    norm, _ = power_iteration(values, unit_vector(values.shape[1], values.device), steps)
    return float(values.square().sum() / norm.square()) if norm > 0 else 0.0


def concentration(weight: Tensor) -> Concentration:
    """Return all three measures of a weight `[N, K]`."""
    return Concentration(hoyer(weight), gini(weight), stable_rank(weight))

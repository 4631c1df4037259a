"""Distribution-guided calibration: the samples that reach furthest into the distribution.

    rho(x) = sqrt((x - mean)^T C^-1 (x - mean))

ranks samples by the Mahalanobis distance of a feature, over all samples together; the half with the
largest is kept. With fewer samples than dimensions the plain covariance gives every sample the same
distance, (N - 1) / sqrt(N): C is shrunk towards a multiple of the identity (Ledoit and Wolf, 2004),
which orders them again, and needs no inverse of a matrix of the features' size.

What is kept covers more of the distribution's range than chance does; it is no sample of the
distribution, whose variance it overstates.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxq.binding import check_model
from fxq.passes.common.apportion import apportion
from fxq.passes.common.scaling.statistics import row_keys
from fxq.passes.common.taps import check_tap, given_by

DIGITS = 9  # of a relative distance: beyond them two that are equal differ by rounding


def shrinkage(centred: Tensor) -> float:
    """Return how far to shrink the covariance of samples to a multiple of the identity, in [0, 1].

    Args:
        centred: samples less their mean `[N, D]`, fp64.
    Source: Ledoit and Wolf 2004, eqs. (13) to (15); 1 where the samples do not vary.
    """
    n, dims = centred.shape
    squares = centred.square().sum(1)
    mean = squares.sum() / (n * dims)  # of the covariance's diagonal
    small = centred if n < dims else centred.T
    frobenius = (small @ small.T).square().sum() / n**2  # |S|^2
    distance = frobenius / dims - mean**2  # d^2 = |S - mean I|^2 / D
    spread = (squares.square().sum() / n**2 - frobenius / n) / dims  # b^2
    if distance <= 0:
        return 1.0
    return float((spread / distance).clamp(0, 1))


def mahalanobis(features: Tensor) -> Tensor:
    """Return the distance of each sample from the mean of all `[N]`, fp64.

    The order of samples changes nothing, not by a bit. Identical samples are at 0.

    Args:
        features: `[N, D]`, finite, any float dtype.
    Raises:
        ValueError: another shape, no sample, NaN or Inf.
    """
    if features.ndim != 2 or not features.numel():
        raise ValueError(
            f"features: expected [samples, dimensions], found shape {list(features.shape)}; take "
            "the mean over other dimensions"
        )
    if not bool(features.isfinite().all()):
        raise ValueError(
            f"features: expected finite values, found {int((~features.isfinite()).sum())} NaN or "
            "Inf; run the float model in a wider dtype"
        )
    keys = row_keys(features.detach().float())
    order = keys.argsort(stable=True)  # by what they hold alone
    sorted_features = features.detach()[order].double()
    centred = sorted_features - sorted_features.mean(0)
    n, dims = centred.shape
    delta = shrinkage(centred)
    left, singular, _ = torch.linalg.svd(centred, full_matrices=False)
    mean = singular.square().sum() / (n * dims)
    # In the basis of the samples' own directions the shrunk covariance is diagonal.
    variance = (1 - delta) * singular.square() / n + delta * mean
    tiny = torch.finfo(torch.float64).eps * dims * singular.square().amax()
    weight = torch.where(singular.square() > tiny, singular.square() / variance, 0.0)
    found = torch.empty(n, dtype=torch.float64, device=features.device)
    first = torch.searchsorted(keys[order], keys[order])  # equal samples: the first one's distance
    found[order] = (left.square() @ weight).sqrt()[first]
    return found


def choose(
    features: Tensor, count: int | None = None, strata: Sequence[Hashable] | None = None
) -> list[int]:
    """Return which samples to calibrate with, in rising order.

    Distances are over all samples together. Where there are strata, each gives its share of the
    count, rounded by largest remainders, and its own most distant samples.

    Args:
        features: `[N, D]`, one row per sample, such as `pooled_features` gives.
        count: samples to keep; half of them unless given.
        strata: the class or group of each sample; None for one group.
    Raises:
        ValueError: a count beyond the samples, strata of another length, or features that
            `mahalanobis` refuses.
    """
    distance = mahalanobis(features)
    n = len(distance)
    count = (n + 1) // 2 if count is None else count
    if not 1 <= count <= n:
        raise ValueError(f"count: expected 1 to {n} samples, found {count}")
    groups: Sequence[Hashable] = [None] * n if strata is None else strata
    if len(groups) != n:
        raise ValueError(
            f"strata: expected one for each of {n} samples, found {len(groups)}; give the class of "
            "every sample, or None"
        )
    largest = float(distance.max()) or 1.0
    keys = row_keys(features.detach().float()).tolist()
    ranks = [-round(value / largest, DIGITS) for value in distance.tolist()]
    order = sorted(range(n), key=lambda i: (ranks[i], keys[i], i))
    members: dict[Hashable, list[int]] = {}
    for index in order:
        members.setdefault(groups[index], []).append(index)
    sizes = torch.tensor([len(found) for found in members.values()], dtype=torch.float64)
    shares = apportion(sizes, count)
    pairs = zip(members.values(), shares, strict=True)
    return sorted(index for found, share in pairs for index in found[:share])


def pooled_features(model: nn.Module, batches: Sequence[Any], tap: str) -> Tensor:
    """Return the mean over tokens of what a submodule gives, for each sample `[N, D]`, fp32.

    Args:
        model: the float model, in eval mode. A call ends at the tap.
        batches: of its inputs, as `fxq.compress` takes them; the first dimension is the batch.
        tap: the submodule's name, such as the last block's.
    Raises:
        ValueError: no such submodule, or one that is not reached or gives no `[B, ..., D]`.
    """
    check_model(model)
    check_tap(model, tap)

    def pooled(output: Any) -> Tensor:
        first = output[0] if isinstance(output, tuple | list) else output
        if not isinstance(first, Tensor) or first.ndim < 2:
            raise ValueError(
                f"tap {tap!r}: expected a tensor [batch, ..., channel], found {type(first)}; name "
                "another submodule"
            )
        return first.detach().float().flatten(1, -2).mean(1) if first.ndim > 2 else first

    found = []
    for index, batch in enumerate(batches):
        features = given_by(model, tap, batch, pooled)
        if features is None:
            raise ValueError(
                f"tap {tap!r}: expected that batch {index} reaches it, found that it does not; "
                "name another submodule"
            )
        found.append(features)
    if not found:
        raise ValueError("batches: expected at least one, found none")
    return torch.cat(found).float()

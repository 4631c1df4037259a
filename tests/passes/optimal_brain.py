"""Optimal brain surgery as its papers state it: every step inverts the second moments of the
columns that are still free. Slow, and shares nothing with what it judges."""

from collections.abc import Callable

import torch
from torch import Tensor


def damped(moments: Tensor, damping: float = 0.01) -> Tensor:
    return moments + damping * moments.diagonal().mean() * torch.eye(len(moments)).double()


def surgery(
    weight: Tensor, hessian: Tensor, order: list[int], fix: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """Fix columns in order; `fix` is given the weight as it is now and the column."""
    work = weight.double().clone()
    for place, j in enumerate(order):
        free = order[place:]
        inverse = torch.linalg.inv(hessian[free][:, free])
        value = fix(work, j)
        step = (work[:, j] - value) / inverse[0, 0]
        work[:, free] -= step[:, None] * inverse[0]
        work[:, j] = value
    return work


def correlated(rows: int, width: int, seed: int = 0) -> Tensor:
    """Draw inputs of a layer whose channels go together and differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) / width**0.5
    mixing += torch.eye(width)
    sizes = torch.logspace(-1, 1, width)[torch.randperm(width, generator=generator)]
    return torch.randn(rows, width, generator=generator) @ mixing * sizes + 0.3

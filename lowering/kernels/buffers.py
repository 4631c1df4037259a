"""Where kernels get their outputs from: one place, so that tests can poison them."""

import torch
from torch import Tensor


def allocate(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, out: Tensor | None = None
) -> Tensor:
    """Return an uninitialised, contiguous output: `out` where that is one and given."""
    if out is not None and out.shape == shape and out.dtype == dtype and out.is_contiguous():
        return out
    return fresh(shape, dtype, device)


def fresh(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return new memory, uninitialised."""
    return torch.empty(shape, dtype=dtype, device=device)


def placed(result: Tensor, out: Tensor | None) -> Tensor:
    """Return a result in `out`, where that is given: copied, unless it has been written there."""
    if out is None:
        return result
    return out if out.is_set_to(result) else out.copy_(result)

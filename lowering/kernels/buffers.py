"""Where kernels get their outputs from: one place, so that tests can poison them."""

import torch
from torch import Tensor


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an uninitialised output."""
    return torch.empty(shape, dtype=dtype, device=device)

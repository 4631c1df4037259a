"""Outputs of kernels that show what was not written."""

import torch
from torch import Tensor

from fxq.lowering.kernels import buffers

POISON = {torch.int8: 99, torch.uint8: 99, torch.int32: 10**6}


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Stand in for `buffers.allocate`."""
    return torch.full(shape, POISON.get(dtype, float("nan")), dtype=dtype, device=device)


def poison() -> None:
    """Poison the outputs of all kernels from here on."""
    buffers.allocate = poisoned

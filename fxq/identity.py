"""Which tensors have the same values because they are the same memory, seen the same way.

An address says this only while the tensor lives: a weight computed for a moment leaves its address
to the next one. So nobody else compares addresses; `tests/core/test_identity.py` sees to it.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class TensorKey(NamedTuple):
    """Key for dictionaries: two are equal where two tensors are the same view of the same memory.

    It does not keep that memory. The weak reference keeps the storage's number from being given to
    another storage, so a key whose tensor is gone equals no later one.

    Args:
        storage: the memory; equal for every view of it.
        offset: of the first element.
        shape: as the tensor has it.
        stride: likewise.
        dtype: likewise.
        lazy: whether it is to be read conjugated, and negated.
    """

    storage: StorageWeakRef
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    lazy: tuple[bool, bool]

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorKey":
        """Return the key of a tensor."""
        return cls(
            StorageWeakRef(tensor.untyped_storage()),
            int(tensor.storage_offset()),
            tensor.shape,
            tensor.stride(),
            tensor.dtype,
            (tensor.is_conj(), tensor.is_neg()),
        )

    @property
    def expired(self) -> bool:
        """Whether the memory has been freed."""
        return bool(self.storage.expired())


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor has been written to; 0 for inference tensors, which do not
    count."""
    return 0 if tensor.is_inference() else tensor._version


def state_of(tensor: Tensor) -> tuple[int, int]:
    """Return what changes where a tensor is written to, or given other memory (`.data = `). It says
    so only while somebody keeps the memory that it had."""
    return tensor.data_ptr(), version_of(tensor)

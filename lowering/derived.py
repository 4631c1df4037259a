"""Values derived from a weight (a packed copy, a row sum), kept until the weight changes or dies.

Kernels are pure functions of the weight; packing it at every call would cost more than the product.
An entry is valid while the weight's storage lives and its version counter stands still, so an
in-place write to a weight is seen by the next call. (Writes through `.data` bypass the counter;
torch's own autograd checks share this blind spot.)
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

T = TypeVar("T")


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor has been written to; 0 for inference tensors, which do not
    count."""
    return 0 if tensor.is_inference() else tensor._version


class Derived:
    """A cache from (weight, name of the derived value) to the value."""

    def __init__(self) -> None:
        # The weak reference in an entry keeps the storage's address from being reused, so the
        # address is a safe key.
        self._entries: dict[
            tuple[int, int, torch.Size, str], tuple[StorageWeakRef, int, object]
        ] = {}

    def get(self, weight: Tensor, name: str, compute: Callable[[Tensor], T]) -> T:
        """Return `compute(weight)`, computed again only where the weight has been written to
        since."""
        storage = weight.untyped_storage()
        key = (int(storage._cdata), int(weight.storage_offset()), weight.shape, name)
        entry = self._entries.get(key)
        if entry is not None and entry[1] == version_of(weight) and not entry[0].expired():
            return entry[2]  # type: ignore[return-value]
        self._drop_dead()
        value = compute(weight)
        self._entries[key] = (StorageWeakRef(storage), version_of(weight), value)
        return value

    def _drop_dead(self) -> None:
        for key in [k for k, (ref, _, _) in self._entries.items() if ref.expired()]:
            del self._entries[key]


derived = Derived()

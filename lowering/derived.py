"""Values derived from a weight (a packed copy, a row sum), kept until the weight changes or dies.

Kernels are pure functions of the weight; packing it at every call would cost more than the product.
An entry is valid while the weight's storage lives and its version counter stands still, so an
in-place write to a weight is seen by the next call. (Writes through `.data` bypass the counter;
torch's own autograd checks share this blind spot.)
"""

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from fxq.identity import TensorKey, version_of

T = TypeVar("T")


class Derived:
    """A cache from (weight, name of the derived value) to the value."""

    def __init__(self) -> None:
        self._entries: dict[tuple[TensorKey, str], tuple[int, object]] = {}

    def get(self, weight: Tensor, name: str, compute: Callable[[Tensor], T]) -> T:
        """Return `compute(weight)`, computed again only where the weight has been written to
        since."""
        key = TensorKey.of(weight), name
        entry = self._entries.get(key)
        if entry is not None and entry[0] == version_of(weight):
            return entry[1]  # type: ignore[return-value]
        self._drop_dead()
        value = compute(weight)
        self._entries[key] = (version_of(weight), value)
        return value

    def _drop_dead(self) -> None:
        for key in [k for k in self._entries if k[0].expired]:
            del self._entries[key]


derived = Derived()

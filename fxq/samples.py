"""What calibration batches hold: whether their samples differ, and how far their values spread."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def batch_size(inputs: Sequence[Any]) -> int:
    """Return the number of samples of a batch: rows of its first tensor that has any."""
    tensors = (x for x in inputs if isinstance(x, Tensor) and x.ndim)
    return next((len(x) for x in tensors), 1)


class Samples:
    """What some batches hold.

    Args:
        batches: all of them, or none yet.
    Attributes:
        count: samples.
        first: of each input, what the first sample has: a row, or the whole of an input that has
            no row for each sample.
        differ: whether any sample is not the first one again.
    """

    def __init__(self, batches: Iterable[Sequence[Any]] = ()) -> None:
        self.count, self.differ = 0, False
        self.first: list[Any] = []
        self._moments: dict[int, Tensor] = {}
        for inputs in batches:
            self.add(inputs)

    def add(self, inputs: Sequence[Any]) -> None:
        """Take note of a batch."""
        n = batch_size(inputs)
        if not self.count:
            self.first = [x[:1].clone() if _has_rows(x, n) else x for x in inputs]
        self.count += n
        self.differ = self.differ or any(map(_unlike, inputs, self.first))
        for i, x in enumerate(inputs):
            if isinstance(x, Tensor) and x.is_floating_point() and x.numel():
                wide = x.detach().double()
                moments = torch.stack(
                    [torch.ones_like(wide).sum(), wide.sum(), wide.square().sum()]
                )
                self._moments[i] = self._moments.get(i, 0) + moments.cpu()

    def deviation(self, index: int) -> float:
        """Return the standard deviation of all values of an input; 0 where it has no real ones."""
        if index not in self._moments:
            return 0.0
        count, total, squares = self._moments[index].tolist()
        return max(squares / count - (total / count) ** 2, 0.0) ** 0.5


def _has_rows(x: Any, n: int) -> bool:
    return isinstance(x, Tensor) and x.ndim > 0 and len(x) == n


def _unlike(x: Any, first: Any) -> bool:
    """Tell whether any sample of an input is not the first one."""
    if not isinstance(x, Tensor) or not isinstance(first, Tensor):
        return bool(x != first)
    return x.shape[1:] != first.shape[1:] or not bool((x == first).all())

"""What calibration batches hold: whether their samples differ, and how far their values spread."""

from collections.abc import Iterable, Sequence
from typing import Any

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
        spreads: by input of real numbers, more than one a sample, the smallest and largest of the
            standard deviations that batches have, of all their values.
    """

    def __init__(self, batches: Iterable[Sequence[Any]] = ()) -> None:
        self.count, self.differ = 0, False
        self.first: list[Any] = []
        self.spreads: dict[int, tuple[float, float]] = {}
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
            if isinstance(x, Tensor) and x.is_floating_point() and x.numel() > n:
                spread = float(x.detach().double().std(correction=0))
                least, most = self.spreads.get(i, (spread, spread))
                self.spreads[i] = min(least, spread), max(most, spread)


def _has_rows(x: Any, n: int) -> bool:
    return isinstance(x, Tensor) and x.ndim > 0 and len(x) == n


def _unlike(x: Any, first: Any) -> bool:
    """Tell whether any sample of an input is not the first one."""
    if not isinstance(x, Tensor) or not isinstance(first, Tensor):
        return bool(x != first)
    return x.shape[1:] != first.shape[1:] or not bool((x == first).all())

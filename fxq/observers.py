"""Observers: watch the values on an edge, then say which range to quantize them in.

An observer's state is a handful of tensors that merge exactly and in any order: smallest and
largest value, number of values and, for the rules that weigh values, a histogram
(`fxq.histogram`). Calibrating in other batches, in another order or over many processes therefore
gives the same bytes. `MovingAverage` alone depends on the order of batches by definition, and
refuses to merge.
"""

import copy
from collections.abc import Callable, Sequence
from itertools import dropwhile

import torch
from torch import SymInt, Tensor, nn

from fxq import numerics
from fxq.errors import UnsupportedError
from fxq.histogram import bin_index, mantissa_bits, n_bins, searched_range
from fxq.rows import ByPosition
from fxq.spec import (
    ALL,
    Entropy,
    MeanSquaredError,
    MovingAverage,
    Percentile,
    QuantSpec,
    block_of,
    scale_shape,
)

# How each buffer of two states combines: exact, associative, commutative.
MERGE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "n_values": torch.add,
    "low": torch.minimum,
    "high": torch.maximum,
    "histogram": torch.add,
}


def of_rank(shape: Sequence[int], ndim: int = 0) -> list[int]:
    """Return the shape of a scale without leading dimensions of size 1, or with as many of them as
    make it `ndim` dimensions."""
    kept = [*dropwhile(lambda size: size == 1, shape)]
    return [1] * (ndim - len(kept)) + kept


class RangeObserver(nn.Module):
    """Return the input unchanged and remember what is needed to quantize it.

    Tensors may have more or fewer dimensions than `shape`, where the scale is the same then: one
    number, or one for each place on the last axis.

    Where the spec has rows, there is a state for each: buffers, scale and zero-point have one
    dimension more, the first.

    Args:
        spec: a static spec: which elements share a scale, and the rule that finds their range.
        shape: shape of the observed tensor; the dimensions along which the scale varies are fixed.
        name: qualified name of the observed edge, for messages.
    Raises:
        ValueError: calibration does not decide the spec's range, or the scale's shape is dynamic.
    """

    n_values: Tensor  # number of values seen, int64 scalar or `[rows]`
    low: Tensor  # smallest value, fp32 in the scale's shape
    high: Tensor  # largest value, fp32 in the scale's shape
    histogram: Tensor  # int64 [entries, bins], only for rules that weigh values
    trained_scale: Tensor | None  # take the place of those the range gives
    trained_zero_point: Tensor | None

    def __init__(self, spec: QuantSpec, shape: Sequence[int | SymInt], name: str) -> None:
        super().__init__()
        if spec.dynamic or spec.pair_safe:
            found = "dynamic=True" if spec.dynamic else "pair_safe=True"
            raise ValueError(
                f"an observer needs a range that calibration decides, found {found} at {name}; "
                "compute it from the tensor itself (numerics.choose_qparams, pair_safe_amax)"
            )
        self.spec, self.name = spec, name
        self.block = block_of(spec.granularity, len(shape))
        varying = [1 if w == ALL else size for size, w in zip(shape, self.block, strict=True)]
        if any(isinstance(size, SymInt) for size in varying):
            raise ValueError(
                f"static {spec.granularity} needs a fixed shape, found {list(shape)} at {name}; "
                "capture without that dynamic dimension, or use dynamic=True or PerTensor()"
            )
        self.scale_shape = scale_shape([int(size) for size in varying], self.block)
        if spec.rows is not None and spec.rows.count < 1:
            raise ValueError(
                f"an observer needs a number of rows, found {spec.rows} at {name}; give "
                "ByPosition(count)"
            )
        self.groups: Tensor | None = None  # which range each row has; None: its own
        self._allocate(() if spec.rows is None else (spec.rows.count,))

    def _allocate(self, rows: tuple[int, ...]) -> None:
        """Begin with a state for each of some rows, or with one."""
        self.register_buffer("n_values", torch.zeros(rows, dtype=torch.int64))
        self.register_buffer("low", torch.full((*rows, *self.scale_shape), torch.inf))
        self.register_buffer("high", torch.full((*rows, *self.scale_shape), -torch.inf))
        self.register_buffer("trained_scale", None)
        self.register_buffer("trained_zero_point", None)
        # What searching a range gave, and for how many values it did.
        self.searched: tuple[int, Tensor, Tensor] | None = None
        self.bits = 0  # mantissa bits of the histogram's grid, 0 without one
        if isinstance(self.spec.observer, Percentile | MeanSquaredError | Entropy):
            entries = self.low.numel()
            self.bits = mantissa_bits(entries)
            counts = torch.zeros(entries, n_bins(self.bits), dtype=torch.int64)
            self.register_buffer("histogram", counts)

    def share_rows(self, groups: Tensor) -> None:
        """Let rows share a range, and forget everything seen.

        Args:
            groups: number of the range that each row has `[rows]`, int64, from 0 on, none left out.
        Raises:
            ValueError: no number for each row, or a number that no row has.
        """
        rows = 0 if self.spec.rows is None else self.spec.rows.count
        numbers = groups.unique()
        every = torch.arange(len(numbers), device=groups.device)
        if groups.shape != (rows,) or not torch.equal(numbers, every):
            raise ValueError(
                f"groups at {self.name}: expected a number from 0 on for each of {rows} rows, "
                f"found {groups.tolist()[:8]} of shape {list(groups.shape)}"
            )
        device = self.low.device
        self.groups, self.searched = groups.clone(), None
        self._allocate((len(numbers),))
        self.to(device)

    @property
    def count(self) -> int:
        """Number of values seen."""
        return int(self.n_values.sum())

    @property
    def rows_without_data(self) -> list[int]:
        """Rows, or groups of them, that saw no value. The nearest that did stands for them."""
        if self.spec.rows is None:
            return []
        return (self.n_values.reshape(-1) == 0).nonzero().flatten().tolist()

    @property
    def saw_only_zeros(self) -> bool:
        """Whether values were seen and all of them were zero, which says nothing of the range."""
        return self.count > 0 and not bool(self.low.any()) and not bool(self.high.any())

    def reset(self) -> None:
        """Forget everything seen, and what training made of it."""
        self.trained_scale = self.trained_zero_point = self.searched = None
        for name, buffer in self.named_buffers():
            buffer.fill_({"low": torch.inf, "high": -torch.inf}.get(name, 0))

    def extra_repr(self) -> str:
        """Return what distinguishes this observer in a printed graph."""
        return f"{self.name}: {self.spec}"

    def forward(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        """Take note of `x` and return it.

        Args:
            x: a value of the observed edge.
            index: which row holds: of all of it, of each sample `[B]`, of each token `[T]` or
                `[B, T]` (`fxq.row_choice`). None where the spec has no rows.
        Raises:
            ValueError: `x` is not finite, or needs a scale of another shape.
        """
        if index is not None and self.groups is not None:
            index = self.groups.to(index.device)[index]
        with torch.no_grad():
            self._observe(x.detach(), index)
        return x

    def _observe(self, x: Tensor, index: Tensor | None) -> None:
        block = list(block_of(self.spec.granularity, x.ndim))
        self._check_shape(x.shape, block)
        if not x.numel():
            return
        self.searched = None
        if self.low.device != x.device:
            self.to(x.device)
        for dim in self._row_dims(index, x.ndim):
            block[dim] = 1
        low, high = numerics.block_amin_amax(x, block)
        if not bool((low.isfinite() & high.isfinite()).all()):
            raise self._not_finite(x)
        low, high = low + 0.0, high + 0.0  # -0.0 becomes 0.0: min(0.0, -0.0) depends on the order
        if isinstance(self.spec.observer, MovingAverage) and self.count:
            self.low.lerp_(low, self.spec.observer.momentum)
            self.high.lerp_(high, self.spec.observer.momentum)
        else:
            entries = self._entries(low.shape, index).flatten()
            self.low.view(-1).scatter_reduce_(0, entries, low.flatten(), "amin")
            self.high.view(-1).scatter_reduce_(0, entries, high.flatten(), "amax")
        if self.bits:
            self._add_to_histogram(x, self._entries(low.shape, index))
        rows = torch.zeros((), dtype=torch.int64, device=x.device) if index is None else index
        counts = torch.full_like(rows, x.numel() // rows.numel()).flatten()
        self.n_values.view(-1).index_add_(0, rows.flatten(), counts)

    def _row_dims(self, index: Tensor | None, ndim: int) -> list[int]:
        """Return the dimensions of an observed tensor that have a row for each element."""
        if index is None or index.ndim == 0:
            return []
        both = [0, ndim - 2]
        return both if index.ndim == 2 else both[isinstance(self.spec.rows, ByPosition) :][:1]

    def _entries(self, shape: Sequence[int], index: Tensor | None) -> Tensor:
        """Return which entry of the state each block goes to, int64 in `shape`."""
        scale_shape = of_rank(self.scale_shape, len(shape))
        width = torch.Size(scale_shape).numel()
        entries = torch.arange(width, device=self.low.device).reshape(scale_shape)
        if index is not None:
            place = [1] * len(shape)
            for dim, size in zip(self._row_dims(index, len(shape)), index.shape, strict=True):
                place[dim] = size
            entries = entries + width * index.to(entries.device).reshape(place)
        return entries.expand(shape)

    def _add_to_histogram(self, x: Tensor, entries: Tensor) -> None:
        bins = self.histogram.shape[1]
        index = bin_index(x, self.bits)
        if len(self.histogram) > 1:
            index = index + numerics.expand_blocks(entries * bins, x.shape)
        counts = torch.bincount(index.flatten(), minlength=self.histogram.numel())
        self.histogram += counts.view_as(self.histogram)

    def _check_shape(self, shape: Sequence[int], block: Sequence[int]) -> None:
        if of_rank(scale_shape(shape, block)) == of_rank(self.scale_shape):
            return
        raise ValueError(
            f"static {self.spec.granularity} at {self.name} has a scale of shape "
            f"{self.scale_shape}, found a tensor of shape {list(shape)}; calibrate with the shape "
            "that was captured, or use dynamic=True or PerTensor()"
        )

    def _not_finite(self, x: Tensor) -> ValueError:
        bad = int((~x.float().isfinite()).sum())
        return ValueError(
            f"expected finite values, found {bad} NaN or Inf of {x.numel()} at {self.name}; check "
            "the calibration data, and run the model in fp32 or bf16 if fp16 overflows"
        )

    def is_like(self, other: "RangeObserver") -> bool:
        """Tell whether what one observes may be the other's: the same spec, and scales that differ
        at most in leading dimensions of size 1."""
        alike = of_rank(self.scale_shape) == of_rank(other.scale_shape)
        return self.spec == other.spec and alike

    def at_rank(self, ndim: int) -> "RangeObserver":
        """Return a copy whose scale has as many dimensions as a tensor of `ndim`."""
        made = copy.deepcopy(self)
        made.block = block_of(self.spec.granularity, ndim)
        made.scale_shape = of_rank(self.scale_shape, ndim)

        def shaped(state: Tensor) -> Tensor:
            rows = [] if self.spec.rows is None else [len(state)]
            return state.reshape(rows + made.scale_shape)

        for name in ("low", "high", "trained_scale", "trained_zero_point"):
            if (state := getattr(made, name)) is not None:
                setattr(made, name, shaped(state))
        if made.searched is not None:
            count, low, high = made.searched
            made.searched = count, shaped(low), shaped(high)
        return made

    def range(self) -> tuple[Tensor, Tensor]:
        """Return the smallest and largest value to represent, fp32 in the scale's shape.

        Raises:
            ValueError: no value was seen.
        """
        if not self.count:
            raise ValueError(
                f"the observer at {self.name} saw no data; calibrate with a batch that reaches it"
            )
        if self.searched is None or self.searched[0] != self.count:
            low, high = self.low.clone(), self.high.clone()
            if self.bits:
                low, high = searched_range(self.histogram, low, high, self.bits, self.spec)
            self.searched = self.count, low, high
        return self.searched[1].to(self.low.device), self.searched[2].to(self.low.device)

    def settle(self, low: Tensor, high: Tensor) -> None:
        """Have `range` return this range until other values are seen.

        Args:
            low: smallest value to represent, fp32 in the scale's shape.
            high: largest, likewise.
        Raises:
            ValueError: other shapes.
        """
        if low.shape != self.low.shape or high.shape != self.low.shape:
            raise ValueError(
                f"a range at {self.name}: expected {list(self.low.shape)}, found "
                f"{list(low.shape)} and {list(high.shape)}; give one entry for each scale"
            )
        self.searched = self.count, low.clone(), high.clone()

    def qparams(self) -> tuple[Tensor, Tensor]:
        """Return scale (fp32, > 0) and zero-point (int32), both in the scale's shape, or with a row
        for each of the spec's.

        Raises:
            ValueError: no value was seen.
        """
        low, high = self.range()
        spec = self.spec
        scale, zero_point = numerics.choose_qparams(
            low, high, spec.quant_min, spec.quant_max, symmetric=spec.symmetric
        )
        if spec.rows is not None:
            nearest = self._nearest_rows_with_data()
            if self.groups is not None:
                nearest = nearest[self.groups.to(nearest.device)]
            scale, zero_point = scale[nearest], zero_point[nearest]
        scale = scale if self.trained_scale is None else self.trained_scale
        trained = self.trained_zero_point
        return scale, zero_point if trained is None else trained

    def _nearest_rows_with_data(self) -> Tensor:
        """Return, for each row, itself or the nearest that saw values; of two, the lower."""
        seen = self.n_values.nonzero().flatten()
        every = torch.arange(len(self.n_values), device=seen.device)
        return seen[(every[:, None] - seen).abs().argmin(1)]

    def merge(self, other: "RangeObserver") -> None:
        """Add what `other` has seen to this observer's state, exactly.

        Raises:
            ValueError: the two observe differently.
            UnsupportedError: both are `MovingAverage` and have seen data, or a scale was trained.
        """
        same = self.spec == other.spec and self.scale_shape == other.scale_shape
        shared = [None if o.groups is None else o.groups.tolist() for o in (self, other)]
        if not same or shared[0] != shared[1]:
            raise ValueError(
                "observers merge if they have the same spec, scale shape and shared rows, found "
                f"{self.spec} {self.scale_shape} at {self.name} and "
                f"{other.spec} {other.scale_shape} at {other.name}"
            )
        for one in (self, other):
            one.check_mergeable((self.count > 0) + (other.count > 0))
        self.searched = None
        for name, buffer in self.named_buffers():
            buffer.copy_(MERGE[name](buffer, getattr(other, name).to(buffer.device)))

    def check_mergeable(self, n_states: int) -> None:
        """Raise `UnsupportedError` if `n_states` states with data do not determine their union."""
        if self.trained_scale is not None:
            raise UnsupportedError(
                f"expected a scale that calibration found, found a trained one at {self.name}; "
                "merge before training"
            )
        if isinstance(self.spec.observer, MovingAverage) and n_states > 1:
            raise UnsupportedError(
                f"a moving average depends on the order of batches, found {n_states} independent "
                f"ones at {self.name}; calibrate in one process, or use MinMax() or Percentile()"
            )

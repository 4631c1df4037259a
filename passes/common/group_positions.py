"""GroupPositions: let neighbouring positions share a range as far as the data do not tell them
apart.

A range per position (`fxq.rows.ByPosition`) follows what stands there, such as a first token that
is thirty times larger than the rest, or the scales of a next-scale model. But a range from a few
samples is too narrow for the next one. Positions that share a range have more samples for it, so
the question is which of them to put together:

    error(sample j, position p) = C step^2 / 12 + (max(0, high - top) + max(0, bottom - low))^2

with bottom and top (and so the step) the range of the group in all samples but j, or the part of it
that costs least. The sum over samples, each position in units of its own range, is what a group
costs. Starting with one position in each, the two neighbouring groups that gain most are put
together, until none gain. What is left is the first tokens that stand out, the scales, and the
rest, whatever a model has of them; one group where one sample is all there is.

The rows of the table stay as many as the positions are: the index and the gather are the same for
all layers, however each is grouped.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from fxq.calibrate import NO_DATA, gather_statistics, n_processes
from fxq.dialect import OBSERVED, Dialect, observer_of
from fxq.layer import treat
from fxq.observers import RangeObserver
from fxq.passes.common.convert import pending_layers
from fxq.pipeline import Batches, DataPass
from fxq.rows import ByPosition

CUTS = (1.0, 0.9, 0.8, 0.7, 0.6)  # of the range: what is widest rarely has the least error
FLAT = 1e-12  # relative squared range below which a position says nothing


@dataclass(frozen=True)
class GroupPositions(DataPass):
    """Group the positions of every observer that goes by them. `Calibrate` finds the ranges.

    Args:
        tolerance: how much a common range may cost, relative to two ranges.
    """

    tolerance: float = 0.1  # 0.4 dB: less than ranges of few samples vary by chance

    reads: ClassVar[Dialect] = OBSERVED
    writes: ClassVar[Dialect] = OBSERVED

    def __post_init__(self) -> None:
        if not self.tolerance >= 0:
            raise ValueError(f"GroupPositions.tolerance: expected >= 0, found {self.tolerance}")

    def run(self, gm: GraphModule, data: Batches) -> PassResult:
        """Run every batch once and group the positions, edge by edge."""
        observers = {
            str(node.target): observer
            for node in gm.graph.nodes
            if (observer := observer_of(gm, node)) is not None
            and isinstance(observer.spec.rows, ByPosition)
        }
        seen = token_ranges(gm, data, observers) if observers else {}
        for name, (ranges, n_channels) in seen.items():
            spec = observers[name].spec
            levels = spec.quant_max - spec.quant_min
            groups = group_positions(
                ranges, n_channels, levels, self.tolerance, symmetric=spec.symmetric
            )
            observers[name].share_rows(groups)
        for layer, _ in pending_layers(gm):
            observer = observers.get(str(getattr(layer.args[0], "target", "")))
            if observer is not None and observer.groups is not None:
                n_groups, n_rows = int(observer.groups.max()) + 1, len(observer.groups)
                remark = f"{n_rows} positions in {n_groups} ranges"
                treat(layer, type(self).__name__, "positions grouped", remark)
        return PassResult(gm, modified=bool(observers))


class _TokenRanges(nn.Module):
    """In the place of an observer: the smallest and largest value of every token of every sample.

    Args:
        count: number of positions.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count, self.n_channels = count, 0
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        """Take note of `x` and return it; arguments as an observer's."""
        self.n_channels = x.shape[-1]
        tokens = x.detach().float().flatten(0, -3)  # [S, T, C]
        low, high = tokens.amin(2), tokens.amax(2)
        if not bool((low.isfinite() & high.isfinite()).all()):
            raise ValueError("expected finite values, found NaN or Inf; check the calibration data")
        row = index.expand(low.shape)
        found = torch.full((len(low), self.count, 2), torch.inf, device=x.device)
        found[..., 0].scatter_reduce_(1, row, low, "amin")
        found[..., 1].scatter_reduce_(1, row, -high, "amin")
        self.seen.append(found)
        return x


def token_ranges(
    gm: GraphModule, data: Batches, observers: Mapping[str, RangeObserver]
) -> dict[str, tuple[Tensor, int]]:
    """Run the batches and return, for each observer, the range of each position in each sample.

    Args:
        gm: an observed graph; what its observers have seen stays.
        data: batches of its inputs.
        observers: by name, all with rows by position.
    Returns:
        name -> smallest value and negated largest `[samples, positions, 2]`, fp32, infinite where
        a sample has no such position, and the number of channels. Of all processes.
    """
    watches = {name: _TokenRanges(o.low.shape[0]) for name, o in observers.items()}
    try:
        for name, watch in watches.items():
            gm.set_submodule(name, watch)
        with torch.no_grad():
            for inputs in data:
                gm(*inputs)
    finally:
        for name, observer in observers.items():
            gm.set_submodule(name, observer)
    found = [torch.cat(w.seen).cpu() if w.seen else None for w in watches.values()]
    parts = [[] if one is None else [one] for one in found]
    if n_processes() > 1:
        parts = gather_statistics(found, torch.device("cpu"))
    if not all(parts):
        raise ValueError(NO_DATA)
    return {
        name: (torch.cat(part), int(watch.n_channels))
        for (name, watch), part in zip(watches.items(), parts, strict=True)
    }


def shared_range_cost(
    low: Tensor, high: Tensor, weight: Tensor, n_channels: int, levels: int, *, symmetric: bool
) -> float:
    """Return what it costs that positions share a range, each sample judged by the others' range.

    Args:
        low: smallest value of each token `[S, P]`, infinite where a sample has none there.
        high: largest value, -infinite where there is none.
        weight: of each position's squared errors `[P]`.
        n_channels: of a token.
        levels: number of steps in the range.
        symmetric: the range is as large on both sides of zero.
    Returns:
        infinity where fewer than two samples have a token here.
    """
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    present = high.isfinite()
    if int(present.any(1).sum()) < 2:
        return float("inf")
    top, bottom = _of_others(high.amax(1)), -_of_others(-low.amin(1))  # [S]
    cuts = torch.tensor(CUTS, dtype=low.dtype)[:, None]  # [K, 1]
    top, bottom = cuts * top, cuts * bottom  # [K, S]
    steps = (top.clamp(min=0) - bottom.clamp(max=0)) / levels
    over = (high - top[..., None]).clamp(min=0) + (bottom[..., None] - low).clamp(min=0)
    clipped = (over.square() @ weight).sum(1)  # 0 where a sample has none: no value lies outside
    rounded = steps.square() @ (present.to(weight.dtype) @ weight) * n_channels / 12
    return float((clipped + rounded).min())


def _of_others(values: Tensor) -> Tensor:
    """Return the largest value of all other entries for each entry `[S]`, S at least 2."""
    (first, second), where = values.topk(2)
    others = first.expand_as(values).clone()
    others[where[0]] = second
    return others


def group_positions(
    ranges: Tensor, n_channels: int, levels: int, tolerance: float, *, symmetric: bool
) -> Tensor:
    """Return the group of each position `[P]`, int64, rising from 0 on.

    Args:
        ranges: smallest and negated largest value of each token `[S, P, 2]`, infinite where a
            sample has none.
        n_channels: of a token.
        levels: number of steps in a range.
        tolerance: how much a common range may cost, relative to two ranges.
        symmetric: ranges are as large on both sides of zero.
    """
    low, high = ranges[..., 0].double(), -ranges[..., 1].double()  # [S, P]
    present = high.isfinite()
    squares = torch.where(present, high.clamp(min=0) - low.clamp(max=0), 0.0).square()
    mean = squares.sum(0) / present.sum(0).clamp(min=1)
    weight = torch.where(mean > FLAT * mean.max(), 1 / mean, 0.0)

    def cost(start: int, end: int) -> float:
        part = slice(start, end)
        return shared_range_cost(
            low[:, part], high[:, part], weight[part], n_channels, levels, symmetric=symmetric
        )

    ends = [*range(low.shape[1] + 1)]  # group g is ends[g] to ends[g + 1]
    own = [cost(p, p + 1) for p in range(low.shape[1])]
    both = [cost(p, p + 2) for p in range(low.shape[1] - 1)]
    while both:
        ratios = [_ratio(pair, own[g] + own[g + 1]) for g, pair in enumerate(both)]
        best = min(range(len(ratios)), key=ratios.__getitem__)
        if ratios[best] > 1 + tolerance:
            break
        own[best : best + 2] = [both[best]]
        del ends[best + 1], both[best]
        for g in (best - 1, best):
            if 0 <= g < len(both):
                both[g] = cost(ends[g], ends[g + 2])
    sizes = torch.tensor(ends).diff()
    return torch.arange(len(sizes)).repeat_interleave(sizes)


def _ratio(together: float, apart: float) -> float:
    """Return how much more a common range costs; 0 where one of the two is not supported."""
    if apart == float("inf"):
        return 0.0
    return together / apart if apart else (1.0 if not together else float("inf"))

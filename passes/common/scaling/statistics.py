"""What methods know of a site: the range of each channel, rows of the activation, the weights.

Rows are told apart by a hash of what they hold. It says which of two folds a row is in, so that a
scale fitted to one fold can be judged on the other, and which rows are kept: those with the
smallest hashes. So nothing depends on the order of batches or on how they are spread over
processes, and the statistics of two sets of rows merge.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxq.analysis.labels import sizes_of
from fxq.calibrate import Batches, sweep
from fxq.graph import weight_of
from fxq.passes.common.scaling.sites import Part, ScaleSite

N_FOLDS = 2
FEWEST_ROWS = 8  # a fold with fewer rows says nothing
CHUNK_ROWS = 1024


@dataclass(frozen=True, eq=False)
class Consumer:
    """A layer that reads a site's edge.

    Args:
        part: which of its input channels belong to which of the site's.
        low: smallest value per input channel `[K]`, fp32.
        high: largest value per input channel `[K]`, fp32.
        rows: some of the input's rows `[R, K]`, fp32.
    """

    part: Part
    low: Tensor
    high: Tensor
    rows: Tensor

    @property
    def seen(self) -> Tensor:
        """What a range comes from `[R + 2, K]`: the rows, and the smallest and largest values of
        all data."""
        return torch.cat([self.rows, self.low[None], self.high[None]])

    @property
    def weight(self) -> Tensor:
        """The layer's weight `[N, K]`, fp32; a convolution's `[N, K, ...]`, of all groups. Made
        when asked for: a whole model in fp32 may not fit beside the model."""
        return _ungrouped(weight_of(self.part.node).detach().float(), len(self.low))


@dataclass(frozen=True, eq=False)
class Statistics:
    """A site's channels as its consumers see them.

    Args:
        site: which.
        consumers: the layers.
        folds: the statistics of each half of the rows; none for a half itself, or for few rows.
    """

    site: ScaleSite
    consumers: tuple[Consumer, ...]
    folds: tuple["Statistics", ...] = ()

    @cached_property
    def low(self) -> Tensor:
        """Smallest activation per channel `[n_channels]`, fp32."""
        return self.reduce([c.low for c in self.consumers], "amin")

    @cached_property
    def high(self) -> Tensor:
        """Largest activation per channel `[n_channels]`, fp32."""
        return self.reduce([c.high for c in self.consumers], "amax")

    @property
    def amax(self) -> Tensor:
        """Largest magnitude of the activation per channel `[n_channels]`, fp32."""
        return torch.maximum(self.high.abs(), self.low.abs())

    @cached_property
    def weight_amax(self) -> Tensor:
        """Largest magnitude of a weight per channel, over all consumers `[n_channels]`, fp32."""
        return self.reduce([_column_amax(c.weight) for c in self.consumers], "amax")

    def reduce(self, values: Sequence[Tensor], how: Literal["amin", "amax", "sum"]) -> Tensor:
        """Return what the consumers have for each channel of the site, put together.

        Args:
            values: of each consumer, per input channel `[K]`.
            how: what becomes of several of one channel; a sum stacks the consumers.
        Returns:
            `[n_channels]`, in the dtype of the values.
        """
        start = {"amin": torch.inf, "amax": -torch.inf, "sum": 0.0}[how]
        total = torch.full((self.site.n_channels,), start, dtype=values[0].dtype)
        for consumer, value in zip(self.consumers, values, strict=True):
            mine = consumer.part.channels >= 0
            channels = consumer.part.channels[mine]
            total.scatter_reduce_(0, channels, value.cpu()[mine], how)
        return total


def collect(
    gm: GraphModule, data: Batches, sites: Iterable[ScaleSite], n_rows: int
) -> dict[ScaleSite, Statistics]:
    """Run the batches through a graph and return what methods need to know of each site.

    Args:
        gm: the graph the sites were found in.
        data: batches of its inputs.
        sites: which sites.
        n_rows: rows of each edge to keep.
    """
    sites = list(sites)
    parts = [part for site in sites for part in site.consumers]
    found: dict[tuple[Node, int], Tensor] = {}
    for spatial in sorted({spatial_dims(part.node) for part in parts}):
        edges = [_input(p.node) for p in parts if spatial_dims(p.node) == spatial]
        reduce = partial(row_statistics, spatial=spatial, n_rows=n_rows)
        combine = partial(merge_statistics, n_rows=n_rows)
        for edge, value in sweep(gm, data, list(dict.fromkeys(edges)), reduce, combine).items():
            found[edge, spatial] = value
    return {site: _statistics(site, found) for site in sites}


def row_statistics(x: Tensor, *, spatial: int, n_rows: int) -> Tensor:
    """Return the smallest and largest value of each channel in each fold, and some rows.

    Args:
        x: `[..., C]`, or `[B, C, ...]` with `spatial` dimensions at the end.
        spatial: how many dimensions come after the channels.
        n_rows: rows to keep at most.
    Returns:
        `[2 * N_FOLDS + R, C]`, fp32: lows and highs (infinite for an empty fold), then the rows.
    """
    rows = x.detach().float().movedim(x.ndim - 1 - spatial, -1).flatten(0, -2)
    keys = row_keys(rows)
    bounds = []
    for fold in range(N_FOLDS):
        mine = keys % N_FOLDS == fold
        bounds.append(torch.where(mine[:, None], rows, torch.inf).amin(0))
        bounds.append(torch.where(mine[:, None], rows, -torch.inf).amax(0))
    return torch.cat([torch.stack(bounds), rows[keys.argsort(stable=True)[:n_rows]]])


def merge_statistics(a: Tensor, b: Tensor, *, n_rows: int) -> Tensor:
    """Return the statistics of two sets of rows together."""
    n = 2 * N_FOLDS
    low, high = torch.minimum(a[:n:2], b[:n:2]), torch.maximum(a[1:n:2], b[1:n:2])
    rows = torch.cat([a[n:], b[n:]])
    kept = rows[row_keys(rows).argsort(stable=True)[:n_rows]]
    return torch.cat([torch.stack([low, high], 1).flatten(0, 1), kept])


def row_keys(rows: Tensor) -> Tensor:
    """Return a hash of what each row holds `[R]`, int64.

    Args:
        rows: `[R, C]`, fp32.
    """
    multipliers = torch.arange(1, 2 * rows.shape[1], 2, device=rows.device) * 0x9E3779B97F4A7C1
    sums = [  # a few rows at a time: int64 takes twice the memory; sums wrap around
        (part.contiguous().view(torch.int32).to(torch.int64) * multipliers).sum(1)
        for part in rows.split(CHUNK_ROWS)
    ]
    keys = torch.cat(sums)
    keys = (keys ^ (keys >> 31)) * 0x7FB5D329728EA185
    return keys ^ (keys >> 29)


def spatial_dims(layer: Node) -> int:
    """Return how many dimensions of a layer's input come after its channels."""
    return len(sizes_of(layer.args[1])) - 2


def _input(layer: Node) -> Node:
    edge: Any = layer.args[0]
    return edge


def _statistics(site: ScaleSite, found: Mapping[tuple[Node, int], Tensor]) -> Statistics:
    """Split what was found at a site's inputs into folds, and put them together."""
    n = 2 * N_FOLDS
    folds: list[list[Consumer]] = [[] for _ in range(N_FOLDS)]
    together = []
    for part in site.consumers:
        value = found[_input(part.node), spatial_dims(part.node)]
        lows, highs, rows = value[:n:2], value[1:n:2], value[n:]
        together.append(Consumer(part, lows.amin(0), highs.amax(0), rows))
        fold_of = row_keys(rows) % N_FOLDS
        for fold, consumers in enumerate(folds):
            consumers.append(Consumer(part, lows[fold], highs[fold], rows[fold_of == fold]))
    halves = tuple(Statistics(site, tuple(consumers)) for consumers in folds)
    enough = all(len(c.rows) >= FEWEST_ROWS for half in halves for c in half.consumers)
    return Statistics(site, tuple(together), halves if enough else ())


def _ungrouped(weight: Tensor, n_channels: int) -> Tensor:
    """Return a weight with all input channels, zero where a group does not read one."""
    n, per_group = weight.shape[:2]
    groups = n_channels // per_group
    if groups == 1:
        return weight
    full = weight.new_zeros(groups, n // groups, groups, *weight.shape[1:])
    for group, part in enumerate(weight.reshape(groups, n // groups, *weight.shape[1:])):
        full[group, :, group] = part
    return full.reshape(n, n_channels, *weight.shape[2:])


def _column_amax(weight: Tensor) -> Tensor:
    return weight.abs().transpose(0, 1).flatten(1).amax(1)

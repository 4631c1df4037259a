"""TimestepRows: give every static activation a range for each time-step of the data.

What a diffusion model's layers see drifts from step to step, and one range for all steps fits none
of them. Rows go by the time-step's value, so one graph serves all steps, a batch may mix them, and
samplers may skip or repeat some. Time-steps that were not calibrated have the nearest one's row.

Neighbouring time-steps share a row where one has too few samples, and where their ranges are alike:
each range is that of all its time-steps, so it is wider than each one's own, which costs precision.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from fxq.calibrate import NO_DATA, Batches, calibrate, gather
from fxq.dialect import OBSERVED, Dialect, observer_of
from fxq.graph import args_of, shape_of
from fxq.layer import layer_of, set_facts, treat
from fxq.observers import RangeObserver
from fxq.pipeline import DataPass
from fxq.progress import Reported
from fxq.rewriting import copy_graph
from fxq.row_choice import fitting_index, input_node
from fxq.rows import ByTimestep
from fxq.samples import batch_size
from fxq.spec import LayerSpec, MinMax, MovingAverage, Observer


@dataclass(frozen=True)
class TimestepRows(DataPass):
    """Choose rows by time-step. Stands between the passes that observe and `Calibrate`.

    Args:
        widening: how much wider than its own the ranges of any time-step may become by sharing rows
            with its neighbours, mean over all edges: 0.1 costs at most 0.8 dB there. 0 merges
            nothing, and spares a run over the data.
        fewest_samples: of a row; neighbouring time-steps with fewer share one.
        name: of the model's input that holds time-steps.
    """

    widening: float = 0.05
    fewest_samples: int = 4
    name: str = "timestep"

    reads: ClassVar[Dialect] = OBSERVED
    writes: ClassVar[Dialect] = OBSERVED

    def __post_init__(self) -> None:
        if not self.widening >= 0 or not math.isfinite(self.widening):
            raise ValueError(
                f"TimestepRows.widening: expected a finite number >= 0, found {self.widening!r}"
            )
        if type(self.fewest_samples) is not int or self.fewest_samples < 1:
            raise ValueError(
                f"TimestepRows.fewest_samples: expected 1 or more, found {self.fewest_samples!r}"
            )

    def run(self, gm: GraphModule, data: Batches) -> PassResult:
        """Give the observers rows, and say of each layer how many."""
        counts = _timesteps(gm, data, self.name)
        bins = binned(counts, self.fewest_samples)
        groups = [[index] for index in range(len(bins))]
        widening = torch.zeros(len(bins))
        if self.widening and len(bins) > 1:
            ranges = _ranges(gm, data, bounded(bins, self.name))
            groups = merged(ranges, self.widening)
            widening = widened(ranges, groups)
        rows = bounded([[t for k in group for t in bins[k]] for group in groups], self.name)
        did = f"a range for each of {rows.count} rows of {len(counts)} time-steps"
        if float(widening.max()) > 0:
            did += f", wider than their own by {float(widening.mean()):.1%} on average"
        with_rows(gm, rows, type(self).__name__, did)
        if isinstance(data, Reported):
            data.report(f"{type(self).__name__}: {did}")
        return PassResult(gm, modified=True)


def binned(counts: Counter[float], fewest: int) -> list[list[float]]:
    """Return time-steps in ascending order, in bins of neighbours that have enough samples.

    Args:
        counts: samples of each time-step.
        fewest: samples of a bin, where there are so many at all.
    """
    bins: list[list[float]] = [[]]
    for timestep in sorted(counts):
        if sum(counts[t] for t in bins[-1]) >= fewest:
            bins.append([])
        bins[-1].append(timestep)
    if len(bins) > 1 and sum(counts[t] for t in bins[-1]) < fewest:
        last = bins.pop()
        bins[-1] += last
    return bins


def bounded(bins: Sequence[Sequence[float]], name: str) -> ByTimestep:
    """Return a row for each of ascending bins; the bounds are half-way between them."""
    pairs = pairwise(bins)
    levels = tuple((before[-1] + after[0]) / 2 for before, after in pairs)
    return ByTimestep(levels, name, known=True)


class Ranges(NamedTuple):
    """Smallest and largest values of each bin and each range, `[bins, ranges]`."""

    low: Tensor
    high: Tensor


def merged(ranges: Ranges, widening: float) -> list[list[int]]:
    """Return bins in as few groups of neighbours as there can be such that no bin's ranges become
    wider by more than `widening`, mean over the ranges.

    A part of a group is never wider than the group, so the longest group that starts at the first
    bin belongs to the best division.
    """
    groups: list[list[int]] = []
    for index in range(len(ranges.low)):
        longer = [*groups[-1], index] if groups else [index]
        if groups and bool((_widened(ranges, longer) <= widening).all()):
            groups[-1] = longer
        else:
            groups.append([index])
    return groups


def widened(ranges: Ranges, groups: Sequence[Sequence[int]]) -> Tensor:
    """Return by how much the ranges of each bin become wider in its group, mean over the ranges
    `[bins]`: 0.05 for 5 %."""
    return torch.cat([_widened(ranges, group) for group in groups])


def _widened(ranges: Ranges, group: Sequence[int]) -> Tensor:
    low, high = ranges.low[list(group)].double(), ranges.high[list(group)].double()
    own, common = high - low, high.amax(0) - low.amin(0)
    # A range that is empty, of zeros alone, loses nothing.
    growth = torch.where(own > 0, (common / own).log2(), 0.0)
    return torch.exp2(growth.mean(1)) - 1


def _timesteps(gm: GraphModule, data: Batches, name: str) -> Counter[float]:
    """Return how many samples of each time-step the data of all processes have."""
    inputs = gm.graph.find_nodes(op="placeholder")
    position = inputs.index(input_node(gm, name, "TimestepRows.name"))
    counts: Counter[float] = Counter()
    for batch in data:
        values = batch[position].flatten().float().tolist()
        for value in values:
            counts[value] += batch_size(batch) // len(values)
    total = sum(gather(counts), Counter[float]())
    if not total:
        raise ValueError(NO_DATA)
    return total


def _ranges(gm: GraphModule, data: Batches, rows: ByTimestep) -> Ranges:
    """Return the ranges of each row at each edge, with zero, which every range holds."""
    copied = copy_graph(gm)
    observers = with_rows(copied, rows, rule=MinMax())
    copied.recompile()
    calibrate(copied, data, observers=observers)
    low = torch.cat([o.low.flatten(1).cpu() for o in observers], 1).clamp(max=0)
    high = torch.cat([o.high.flatten(1).cpu() for o in observers], 1).clamp(min=0)
    spread = torch.cat([torch.full((o.low[0].numel(),), not o.spec.symmetric) for o in observers])
    reach = torch.maximum(-low, high)
    return Ranges(torch.where(spread, low, -reach), torch.where(spread, high, reach))


def with_rows(
    gm: GraphModule, rows: ByTimestep, by: str = "", did: str = "", *, rule: Observer | None = None
) -> list[RangeObserver]:
    """Give every observer of one range a range for each row, in a graph that is not calibrated.

    Args:
        gm: an observed graph.
        rows: what chooses.
        by: the pass that says of layers what it `did`; says nothing unless given.
        did: for the layers' records.
        rule: how the ranges are found; as before unless given.
    Returns:
        the new observers.
    """
    made: list[RangeObserver] = []
    for node in list(gm.graph.nodes):
        old = observer_of(gm, node)
        if old is None or old.spec.rows is not None:
            continue
        edge, layers = args_of(node)[0], [n for n in node.users if layer_of(n).is_pending]
        index, why = fitting_index(gm, rows, edge)
        if isinstance(old.spec.observer, MovingAverage) and rule is None:
            index, why = None, "a moving average has one range"
        for layer in layers if by else ():
            why = did if index else f"one range for all time-steps: {why}"
            treat(layer, by, why, why)
        if index is None:
            continue
        spec = replace(old.spec, rows=rows, observer=rule or old.spec.observer)
        made.append(RangeObserver(spec, shape_of(edge), old.name))
        gm.add_submodule(node.target, made[-1])
        node.args = (edge, index)
        for layer in layers:
            before = layer_of(layer).spec
            assert before is not None
            set_facts(layer, spec=LayerSpec(spec, before.weight))
    return made

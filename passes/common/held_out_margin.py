"""HeldOutMargin: ranges as wide as data that they were not made from ask for.

A range from a few samples is too narrow for the next one where the layer before it reaches far in
few of them, and wide enough elsewhere; a margin for all costs codes everywhere. So the range of
each half of the calibration data is tried on the other half, with margins,

    error(f) = sum over both halves of |x - Q(x; (1 + f) [low, high] of the other half)|^2

and the smallest margin of least error is what the range of all data gets. Errors come from
histograms (`fxq.histogram`), so that they are the same over batches in any order and over any
number of processes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar

import torch
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from fxq.calibrate import Batches, calibrate
from fxq.dialect import OBSERVED, Dialect
from fxq.histogram import Density, quantization_error
from fxq.layer import treat
from fxq.observers import RangeObserver
from fxq.passes.common.convert import pending_layers
from fxq.passes.common.whole import halves_of
from fxq.pipeline import DataPass
from fxq.rewriting import copy_graph
from fxq.spec import MeanSquaredError, MinMax


@dataclass(frozen=True)
class HeldOutMargin(DataPass):
    """Widen static ranges by what held-out data ask for. Stands after `Calibrate`.

    It is for ranges of all values seen (`MinMax`), one for all rows: those of other rules clip on
    purpose. Where a process has a single batch that cannot be cut in two, nothing is held out and
    nothing widened.

    Args:
        margins: to try, relative to the range, rising from 0.
    Raises:
        ValueError: other margins.
    """

    margins: tuple[float, ...] = (0.0, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)

    reads: ClassVar[Dialect] = OBSERVED
    writes: ClassVar[Dialect] = OBSERVED

    def __post_init__(self) -> None:
        rising = all(a < b < math.inf for a, b in pairwise(self.margins))
        if self.margins[:1] != (0.0,) or not rising:
            raise ValueError(
                f"HeldOutMargin.margins: expected finite numbers rising from 0.0, found "
                f"{self.margins}"
            )

    def run(self, gm: GraphModule, data: Batches) -> PassResult:
        """Run every batch once more, and note on the layers what their ranges gained."""
        observers = {
            name: module
            for name, module in gm.named_modules()
            if isinstance(module, RangeObserver)
            and isinstance(module.spec.observer, MinMax)
            and module.spec.rows is None
            and module.count
        }
        halves = halves_of(gm, data)
        if not observers or not halves.held_out:
            return PassResult(gm, modified=False)
        seen = [_seen(gm, observers, half) for half in (halves.fit, halves.judge)]
        chosen: dict[str, float] = {}
        for name, observer in observers.items():
            margin = best_margin([half[name] for half in seen], self.margins)
            if margin:
                low, high = observer.range()
                observer.settle(low * (1 + margin), high * (1 + margin))
                chosen[name] = margin
        for layer, _ in pending_layers(gm):
            name = str(getattr(layer.args[0], "target", ""))
            if name in chosen:
                treat(layer, type(self).__name__, f"range {chosen[name]:.0%} wider")
        return PassResult(gm, modified=bool(chosen))


def best_margin(halves: Sequence[RangeObserver], margins: Sequence[float]) -> float:
    """Return the margin of least error; of equals, the smallest.

    Args:
        halves: two observers with histograms, each of what one half of the data showed.
        margins: relative to the range of either half, which is judged on the other.
    """
    if not all(half.count for half in halves):
        return margins[0]
    errors = torch.zeros(len(margins), dtype=torch.float64)
    for fitted, judged in zip(halves, reversed(halves), strict=True):
        density = Density.of(judged.histogram, judged.low, judged.high, judged.bits)
        weight = density.counts.sum(1)
        for index, margin in enumerate(margins):
            low, high = fitted.low * (1 + margin), fitted.high * (1 + margin)
            error = quantization_error(density, low, high, fitted.spec, 2.0)
            errors[index] += float((error * weight).sum())
    return margins[int(errors.argmin())]


def _seen(
    gm: GraphModule, observers: dict[str, RangeObserver], data: Batches
) -> dict[str, RangeObserver]:
    """Return what some batches show at the observed edges, as histograms; `gm` stays as it is."""
    copied = copy_graph(gm)
    watches = {name: _with_histogram(observer) for name, observer in observers.items()}
    for name, watch in watches.items():
        copied.set_submodule(name, watch)
    calibrate(copied, data, observers=list(watches.values()))
    return watches


def _with_histogram(observer: RangeObserver) -> RangeObserver:
    """Return an observer of the same edge that counts values, and has seen none."""
    spec = replace(observer.spec, observer=MeanSquaredError())
    widths = zip(observer.scale_shape, observer.block, strict=True)
    shape = [size * max(1, block) for size, block in widths]  # a dimension with one scale: any size
    return RangeObserver(spec, shape, observer.name).to(observer.low.device)

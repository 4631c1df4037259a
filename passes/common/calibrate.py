"""Calibrate: run the batches through an observed graph, so that every observer knows its range."""

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from fxq.calibrate import calibrate, warn_of_missing_data
from fxq.checkpoint import Checkpoint
from fxq.dialect import OBSERVED, Dialect
from fxq.observers import RangeObserver
from fxq.pipeline import Batches, DataPass
from fxq.row_choice import counted_steps


@dataclass(frozen=True)
class Calibrate(DataPass):
    """Feed the observers. Under `torch.distributed` each process gives its own batches, and all end
    with the same ranges."""

    reads: ClassVar[Dialect] = OBSERVED
    writes: ClassVar[Dialect] = OBSERVED

    def run(self, gm: GraphModule, data: Batches) -> PassResult:
        """Run every batch once. The graph is unchanged, the observers in it are not."""
        return self.resume(gm, data, None)

    def resume(self, gm: GraphModule, data: Batches, checkpoint: Checkpoint | None) -> PassResult:
        """Likewise, but each batch once in all calls with the same checkpoint."""
        observers = [m for m in gm.modules() if isinstance(m, RangeObserver)]
        with counted_steps(gm, data) as batches:
            seen = calibrate(gm, batches, observers=observers, checkpoint=checkpoint)
        warn_of_missing_data(observers)
        return PassResult(gm, modified=bool(observers) and seen > 0)

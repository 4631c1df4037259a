"""Calibrate: run the batches through an observed graph, so that every observer knows its range."""

import warnings
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from fxq.calibrate import calibrate
from fxq.checkpoint import Checkpoint
from fxq.dialect import OBSERVED, Dialect
from fxq.errors import FxqWarning
from fxq.observers import RangeObserver
from fxq.pipeline import Batches, DataPass


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
        seen = calibrate(gm, data, observers=observers, checkpoint=checkpoint)
        if zeros := [observer.name for observer in observers if observer.saw_only_zeros]:
            warnings.warn(
                f"calibration saw only zeros at {', '.join(zeros)}: their range is not known and "
                "their scale is 1; give data that reaches them, or leave them float with overrides",
                FxqWarning,
                stacklevel=2,
            )
        if missed := {row for observer in observers for row in observer.rows_without_data}:
            warnings.warn(
                f"calibration reached no value in rows {_listing(missed)}: the nearest row that it "
                "reached stands for each; give data of all time-steps, steps or positions",
                FxqWarning,
                stacklevel=2,
            )
        return PassResult(gm, modified=bool(observers) and seen > 0)


def _listing(rows: set[int]) -> str:
    first = sorted(rows)[:8]
    return ", ".join(map(str, first)) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")

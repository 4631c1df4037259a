"""LeaveFloat: the few layers that cost the results most, for the work they are, stay float.

A layer's error relative to its own output does not tell what it costs: on the way to the results
some errors grow, and some vanish. `sensitivity.errors_at_results` follows them all with a few
backward passes. In an ImageNet ViT-Ti at 8 bits three layers with 3 % of the multiply-adds make a
sixth of the error of typical photographs, and most of that of the worst.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from fxq.account import flops_of
from fxq.calibrate import NO_DATA, Batches, all_reduce, gather, n_processes
from fxq.dialect import OBSERVED, Dialect, observer_of
from fxq.errors import FxqWarning
from fxq.layer import Skip, treat
from fxq.passes.common.convert import Convert, pending_layers
from fxq.passes.common.sensitivity import errors_at_results
from fxq.passes.common.student import without_observers
from fxq.passes.common.whole import pieces
from fxq.pipeline import DataPass
from fxq.rewriting import copy_graph, erase_dead


@dataclass(frozen=True)
class LeaveFloat(DataPass):
    """Leave layers float whose quantization costs much more than their share of the work. Stands
    after `Calibrate`, right before `Convert`.

    Where no gradient can be had (an operator that has none), every layer is quantized, and a
    warning says so.

    Args:
        most_work: which part of the model's floating-point operations may stay float at most.
        least_gain: a layer's share of the sum of all layers' errors must be this many times its
            share of the work.
        n_samples: of the data that are judged on, in this process.
        n_directions: backward passes for each.
        seed: of the directions.
    Raises:
        ValueError: `most_work` is not from 0 to 1, or a number that must be positive is not.
    """

    most_work: float = 0.04
    least_gain: float = 4.0
    n_samples: int = 32
    n_directions: int = 2
    seed: int = 0

    reads: ClassVar[Dialect] = OBSERVED
    writes: ClassVar[Dialect] = OBSERVED

    def __post_init__(self) -> None:
        if not 0 <= self.most_work <= 1:
            raise ValueError(f"LeaveFloat.most_work: expected 0 to 1, found {self.most_work}")
        for name in ("least_gain", "n_samples", "n_directions"):
            if not (found := getattr(self, name)) > 0:
                raise ValueError(f"LeaveFloat.{name}: expected a positive number, found {found}")

    def run(self, gm: GraphModule, data: Batches) -> PassResult:
        """Judge every layer, and take the quantizers from those that cost too much."""
        layers = [layer for layer, _ in pending_layers(gm)]
        if not layers:
            return PassResult(gm, modified=False)
        errors = self._errors(gm, [layer.name for layer in layers], data)
        total = sum(flops_of(node) for node in gm.graph.nodes)
        work = [flops_of(layer) / total for layer in layers]
        chosen = costly(errors, work, self.most_work, self.least_gain)
        for layer, error, part in [(layers[i], errors[i], work[i]) for i in chosen]:
            for edge in layer.all_input_nodes:
                if observer_of(gm, edge) is not None:
                    layer.replace_input_with(edge, edge.all_input_nodes[0])
            share = error / sum(errors)
            why = f"left float: {share:.0%} of the error in the results, {part:.1%} of the work"
            treat(layer, type(self).__name__, Skip(why, intended=True), spec=None)
        erase_dead(gm)
        return PassResult(gm, modified=bool(chosen))

    def _errors(self, gm: GraphModule, names: Sequence[str], data: Batches) -> list[float]:
        """Return the error in the results that each layer makes alone; zeros where it is not
        known."""
        quantized = Convert().run(copy_graph(gm)).graph_module
        generator = torch.Generator().manual_seed(self.seed)
        parts = list(pieces(gm, data, self.n_samples))
        sums, why = torch.zeros(len(names), dtype=torch.float64), ""
        try:
            sums = errors_at_results(
                without_observers(gm), quantized, parts, names, self.n_directions, generator
            )
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # what autograd raises, NotImplementedError included
            why = str(error).partition("\n")[0]
        if not any(gather(bool(parts))):
            raise ValueError(NO_DATA)
        why = next(filter(None, gather(why)), "")  # of any process: all leave the same layers
        if n_processes() > 1:
            sums = all_reduce(sums, "SUM")
        errors: list[float] = sums.tolist()
        if not why and not all(math.isfinite(error) for error in errors):
            why = "a gradient or a quantized value is not finite"
        if why:
            warnings.warn(
                f"{type(self).__name__}: every layer is quantized; which of them cost the results "
                f"most is not known: {why}",
                FxqWarning,
                stacklevel=2,
            )
            return [0.0] * len(names)
        return errors


def costly(
    errors: Sequence[float], work: Sequence[float], most_work: float, least_gain: float
) -> list[int]:
    """Return which layers to leave float: those with most error for their work first.

    Args:
        errors: of each layer alone.
        work: each layer's share of all work.
        most_work: of those that are chosen, together.
        least_gain: of the share in the errors to that in the work.
    """
    total, spent, chosen = sum(errors), 0.0, []
    dense = [k for k, error in enumerate(errors) if error > least_gain * work[k] * total]
    for k in sorted(dense, key=lambda k: errors[k] / work[k] if work[k] else math.inf)[::-1]:
        if spent + work[k] <= most_work:
            spent += work[k]
            chosen.append(k)
    return chosen

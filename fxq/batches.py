"""Calibration batches as a user gives them, as the graph's inputs."""

import itertools
import operator
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from fxq.calibrate import n_processes
from fxq.capturing import Captured
from fxq.errors import FxqWarning
from fxq.numerics import is_inexact
from fxq.rewriting import copy_graph
from fxq.samples import Samples
from fxq.signature import RETURN_DICT, Leaf, split_inputs
from fxq.writes import as_stored

FAR_APART = 3.0  # pixels from 0 to 1 have a quarter of the deviation that normalised ones have


def checked_device(device: torch.device | str, what: str) -> torch.device:
    """Return a device that is there, as tensors on it say it ("cuda" becomes "cuda:0").

    Args:
        device: as a caller gives it.
        what: the argument's name, for the error.
    Raises:
        ValueError: no such device here, or one without memory.
    """
    try:
        found = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{what}: expected cpu or cuda, found {device!r}: {reason}") from error
    if found.type == "meta":
        raise ValueError(f"{what}: expected cpu or cuda, found {device!r}, which has no values")
    return found


def device_of(model: nn.Module | ExportedProgram) -> torch.device | None:
    """Return the device of a model's first tensor, None where it has none."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return next((tensor.device for tensor in tensors), None)


class CheckedBatches:
    """The user's batches as the graph's inputs, checked one by one, and iterable again.

    Where the model has state, each batch comes with the state that the float model has after the
    batches before it, so every pass sees the same inputs, however often it iterates.
    """

    def __init__(
        self,
        captured: Captured,
        data: Iterable[Any],
        device: torch.device | None,
        example: Sequence[Any] | None = None,
    ) -> None:
        if not isinstance(data, Iterable):
            raise TypeError(
                f"data: expected batches to iterate over, found {type(data).__name__}; give a list "
                "or a data loader"
            )
        self.signature, self.device, self.told = captured.signature, device, False
        self.initial_state = list(captured.state.values())
        self.float_graph = copy_graph(captured.graph_module)  # passes rewrite the other
        self.data = list(data) if isinstance(data, Iterator) else data
        self.example, self.judged = example, False

    def _without_labels(self, batch: Any) -> Any:
        """Return a batch of a data loader without what the model does not take: what stands after
        its only input, and entries of other names beside all that it was captured with."""
        if isinstance(batch, Mapping) and set(self.signature.given) <= {
            *batch, *self.signature.defaults
        }:  # fmt: skip
            known = (*self.signature.known, RETURN_DICT)
            extra = [name for name in batch if name not in known]
            if extra:
                self._tell(f"entries of other names are left out: {extra}")
            return {name: value for name, value in batch.items() if name not in extra}
        if not isinstance(batch, tuple | list) or len(batch) < 2 or not self.signature.given:
            return batch
        others = self.signature.leaves[self.signature.in_spec.child(0).num_leaves :]
        tensors_only = all(isinstance(value, Tensor) for value in batch[1:])
        if any(isinstance(leaf, Leaf) for leaf in others) or (others and not tensors_only):
            return batch
        extra = [list(v.shape) if isinstance(v, Tensor) else type(v).__name__ for v in batch[1:]]
        only = self.signature.given[0]
        self._tell(
            f"the model takes {only!r} alone; what batches have after it is left out: {extra}"
        )
        return tuple(batch[:1])

    def _tell(self, what: str) -> None:
        if not self.told:
            self.told = True
            _warn(what)

    def __length_hint__(self) -> int:
        return operator.length_hint(self.data)

    def __iter__(self) -> Iterator[Sequence[Any]]:
        state, seen = self.initial_state, None if self.judged else Samples()
        for index, batch in enumerate(self.data):
            args, kwargs = split_inputs(self._without_labels(batch))
            leaves = self.signature.flatten(args, kwargs, f"data batch {index}", self.device)
            for leaf, value in zip(self.signature.tensors, leaves, strict=True):
                if is_inexact(value) and (bad := int((~value.isfinite()).sum())):
                    raise ValueError(
                        f"data batch {index}, input {leaf.name!r}: expected finite values, found "
                        f"{bad} NaN or Inf; "
                        "remove or repair this batch"
                    )
            inputs = [*leaves, *state]
            if seen is not None:
                seen.add(inputs)
            yield inputs
            if state:
                with torch.no_grad():
                    state = self.signature.next_state(inputs, self.float_graph(*inputs))
        if seen is not None and seen.count and not self.judged:
            self.judged = True
            self._judge(seen)

    def _judge(self, seen: Samples) -> None:
        """Warn of data that say little of other inputs."""
        if self.signature.tensors and not seen.differ and n_processes() == 1:
            many = "one sample" if seen.count == 1 else f"{seen.count} samples that are all alike"
            _warn(f"expected samples that differ, found {many}: ranges and factors found on them "
                  "may not hold for any other; give some tens of typical inputs")  # fmt: skip
        if self.example is None:
            return
        example = Samples([self.example])
        for i, leaf in enumerate(self.signature.tensors):
            least, most = seen.spreads.get(i, (0.0, 0.0))
            spread, _ = example.spreads.get(i, (0.0, 0.0))
            if 0 < spread < least / FAR_APART or spread > most * FAR_APART > 0:
                _warn(f"the example's values of {leaf.name!r} have a standard deviation of "
                      f"{spread:.3g}, those of batches {least:.3g} to {most:.3g}: are both "
                      "normalised alike? Ranges come from the data")  # fmt: skip


def _warn(what: str) -> None:
    warnings.warn(f"data: {what}", FxqWarning, stacklevel=3)


@dataclass(frozen=True)
class StoredBatches:
    """Batches of a graph that keeps buffers of the model in a form of its own.

    Args:
        gm: the graph.
        data: batches with these buffers as the model has them.
    """

    gm: GraphModule
    data: Iterable[Sequence[Any]]

    def __length_hint__(self) -> int:
        return operator.length_hint(self.data)

    def __iter__(self) -> Iterator[Sequence[Any]]:
        return (as_stored(self.gm, inputs) for inputs in self.data)

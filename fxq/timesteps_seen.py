"""Rows by time-step that no step reaches, told once.

One pipeline counts its time-steps from 1000 down, another from 1. Levels (`fxq.rows.ByTimestep`) in
the other's unit choose the same row at every step, and nothing fails. So the first steps are
watched, until every row has been chosen once.

A run of a sampler falls from much noise to little. After a few steps that fell, rows above all that
were chosen are out of its reach; rows below them may still come, until the time-step rises again
and the run is over. Calls in any other order tell nothing.

The device is not waited for, but once for levels that are on it: time-steps are copied while it
works, and looked at by the first call that finds them there.
"""

import warnings
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxq.errors import FxqWarning
from fxq.graph import RUNTIME_STATE, args_of, input_name, is_op, tensor_of
from fxq.operators import COPIES
from fxq.row_choice import LEVELS

aten = torch.ops.aten
MIN_STEPS = 4  # of a run: as many as few-step models take


@dataclass
class TimestepsSeen:
    """What time-steps a graph has been called with, and which rows they chose.

    Args:
        name: of the input that holds time-steps.
        given: its index among the inputs.
        levels: bounds of the rows, or the index of the input that holds them.
    """

    name: str
    given: int
    levels: Tensor | int
    done: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.bounds: Tensor | None = None  # of rows, on the CPU
        self.arriving = deque[tuple[Tensor, torch.cuda.Event | None]]()
        self.rows: set[int] = set()
        self.lowest, self.highest = float("inf"), float("-inf")
        self.last, self.n_steps = float("inf"), 0  # of the run

    def __reduce__(self) -> Any:
        """A copy of a program starts anew: what is under way to the CPU is this one's."""
        return type(self), (self.name, self.given, self.levels)

    def __call__(self, inputs: Sequence[Any]) -> None:
        """Note the inputs of a call; warn where rows are out of reach."""
        value = inputs[self.given]
        if self.done or type(value) is not Tensor or value.is_meta or _is_being_captured(value):
            return
        if self.bounds is None:  # once
            given = self.levels if isinstance(self.levels, Tensor) else inputs[self.levels]
            self.bounds = given.detach().cpu()
        self.arriving.append(_sent(value.detach()))
        while self.arriving and not self.done and _is_there(self.arriving[0][1]):
            self._note(self.arriving.popleft()[0].float().flatten(), self.bounds)

    def _note(self, values: Tensor, bounds: Tensor) -> None:
        now, steps = float(values.max()), self.n_steps
        if now > self.last and steps >= MIN_STEPS:  # the run is over
            self._tell(bounds, steps, lowest=0)
            return
        self.n_steps = 1 if now > self.last else steps + (now < self.last)
        self.last = now
        self.rows |= set(torch.bucketize(values, bounds).tolist())
        self.lowest = min(self.lowest, float(values.min()))
        self.highest = max(self.highest, now)
        self.done = len(self.rows) > len(bounds)
        if self.n_steps >= MIN_STEPS and max(self.rows) < len(bounds):
            self._tell(bounds, self.n_steps, lowest=max(self.rows) + 1)

    def _tell(self, bounds: Tensor, steps: int, lowest: int) -> None:
        """Warn of the rows from `lowest` on that no step has chosen."""
        levels = bounds.tolist()
        missing = sorted(set(range(lowest, len(levels) + 1)) - self.rows)
        self.done = True
        warnings.warn(
            f"input {self.name!r}: expected time-steps in every row of ByTimestep(levels="
            f"{tuple(levels)}), found {self.lowest:g} to {self.highest:g} in a run of {steps} "
            f"steps, and none {' or '.join(_range_of(row, levels) for row in missing)}; levels are "
            "in the unit of this input: choose them among the values that it has",
            FxqWarning,
            stacklevel=2,
        )


def timesteps_to_see(gm: GraphModule) -> list[TimestepsSeen]:
    """Return what is to be called with the inputs of every call of a graph: one for each input that
    rows go by. A time-step that the graph computes is not watched.

    Args:
        gm: canonical or lowered, after its recipe, saved and loaded or as Dynamo gives it.
    """
    inputs = gm.graph.find_nodes(op="placeholder")
    found = []
    for node in gm.graph.nodes:
        if not is_op(node, aten.bucketize.Tensor) or not _is_levels(args_of(node)[1]):
            continue
        given, levels = args_of(node)[:2]
        while is_op(given, *COPIES, aten.select.int):
            given = args_of(given)[0]
        if given in inputs:
            bounds = inputs.index(levels) if levels in inputs else tensor_of(gm, levels)
            found.append(TimestepsSeen(input_name(given), inputs.index(given), bounds))
    return found


def _is_levels(node: Any) -> bool:
    """Tell whether a node is a buffer of levels that `fxq.row_choice` made, or stands for one."""
    if not isinstance(node, Node):
        return False
    name = node.meta.get("source", "") if node.op == "placeholder" else node.target
    *path, last = str(name).split(".")
    return RUNTIME_STATE in path and last.startswith(LEVELS.rpartition(".")[2])


def _is_being_captured(value: Tensor) -> bool:
    """Tell whether the call becomes part of a CUDA graph of the user's, which would replay it."""
    return value.is_cuda and torch.cuda.is_current_stream_capturing()


def _sent(value: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Return a copy on the CPU and what happens when it is there, None where it is."""
    if not value.is_cuda:
        return value.cpu(), None
    event = torch.cuda.Event()
    copied = value.to("cpu", non_blocking=True)  # to pinned memory
    event.record(torch.cuda.current_stream(value.device))
    return copied, event


def _is_there(event: torch.cuda.Event | None) -> bool:
    return event is None or event.query()


def _range_of(row: int, levels: Sequence[float]) -> str:
    """Return the time-steps of a row in words."""
    if row == 0:
        return f"up to {levels[0]:g}"
    above = f"above {levels[row - 1]:g}"
    return above if row == len(levels) else f"{above} up to {levels[row]:g}"

"""Trajectories: calls of one denoising run after another, put in order by their time-step.

A call belongs to the step whose time-step it was given, by value: a sampler may call a step twice,
and guidance may be two calls or a batch twice as large. A trajectory is one row of the batch
through all steps of a run.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxq.errors import MissingInputError, did_you_mean
from fxq.numerics import is_inexact

Call = Any  # a tuple of arguments, or a dict of all of them by name


@dataclass(frozen=True, eq=False)
class Trajectories:
    """What was recorded, by run and step.

    Args:
        calls: as they were given.
        timesteps: values, in the order in which the sampler goes through them.
        paths: for each run, and for each of the calls that guidance makes at a step, the number of
            the call at each step.
        rows: of each path's batch.
    """

    calls: Sequence[Call] = field(repr=False)
    timesteps: tuple[float, ...]
    paths: tuple[tuple[int, ...], ...] = field(repr=False)
    rows: tuple[int, ...] = field(repr=False)

    @property
    def count(self) -> int:
        """How many trajectories there are."""
        return sum(self.rows)

    def place(self, trajectory: int) -> tuple[int, int]:
        """Return a trajectory's path and its row in it."""
        for path, rows in enumerate(self.rows):
            if trajectory < rows:
                return path, trajectory
            trajectory -= rows
        raise IndexError(f"expected a trajectory below {self.count}")

    def rows_of(self, call: int, rows: Sequence[int]) -> Call:
        """Return some rows of a call, as a call; what is no batch in it is kept whole.

        Raises:
            ValueError: NaN or Inf in these rows.
        """
        whole = self.calls[call]
        size = batch_of(whole)
        chosen = torch.tensor(rows)

        def part(x: Tensor) -> Tensor:
            batched = x.ndim > 0 and len(x) == size
            return x.index_select(0, chosen.to(x.device)) if batched else x.clone()

        found = pytree.tree_map_only(Tensor, part, whole)
        for where, leaf in pytree.tree_leaves_with_path(found):
            if is_inexact(leaf) and not leaf.isfinite().all():
                raise ValueError(
                    f"calls: expected finite values, found NaN or Inf in {pytree.keystr(where)} of "
                    f"{self.named(call)}; repair the pipeline, or leave out its run"
                )
        return found

    def named(self, call: int) -> str:
        """Return how messages call a call."""
        number = getattr(self.calls, "steps", range(len(self.calls)))[call]
        return f"call {number}"


def trajectories(module: nn.Module, calls: Sequence[Call], timestep: str) -> Trajectories:
    """Put calls in order.

    Args:
        module: which was called.
        calls: all of one or more runs, in the order in which they were made.
        timestep: the name of its argument that says the step.
    Raises:
        ValueError: no calls, not all of a run, one step only, runs of different steps or batches.
        MissingInputError: no such argument.
    """
    _check_complete(calls)
    values = [timestep_of(module, calls[i], timestep, i) for i in range(len(calls))]
    runs = _runs(values)
    steps = [*runs[0]]
    paths, rows = [], []
    for index, run in enumerate(runs):
        if [*run] != steps:
            raise ValueError(
                f"calls: expected the {len(steps)} time-steps of the first run in each, found "
                f"{len(run)} others in run {index}: {_listed([*run])} and not {_listed(steps)}; "
                "record whole runs of one sampler"
            )
        # The first calls of a step, as many as every step has: one, or those of guidance.
        for turn in range(min(map(len, run.values()))):
            path = tuple(numbers[turn] for numbers in run.values())
            paths.append(path)
            rows.append(_rows_of(calls, path))
    return Trajectories(calls, tuple(steps), tuple(paths), tuple(rows))


def _check_complete(calls: Sequence[Call]) -> None:
    made = getattr(calls, "n_calls", len(calls))
    if not calls:
        raise ValueError("calls: expected those of a denoising run, found none")
    if made != len(calls):
        raise ValueError(
            f"calls: expected every call of each run, found {len(calls)} of {made}; record with "
            f"max_calls={made} and enough max_bytes, on disk (path=) if memory is short"
        )


def _rows_of(calls: Sequence[Call], path: Sequence[int]) -> int:
    sizes = {batch_of(calls[number]) for number in path}
    if len(sizes) > 1:
        raise ValueError(
            f"calls: expected one batch size through a run, found {sorted(sizes)}; record without "
            "what changes it on the way"
        )
    return sizes.pop()


def _runs(values: Sequence[float]) -> list[dict[float, list[int]]]:
    """Split calls into runs, each a mapping from the time-step to its calls' numbers. Time-steps go
    one way; a step the other way begins a new run."""
    moves = [b - a for a, b in pairwise(values)]
    direction = sum((move > 0) - (move < 0) for move in moves)
    if len({*values}) < 2:
        raise ValueError(
            f"calls: expected several time-steps to choose among, found {values[0]:g} alone; "
            "calibrate with the calls as they are"
        )
    sign = 1 if direction > 0 else -1
    runs: list[dict[float, list[int]]] = [{}]
    for number, value in enumerate(values):
        if number and moves[number - 1] * sign < 0:
            runs.append({})
        runs[-1].setdefault(value, []).append(number)
    return runs


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values[:4]) + (", ..." if len(values) > 4 else "")


def named_arguments(module: nn.Module, call: Call) -> Mapping[str, Any]:
    """Return a call's arguments by name."""
    if isinstance(call, dict):
        return call
    arguments = call if isinstance(call, tuple | list) else (call,)
    return inspect.signature(module.forward).bind(*arguments).arguments


def timestep_of(module: nn.Module, call: Call, name: str, number: int) -> float:
    """Return the value of a call's time-step.

    Raises:
        MissingInputError: it has no such argument.
        ValueError: it is not one finite number for the whole batch.
    """
    arguments = named_arguments(module, call)
    if name not in arguments:
        raise MissingInputError(
            f"timestep: expected an argument {name!r} in call {number}; "
            f"{did_you_mean(name, arguments)}"
        )
    given = torch.as_tensor(arguments[name]).double().flatten()
    found = given.unique()
    if len(found) != 1 or not bool(found.isfinite().all()):
        raise ValueError(
            f"timestep: expected one finite time-step for the whole batch, found {given.tolist()} "
            f"in call {number}; record a pipeline that draws one step at a time"
        )
    return float(found)


def batch_of(call: Call) -> int:
    """Return the batch size of a call: of the first tensor in it that has one."""
    for leaf in pytree.tree_leaves(call):
        if isinstance(leaf, Tensor) and leaf.ndim > 1:
            return len(leaf)
    raise ValueError("calls: expected a tensor with a batch in each, found none")

"""Train one block: the quantized block, on what the quantized blocks before it give, towards what
the float block gives on what the float blocks before it give."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.optim import Optimizer

from fxq.calibrate import all_reduce, n_processes
from fxq.passes.common.reconstruction.blocks import Block
from fxq.passes.common.reconstruction.frontier import Frontier
from fxq.passes.common.reconstruction.losses import BlockLoss, is_float, total_error
from fxq.passes.common.reconstruction.methods import Learned, Method
from fxq.passes.common.reconstruction.row_adam import RowAdam
from fxq.progress import Task
from fxq.rewriting import with_outputs

N_JUDGEMENTS = 4  # of a block, after its first


@dataclass(frozen=True)
class Outcome:
    """What training a block came to.

    Args:
        learned: what is kept, None where nothing was better than what calibration had found.
        before: error of the block's outputs on the rows that judge, relative to their power, as
            calibrated.
        after: likewise, of what is kept.
    """

    learned: Learned | None
    before: float
    after: float


@dataclass(frozen=True, eq=False)
class Course:
    """How all blocks train.

    Args:
        method: what learns.
        loss: what it learns for.
        inputs_share: share of the input's elements that come from the quantized blocks in each
            step; the others are the float model's.
        rows_per_step: samples of a step, of as many batches as that takes.
        weights: of the elements of nodes, by name.
        judges: numbers of the batches that judge.
        pupils: numbers of those that are learned from.
    """

    method: Method
    loss: BlockLoss
    inputs_share: float
    rows_per_step: int
    weights: Mapping[str, Tensor]
    judges: Sequence[int]
    pupils: Sequence[int]


class BlockTraining:
    """One block's training.

    Args:
        block: what is trained; observers calibrated.
        exact: its float function.
        frontier: inputs in both forms, and the block's outputs in float.
        course: how.
    """

    def __init__(
        self, block: Block, exact: GraphModule, frontier: Frontier, course: Course
    ) -> None:
        self.block, self.frontier, self.course = block, frontier, course
        self.student = course.method.student(block.graph_module)
        watched = course.loss.watched(block.layers)
        self.weights = [course.weights.get(name) for name in (*block.outputs, *watched)]
        self.watched_student = with_outputs(self.student, watched)
        self.watched_exact = with_outputs(exact, watched)

    def train(self, steps: int, task: Task) -> Outcome:
        """Train, and return the best of what was judged, the beginning among it.

        Raises:
            ValueError: an error that is not finite.
        """
        groups = self.course.method.groups(self.student)
        before = best = self._judged()
        if not groups or best == 0:
            task.advance(steps)
            return Outcome(None, before, before)
        kept: Learned | None = None
        tables = [group for group in groups if group.get("rows")]
        others = [group for group in groups if not group.get("rows")]
        adams = [kind(of) for kind, of in ((torch.optim.Adam, others), (RowAdam, tables)) if of]
        rates = [group["lr"] for adam in adams for group in adam.param_groups]
        judged = {math.ceil(steps * k / N_JUDGEMENTS) for k in range(1, N_JUDGEMENTS + 1)}
        unit = max(best, torch.finfo(torch.float32).tiny)
        for step in range(steps):
            current = [group for adam in adams for group in adam.param_groups]
            for group, rate in zip(current, rates, strict=True):
                group["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
            self._step(adams, step, step / steps, unit)
            if step + 1 in judged and (found := self._judged()) < best:
                best, kept = found, self.course.method.learned(self.student)
            task.advance(1, partial(self._news, before, best))
        return Outcome(kept, before, best)

    def _news(self, before: float, best: float) -> str:
        return f"{self.block.name}: error {before:.2e} at first, {best:.2e} so far"

    def _step(self, adams: Sequence[Optimizer], step: int, done: float, unit: float) -> None:
        parameters = [p for adam in adams for group in adam.param_groups for p in group["params"]]
        batches, rows = list[int](), 0
        while rows < self.course.rows_per_step:
            batches.append(self.course.pupils[int(torch.randint(len(self.course.pupils), ()))])
            rows += self.frontier.rows[batches[-1]]
        gradients = [torch.zeros_like(parameter) for parameter in parameters]
        self.student.train()  # and what it shares with the other
        for batch in batches:
            error = self._error(batch, done, unit)
            if not bool(error.isfinite()):
                raise ValueError(
                    f"reconstruction: expected a finite error, found {float(error)} in "
                    f"{self.block.name} at step {step}; check the data, or lower the learning rates"
                )
            share = self.frontier.rows[batch] / rows
            parts = torch.autograd.grad(error, parameters, materialize_grads=True)
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.add_(part, alpha=share)
        for parameter, gradient in zip(parameters, _averaged(gradients), strict=True):
            parameter.grad = gradient
        for adam in adams:
            adam.step()

    def _error(self, batch: int, done: float, unit: float) -> Tensor:
        """Return what is lowered, of one batch, in units of the error at the beginning."""
        course, names = self.course, self.block.inputs
        exact = self.frontier.read("exact", batch, names)
        mixed = [
            one if self.frontier.is_shared(batch, name) else _mixed(one, other, course.inputs_share)
            for name, one, other in zip(
                names, self.frontier.read("found", batch, names), exact, strict=True
            )
        ]
        targets = self._targets(batch, exact)
        with torch.enable_grad():
            found = self.watched_student(*mixed)
            error = course.loss(found, targets, self.weights, len(self.block.outputs)) / unit
            return error + course.method.penalty(self.student, done)

    def _targets(self, batch: int, inputs: Sequence[Any]) -> list[Any]:
        """Return the float block's outputs, and those of the layers watched."""
        outputs = self.frontier.read("exact", batch, self.block.outputs)
        if not self.course.loss.watched(self.block.layers):
            return outputs
        with torch.no_grad():
            return [*outputs, *self.watched_exact(*inputs)[len(outputs) :]]

    @torch.no_grad()
    def _judged(self) -> float:
        """Return the error of the block's outputs as it would be converted now."""
        self.student.eval()
        total = torch.zeros(2, dtype=torch.float64)
        for batch in self.course.judges:
            found = self.student(*self.frontier.read("found", batch, self.block.inputs))
            exact = self.frontier.read("exact", batch, self.block.outputs)
            error = total_error(found, exact, self.weights[: len(exact)])
            total += torch.tensor([float(error), 1.0], dtype=torch.float64)
        if n_processes() > 1:
            total = all_reduce(total, "SUM")
        if not bool(total.isfinite().all()):
            raise ValueError(
                f"reconstruction: expected finite outputs of {self.block.name}, found NaN or Inf; "
                "check the data and the model"
            )
        return float(total[0] / total[1])


def _mixed(found: Any, exact: Any, share: float) -> Any:
    """Return `found` in a share of the elements, and `exact` in the others."""
    if share == 1 or not is_float(found):
        return found
    return torch.where(torch.rand_like(found.real) < share, found, exact)


def _averaged(gradients: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the mean over processes of each gradient."""
    if n_processes() == 1:
        return gradients
    return [
        all_reduce(gradient, "SUM").to(gradient.device) / n_processes() for gradient in gradients
    ]


def divided(rows: Sequence[set[tuple[int, int]]], held_out: float) -> tuple[list[int], list[int]]:
    """Return the numbers of the batches that judge and of those that are learned from: the former
    evenly spread, because data are often in the order of time-steps. Where only those that judge
    use a row, they are learned from too: else it would not be learned."""
    count = len(rows)
    everything = list(range(count))
    if count < 4 or not held_out:
        return everything, everything
    n_judges = max(1, round(count * held_out))
    judges = [int((k + 0.5) * count / n_judges) for k in range(n_judges)]
    others = [k for k in everything if k not in judges]
    learned = set[tuple[int, int]]().union(*(rows[k] for k in others))
    pupils = [k for k in everything if k in others or not rows[k] <= learned]
    return judges, pupils or everything

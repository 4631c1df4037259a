"""RowAdam: Adam for tables of which each step uses some rows."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class RowAdam(Optimizer):
    """Adam in which a row without a gradient stays where it is.

    Its moments and its count of steps stay too: Adam itself would go on moving the row by what it
    remembers, towards steps of other rows. A row that all steps use moves as under Adam.

    Args:
        groups: of parameters `[rows, ...]`.
        lr: where a group has none.
        betas: how much of the moments is kept in each step.
        eps: added to the root of the second moment.
    """

    def __init__(
        self,
        groups: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move the rows that have a gradient."""
        for group in self.param_groups:
            for table in group["params"]:
                if table.grad is not None:
                    self._move(table, table.grad, **group)

    def _move(
        self,
        table: Tensor,
        gradients: Tensor,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        **_: Any,
    ) -> None:
        state = self.state[table]
        if not state:
            count = table.new_zeros(len(table), *[1] * (table.ndim - 1))
            state |= {
                "step": count,
                "exp_avg": torch.zeros_like(table),
                "exp_avg_sq": torch.zeros_like(table),
            }
        used = gradients.flatten(1).any(1)
        gradient, (first, second) = gradients[used], betas
        step = state["step"][used] + 1
        mean = state["exp_avg"][used].lerp(gradient, 1 - first)
        square = state["exp_avg_sq"][used].lerp(gradient.square(), 1 - second)
        root = (square / (1 - second**step)).sqrt() + eps
        table[used] -= lr * (mean / (1 - first**step)) / root
        state["step"][used], state["exp_avg"][used], state["exp_avg_sq"][used] = step, mean, square

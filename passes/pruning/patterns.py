"""Patterns: which weights of a linear may go, and how many of them exactly do."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fxq.errors import PassError


@dataclass(frozen=True)
class Unstructured:
    """Any weights go: `int(sparsity * size)` of each row, or of each layer.

    Args:
        sparsity: share that goes, 0 to 1.
        per: what is compared, and counted.
    """

    sparsity: float
    per: Literal["row", "layer"] = "row"

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity <= 1 or self.per not in ("row", "layer"):
            raise ValueError(
                'Unstructured: expected sparsity from 0 to 1 and per="row" or "layer", found '
                f"{self.sparsity!r} and {self.per!r}"
            )

    def __str__(self) -> str:
        return f"{self.sparsity:.0%} of each {self.per}"

    def keep(self, scores: Tensor) -> Tensor:
        """Return True for the weights that stay.

        Args:
            scores: importance `[N, K]`, no NaN; of equal ones the first go.
        """
        rows = self.compared(scores, 0.0)
        count = self.removed(rows.shape[1])
        return keep_all_but(rows, count).reshape(scores.shape)

    def compared(self, values: Tensor, padding: float) -> Tensor:
        """Return a weight's values by what is compared with one another `[..., size]`."""
        return values if self.per == "row" else values.flatten()[None]

    def removed(self, size: int) -> int:
        """Return how many of `size` weights that are compared go."""
        return int(self.sparsity * size)

    def check(self, mask: Tensor) -> None:
        """Raise `PassError` where other numbers of weights are gone than the pattern says."""
        rows = self.compared(mask, False)
        gone, expected = (~rows).sum(1), self.removed(rows.shape[1])
        if bool((gone != expected).any()):
            raise PassError(
                f"expected {expected} of {rows.shape[1]} weights to go, {self}, found "
                f"{int(gone.min())} to {int(gone.max())}"
            )


@dataclass(frozen=True)
class Group:
    """Of every `size` neighbours in a row `kept` stay: `Group(2, 4)` is 2:4.

    A row whose length `size` does not divide counts as padded with zeros: of its last neighbours
    `kept` stay, or all where there are no more.
    """

    kept: int
    size: int

    def __post_init__(self) -> None:
        if not 0 < self.kept <= self.size:
            raise ValueError(f"Group: expected 0 < kept <= size, found {self.kept}, {self.size}")

    def __str__(self) -> str:
        return f"{self.kept}:{self.size}"

    def keep(self, scores: Tensor) -> Tensor:
        """Return True for the weights that stay; arguments as for `Unstructured.keep`."""
        groups = self.compared(scores, -torch.inf)
        return keep_all_but(groups, self.size - self.kept).flatten(1)[:, : scores.shape[1]]

    def check(self, mask: Tensor) -> None:
        """Raise `PassError` where other numbers of weights are left than the pattern says."""
        left = self.compared(mask.int(), 0).sum(-1)
        expected = self.compared(torch.ones_like(mask[:1], dtype=torch.int), 0).sum(-1)
        if bool((left != expected.clamp(max=self.kept)).any()):
            raise PassError(
                f"expected {self.kept} of every {self.size} neighbours to stay, found "
                f"{int(left.min())} to {int(left.max())}"
            )

    def compared(self, values: Tensor, padding: float) -> Tensor:
        """Return a weight's values by what is compared with one another `[N, groups, size]`."""
        rest = -values.shape[1] % self.size
        return F.pad(values, (0, rest), value=padding).unflatten(1, (-1, self.size))


Pattern = Unstructured | Group


def keep_all_but(scores: Tensor, count: int) -> Tensor:
    """Return False for the `count` lowest scores along the last dimension, True for others."""
    lowest = scores.argsort(dim=-1, stable=True)[..., :count]
    return torch.ones_like(scores, dtype=torch.bool).scatter(-1, lowest, False)

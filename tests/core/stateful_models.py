"""Models that write in place, and what three calls of them give and write."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


class Cache(nn.Module):
    """Writes a row to an argument and to a buffer, and counts."""

    cache: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.key = nn.Linear(8, 8)
        self.register_buffer("cache", torch.zeros(2, 4, 8))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, given: Tensor, x: Tensor, place: Tensor) -> dict[str, Tensor]:
        given.index_copy_(1, place, self.key(x))
        self.cache.index_copy_(1, place, self.key(x))
        self.count += 1
        return {
            "sum": (given + self.cache).sum(1) * self.count,
            "cache": self.cache,
            "rows": self.cache[:, :2],
            "given": given,
        }


class Swap(nn.Module):
    """Two buffers change places, each new value read from the other's old one."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Module()
        self.child.register_buffer("a", torch.zeros(3))
        self.register_buffer("b", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        old = self.child.a.clone()
        self.child.a.copy_(self.b)
        self.b.copy_(old)
        return x + self.child.a


class Assigned(nn.Module):
    """Assigns its buffer anew, as VAR-like caches of fixed size do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = self.mean * 0.5 + x.mean(0)
        return x - self.mean


class Masked(nn.Module):
    """Writes to a slice of its argument, then reads all of it."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x[:, 0] = 5
        y = x * 2
        x.add_(1)
        return y, x


def calls(build: Callable[[], nn.Module]) -> list[tuple[Any, ...]]:
    """Return arguments for three calls."""
    generator = torch.Generator().manual_seed(1)
    if build is Cache:
        return [
            (torch.zeros(2, 4, 8), torch.randn(2, 1, 8, generator=generator), torch.tensor([i]))
            for i in range(3)
        ]
    return [(torch.randn(4, 3, generator=generator),) for _ in range(3)]


def run(model: Callable[..., Any], inputs: list[tuple[Any, ...]]) -> list[Tensor]:
    """Return everything three calls gave and wrote to their arguments."""
    seen = []
    with torch.no_grad():
        for args in inputs:
            given = [arg.clone() for arg in args]
            result = tree_leaves(model(*given))
            seen += [value.clone() for value in (*result, *given)]
    return seen


def seeded() -> Cache:
    torch.manual_seed(0)
    return Cache().eval()

"""Number formats that codes are in: integers of 2 to 8 bits, and 8-bit floating point.

A format says its grid, the dtype that holds its codes, and what a code of a value is. Everything
else (ranges, scales, files, dialects, kernels) asks it.
"""

from dataclasses import dataclass
from typing import Literal

import torch

FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
CONTAINERS = frozenset({torch.int8, torch.uint8, *FLOAT8.values()})  # of codes, of any format


@dataclass(frozen=True)
class Integer:
    """Signed integers of `bits` bits, one to a byte in memory and packed in files."""

    bits: int = 8

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise ValueError(f"Integer.bits: expected 2 to 8, found {self.bits!r}")

    def __str__(self) -> str:
        return f"int{self.bits}"

    def grid(self, *, symmetric: bool) -> tuple[int, int]:
        """Return the smallest and largest code: all of them, or as many on each side of zero."""
        high = 2 ** (self.bits - 1) - 1
        return -high if symmetric else -high - 1, high

    @property
    def dtype(self) -> torch.dtype:
        """What holds a code."""
        return torch.int8


@dataclass(frozen=True)
class Float8:
    """8-bit floating point (arXiv:2209.05433): `e4m3`, without infinities and up to 448, or `e5m2`,
    up to 57344. Values round to the nearest, ties to even, and saturate."""

    layout: Literal["e4m3", "e5m2"] = "e4m3"

    def __post_init__(self) -> None:
        if self.layout not in FLOAT8:
            raise ValueError(f"Float8.layout: expected one of {[*FLOAT8]}, found {self.layout!r}")

    def __str__(self) -> str:
        return f"fp8_{self.layout}"

    @property
    def bits(self) -> int:
        """Width of a code."""
        return 8

    def grid(self, *, symmetric: bool) -> tuple[int, int]:
        """Return the smallest and largest value that a code stands for at scale 1."""
        high = int(torch.finfo(self.dtype).max)
        return -high, high

    @property
    def dtype(self) -> torch.dtype:
        """What holds a code."""
        return FLOAT8[self.layout]


Format = Integer | Float8

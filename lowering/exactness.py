"""How near a kernel's result is to the value it stands for, and how near it has to be."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fxq.numerics import sqnr_db

MIN_SQNR_DB = 120.0  # fp32 sums of thousands of terms in another order differ at 130 dB and more
MAX_ROUNDED_SHARE = 1e-3  # of outputs in a narrower format that may round to the neighbouring value


@dataclass(frozen=True)
class Exactness:
    """How one kernel compares with what it replaces.

    Args:
        accumulators_equal: the integer accumulators are bit-equal to exact integer arithmetic; true
            of a kernel that has none.
        sqnr_db: of the outputs, infinite where they are bit-equal.
        ok: within the bounds.
    """

    accumulators_equal: bool
    sqnr_db: float
    ok: bool


def differ_by_rounding(expected: Any, found: Any) -> Exactness:
    """Compare one result, or several, that may differ by floating-point rounding only."""
    pairs = list(zip(tree_leaves(expected), tree_leaves(found), strict=True))
    ok = all(_close(*pair) for pair in pairs)
    return Exactness(True, min(sqnr_db(*pair) for pair in pairs), ok)


def _close(expected: Tensor, found: Tensor) -> bool:
    if expected.shape != found.shape:
        return False
    if expected.dtype == torch.float32:
        return sqnr_db(expected, found) >= MIN_SQNR_DB
    # A narrower result was rounded on both sides, so a few values fall to the neighbour.
    differ = (expected != found) & ~(expected.isnan() & found.isnan())
    return float(differ.float().mean()) <= MAX_ROUNDED_SHARE

"""Proof: a graph still computes the function it computed before a pass."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from fxq.errors import PassError
from fxq.numerics import as_real, is_inexact
from fxq.seeding import seeded

# Largest relative difference that rounding explains.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# The same for any model, which may be deep enough to amplify rounding a hundred times: what a wrong
# fold does is larger still.
LOOSE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 1e-1, torch.bfloat16: 2e-1}


def float_difference(
    before: GraphModule, after: GraphModule, batches: Iterable[Sequence[Any]]
) -> dict[torch.dtype, float]:
    """Return the largest `|before - after| / |before|` (Euclidean norms) of any output, by dtype.

    Outputs that are neither floating point nor complex must be equal: they differ by 0 or infinity.

    Args:
        before: a graph.
        after: another that takes the same inputs.
        batches: the graphs' positional inputs.
    """
    worst: dict[torch.dtype, float] = {}
    for inputs in batches:
        pair = [tree_leaves(seeded(gm, inputs)) for gm in (before, after)]
        for expected, found in zip(*pair, strict=True):
            if isinstance(expected, Tensor):
                difference = _relative(expected, found)
                worst[expected.dtype] = max(worst.get(expected.dtype, 0.0), difference)
    return worst


def check_float_function(
    before: GraphModule,
    after: GraphModule,
    batches: Iterable[Sequence[Any]],
    *,
    name: str,
    tolerance: Mapping[torch.dtype, float] = TOLERANCE,
) -> dict[torch.dtype, float]:
    """Raise where two graphs differ by more than rounding; return how much they do.

    Args:
        before: the graph before a pass; `fxq.rewriting.copy_graph` makes a cheap copy.
        after: and after it.
        batches: the graphs' positional inputs.
        name: what the error calls the pass.
        tolerance: largest relative difference by real dtype; 1e-5 in fp32, 1e-12 in fp64.
    Raises:
        PassError: a larger one.
    """
    worst = float_difference(before, after, batches)
    for dtype, difference in worst.items():
        allowed = tolerance.get(dtype.to_real(), 0.0)
        if not difference <= allowed:
            raise PassError(
                f"{name}: expected the float function to stay the same to {allowed:.0e} in "
                f"{str(dtype).removeprefix('torch.')}, found a relative difference of "
                f"{difference:.1e}; leave out sites (kinds=...) or report this model"
            )
    return worst


def _relative(expected: Tensor, found: Tensor) -> float:
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return torch.inf
    if not is_inexact(expected):
        return 0.0 if torch.equal(expected, found) else torch.inf
    a, b = as_real(expected).double(), as_real(found).double()
    same = (a == b) | (a.isnan() & b.isnan())  # infinities and NaN that were there before
    difference = torch.where(same, 0.0, a - b).norm()
    size = a[a.isfinite()].norm()
    return float(difference / size) if difference else 0.0

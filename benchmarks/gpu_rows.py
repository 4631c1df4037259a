"""Rows of the GPU benchmark: one way of computing one case each, checked before it is timed.

A row is made on the device from its sizes alone, so that it can be made again in another process,
and at tiny sizes on a CPU, where tests check that a wrong result is refused. A row's calls compute
the same of different tensors, more than the caches hold together.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from common import Cell, attempt, refuse_constant
from torch import Tensor

from fxq.numerics import sqnr_db

ROTATED_BYTES = 200_000_000  # several times the 50 to 60 MB of L2 of an H100 or H200
MOST_COPIES = 64

Unit = Literal["TOP/s", "TFLOP/s", "GB/s", ""]
PER_UNIT = {"TOP/s": 1e12, "TFLOP/s": 1e12, "GB/s": 1e9, "": 1.0}


@dataclass(frozen=True)
class Job:
    """A row on a device, ready to be run.

    Args:
        calls: compute the same of different copies of the inputs.
        inputs: what they compute on, by name; refused where constant.
        check: returns why the result of the first call is wrong, None where it is right.
        work: operations or bytes of one call, in the row's unit times a second.
        notes: what else the row says.
    """

    calls: tuple[Callable[[], Any], ...]
    inputs: Mapping[str, Tensor]
    check: Callable[[], str | None]
    work: float = 0.0
    notes: Mapping[str, Cell] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """What to measure.

    Args:
        case: what is computed, in words.
        variant: by what.
        unit: of the speed.
        seconds: that it takes about, compiling included.
        make: returns the job on a device.
        expected: key of the figure of `throughput.py` that it should reach, None where it has none.
    """

    case: str
    variant: str
    unit: Unit
    seconds: float
    make: Callable[[str], Job]
    expected: str | None = None

    @property
    def key(self) -> str:
        """What the row is called in the results."""
        return f"{self.case} | {self.variant}"


@dataclass(frozen=True)
class Measured:
    """Milliseconds of one call.

    Args:
        median_ms: the middle sample.
        p90_ms: a tenth of the samples is slower.
        samples: how many.
        launched: "graph", or "eager" with the reason.
    """

    median_ms: float
    p90_ms: float
    samples: int
    launched: str = "graph"


def run_row(
    row: Row, device: str, measure: Callable[[tuple[Callable[[], Any], ...]], Measured]
) -> dict[str, Cell]:
    """Make a row, check it, measure it, and return what to write down; a failure is a result."""
    found = attempt(lambda: _run(row, device, measure))
    return found if isinstance(found, dict) else {"why": f"failed: {found}"}


def _run(
    row: Row, device: str, measure: Callable[[tuple[Callable[[], Any], ...]], Measured]
) -> dict[str, Cell]:
    with torch.no_grad():
        job = row.make(device)
        refuse_constant(job.inputs)
        if why := job.check():
            return {"why": f"refused: {why}", **job.notes}
        timing = measure(job.calls)
    cells: dict[str, Cell] = {"ms": timing.median_ms, "p90 ms": timing.p90_ms}
    if job.work:
        cells["speed"] = job.work / PER_UNIT[row.unit] / timing.median_ms * 1e3
    cells |= {"unit": row.unit, "samples": timing.samples, "launched": timing.launched}
    return cells | dict(job.notes)


def n_copies(n_bytes: int, rotated_bytes: int = ROTATED_BYTES) -> int:
    """Return how many copies of inputs of a size hold more than the caches."""
    return min(MOST_COPIES, max(1, math.ceil(rotated_bytes / max(1, n_bytes))))


def size_bytes(*tensors: Tensor) -> int:
    """Return the bytes of tensors."""
    return sum(x.numel() * x.element_size() for x in tensors)


def rotated(*tensors: Tensor, keep: bool = False) -> list[tuple[Tensor, ...]]:
    """Return tensors and copies of them that hold more than the caches together.

    Args:
        tensors: what a call reads.
        keep: on a CPU nothing is timed, and one copy is enough.
    """
    copies = 1 if keep or not tensors[0].is_cuda else n_copies(size_bytes(*tensors))
    return [tensors, *(tuple(x.clone() for x in tensors) for _ in range(copies - 1))]


def too_far(expected: Tensor, found: Tensor, bound_db: float) -> str | None:
    """Return by how much a result misses its bound, None where it does not."""
    if expected.shape != found.shape:
        return f"expected shape {list(expected.shape)}, found {list(found.shape)}"
    if not bool(found.isfinite().all()):
        return "its output holds NaN or Inf"
    reached = sqnr_db(expected.float(), found.float())
    return None if reached >= bound_db else f"{reached:.1f} dB, expected {bound_db:.1f} dB"

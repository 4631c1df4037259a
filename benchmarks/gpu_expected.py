"""Figures that rows of the GPU benchmark should reach, by the machine code of what they launch.

Compiled here and now for sm_90, without a GPU, which takes seconds for each kernel; kept for the
version of Triton that compiled them.
"""

import functools
import json
from collections.abc import Callable, Iterable, Mapping

import shipped
import throughput
import triton
from gpu_attention import LENGTHS
from gpu_journal import Journal
from gpu_linear import DIT_XL, FEW, LARGE, VIT_L, WAN, Shape
from gpu_rows import Row

from fxq.lowering.kernels.int8_linear import ACTIVATION


def figures() -> dict[str, Callable[[], float]]:
    """Return how to find each figure, in 10^12 operations a second, by `Row.expected`."""
    shapes = [shape for group in (LARGE, VIT_L, WAN, DIT_XL, FEW) for shape in group.values()]
    blocks = {shape.block_size for shape in LENGTHS.values()}
    return {
        **{f"linear {tuple(shape)}": functools.partial(linear, shape) for shape in shapes},
        **{
            f"attention {dim} {block}": functools.partial(attend, dim, block)
            for dim in (64, 128)
            for block in blocks
        },
    }


def linear(shape: Shape) -> float:
    """Return what int8_linear should reach."""
    flags = shipped.LINEAR | {
        "PER_ROW_SCALE": shape.per_row, "ACT": ACTIVATION[shape.activation],
        "HAS_OUT_SCALE": shape.requantize,
    }  # fmt: skip
    out = "*i8" if shape.requantize else "*bf16"
    tiles = shipped.linear_tiles(shape[:3], flags, out, tma=True)
    fixed = {"M": 1} if shape.m == 1 else {}
    code = shipped.linear(shape[:3], flags, out, tma=True, **fixed)
    found = throughput.int8_linear(code, shape[:3], (tiles.bm, tiles.bn), tiles.bk)
    return found.per_second / 1e12


def attend(dim: int, block: int) -> float:
    """Return what attend_blocks should reach."""
    tiles = shipped.attention_tiles("paper", block, dim)
    code = shipped.attention("paper", block, dim, {"TAIL": True})
    return throughput.attention(code, block, tiles.bn, dim).per_second / 1e12


def compute(
    rows: Iterable[Row],
    journal: Journal,
    known: Mapping[str, Callable[[], float]] | None = None,
) -> None:
    """Find the figures of rows, in their order, and keep each as soon as it is found."""
    known = figures() if known is None else known
    found = journal.expected()
    for key in dict.fromkeys(row.expected for row in rows if row.expected):
        versioned = f"{key} (Triton {triton.__version__})"
        if versioned not in found:
            found[versioned] = known[key]()
            journal.figures.write_text(json.dumps(found, indent=1) + "\n")

"""A space-filling curve through a (t, h, w) grid, and which blocks of it touch.

Tokens that are neighbours on the curve are neighbours in space and time: a block of 128 becomes a
compact cell of about 5 x 5 x 5 instead of a row 128 wide: its mean stands for its tokens. The curve
is the generalised Hilbert curve of J. Cervený ("gilbert"), for any side lengths, with axis order
(w, h, t) of the published code. Steps have length 1 where the sides are even, now and then 2 where
they are odd.

The recursion only ever asks for boxes of a few dozen shapes and orientations. Each is computed once
as an array of offsets, so a grid of 75,600 tokens takes milliseconds.
"""

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Grid = tuple[int, int, int]  # frames, height, width, in tokens
Vector = tuple[int, int, int]
Offsets = NDArray[np.int32]


@lru_cache(maxsize=32)
def curve_order(grid: Grid) -> Tensor:
    """Return which token comes where on the curve.

    Args:
        grid: frames, height and width in tokens, each at least 1.
    Returns:
        `[t * h * w]`, int64: entry c is the raster index (t, h, w) of the c-th token on the curve.
        Shared between callers: not to be written to.
    Raises:
        ValueError: a side below 1.
    Source: arXiv:2511.19835, published code; the curve is github.com/jakubcerveny/gilbert.
    """
    if len(grid) != 3 or min(grid) < 1:
        raise ValueError(
            f"grid: expected three sides (frames, height, width) of at least 1 token, found "
            f"{grid}; give the grid after the patch embedding"
        )
    t, h, w = grid
    lengths = (w, h, t)
    lead = lengths.index(max(lengths))
    sides = [_axis(i, lengths[i]) for i in (lead, *(i for i in range(3) if i != lead))]
    x, y, z = _box({}, *sides).astype(np.int64).T
    return torch.from_numpy((z * h + y) * w + x)


def block_adjacency(grid: Grid, order: Tensor | None, block_size: int) -> Tensor:
    """Return which blocks hold a token and one of its 26 neighbours in space and time.

    Args:
        grid: frames, height and width in tokens.
        order: `[t * h * w]`, int64: raster index of the c-th token; None: raster order.
        block_size: tokens per block, counted along `order`; the last block may hold fewer.
    Returns:
        `[N, N]`, bool, symmetric, true on the diagonal.
    """
    t, h, w = grid
    n_blocks = -(-t * h * w // block_size)
    block = np.arange(t * h * w) // block_size
    if order is not None:
        raster = np.empty_like(block)
        raster[order.numpy()] = block
        block = raster
    padded = np.full((t + 2, h + 2, w + 2), n_blocks)  # one more block, outside the grid
    padded[1:-1, 1:-1, 1:-1] = block.reshape(grid)
    touching = np.zeros((n_blocks + 1, n_blocks + 1), np.bool_)
    for dt, dh, dw in np.ndindex(3, 3, 3):
        touching[padded[1:-1, 1:-1, 1:-1], padded[dt : dt + t, dh : dh + h, dw : dw + w]] = True
    return torch.from_numpy(touching[:n_blocks, :n_blocks].copy())


def _axis(index: int, length: int) -> Vector:
    return tuple(length if i == index else 0 for i in range(3))  # type: ignore[return-value]


def _box(known: dict[tuple[Vector, Vector, Vector], Offsets], *sides: Vector) -> Offsets:
    """Return the curve through a box as offsets from its first corner `[n, 3]`.

    Args:
        known: boxes computed so far.
        sides: the box's three edges as vectors: the first is the way the curve goes.
    """
    a, b, c = sides
    if (a, b, c) not in known:
        lengths = [abs(sum(side)) for side in (a, b, c)]
        if lengths.count(1) >= 2:  # a row; its third side may be 0, where a side of 1 was halved
            along = next((s for s, n in zip(sides, lengths, strict=True) if n != 1), a)
            line = np.arange(abs(sum(along)), dtype=np.int32)
            known[a, b, c] = line[:, None] * np.array(_unit(along), np.int32)
        else:
            parts = _parts(a, b, c)
            known[a, b, c] = np.concatenate(
                [_box(known, *edges) + np.array(start, np.int32) for start, edges in parts]
            )
    return known[a, b, c]


def _parts(a: Vector, b: Vector, c: Vector) -> list[tuple[Vector, tuple[Vector, Vector, Vector]]]:
    """Return the boxes that a box is cut into: where each starts, and its edges."""
    w, h, d = (abs(sum(side)) for side in (a, b, c))
    a2, b2, c2 = _half(a), _half(b), _half(c)
    a1, b1, c1 = _sub(a, a2), _sub(b, b2), _sub(c, c2)
    a_end, c_end = _sub(a, _unit(a)), _sub(c, _unit(c))
    b2_end, c2_end = _sub(b2, _unit(b)), _sub(c2, _unit(c))
    zero = (0, 0, 0)
    if 2 * w > 3 * h and 2 * w > 3 * d:
        return [(zero, (a2, b, c)), (a2, (a1, b, c))]
    if 3 * h > 4 * d:
        return [
            (zero, (b2, c, a2)),
            (b2, (a, b1, c)),
            (_add(a_end, b2_end), (_neg(b2), c, _neg(a1))),
        ]
    if 3 * d > 4 * h:
        return [
            (zero, (c2, a2, b)),
            (c2, (a, b, c1)),
            (_add(a_end, c2_end), (_neg(c2), _neg(a1), b)),
        ]
    return [
        (zero, (b2, c2, a2)),
        (b2, (c, a2, b1)),
        (_add(b2_end, c_end), (a, _neg(b2), _neg(c1))),
        (_add(_add(a_end, b2), c_end), (_neg(c), _neg(a1), b1)),
        (_add(a_end, b2_end), (_neg(b2), c2, _neg(a1))),
    ]


def _half(side: Vector) -> Vector:
    """Return half a vector, to an even length where there is a choice."""
    half: Vector = (side[0] // 2, side[1] // 2, side[2] // 2)
    if abs(sum(half)) % 2 and abs(sum(side)) > 2:
        half = _add(half, _unit(side))
    return half


def _unit(side: Vector) -> Vector:
    return tuple((x > 0) - (x < 0) for x in side)  # type: ignore[return-value]


def _add(a: Vector, b: Vector) -> Vector:
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]


def _sub(a: Vector, b: Vector) -> Vector:
    return a[0] - b[0], a[1] - b[1], a[2] - b[2]


def _neg(a: Vector) -> Vector:
    return -a[0], -a[1], -a[2]

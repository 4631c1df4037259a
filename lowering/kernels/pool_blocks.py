"""pool_blocks on CUDA: statistics of blocks of visual tokens, in one read.

    mean[n]      = sum_i x[i] / count                fp32
    deviation[n] = sum_i |x[i] - mean[n]| / count    fp32, where asked for
    copied       = x in canonical order, where an index into it is given

x `[B, H, S, D]`, fp16, bf16 or fp32, any strides but 1 in the last; mean and deviation
`[B, H, N, D]`, fp32, contiguous; copied `[B, H, S, D]` in the dtype of x. A program holds one block
of one head in registers. With an index it gathers the block's tokens and writes them where the
curve has them, so that the attention kernel reads rows in sequence; programs beyond the last block
then copy the text.

Not measured yet on a GPU.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxq.lowering.kernels import buffers

WARPS = 8


class Case(NamedTuple):
    """A shape that tests run.

    Args:
        n_tokens: S.
        text_start: where text begins.
        text_size: tokens of text.
        block_size: visual tokens per block.
        dim: D.
        reorder: gather by a random order.
        deviation: compute it.
    """

    n_tokens: int
    text_start: int
    text_size: int
    block_size: int
    dim: int
    reorder: bool
    deviation: bool


CASES = (
    Case(1, 0, 0, 16, 64, False, True),
    Case(63, 0, 0, 16, 80, False, True),
    Case(75, 0, 11, 32, 64, True, True),
    Case(129, 97, 32, 32, 96, True, False),
    Case(64, 0, 0, 64, 128, False, False),
)


@triton.jit
def pool_blocks_kernel(
    x_ptr, index_ptr, mean_ptr, deviation_ptr, copied_ptr,
    stride_b, stride_h, stride_s, H, S, T, N, D, visual_start,
    HAS_ORDER: tl.constexpr, HAS_DEVIATION: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    n, bh = tl.program_id(0), tl.program_id(1)
    offs_t, offs_d = tl.arange(0, ROWS), tl.arange(0, BD)
    # Canonical tokens of this program: of one visual block, or a block's worth of text.
    is_text = n >= N
    first = tl.where(is_text, T + (n - N) * BLOCK, n * BLOCK)
    last = tl.minimum(first + BLOCK, tl.where(is_text, S, T))
    tokens = first + offs_t
    valid = tokens < last
    if HAS_ORDER:
        rows = tl.load(index_ptr + tokens, mask=valid, other=0)
    else:  # no program has text then
        rows = visual_start + tokens
    mask = valid[:, None] & (offs_d < D)[None, :]
    base = x_ptr + (bh // H).to(tl.int64) * stride_b + (bh % H).to(tl.int64) * stride_h
    tile = tl.load(base + rows.to(tl.int64)[:, None] * stride_s + offs_d[None, :], mask, other=0.0)
    if HAS_ORDER:
        offs = (bh.to(tl.int64) * S + tokens)[:, None] * D + offs_d[None, :]
        tl.store(copied_ptr + offs, tile, mask)

    x = tile.to(tl.float32)
    count = tl.maximum(last - first, 1).to(tl.float32)
    mean = tl.sum(x, 0) / count
    out = (bh.to(tl.int64) * N + n) * D + offs_d
    write = offs_d < tl.where(is_text, 0, D)
    tl.store(mean_ptr + out, mean, mask=write)
    if HAS_DEVIATION:
        distance = tl.where(mask, tl.abs(x - mean[None, :]), 0.0)
        tl.store(deviation_ptr + out, tl.sum(distance, 0) / count, mask=write)


def launch(
    x: Tensor,
    index: Tensor | None,
    n_visual: int,
    visual_start: int,
    block_size: int,
    *,
    deviation: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Run the kernel.

    Args:
        x: `[B, H, S, D]`, last stride 1.
        index: position in the sequence of each canonical token `[S]`, int64; where left out,
            visual tokens are taken as they lie and nothing is copied.
        n_visual: T.
        visual_start: first visual token of the sequence.
        block_size: visual tokens per block.
        deviation: compute it.
    Returns:
        mean and deviation `[B, H, N, D]`, fp32, and x in canonical order; without an index x
        itself.
    """
    n_batch, n_heads, n_tokens, dim = x.shape
    n_blocks = triton.cdiv(n_visual, block_size)
    shape = (n_batch, n_heads, n_blocks, dim)
    mean = buffers.allocate(shape, torch.float32, x.device)
    spread = buffers.allocate(shape, torch.float32, x.device) if deviation else None
    copied = x if index is None else buffers.allocate(tuple(x.shape), x.dtype, x.device)
    n_text = 0 if index is None else triton.cdiv(n_tokens - n_visual, block_size)
    grid = (n_blocks + n_text, n_batch * n_heads)
    if grid[0] * grid[1] == 0:
        return mean, spread, copied
    pool_blocks_kernel[grid](
        x, index, mean, spread, copied, *x.stride()[:3], n_heads, n_tokens, n_visual, n_blocks, dim,
        visual_start, HAS_ORDER=index is not None, HAS_DEVIATION=deviation, BLOCK=block_size,
        ROWS=triton.next_power_of_2(block_size), BD=triton.next_power_of_2(dim), num_warps=WARPS,
    )  # fmt: skip
    return mean, spread, copied

"""attend_blocks on CUDA: attention of query blocks to lists of key blocks, rectified in registers.

    O = R * softmax(scale * Q K^T) V + U      over the keys of the visited blocks and valid text
    lse = log-sum-exp of the same logits, natural logarithm

Q, K, V and O `[B, H, S, D]`, fp16 or bf16 (fp32 in tests), D contiguous, all else strided; logits,
sums and the accumulator are fp32; softmax is in base 2. Online: every block left out is one
pseudo-key (pooled key and value in the dtype of K, bias `[B, H, N, N]`, fp32) of the same softmax.

One program is one block of queries of one head. What the program visits is a list, so that the main
loop has neither branch nor mask: a branch on data would end software pipelining. The next entry of
the list is carried through the loop, so that tiles load while others are multiplied. With the copy
engine, logits of the next tile are multiplied under the softmax of this one, as FlashAttention-3
does; without, tiles are loaded by pointers and softmax waits for its logits.

What needs a mask (the last, shorter block, the program's own block where attention is
causal, and text) comes after, in a loop of its own. Text queries are programs beyond the last
block, whose list is everything. Query blocks are the fastest grid axis, so that programs of a head
share its keys in L2.

Not measured yet on a GPU. What `choose_config` returns is proved from its sm_90 code: no local
memory, copies that run on at every wait, softmax that runs beside the tensor cores
(tests/lowering/test_rectified_attention_aot.py).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxq.lowering.kernels import buffers, hardware
from fxq.lowering.kernels.select_blocks import Selection
from fxq.rectified_attention.layout import BlockLayout

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e38)  # finite, so that a row without keys makes no NaN


class Config(NamedTuple):
    """Keys per tile and launch parameters.

    Args:
        bn: keys per tile.
        num_warps: of a program.
        num_stages: tiles of keys and values in shared memory.
        tma: the copy engine loads them.
    """

    bn: int
    num_warps: int
    num_stages: int
    tma: bool = False


class Case(NamedTuple):
    """A shape and option that tests and benchmarks run.

    Args:
        n_tokens: S.
        dim: D.
        block_size: visual tokens per block.
        heads: query heads.
        kv_heads: key-value heads.
        text_size: tokens of text.
        text_len: valid ones, per sample; also the number of samples.
        text_first: text comes first.
        density: share of visual blocks.
        mode: of the attention.
        is_causal: keys after the query are not seen.
        dtype: of the inputs.
        reorder: visual tokens are gathered by a curve.
        center_keys: as in the definition.
    """

    n_tokens: int
    dim: int = 64
    block_size: int = 16
    heads: int = 1
    kv_heads: int = 1
    text_size: int = 0
    text_len: tuple[int, ...] = (0,)
    text_first: bool = False
    density: float = 0.3
    mode: str = "paper"
    is_causal: bool = False
    dtype: torch.dtype = torch.float32
    reorder: bool = False
    center_keys: bool = False


CASES = (
    Case(1),
    Case(63, mode="online"),
    Case(64, dtype=torch.float16, heads=2, kv_heads=1),
    Case(75, text_size=11, text_len=(11, 4, 0), center_keys=True),
    Case(75, text_size=11, text_len=(3, 0), text_first=True, mode="online"),
    Case(75, text_size=20, text_len=(20,), reorder=True, dim=80),
    Case(75, text_size=20, text_len=(17,), text_first=True, reorder=True, dtype=torch.float16),
    Case(70, is_causal=True),
    Case(70, is_causal=True, mode="online", text_size=6, text_len=(5,), text_first=True),
    Case(70, is_causal=True, text_size=6, text_len=(5,)),
    Case(33, dim=96, mode="sparse", heads=4, kv_heads=2),
    Case(80, density=1.0, mode="online"),
    Case(80, dim=128, density=0.2, mode="online", dtype=torch.float16),
    Case(20, text_size=20, text_len=(0, 20)),
)


def choose_config(
    block_size: int, dim: int, *, online: bool, tma: bool, shared_bytes: int
) -> Config:
    """Return tiles for a block size and a head dim padded to a power of two.

    With the copy engine a tile is 64 keys, because logits of two tiles are in registers, and with
    128 queries, of which one program fits a multiprocessor, four tiles are in flight. Without it a
    tile is a whole block, half of one in the largest online kernel, whose second loop would spill
    in float16. Four warps would spill with 128 queries.

    Args:
        block_size: visual tokens per block.
        dim: D.
        online: there are pseudo-keys.
        tma: the copy engine can load keys and values.
        shared_bytes: what one program may have.
    """
    warps = 8 if block_size >= 128 else 4
    half = tma or (online and block_size >= 128 and dim >= 128)
    bn = min(block_size, 64) if half else block_size
    depth = 4 if tma and block_size >= 128 else 3
    for keys, stages in ((bn, depth), (bn, 3), (bn // 2, 3), (bn // 2, 2)):
        tiles = 2 * stages + tma  # the first tile of keys has a place of its own
        if 2 * dim * (block_size + tiles * keys) + 1024 <= shared_bytes:
            return Config(keys, warps, stages, tma)
    return Config(max(16, bn // 4), warps, 2, tma)


@triton.jit
def _logits(q, k):
    """Products of queries and keys; those of fp32 are not TF32, whatever Triton's default is."""
    return tl.dot(q, tl.trans(k), input_precision="ieee")


@triton.jit
def _weigh(acc, total, peak, dots, v, scale2):
    """One step of online softmax in base 2. The scale, > 0, and the peak go into one FMA: softmax
    takes about half the time of a tile."""
    new = tl.maximum(peak, tl.max(dots, 1) * scale2)
    weights = tl.exp2(dots * scale2 - new[:, None])
    alpha = tl.exp2(peak - new)
    total = total * alpha + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    return acc, total, new


@triton.jit
def _tile(desc, b, h, start, BN: tl.constexpr, BD: tl.constexpr):
    """`BN` tokens of a head, from a descriptor of `[B, Hkv, S, D]`; zeros beyond its ends."""
    return tl.reshape(desc.load([b, h, start, 0]), (BN, BD))


@triton.jit
def attend_blocks_kernel(
    q_ptr, k_ptr, v_ptr, k_desc, v_desc, out_ptr, lse_ptr, count_ptr, list_ptr,
    ratio_ptr, correction_ptr, pooled_k_ptr, pooled_v_ptr, bias_ptr, text_len_ptr, index_ptr,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, out_b, out_h, out_s,
    H, GROUP, S, T, N, D, DV, visual_start, text_start, text_size, scale,
    HAS_TEXT_LEN: tl.constexpr, HAS_ORDER: tl.constexpr, CAUSAL: tl.constexpr, MODE: tl.constexpr,
    TAIL: tl.constexpr, TMA: tl.constexpr,
    PADDED: tl.constexpr, BLOCK: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    n, bh = tl.program_id(0), tl.program_id(1)
    b, h = bh // H, bh % H
    offs_m, offs_n, offs_d = tl.arange(0, BLOCK), tl.arange(0, BN), tl.arange(0, BD)
    SPLIT: tl.constexpr = BLOCK // BN
    # Rows of this program: a visual block, or a block's worth of text.
    is_text = n >= N
    row0 = tl.where(is_text, text_start + (n - N) * BLOCK, visual_start + n * BLOCK)
    row_end = tl.where(is_text, text_start + text_size, visual_start + T)
    rows = row0 + offs_m
    in_rows = rows < row_end
    plan = tl.where(is_text, tl.num_programs(1).to(tl.int64) * N, bh.to(tl.int64) * N + n)
    in_d, in_dv = offs_d < D, offs_d < DV
    q_offs = rows.to(tl.int64)[:, None] * q_s + offs_d[None, :]
    q_base = q_ptr + b.to(tl.int64) * q_b + h.to(tl.int64) * q_h
    q = tl.load(q_base + q_offs, mask=in_rows[:, None] & in_d[None, :], other=0.0)
    k_base = k_ptr + b.to(tl.int64) * k_b + (h // GROUP).to(tl.int64) * k_h
    v_base = v_ptr + b.to(tl.int64) * v_b + (h // GROUP).to(tl.int64) * v_h
    k_offs = offs_n[:, None] * k_s + offs_d[None, :]
    v_offs = offs_n[:, None] * v_s + offs_d[None, :]
    scale2 = scale * LOG2E
    acc = tl.zeros((BLOCK, BD), dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    peak = tl.full((BLOCK,), LOWEST, dtype=tl.float32)

    count = tl.load(count_ptr + plan)
    visited = list_ptr + plan * N
    if CAUSAL:  # text before every visual token sees none of them
        count = tl.where(is_text & (text_start < visual_start), 0, count)
    masked = tl.minimum(count, 1) if CAUSAL else 0
    if TAIL and not CAUSAL:
        last = tl.load(visited + tl.maximum(count - 1, 0), mask=count > 0, other=0)
        masked = tl.where((count > 0) & (last == N - 1), 1, 0)
    full = count - masked

    n_tiles = full * SPLIT
    ahead = tl.load(visited, mask=full > 0, other=0)
    if TMA:
        start = visual_start + ahead * BLOCK
        ahead = tl.load(visited + 1 // SPLIT, mask=n_tiles > 1, other=0)
        dots = _logits(q, _tile(k_desc, b, h // GROUP, start, BN, BD))
        for i in range(0, n_tiles):
            # The last round multiplies a tile that nobody uses: cheaper than a loop of its own.
            following = visual_start + ahead * BLOCK + (i + 1) % SPLIT * BN
            ahead = tl.load(visited + (i + 2) // SPLIT, mask=i + 2 < n_tiles, other=0)
            # Loaded side by side, so that they share a barrier, and no wait parts the product of
            # the next tile from the softmax of this one: the compiler weaves them together.
            k = _tile(k_desc, b, h // GROUP, following, BN, BD)
            v = _tile(v_desc, b, h // GROUP, start, BN, BD)
            next_dots = _logits(q, k)
            acc, total, peak = _weigh(acc, total, peak, dots, v, scale2)
            dots, start = next_dots, following
    else:
        for i in range(0, n_tiles):
            start = visual_start + ahead * BLOCK + (i % SPLIT) * BN
            ahead = tl.load(visited + (i + 1) // SPLIT, mask=i + 1 < n_tiles, other=0)
            if PADDED:
                k = tl.load(k_base + start.to(tl.int64) * k_s + k_offs, in_d[None, :], other=0.0)
                v = tl.load(v_base + start.to(tl.int64) * v_s + v_offs, in_dv[None, :], other=0.0)
            else:
                k = tl.load(k_base + start.to(tl.int64) * k_s + k_offs)
                v = tl.load(v_base + start.to(tl.int64) * v_s + v_offs)
            acc, total, peak = _weigh(acc, total, peak, _logits(q, k), v, scale2)

    n_text = text_size
    if HAS_TEXT_LEN:
        n_text = tl.load(text_len_ptr + b).to(tl.int32)
    n_masked = masked * SPLIT
    block0 = tl.load(visited + full, mask=masked > 0, other=0) * BLOCK if TAIL or CAUSAL else 0
    for i in tl.range(0, n_masked + tl.cdiv(n_text, BN), num_stages=1):
        of_text = i >= n_masked
        start = tl.where(of_text, text_start + (i - n_masked) * BN, visual_start + block0 + i * BN)
        end = tl.where(of_text, text_start + n_text, visual_start + T)
        cols = start + offs_n
        in_cols = (cols < end)[:, None]
        k = tl.load(
            k_base + cols.to(tl.int64)[:, None] * k_s + offs_d[None, :],
            in_cols & in_d[None, :],
            other=0.0,
        )
        v = tl.load(
            v_base + cols.to(tl.int64)[:, None] * v_s + offs_d[None, :],
            in_cols & in_dv[None, :],
            other=0.0,
        )
        seen = (cols < end)[None, :]
        if CAUSAL:
            seen = seen & (cols[None, :] <= rows[:, None])
        dots = tl.where(seen, _logits(q, k), float("-inf"))
        acc, total, peak = _weigh(acc, total, peak, dots, v, scale2)

    if MODE == 1:
        pooled_k = pooled_k_ptr + bh.to(tl.int64) * N * D
        pooled_v = pooled_v_ptr + bh.to(tl.int64) * N * DV
        n_pooled = tl.where(is_text, 0, N)
        for start in tl.range(0, n_pooled, BN, num_stages=2):
            cols = start + offs_n
            in_cols = cols < N
            k = tl.load(
                pooled_k + cols[:, None] * D + offs_d[None, :],
                in_cols[:, None] & in_d[None, :],
                other=0.0,
            )
            v = tl.load(
                pooled_v + cols[:, None] * DV + offs_d[None, :],
                in_cols[:, None] & in_dv[None, :],
                other=0.0,
            )
            bias = tl.load(bias_ptr + plan * N + cols, mask=in_cols, other=float("-inf"))
            dots = _logits(q, k) + (bias / scale)[None, :]
            acc, total, peak = _weigh(acc, total, peak, dots, v, scale2)

    empty = total == 0.0
    ratio = tl.load(ratio_ptr + plan) / tl.where(empty, 1.0, total)
    out = acc * ratio[:, None]
    if MODE == 0:
        out += tl.load(correction_ptr + plan * DV + offs_d, mask=in_dv, other=0.0)[None, :]
    lse = (peak + tl.log2(tl.where(empty, 1.0, total))) * LN2
    lse = tl.where(empty, float("-inf"), lse)
    if HAS_ORDER:  # back to the order of the sequence
        rows = tl.load(index_ptr + rows, mask=in_rows, other=0)
    tl.store(lse_ptr + bh.to(tl.int64) * S + rows, lse, mask=in_rows)
    out_base = out_ptr + b.to(tl.int64) * out_b + h.to(tl.int64) * out_h
    tl.store(
        out_base + rows.to(tl.int64)[:, None] * out_s + offs_d[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=in_rows[:, None] & in_dv[None, :],
    )


class Pooled(NamedTuple):
    """One pseudo-key per block.

    Args:
        key: `[B, H, N, D]`, contiguous, in the dtype of the keys.
        value: `[B, H, N, Dv]`, likewise.
        bias: added to the logits `[B, H, N, N]`, fp32, minus infinity for blocks not given back.
    """

    key: Tensor
    value: Tensor
    bias: Tensor


def launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    selection: Selection,
    correction: Tensor | None,
    pooled: Pooled | None,
    text_len: Tensor | None,
    index: Tensor | None,
    layout: BlockLayout,
    scale: float,
    *,
    is_causal: bool,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the kernel.

    Args:
        query: `[B, H, S, D]`, last stride 1.
        key: `[B, Hkv, S, D]`, last stride 1.
        value: `[B, Hkv, S, Dv]`, last stride 1.
        out: where the output goes `[B, H, S, Dv]`, last stride 1.
        selection: of `select_blocks`.
        correction: U `[B * H * N + 1, Dv]`, fp32, zeros in the last row; with `pooled` or without
            rectification None.
        pooled: pseudo-keys of "online" mode.
        text_len: valid text tokens `[B]`, int32.
        index: where the rows of the result go `[S]`, int64; as they lie unless given.
        layout: of query, key and value.
        scale: of the logits, > 0.
        is_causal: keys after the query are not seen.
        config: tiles; chosen by shape unless given.
    Returns:
        `out`, and log-sum-exp `[B, H, S]`, fp32.
    """
    n_batch, n_heads, n_tokens, dim = query.shape
    n_blocks, block, dim_v = layout.n_blocks, layout.block_size, value.shape[-1]
    padded = triton.next_power_of_2(max(dim, dim_v))
    tiles = config or choose_config(
        block,
        padded,
        online=pooled is not None,
        tma=hardware.can_describe(key) and hardware.can_describe(value),
        shared_bytes=hardware.shared_bytes(query.device),
    )
    described = (key, value) if tiles.tma else ()
    descriptors = [hardware.describe(x, (1, 1, tiles.bn, padded)) for x in described]
    lse = buffers.allocate((n_batch, n_heads, n_tokens), torch.float32, query.device)
    grid = (n_blocks + triton.cdiv(layout.text_size, block), n_batch * n_heads)
    if grid[0] * grid[1] == 0:
        return out, lse
    attend_blocks_kernel[grid](
        query, key, value, *(descriptors or (None, None)), out, lse,
        selection.n_visited, selection.visited, selection.ratio, correction,
        *(pooled or (None, None, None)), text_len, index,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3],
        n_heads, n_heads // key.shape[1], n_tokens, layout.n_visual, n_blocks, dim, dim_v,
        layout.visual_start, layout.text_start, layout.text_size, scale,
        HAS_TEXT_LEN=text_len is not None, HAS_ORDER=index is not None, CAUSAL=is_causal,
        MODE=1 if pooled else 0 if correction is not None else 2,
        TAIL=layout.n_visual % block != 0, TMA=tiles.tma, PADDED=not dim == dim_v == padded,
        BLOCK=block, BN=tiles.bn, BD=padded,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    return out, lse

"""select_blocks on CUDA: which key blocks each query block visits, without the host.

    P          = softmax over [scale * dot + log count, text]        fp32
    selected   = k largest of P, or prefix of mass > top_p, or adjacent; within what is visible
    given      = visible, not selected, |gain| > |error| where gated
    R          = 1 - sum(P over given), or what selected and text hold

`fxq.rectified_attention.selection` and `.rectification` are the definition. Inputs are products of
pooled queries and keys, `[B, H, N, N]`, fp32, which cuBLAS makes better than a kernel that would
read every pooled key once per row, in float64, so that no switch for the precision of products
changes a list. One program holds one row in registers. Thresholds are found bit by bit
(probabilities are non-negative floats, whose order is that of their bits), ties go to the lower
index, and the list of visited blocks is ascending.

Not measured yet on a GPU.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxq.lowering.kernels import buffers

MAX_BLOCKS = 4096  # a row stays in registers: 16 values a thread
WARPS = 8
MODES = ("paper", "online", "sparse")


class Case(NamedTuple):
    """A selection that tests run.

    Args:
        n_blocks: N.
        density: share of blocks to keep.
        top_p: mass to keep.
        text: there is text.
        gate: give back only blocks that gain.
        is_causal: later blocks are not visible.
        adjacency: some blocks are always kept.
        ties: probabilities repeat.
        mode: of the attention.
        mass: of R.
    """

    n_blocks: int
    density: float
    top_p: float
    text: bool = False
    gate: bool = True
    is_causal: bool = False
    adjacency: bool = False
    ties: bool = False
    mode: str = "paper"
    mass: str = "complement"


CASES = (
    Case(1, 0.2, 0.3),
    Case(7, 0.2, 0.3, text=True, adjacency=True),
    Case(7, 0.0, 0.9, text=True, mode="online", gate=False),
    Case(11, 0.3, 0.0, ties=True),
    Case(11, 0.0, 0.4, ties=True, text=True),
    Case(9, 0.3, 0.3, is_causal=True, adjacency=True, mass="critical"),
    Case(8, 1.0, 0.3, text=True),
    Case(5, 0.0, 1.0, is_causal=True),
    Case(18, 0.11, 0.3, text=True, mode="sparse"),
)


@triton.jit
def _top_k(bits, visible, k):
    """The k largest; bits of what is not visible are -1."""
    t = 0
    for i in range(31):
        candidate = t | (1 << (30 - i))
        enough = tl.sum((bits >= candidate).to(tl.int32)) >= k
        t = tl.where(enough, candidate, t)
    above = bits > t
    ties = (bits == t) & visible
    before = tl.cumsum(ties.to(tl.int32), 0) - ties.to(tl.int32)
    return above | (ties & (before < k - tl.sum(above.to(tl.int32))))


@triton.jit
def _top_p(p, bits, visible, p_text, top_p):
    """The smallest prefix that holds more than top_p; text is an entry and the last of its ties."""
    text_bits = p_text.to(tl.int32, bitcast=True)
    u = 0  # the largest value above which there is more than top_p
    for i in range(31):
        candidate = u | (1 << (30 - i))
        above = tl.sum(tl.where(bits > candidate, p, 0.0))
        above += tl.where(text_bits > candidate, p_text, 0.0)
        u = tl.where(above > top_p, candidate, u)
    rest = tl.sum(tl.where(bits > 0, p, 0.0)) + tl.where(text_bits > 0, p_text, 0.0)
    t = tl.where(rest > top_p, u + 1, 0)
    mass = tl.sum(tl.where(bits > t, p, 0.0)) + tl.where(text_bits > t, p_text, 0.0)
    ties = (bits == t) & visible
    before = (tl.cumsum(ties.to(tl.int32), 0) - ties.to(tl.int32)).to(tl.float32)
    return (bits > t) | (ties & (mass + before * p <= top_p))


@triton.jit
def select_blocks_kernel(
    dot_ptr, dq_ptr, dk_ptr, shift_ptr, shift_dq_ptr, text_lse_ptr, adjacency_ptr, density_ptr,
    count_ptr, list_ptr, ratio_ptr, given_ptr,
    N, T, scale, top_p,
    HAS_TEXT: tl.constexpr, HAS_ADJACENCY: tl.constexpr, GATE: tl.constexpr,
    CENTER: tl.constexpr, CAUSAL: tl.constexpr, MODE: tl.constexpr, CRITICAL: tl.constexpr,
    ALL: tl.constexpr, BLOCK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    n, bh = tl.program_id(0), tl.program_id(1)
    row = bh.to(tl.int64) * N + n
    cols = tl.arange(0, BN)
    inside = cols < N
    visible = inside & (cols <= n) if CAUSAL else inside
    dot = tl.load(dot_ptr + row * N + cols, mask=inside, other=0.0)
    tokens = tl.minimum(T - cols * BLOCK, BLOCK).to(tl.float32)
    counted = tl.where(cols == n, (tokens + 1.0) / 2.0, tokens) if CAUSAL else tokens
    log_count = tl.log(tl.where(inside, counted, 1.0))
    logits = tl.where(visible, dot * scale + log_count, float("-inf"))
    peak = tl.max(logits)
    text = float("-inf")
    if HAS_TEXT:
        text = tl.load(text_lse_ptr + row)
        peak = tl.maximum(peak, text)
    weights = tl.exp(logits - peak)
    p_text = tl.exp(text - peak)
    total = tl.sum(weights) + p_text
    p = weights / total
    p_text = p_text / total

    bits = tl.where(visible, p.to(tl.int32, bitcast=True), -1)
    n_visible = tl.sum(visible.to(tl.int32)).to(tl.float32)
    wanted = tl.floor(tl.load(density_ptr).to(tl.float32) * n_visible + 0.5)
    k = tl.minimum(tl.maximum(wanted, 1.0), n_visible).to(tl.int32)
    selected = _top_k(bits, visible, k)
    if ALL:
        selected = visible
    else:
        selected = selected | _top_p(p, bits, visible, p_text, top_p)
    if HAS_ADJACENCY:
        near = tl.load(adjacency_ptr + n.to(tl.int64) * N + cols, mask=inside, other=0)
        selected = selected | (near != 0)
    if CAUSAL:
        selected = selected | (cols == n)
    selected = selected & visible

    given = visible & (selected == 0)
    if GATE:
        dq = tl.load(dq_ptr + row * N + cols, mask=inside, other=0.0)
        dk = tl.load(dk_ptr + row * N + cols, mask=inside, other=0.0)
        if CENTER:
            dot -= tl.load(shift_ptr + row)
            dq -= tl.load(shift_dq_ptr + row)
        given = given & (tl.abs(dot) > tl.abs(dq) + tl.abs(dk))

    place = tl.cumsum(selected.to(tl.int32), 0) - 1
    tl.store(list_ptr + row * N + place, cols, mask=selected)
    tl.store(count_ptr + row, tl.sum(selected.to(tl.int32)))
    ratio = 1.0
    if MODE == 0:
        back = tl.where(given, p, 0.0)
        ratio = 1.0 - tl.sum(back)
        if CRITICAL:
            ratio = p_text + tl.sum(tl.where(selected, p, 0.0))
        tl.store(given_ptr + row * N + cols, back, mask=inside)
    if MODE == 1:
        bias = tl.where(given, log_count, float("-inf"))
        tl.store(given_ptr + row * N + cols, bias, mask=inside)
    tl.store(ratio_ptr + row, tl.maximum(ratio, 0.0))


class Selection(NamedTuple):
    """What query blocks visit. The last row of each is that of text queries, which visit
    everything and get nothing back.

    Args:
        n_visited: blocks visited `[B * H * N + 1]`, int32.
        visited: their indices, ascending, as many as `n_visited` says `[B * H * N + 1, N]`, int32.
        ratio: R `[B * H * N + 1]`, fp32.
        given: what is given back `[B, H, N, N]`, fp32: probabilities in "paper" mode, biases of
            pseudo-keys in "online" mode; None in "sparse" mode.
    """

    n_visited: Tensor
    visited: Tensor
    ratio: Tensor
    given: Tensor | None


class Products(NamedTuple):
    """What is known of every pair of blocks.

    Args:
        dot: pooled queries times pooled keys `[B, H, N, N]`, fp32.
        dq: deviations of queries times pooled keys; None without a gate.
        dk: pooled queries times deviations of keys; None without a gate.
        shift: pooled queries times the mean key `[B, H, N]`; None unless keys are centred.
        shift_dq: deviations of queries times the mean key.
    """

    dot: Tensor
    dq: Tensor | None = None
    dk: Tensor | None = None
    shift: Tensor | None = None
    shift_dq: Tensor | None = None


def launch(
    products: Products,
    text_lse: Tensor | None,
    adjacency: Tensor | None,
    density: Tensor,
    n_visual: int,
    block_size: int,
    top_p: float,
    mode: str,
    mass: str,
    scale: float,
    *,
    is_causal: bool,
) -> Selection:
    """Run the kernel.

    Args:
        products: contiguous.
        text_lse: log-sum-exp of the logits of valid text per query block `[B, H, N]`, fp32.
        adjacency: `[N, N]`, bool.
        density: one element, any float dtype.
        n_visual: visual tokens.
        block_size: visual tokens per block.
        top_p: see `fxq.rectified_attention.selection.select_blocks`.
        mode: "paper", "online" or "sparse".
        mass: "complement" or "critical".
        scale: of the logits.
        is_causal: later blocks are not visible.
    """
    n_batch, n_heads, n_blocks, _ = products.dot.shape
    n_rows, device = n_batch * n_heads * n_blocks, products.dot.device
    count = buffers.allocate((n_rows + 1,), torch.int32, device)
    visited = buffers.allocate((n_rows + 1, n_blocks), torch.int32, device)
    ratio = buffers.allocate((n_rows + 1,), torch.float32, device)
    given = (
        None if mode == "sparse" else buffers.allocate(products.dot.shape, torch.float32, device)
    )
    count[-1], ratio[-1] = n_blocks, 1.0
    torch.arange(n_blocks, out=visited[-1])
    if n_rows == 0:
        return Selection(count, visited, ratio, given)
    select_blocks_kernel[(n_blocks, n_batch * n_heads)](
        products.dot, products.dq, products.dk, products.shift, products.shift_dq, text_lse,
        None if adjacency is None else adjacency.contiguous().view(torch.int8), density,
        count, visited, ratio, given, n_blocks, n_visual, scale, top_p,
        **flags(products, text_lse, adjacency, top_p, mode, mass, is_causal),
        BLOCK=block_size, BN=triton.next_power_of_2(n_blocks), num_warps=WARPS,
    )  # fmt: skip
    return Selection(count, visited, ratio, given)


def flags(
    products: Products,
    text_lse: Tensor | None,
    adjacency: Tensor | None,
    top_p: float,
    mode: str,
    mass: str,
    is_causal: bool,
) -> dict[str, bool | int]:
    """Return the kernel's compile-time flags."""
    return {
        "HAS_TEXT": text_lse is not None,
        "HAS_ADJACENCY": adjacency is not None,
        "GATE": products.dq is not None,
        "CENTER": products.shift is not None,
        "CAUSAL": is_causal,
        "MODE": MODES.index(mode),
        "CRITICAL": mass == "critical",
        "ALL": top_p >= 1,
    }

"""rectified_attention on CUDA: three kernels, and matrix products of pooled blocks between them.

    pool_blocks     statistics of the blocks of Q, K and V        (gathers into curve order)
    product         N x N products of pooled queries and keys     (cuBLAS, float64)
    select_blocks   lists of visited blocks, R, what is given back
    product         U = given @ pooled values                     (likewise)
    attend_blocks   attention over the lists, R and U in its epilogue

Products are float64, so that no switch of torch changes what is selected. Nothing waits for the
host. `fxq.rectified_attention.reference` is the definition.
"""

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from fxq.lowering.kernels import attend_blocks, pool_blocks, select_blocks
from fxq.lowering.kernels.hardware import starts_aligned
from fxq.lowering.kernels.select_blocks import Products, Selection
from fxq.numerics import product
from fxq.rectified_attention.layout import BlockLayout, empty_output, repeat_heads
from fxq.rectified_attention.pooling import BlockStats, mean_token


def pair_products(
    q: BlockStats, k: BlockStats, counts: Tensor, *, gate: bool, center_keys: bool
) -> Products:
    """Return the products of pooled blocks that selection and gate need.

    Centring the keys moves every product of a row by the same number, so keys need no second copy.

    Args:
        q: statistics of the query blocks `[B, H, N, D]`.
        k: statistics of the key blocks, as many heads.
        counts: tokens of each block `[N]`, fp32.
        gate: the gate is on.
        center_keys: subtract the mean key before the gate.
    """
    dot = product(q.mean, k.mean.mT)
    if not gate:
        return Products(dot)
    dq, dk = product(q.deviation, k.mean.mT), product(q.mean, k.deviation.mT)
    if not center_keys:
        return Products(dot, dq, dk)
    centre = mean_token(k.mean, counts).mT  # [B, H, D, 1]
    return Products(dot, dq, dk, product(q.mean, centre), product(q.deviation, centre))


def text_log_sum_exp(
    q_mean: Tensor, text_key: Tensor, text_len: Tensor | None, scale: float
) -> Tensor:
    """Return the log-sum-exp of the logits of valid text for pooled queries `[B, H, N]`, fp32.

    Args:
        q_mean: pooled queries `[B, H, N, D]`, fp32.
        text_key: keys of the text `[B, Hkv, text_size, D]`.
        text_len: valid text tokens `[B]`.
        scale: of the logits.
    """
    keys = repeat_heads(text_key, q_mean.shape[1])
    logits = product(q_mean, keys.mT) * scale
    if text_len is not None:
        padding = torch.arange(keys.shape[2], device=keys.device) >= text_len[:, None]
        logits = logits.masked_fill(padding[:, None, None], -torch.inf)
    return logits.logsumexp(-1)


def is_aligned(x: Tensor) -> bool:
    """Tell whether every row of `x` `[B, H, S, D]` starts at a multiple of 16 bytes and of 16
    elements. Triton then loads 16 bytes at a time, asynchronously; where it cannot, kernels
    spill."""
    steps = [step for step, size in zip(x.stride(), x.shape, strict=True) if size > 1][:-1]
    in_sequence = x.shape[-1] == 1 or x.stride(-1) == 1
    return in_sequence and starts_aligned(x) and all(step % 16 == 0 for step in steps)


class Prepared(NamedTuple):
    """What `attend_blocks.launch` takes.

    Args:
        query, key, value: as given, or copies in canonical order.
        out: uninitialised, laid out like the query that was given.
        selection: lists of visited blocks, and R.
        correction: U, in "paper" mode.
        pooled: pseudo-keys, in "online" mode.
        text_len: valid text tokens per sample.
        positions: where canonical tokens lie in the sequence; None where nothing was copied.
        layout: of query, key and value.
        scale: of the logits.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    selection: Selection
    correction: Tensor | None
    pooled: attend_blocks.Pooled | None
    text_len: Tensor | None
    positions: Tensor | None
    layout: BlockLayout
    scale: float


def prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    density: Tensor,
    text_len: Tensor | None,
    order: Tensor | None,
    adjacency: Tensor | None,
    text_start: int,
    text_size: int,
    block_size: int,
    top_p: float,
    mode: str,
    mass: str,
    gate: bool,
    center_keys: bool,
    is_causal: bool,
    scale: float,
) -> Prepared:
    """Pool and select. Arguments: `fxq.rectified_attention.reference`."""
    layout = BlockLayout(query.shape[2], text_start, text_size, block_size)
    n_heads, n_visual = query.shape[1], layout.n_visual
    out = empty_output(query, value.shape[-1])
    gate = gate and mode != "sparse"
    index = None if order is None else layout.to_canonical(order, query.device)

    def pool(x: Tensor, deviation: bool) -> tuple[BlockStats, Tensor]:
        x = x if is_aligned(x) else x.clone(memory_format=torch.contiguous_format)
        mean, spread, copied = pool_blocks.launch(
            x, index, n_visual, layout.visual_start, block_size, deviation=deviation
        )
        parts = (mean, mean if spread is None else spread)  # without a gate nobody reads it
        return BlockStats(*(repeat_heads(part, n_heads) for part in parts)), copied

    (q, query), (k, key), (v, value) = pool(query, gate), pool(key, gate), pool(value, False)
    text_first = text_start == 0
    if index is not None:
        layout = dataclasses.replace(layout, text_start=n_visual)
    counts = layout.counts(query.device)
    products = pair_products(q, k, counts, gate=gate, center_keys=center_keys)
    text_lse = None
    if text_size and (text_first or not is_causal):
        text_key = key[:, :, layout.text_start : layout.text_start + text_size]
        text_lse = text_log_sum_exp(q.mean, text_key, text_len, scale)
    selection = select_blocks.launch(
        products, text_lse, adjacency, density.to(query.device), n_visual, block_size, top_p, mode,
        mass, scale, is_causal=is_causal,
    )  # fmt: skip
    correction, pooled = None, None
    if mode == "paper":
        correction = corrections(selection, v.mean)
    elif mode == "online":
        assert selection.given is not None
        keys, values = k.mean.to(key.dtype), v.mean.to(value.dtype)
        pooled = attend_blocks.Pooled(keys, values, selection.given)
    return Prepared(
        query, key, value, out, selection, correction, pooled, text_len, index, layout, scale
    )


def corrections(selection: Selection, v_mean: Tensor) -> Tensor:
    """Return U `[B * H * N + 1, Dv]`, fp32; the last row, that of text queries, is zero.

    Args:
        selection: with probabilities given back.
        v_mean: pooled values `[B, H, N, Dv]`, fp32.
    """
    assert selection.given is not None
    out = torch.zeros(selection.ratio.shape[0], v_mean.shape[-1], device=v_mean.device)
    out[:-1].view(v_mean.shape).copy_(product(selection.given, v_mean))
    return out


def launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    density: Tensor,
    text_len: Tensor | None,
    order: Tensor | None,
    adjacency: Tensor | None,
    text_start: int,
    text_size: int,
    block_size: int,
    top_p: float,
    mode: str,
    mass: str,
    gate: bool,
    center_keys: bool,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Run the kernels. Arguments and results: `fxq.rectified_attention.reference`."""
    prepared = prepare(
        query, key, value, density, text_len, order, adjacency, text_start, text_size, block_size,
        top_p, mode, mass, gate, center_keys, is_causal, scale,
    )  # fmt: skip
    return attend_blocks.launch(*prepared, is_causal=is_causal)

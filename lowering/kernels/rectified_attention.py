"""rectified_attention on CUDA: three kernels, and matrix products of pooled blocks between them.

    pool_blocks     statistics of the blocks of Q, K and V        (gathers into curve order)
    torch.matmul    N x N products of pooled queries and keys     (cuBLAS, fp32)
    select_blocks   lists of visited blocks, R, what is given back
    torch.matmul    U = given @ pooled values
    attend_blocks   attention over the lists, R and U in its epilogue

Nothing waits for the host. `fxq.rectified_attention.reference` is the definition.
"""

import dataclasses

import torch
from torch import Tensor

from fxq.lowering.kernels import attend_blocks, pool_blocks, select_blocks
from fxq.lowering.kernels.select_blocks import Products
from fxq.rectified_attention.layout import TokenLayout
from fxq.rectified_attention.pooling import BlockStats, mean_token
from fxq.rectified_attention.reference import repeat_heads


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
    dot = q.mean @ k.mean.mT
    if not gate:
        return Products(dot)
    dq, dk = q.deviation @ k.mean.mT, q.mean @ k.deviation.mT
    if not center_keys:
        return Products(dot, dq, dk)
    centre = mean_token(k.mean, counts).mT  # [B, H, D, 1]
    return Products(dot, dq, dk, q.mean @ centre, q.deviation @ centre)


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
    keys = repeat_heads(text_key.float(), q_mean.shape[1])
    logits = q_mean @ keys.mT * scale
    if text_len is not None:
        padding = torch.arange(keys.shape[2], device=keys.device) >= text_len[:, None]
        logits = logits.masked_fill(padding[:, None, None], -torch.inf)
    return logits.logsumexp(-1)


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
    layout = TokenLayout(query.shape[2], text_start, text_size, block_size)
    n_heads, n_visual, device = query.shape[1], layout.n_visual, query.device
    gate = gate and mode != "sparse"
    index = None if order is None else layout.to_canonical(order, device)

    def pool(x: Tensor, deviation: bool) -> tuple[BlockStats, Tensor]:
        start = layout.visual_start
        mean, spread, copied = pool_blocks.launch(
            x, index, n_visual, start, block_size, deviation=deviation
        )
        parts = (mean, mean if spread is None else spread)
        return BlockStats(*(repeat_heads(part, n_heads) for part in parts)), copied

    (q, query), (k, key), (v, value) = (
        pool(query, gate),
        pool(key, gate),
        pool(value, False),
    )
    if index is not None:
        layout = dataclasses.replace(layout, text_start=n_visual)
    products = pair_products(q, k, layout.counts(device), gate=gate, center_keys=center_keys)
    text_lse = None
    if text_size and not (is_causal and layout.text_start > 0):
        text_key = key[:, :, layout.text_start : layout.text_start + text_size]
        text_lse = text_log_sum_exp(q.mean, text_key, text_len, scale)
    selection = select_blocks.launch(
        products, text_lse, adjacency, density, n_visual, block_size, top_p, mode, mass, scale,
        is_causal=is_causal,
    )  # fmt: skip

    correction, pooled = None, None
    if selection.given is not None and mode == "paper":
        rows, dim_v = selection.ratio.shape[0], value.shape[-1]
        correction = torch.zeros(rows, dim_v, device=device)
        torch.matmul(selection.given, v.mean, out=correction[:-1].view(v.mean.shape))
    elif selection.given is not None:
        keys, values = k.mean.to(key.dtype), v.mean.to(value.dtype)
        pooled = attend_blocks.Pooled(keys, values, selection.given)
    return attend_blocks.launch(
        query, key, value, selection, correction, pooled, text_len, index, layout, scale,
        is_causal=is_causal,
    )  # fmt: skip

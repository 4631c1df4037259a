"""The definition of rectified sparse attention, composed of the pieces beside it.

`plan` decides from pooled statistics what every query block visits and what it gets back;
`rectified_attention` attends accordingly, one query block of one head at a time and to the keys it
visits only: time grows with the density, and memory with the sequence rather than its square. At a
density of 1 that is dense attention, which torch computes faster (`dense.py`).
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from fxq.rectified_attention.dense import dense_attention, is_for_torch
from fxq.rectified_attention.layout import (
    BlockLayout,
    check_choices,
    check_layout,
    check_tensors,
    empty_output,
    repeat_heads,
)
from fxq.rectified_attention.pooling import pool_blocks
from fxq.rectified_attention.rectification import (
    no_rectification,
    passes_gate,
    rectification,
)
from fxq.rectified_attention.selection import (
    implicit_attention,
    log_counts,
    select_blocks,
    visible_blocks,
)


@dataclass(frozen=True)
class Plan:
    """What every query block visits, and what it gets back for the rest.

    Args:
        selected: visual blocks visited `[B, H, N, N]`, bool.
        compensated: visual blocks given back `[B, H, N, N]`, bool; none of them selected.
        ratio: R, factor of the sparse output `[B, H, N]`, fp32.
        correction: U, added to it `[B, H, N, Dv]`, fp32.
        p_blocks: implicit probability of each block `[B, H, N, N]`, fp32.
        p_text: implicit probability of the text `[B, H, N]`, fp32.
        k_mean: pooled keys `[B, H, N, D]`, fp32.
        v_mean: pooled values `[B, H, N, Dv]`, fp32.
        counts: tokens of each block `[N]`, fp32.
    """

    selected: Tensor
    compensated: Tensor
    ratio: Tensor
    correction: Tensor
    p_blocks: Tensor
    p_text: Tensor
    k_mean: Tensor
    v_mean: Tensor
    counts: Tensor


def plan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    density: Tensor,
    text_mask: Tensor,
    adjacency: Tensor | None,
    layout: BlockLayout,
    top_p: float,
    mode: str,
    mass: str,
    gate: bool,
    center_keys: bool,
    is_causal: bool,
    scale: float,
) -> Plan:
    """Return the plan for tokens in canonical order.

    Args:
        query: `[B, H, S, D]`, any float dtype, canonical order.
        key: `[B, Hkv, S, D]`.
        value: `[B, Hkv, S, Dv]`.
        density: share of the visible blocks to keep, one element.
        text_mask: valid text tokens `[B, text_size]`, bool.
        adjacency: blocks always kept `[N, N]`, bool.
        layout: of the sequence.
        top_p: see `select_blocks`.
        mode: "paper", "online" or "sparse".
        mass: see `rectification`.
        gate: give back only what `passes_gate`.
        center_keys: see `passes_gate`.
        is_causal: keys after the query are not seen.
        scale: of the logits.
    """
    n_heads, n_visual = query.shape[1], layout.n_visual
    counts = layout.counts(query.device)
    q = pool_blocks(query[:, :, :n_visual], counts, layout.block_size)
    k, v = (pool_blocks(x[:, :, :n_visual], counts, layout.block_size) for x in (key, value))
    k, v = (type(x)(*(repeat_heads(part, n_heads) for part in x)) for x in (k, v))
    text_key = repeat_heads(key[:, :, n_visual:].float(), n_heads)
    if is_causal and layout.text_start > 0:
        text_mask = torch.zeros_like(text_mask)  # text after every visual query
    visible = visible_blocks(layout.n_blocks, is_causal, query.device)
    bias = log_counts(counts, is_causal)
    p_blocks, p_text = implicit_attention(q.mean, k.mean, bias, visible, text_key, text_mask, scale)
    if is_causal:  # a query block sees part of its own block, which no pooled key can stand for
        own = torch.eye(layout.n_blocks, dtype=torch.bool, device=query.device)
        adjacency = own if adjacency is None else adjacency | own
    selected = select_blocks(p_blocks, p_text, density, top_p, adjacency, visible)

    compensated = visible & ~selected
    if gate:
        compensated = compensated & passes_gate(q, k, counts, center_keys)
    if mode == "sparse":
        compensated = torch.zeros_like(compensated)
    if mode == "paper":
        parts = rectification(p_blocks, p_text, selected, compensated, v.mean, mass)
    else:
        parts = no_rectification(selected, v.mean)
    return Plan(selected, compensated, *parts, p_blocks, p_text, k.mean, v.mean, counts)


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return softmax attention and its log-sum-exp; zeros and minus infinity without any key.

    Args:
        query: `[rows, D]`, fp32, scaled.
        key: `[columns, D]`, fp32.
        value: `[columns, Dv]`, fp32.
        bias: added to the logits, broadcasts against `[rows, columns]`, fp32, minus infinity where
            a key is not seen.
    """
    if key.shape[0] == 0:
        return query.new_zeros(len(query), value.shape[-1]), query.new_full(
            (len(query),), -torch.inf
        )
    # On a GPU a switch of torch would make fp32 products TF32; see `fxq.numerics.product`.
    dtype = torch.float64 if query.is_cuda else torch.float32
    query, key, value = (x.to(dtype) for x in (query, key, value))
    logits = query @ key.mT if bias is None else torch.addmm(bias.to(dtype), query, key.mT)
    peak = logits.amax(-1, keepdim=True)
    peak = peak.masked_fill(peak == -torch.inf, 0)
    weights = (logits - peak).exp_()
    total = weights.sum(-1, keepdim=True)
    out = weights @ value / total.masked_fill(total == 0, 1)
    return out.float(), (total.log() + peak)[:, 0].float()


def visited_tokens(selected: Tensor, layout: BlockLayout, text: Tensor) -> Tensor:
    """Return the canonical positions of the keys that a query block visits, ascending int64.

    Args:
        selected: visual blocks visited `[N]`, bool.
        layout: of the sequence.
        text: positions of valid text tokens, int64.
    """
    inside = torch.arange(layout.block_size, device=text.device)
    tokens = (selected.nonzero() * layout.block_size + inside).flatten()
    return torch.cat([tokens[tokens < layout.n_visual], text])


def attend_block(
    query: Tensor, key: Tensor, value: Tensor, found: Plan, b: int, h: int, n: int,
    tokens: Tensor, seen: Tensor | None, online: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return rectified output and log-sum-exp of one query block of one head.

    Args:
        query: rows of the block `[rows, D]`, fp32, scaled.
        key: all keys of the head `[S, D]`, fp32, canonical order.
        value: all values of the head `[S, Dv]`, fp32.
        found: the plan.
        b: sample.
        h: query head.
        n: query block.
        tokens: keys that it visits, `visited_tokens`.
        seen: which of them each row may see `[rows, tokens]`, bool; all unless given.
        online: blocks given back join the softmax.
    """
    keys, values = key[tokens], value[tokens]
    bias = None if seen is None else torch.zeros(seen.shape, device=seen.device)
    if bias is not None and seen is not None:
        bias = bias.masked_fill_(~seen, -torch.inf)
    if online:
        given = found.compensated[b, h, n]
        pseudo = found.counts[given].log().expand(len(query), -1)
        visited = query.new_zeros(len(query), len(tokens)) if bias is None else bias
        keys = torch.cat([keys, found.k_mean[b, h, given]])
        values = torch.cat([values, found.v_mean[b, h, given]])
        bias = torch.cat([visited, pseudo], dim=1)
    out, lse = attend(query, keys, values, bias)
    return out * found.ratio[b, h, n] + found.correction[b, h, n], lse


def rectified_attention(
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
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """Compute rectified sparse attention on any device, in fp32.

    Args:
        query: `[B, H, S, D]`, any float dtype.
        key: `[B, Hkv, S, D]`; each key-value head serves H / Hkv query heads in a row.
        value: `[B, Hkv, S, Dv]`.
        density: share of the visual key blocks kept, one element; 1 and more is dense attention.
        text_len: valid text tokens, the first of the segment, `[B]`, int; all unless given.
        order: position among the visual tokens of each token on the curve `[T]`, int64.
        adjacency: blocks always kept `[N, N]`, bool, in curve order.
        text_start: first token of the text segment, 0 or S - text_size.
        text_size: tokens of the text segment, padding included.
        block_size: visual tokens per block.
        top_p: see `select_blocks`.
        mode: "paper", "online" (blocks left out join the softmax as pseudo-keys) or "sparse" (they
            are forgotten).
        mass: see `rectification`; for "paper".
        gate: give back only blocks that `passes_gate`.
        center_keys: see `passes_gate`.
        is_causal: keys after the query are not seen.
        scale: of the logits, 1 / sqrt(D) unless given.
    Returns:
        `[B, H, S, Dv]` in the dtype of `query` and laid out like it, and the log-sum-exp of the
        logits of all keys a token sees, pseudo-keys included, `[B, H, S]`, fp32.
    Raises:
        ValueError: arguments that make no self-attention or do not fit each other.
    """
    check_choices(mode, mass)
    check_tensors(query, key, value, density)
    layout = BlockLayout(query.shape[2], text_start, text_size, block_size)
    check_layout(layout, text_len, order, adjacency, query.shape[0], is_causal)
    if is_for_torch(query, value, density, layout, is_causal):
        return dense_attention(query, key, value, text_len, layout, scale)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    index = layout.to_canonical(order, query.device)
    text_mask = layout.text_mask(text_len, query.shape[0], query.device)
    out = empty_output(query, value.shape[-1])
    query, key, value = (x.index_select(2, index) for x in (query, key, value))
    found = plan(
        query, key, value, density, text_mask, adjacency, layout, top_p, mode, mass, gate,
        center_keys, is_causal, scale,
    )  # fmt: skip
    positions = index if is_causal else None
    online = mode == "online"
    canonical = _attend_all(query, key, value, found, layout, text_mask, positions, online, scale)
    out[:, :, index] = canonical[0].to(query.dtype)
    lse = torch.empty_like(canonical[1])
    lse[:, :, index] = canonical[1]
    return out, lse


def _attend_all(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    found: Plan,
    layout: BlockLayout,
    text_mask: Tensor,
    positions: Tensor | None,
    online: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp of all canonical rows, fp32."""
    n_batch, n_heads, n_tokens, _ = query.shape
    out = torch.empty(n_batch, n_heads, n_tokens, value.shape[-1], device=query.device)
    lse = torch.empty(n_batch, n_heads, n_tokens, device=query.device)
    everything = torch.ones(layout.n_blocks, dtype=torch.bool, device=query.device)
    for b, h in itertools.product(range(n_batch), range(n_heads)):
        group = h // (n_heads // key.shape[1])
        k, v, q = key[b, group].float(), value[b, group].float(), query[b, h].float() * scale
        text = layout.n_visual + text_mask[b].nonzero()[:, 0]
        for n, rows in layout.row_groups():
            selected = everything if n is None else found.selected[b, h, n]
            tokens = visited_tokens(selected, layout, text)
            seen = None if positions is None else positions[tokens] <= positions[rows, None]
            if n is None:  # text queries see everything and get nothing back
                bias = None if seen is None else torch.where(seen, 0.0, -torch.inf)
                result = attend(q[rows], k[tokens], v[tokens], bias)
            else:
                result = attend_block(q[rows], k, v, found, b, h, n, tokens, seen, online)
            out[b, h, rows], lse[b, h, rows] = result
    return out, lse

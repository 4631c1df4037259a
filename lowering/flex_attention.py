"""FlexAttention as the engine for rectified attention that our own kernel does not take.

The plan is the reference's, in torch; FlexAttention attends to what it selects; R and U follow.
Blocks that are visited whole go in as full blocks, which need no mask; the last, shorter block and
text are partial blocks. FlexAttention knows no pseudo-keys, so "online" mode is not for it.
Its own products of fp32 tensors are TF32 where torch's switches say so; what is selected is not.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from fxq.rectified_attention.layout import BlockLayout, empty_output
from fxq.rectified_attention.reference import plan


@functools.cache
def compiled() -> Callable[..., Any]:
    """Return FlexAttention as a kernel; without compiling it computes every logit."""
    return torch.compile(flex_attention, dynamic=False)


def block_lists(kept: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many entries of each row are set, and their indices first, int32.

    Args:
        kept: `[..., N]`, bool.
    """
    order = kept.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return kept.sum(-1, dtype=torch.int32), order.to(torch.int32)


def pad_segments(x: Tensor, layout: BlockLayout, n_visual: int, n_text: int) -> Tensor:
    """Return canonical tokens `[B, H, S, D]` with each segment filled up by zeros.

    Args:
        x: `[B, H, S, D]`.
        layout: of the sequence.
        n_visual: visual tokens with padding.
        n_text: text tokens with padding.
    """
    visual, text = x[:, :, : layout.n_visual], x[:, :, layout.n_visual :]
    parts = ((visual, n_visual), (text, n_text))
    return torch.cat([F.pad(part, (0, 0, 0, n - part.shape[2])) for part, n in parts], dim=2)


def block_mask(selected: Tensor, text_mask: Tensor, layout: BlockLayout) -> BlockMask:
    """Return what query blocks visit, for segments filled up to whole blocks.

    Args:
        selected: `[B, H, N, N]`, bool.
        text_mask: valid text tokens `[B, text_size]`, bool.
        layout: of the sequence.
    """
    size, n_blocks, n_visual = layout.block_size, layout.n_blocks, layout.n_visual
    n_text = -(-layout.text_size // size)
    kept = F.pad(selected, (0, n_text, 0, n_text), value=True)  # [B, H, N + text, N + text]
    whole = torch.arange(n_blocks + n_text, device=selected.device) < n_visual // size
    length = text_mask.sum(-1)

    def seen(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        in_text = column - n_blocks * size
        valid = torch.where(in_text < 0, column < n_visual, in_text < length[b])
        return kept[b, h, row // size, column // size] & valid

    total = (n_blocks + n_text) * size
    return BlockMask.from_kv_blocks(
        *block_lists(kept & ~whole), *block_lists(kept & whole), BLOCK_SIZE=size, mask_mod=seen,
        seq_lengths=(total, total), compute_q_blocks=False,
    )  # fmt: skip


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
    *,
    scale: float,
    attention: Callable[..., Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend with FlexAttention: `attention` where given, `compiled()` otherwise.

    All other arguments and the results: `fxq.rectified_attention.reference`.
    """
    layout = BlockLayout(query.shape[2], text_start, text_size, block_size)
    index = layout.to_canonical(order, query.device)
    text_mask = layout.text_mask(text_len, query.shape[0], query.device)
    result = empty_output(query, value.shape[-1])
    query, key, value = (x.index_select(2, index) for x in (query, key, value))
    found = plan(
        query, key, value, density, text_mask, adjacency, layout, top_p, mode, mass, gate,
        center_keys, False, scale,
    )  # fmt: skip
    n_visual, n_text = layout.n_blocks * block_size, -(-text_size // block_size) * block_size
    padded = [pad_segments(x, layout, n_visual, n_text) for x in (query, key, value)]
    sparse, aux = (attention or compiled())(
        *padded, block_mask=block_mask(found.selected, text_mask, layout), scale=scale,
        enable_gqa=key.shape[1] != query.shape[1], return_aux=AuxRequest(lse=True),
    )  # fmt: skip
    rows = torch.cat([torch.arange(layout.n_visual), n_visual + torch.arange(text_size)])
    rows = rows.to(index.device)[index.argsort()]  # where the padded result has each token
    ratio = F.pad(
        found.ratio[..., None].repeat_interleave(block_size, 2), (0, 0, 0, n_text), value=1
    )
    correction = F.pad(found.correction.repeat_interleave(block_size, 2), (0, 0, 0, n_text))
    result.copy_((sparse.float() * ratio + correction).index_select(2, rows))
    return result, aux.lse.float().index_select(2, rows)

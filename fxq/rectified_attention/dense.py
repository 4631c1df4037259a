"""Density 1 and more is dense attention, which torch computes faster than a definition."""

import torch
from torch import Tensor

from fxq.rectified_attention.layout import BlockLayout, empty_output, repeat_heads

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def is_for_torch(
    query: Tensor, value: Tensor, density: Tensor, layout: BlockLayout, is_causal: bool
) -> bool:
    """Tell whether `dense_attention` gives what the definition would. Where tensors are on a CPU:
    elsewhere reading the density would have the host wait for the device."""
    return (
        query.device.type == "cpu"
        and float(density) >= 1
        and not is_causal
        and query.shape[-1] == value.shape[-1]
        and layout.n_visual > 0  # so that no row is without keys
        and query.dtype in FLOATS
    )


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    text_len: Tensor | None,
    layout: BlockLayout,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """Return dense attention and its log-sum-exp on a CPU.

    Arguments and results: `reference.rectified_attention`.
    """
    mask = None
    if text_len is not None and layout.text_size:
        text = layout.text_mask(text_len, len(query), query.device)
        start, size = layout.text_start, layout.text_size
        hidden = query.new_zeros(len(query), 1, 1, layout.n_tokens)
        hidden[:, 0, 0, start : start + size].masked_fill_(~text, -torch.inf)
        mask = hidden.expand(-1, -1, layout.n_tokens, -1)
    # What scaled_dot_product_attention runs on CPUs; it alone returns the log-sum-exp.
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    n_heads = query.shape[1]
    key, value = repeat_heads(key, n_heads), repeat_heads(value, n_heads)
    found, lse = attend(query, key, value, attn_mask=mask, scale=scale)
    out = empty_output(query, value.shape[-1]).copy_(found)
    return out, lse.float().contiguous()

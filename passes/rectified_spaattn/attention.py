"""Rectified sparse attention by keyword, for direct use: the op with the defaults of
`ReplaceAttention`."""

from typing import Literal

import torch
from torch import Tensor

from fxq.operators import SPARSE_ATTENTION
from fxq.passes.rectified_spaattn.curve import Grid, block_adjacency, curve_order
from fxq.passes.rectified_spaattn.replace_attention import ReplaceAttention
from fxq.rectified_attention.layout import Mass, Mode

DEFAULT = ReplaceAttention()


def rectified_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    density: float | Tensor = 0.2,
    grid: Grid | None = None,
    text: Literal["first", "last"] = "last",
    text_size: int = 0,
    text_len: Tensor | None = None,
    block_size: int = DEFAULT.block_size,
    top_p: float = DEFAULT.top_p,
    mode: Mode = DEFAULT.mode,
    mass: Mass = DEFAULT.mass,
    gate: bool | None = None,
    center_keys: bool = DEFAULT.center_keys,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Return rectified sparse self-attention, `scaled_dot_product_attention`'s at a density of 1.

    Runs on any device by its definition; inside `torch.compile(..., backend="fxq")` on a kernel.

    Args:
        query: `[B, H, S, D]`, any float dtype.
        key: `[B, Hkv, S, D]`; each key-value head serves H / Hkv query heads in a row.
        value: `[B, Hkv, S, Dv]`.
        density: share of the visual key blocks that each query block keeps at least; 1 and more is
            dense. A tensor of one element may change without another graph.
        grid: frames, height and width of the visual tokens, which lie in this (raster) order: they
            are then taken along a curve, and blocks that touch are kept. None: as they lie.
        text: where the text tokens are.
        text_size: how many, padding included; 0 for none.
        text_len: valid text tokens of each sample, the first of the segment, `[B]`, int; all unless
            given.
        block_size: visual tokens per block.
        top_p: keep more blocks until their implicit probability exceeds this.
        mode: as `ReplaceAttention.mode`.
        mass: as `ReplaceAttention.mass`.
        gate: as `ReplaceAttention.gate`.
        center_keys: as `ReplaceAttention.center_keys`.
        is_causal: keys after the query are not seen; without a grid.
        scale: of the logits, 1 / sqrt(D) unless given.
    Returns:
        `[B, H, S, Dv]` in the dtype of `query`.
    Raises:
        ValueError: arguments that make no self-attention or do not fit each other.
    """
    if text not in ("first", "last"):
        raise ValueError(f"text: expected 'first' or 'last', found {text!r}")
    order = adjacency = None
    if grid is not None:
        if is_causal:
            raise ValueError("grid: expected none with is_causal, where positions say what is past")
        order = curve_order(grid).to(query.device)
        adjacency = block_adjacency(grid, order.cpu(), block_size).to(query.device)
    share = torch.as_tensor(density, dtype=torch.float32, device=query.device)
    out: Tensor = SPARSE_ATTENTION(
        query, key, value, share, text_len, order, adjacency,
        0 if text == "first" else query.shape[-2] - text_size, text_size, block_size, top_p, mode,
        mass, mode == "paper" if gate is None else gate, center_keys, is_causal, scale,
    )[0]  # fmt: skip
    return out

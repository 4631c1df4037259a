"""The operator `fxq::rectified_attention` of the QUANTIZED dialect.

Its body is `fxq.rectified_attention.reference`, so a graph that holds it runs on any device.
Density is a tensor: one graph serves every step, and a density of 1 is dense attention.
"""

import torch
from torch import Tensor

from fxq.rectified_attention import reference
from fxq.rectified_attention.layout import check_choices, empty_output


@torch.library.custom_op("fxq::rectified_attention", mutates_args=())
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
    """Return output and log-sum-exp. Arguments: `reference.rectified_attention`."""
    return reference.rectified_attention(
        query, key, value, density, text_len, order, adjacency, text_start, text_size, block_size,
        top_p, mode, mass, gate, center_keys, is_causal, scale,
    )  # fmt: skip


@rectified_attention.register_fake
def _(
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
    check_choices(mode, mass)
    out = empty_output(query, value.shape[-1])
    return out, query.new_empty(query.shape[:-1], dtype=torch.float32)

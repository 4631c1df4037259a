"""fxq::cache_attention: attention of queries to keys and values that are a cache's int8 codes.

    keys, values = decode(keys, key_scale), decode(values, value_scale)     # fxq.cache_codes
    y = softmax(scale * query @ keys.T + mask) @ values

where a query that sees nothing gives 0, as of `scaled_dot_product_attention`. Heads may share keys
and values: neighbouring ones do.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fxq.cache_codes import decode
from fxq.lowering.cpu.cache_attention import fits, launch
from fxq.lowering.cpu.native import native
from fxq.lowering.registering import register


def reference(
    query: Tensor,
    keys: Tensor,
    key_scale: Tensor,
    values: Tensor,
    value_scale: Tensor,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    """Compute the definition above on any device.

    Args:
        query: fp32 `[B, H, T, D]`.
        keys: codes `[B, G, L, D]`, int8; G divides H.
        key_scale: fp32 `[1, G, 1, D]`.
        values: codes `[B, G, L, E]`, int8.
        value_scale: fp32 `[1, G, 1, E]`.
        mask: bool, False for what is not seen, or fp32, which is added; broadcasts against
            `[B, H, T, L]`.
        scale: of the scores.
    """
    k, v = decode(keys, key_scale), decode(values, value_scale)
    shared = keys.shape[1] != query.shape[1]
    return F.scaled_dot_product_attention(query, k, v, mask, scale=scale, enable_gqa=shared)


def cache_attention(
    query: Tensor, keys: Tensor, key_scale: Tensor, values: Tensor, *rest: Any
) -> Tensor:
    """Compute `reference` with the fastest implementation for the device of `query`."""
    on_cpu = query.device.type == "cpu" and not isinstance(native("cache_attention"), str)
    compute = launch if on_cpu and fits(query, keys, values) else reference
    return compute(query, keys, key_scale, values, *rest)


def _fake(query: Tensor, values: Tensor, **_: object) -> Tensor:
    return query.new_empty((*query.shape[:-1], values.shape[-1]))


register(reference, cache_attention, _fake)

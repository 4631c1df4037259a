"""cache_attention on x86: `cache_attention.cpp` converts codes in registers.

One query waits for memory, which holds a quarter of the bytes; a few share converted codes. Every
sum is in fp32: a result differs from the definition by the order of its sums, by fused
multiply-adds, and by where scales are multiplied.
"""

import ctypes

import torch
from torch import Tensor

from fxq.lowering.cpu.native import SIZE, address, native
from fxq.lowering.kernels import buffers

VECTOR = 8  # channels, which a head's size is a multiple of
# Queries of one sequence that share keys, up to which this is faster than dequantizing first.
MOST_ROWS = 64


def launch(
    query: Tensor,
    keys: Tensor,
    key_scale: Tensor,
    values: Tensor,
    value_scale: Tensor,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    """Return the result `[B, H, T, E]`; the arguments are those of
    `fxq.lowering.cache_attention`, with sizes that `fits` and the last axes contiguous."""
    kernel = native("cache_attention")
    assert not isinstance(kernel, str)
    (batch, heads, n_queries, width), (shared, length) = query.shape, keys.shape[1:3]
    # Named, so that they live as long as the call.
    query, keys, values = (_dense(x) for x in (query, keys, values))
    key_scale, value_scale = key_scale.contiguous(), value_scale.contiguous()
    if mask is not None:
        mask = _dense(mask.expand(batch, heads, n_queries, length))
    out = buffers.allocate((batch, heads, n_queries, values.shape[3]), torch.float32, query.device)
    sizes = _numbers(batch, heads, shared, n_queries, length, width, values.shape[3])
    no_mask = (0, 0, 0)
    steps = _numbers(
        *(step for x in (query, keys, values) for step in x.stride()[:3]),
        *(no_mask if mask is None else mask.stride()[:3]),
    )
    kernel(
        *(ctypes.addressof(sizes), ctypes.addressof(steps)),
        address(query, strided=True),
        *(address(keys, strided=True), address(key_scale)),
        *(address(values, strided=True), address(value_scale)),
        *(address(mask, strided=True), int(mask is not None and mask.dtype != torch.bool)),
        *(scale, address(out), torch.get_num_threads()),
    )
    return out


def fits(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Tell whether the kernel takes these sizes, and is faster than dequantizing first."""
    rows = query.shape[1] // keys.shape[1] * query.shape[2]
    whole = keys.shape[3] % VECTOR == 0 and values.shape[3] % VECTOR == 0
    return whole and rows <= MOST_ROWS


def _numbers(*values: int) -> "ctypes.Array[ctypes.c_int64]":
    return (SIZE * len(values))(*values)


def _dense(x: Tensor) -> Tensor:
    """Return a tensor whose last axis is contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()

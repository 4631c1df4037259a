"""Pooled statistics of blocks of tokens, each block by its true number of tokens."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class BlockStats(NamedTuple):
    """Statistics of the blocks of a sequence.

    Args:
        mean: of the block's tokens `[B, H, N, D]`, fp32.
        deviation: mean distance from `mean`, channel by channel `[B, H, N, D]`, fp32.
    """

    mean: Tensor
    deviation: Tensor


def pool_blocks(x: Tensor, counts: Tensor, block_size: int) -> BlockStats:
    """Return mean and mean absolute deviation of each block.

    Args:
        x: visual tokens in curve order `[B, H, T, D]`, any float dtype.
        counts: tokens of each block `[N]`, fp32; their sum is T.
        block_size: tokens of every block but the last.
    Source: arXiv:2511.19835, pooling; departs by dividing by the true count in the last block.
    """
    n_batch, n_heads, n_tokens, n_channels = x.shape
    n_blocks = counts.shape[0]
    padded = F.pad(x.float(), (0, 0, 0, n_blocks * block_size - n_tokens))
    blocks = padded.reshape(n_batch, n_heads, n_blocks, block_size, n_channels)
    mean = blocks.sum(3) / counts[:, None]
    distance = (blocks - mean[:, :, :, None]).abs()
    if n_tokens < n_blocks * block_size:
        distance[:, :, -1, n_tokens % block_size :] = 0
    return BlockStats(mean, distance.sum(3) / counts[:, None])


def mean_token(mean: Tensor, counts: Tensor) -> Tensor:
    """Return the mean over all tokens `[B, H, 1, D]` from the means of their blocks."""
    return (mean * counts[:, None]).sum(2, keepdim=True) / counts.sum()

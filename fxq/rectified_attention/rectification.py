"""Which of the blocks left out are worth giving back, and how much."""

import torch
from torch import Tensor

from fxq.numerics import product
from fxq.rectified_attention.pooling import BlockStats, mean_token


def gain_and_error(q: BlockStats, k: BlockStats) -> tuple[Tensor, Tensor]:
    """Return the gain of pooling each pair of blocks and its first-order error, `[B, H, N, N]`.

    With Q = q + dq and K = k + dk around their means, the product q k is what pooling keeps; dq k
    and q dk are what it loses first.

    Args:
        q: statistics of the query blocks.
        k: statistics of the key blocks, as many heads.
    Source: arXiv:2511.19835, gain-aware pooling rectification; the common factor block_size^2 is
    left out.
    """
    gain = product(q.mean, k.mean.mT).abs()
    error = product(q.deviation, k.mean.mT).abs() + product(q.mean, k.deviation.mT).abs()
    return gain, error


def passes_gate(q: BlockStats, k: BlockStats, counts: Tensor, center_keys: bool) -> Tensor:
    """Return for which pairs of blocks pooling gains more than it loses, bool `[B, H, N, N]`.

    Args:
        q: statistics of the query blocks.
        k: statistics of the key blocks.
        counts: tokens of each block `[N]`, fp32.
        center_keys: subtract the mean key first, so that the answer, like softmax, does not depend
            on a constant added to every key.
    """
    if center_keys:
        k = BlockStats(k.mean - mean_token(k.mean, counts), k.deviation)
    gain, error = gain_and_error(q, k)
    return gain > error


def rectification(
    p_blocks: Tensor,
    p_text: Tensor,
    selected: Tensor,
    compensated: Tensor,
    v_mean: Tensor,
    mass: str,
) -> tuple[Tensor, Tensor]:
    """Return R `[B, H, N]` and U `[B, H, N, Dv]`, fp32: `output = R * sparse + U`.

    Args:
        p_blocks: probability of each block `[B, H, N, N]`, fp32.
        p_text: probability of the text `[B, H, N]`, fp32.
        selected: blocks visited `[B, H, N, N]`, bool.
        compensated: blocks given back, none of them selected `[B, H, N, N]`, bool.
        v_mean: mean value of each block `[B, H, N, Dv]`, fp32.
        mass: "complement": R is all that is not given back, so that weights sum to one.
            "critical": R is what the visited keys hold.
    Source: arXiv:2511.19835, rectified output.
    """
    given = p_blocks * compensated
    if mass == "complement":
        ratio = 1 - given.sum(-1)
    else:
        ratio = p_text + (p_blocks * selected).sum(-1)
    return ratio.clamp(min=0), product(given, v_mean)


def no_rectification(selected: Tensor, v_mean: Tensor) -> tuple[Tensor, Tensor]:
    """Return R = 1 and U = 0 in the shapes of `rectification`."""
    ratio = torch.ones(selected.shape[:-1], device=v_mean.device)
    return ratio, torch.zeros(*ratio.shape, v_mean.shape[-1], device=v_mean.device)

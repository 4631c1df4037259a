"""The implicit full attention between blocks, and which blocks it makes worth visiting."""

import torch
from torch import Tensor

from fxq.numerics import product


def visible_blocks(n_blocks: int, is_causal: bool, device: torch.device) -> Tensor:
    """Return which key blocks a query block may see at all, bool `[N, N]`.

    Causal attention sees the blocks up to its own; inside its own the exact mask applies.
    """
    every = torch.ones(n_blocks, n_blocks, dtype=torch.bool, device=device)
    return every.tril() if is_causal else every


def log_counts(counts: Tensor, is_causal: bool) -> Tensor:
    """Return the logarithm of how many tokens a pooled column stands for, fp32, broadcasts against
    `[N, N]`.

    Causal: a token of a query block sees, on average over the block, (n + 1) / 2 of its n tokens.
    """
    if not is_causal:
        return counts.log()[None]
    own = torch.diag_embed((counts + 1) / 2 - counts)
    return (counts[None] + own).log()


def implicit_attention(
    q_mean: Tensor,
    k_mean: Tensor,
    log_count: Tensor,
    visible: Tensor,
    text_key: Tensor,
    text_mask: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the attention of pooled queries to pooled visual keys and to the text.

    Text is isolated: its keys are not pooled. A visual column stands for as many tokens as its
    block has, a text column for one, so a softmax over both must be reallocated; adding the
    logarithm of the count to a visual logit is the same in closed form, for unequal counts too.

    Args:
        q_mean: pooled queries `[B, H, N, D]`, fp32.
        k_mean: pooled keys `[B, H, N, D]`, fp32.
        log_count: `log_counts`.
        visible: `[N, N]`, bool.
        text_key: keys of the text segment `[B, H, text_size, D]`, fp32.
        text_mask: which of them are valid `[B, text_size]`, bool.
        scale: of the logits.
    Returns:
        probability of each visual block `[B, H, N, N]` and of all text together `[B, H, N]`, fp32;
        a row of both sums to one.
    Source: arXiv:2511.19835, isolated-pooling attention reallocation.
    """
    blocks = product(q_mean, k_mean.mT) * scale + log_count  # [B, H, N, N]
    blocks = blocks.masked_fill(~visible, -torch.inf)
    text = product(q_mean, text_key.mT) * scale  # [B, H, N, text_size]
    text = text.masked_fill(~text_mask[:, None, None], -torch.inf)
    p = torch.cat([blocks, text], dim=-1).softmax(-1)
    n_blocks = blocks.shape[-1]
    return p[..., :n_blocks], p[..., n_blocks:].sum(-1)


def keep_count(density: Tensor, n_visible: Tensor) -> Tensor:
    """Return how many of the visible blocks a density keeps, at least one, rounded to nearest.

    Args:
        density: one element, any float dtype; 1 and more keep all.
        n_visible: `[N]`, any number dtype.
    """
    n_visible = n_visible.float()
    wanted = (density.reshape(()).float() * n_visible + 0.5).floor()
    return torch.minimum(wanted.clamp(min=1), n_visible)


def select_blocks(
    p_blocks: Tensor,
    p_text: Tensor,
    density: Tensor,
    top_p: float,
    adjacency: Tensor | None,
    visible: Tensor,
) -> Tensor:
    """Return which visual blocks each query block visits, bool `[B, H, N, N]`.

    A block is visited where it is among the k most probable, or where the entries more probable
    than it (blocks, and text as one entry) hold no more than `top_p` together, or where adjacency
    asks for it. Between equal probabilities the lower index comes first, text last.

    Args:
        p_blocks: probability of each block `[B, H, N, N]`, fp32.
        p_text: probability of the text `[B, H, N]`, fp32.
        density: share of the visible blocks that k is, one element.
        top_p: 1 and more visit all.
        adjacency: `[N, N]`, bool.
        visible: `[N, N]`, bool.
    Source: arXiv:2511.19835, block selection; departs in that text takes none of the k places.
    """
    entries = torch.cat([p_blocks, p_text[..., None]], -1)
    ranked, order = entries.sort(dim=-1, descending=True, stable=True)
    before = ranked.cumsum(-1).roll(1, -1)
    before[..., 0] = 0
    in_prefix = (before <= top_p) | (top_p >= 1)
    in_prefix = torch.zeros_like(in_prefix).scatter(-1, order, in_prefix)[..., :-1]

    order = p_blocks.masked_fill(~visible, -1).argsort(dim=-1, descending=True, stable=True)
    rank = torch.arange(p_blocks.shape[-1], device=p_blocks.device)
    in_top_k = rank < keep_count(density, visible.sum(-1))[:, None]  # [N, N], by rank
    in_top_k = torch.zeros_like(in_prefix).scatter(-1, order, in_top_k.expand_as(order))

    selected = in_prefix | in_top_k
    if adjacency is not None:
        selected = selected | adjacency
    return selected & visible

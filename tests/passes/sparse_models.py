"""Small joint-attention models that the sparse attention tests share."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Mask = Callable[[Tensor, int], Tensor]  # valid text [B, text], visual tokens -> attention mask


def below_length(valid: Tensor, n_visual: int) -> Tensor:
    """`arange < n`: provably key padding."""
    n = n_visual + valid.sum(1)
    keep = torch.arange(n_visual + valid.shape[1])[None] < n[:, None]
    return keep[:, None, None]


def not_above_length(valid: Tensor, n_visual: int) -> Tensor:
    """The same, the other way round."""
    n = valid.sum(1, dtype=torch.int32) + n_visual
    hidden = n.unsqueeze(1) <= torch.arange(n_visual + valid.shape[1]).unsqueeze(0)
    return (~hidden)[:, None, None]


def too_short_a_length(valid: Tensor, n_visual: int) -> Tensor:
    """May hide visual tokens."""
    n = n_visual - 1 + valid.sum(1)
    return (torch.arange(n_visual + valid.shape[1])[None] < n[:, None])[:, None, None]


def beside_ones(valid: Tensor, n_visual: int) -> Tensor:
    """Not provably a prefix: the text's own mask decides."""
    return torch.cat([valid.new_ones(len(valid), n_visual), valid], 1)[:, None, None]


def additive(valid: Tensor, n_visual: int) -> Tensor:
    """Not boolean."""
    keep = beside_ones(valid, n_visual)
    return torch.zeros(keep.shape).masked_fill(~keep, -1e4)


def per_query(valid: Tensor, n_visual: int) -> Tensor:
    """Another mask for every query."""
    keep = beside_ones(valid, n_visual)
    return keep.expand(-1, 1, keep.shape[-1], -1)


class JointAttention(nn.Module):
    """Video and text in one self-attention, and nothing but it."""

    def __init__(
        self,
        text: Literal["first", "last", "none"] = "last",
        mask: Mask | None = None,
        heads: tuple[int, int] = (2, 2),
        head_dim: int = 16,
        is_causal: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.text, self.mask, self.heads = text, mask, heads
        self.is_causal, self.dropout = is_causal, dropout
        width = heads[0] * head_dim
        self.embed = nn.Conv3d(4, width, (1, 2, 2), (1, 2, 2))
        self.embed_text = nn.Linear(24, width)
        self.q = nn.Linear(width, width)
        self.k, self.v = (nn.Linear(width, heads[1] * head_dim) for _ in range(2))
        self.out = nn.Linear(width, 16)

    def forward(
        self, video: Tensor, text: Tensor, valid: Tensor, timestep: Tensor | None = None
    ) -> Tensor:
        x = self.embed(video).flatten(2).transpose(1, 2)
        n_visual, n_text = x.shape[1], text.shape[1]
        if timestep is not None:
            x = x + timestep.view(-1, 1, 1) * 1e-3
        if self.text != "none":
            joint = [x, self.embed_text(text)]
            x = torch.cat(joint if self.text == "last" else joint[::-1], 1)
        q = self.q(x).unflatten(-1, (self.heads[0], -1)).transpose(1, 2)
        k, v = (
            layer(x).unflatten(-1, (self.heads[1], -1)).transpose(1, 2)
            for layer in (self.k, self.v)
        )
        mask = None if self.mask is None else self.mask(valid, n_visual)
        h = F.scaled_dot_product_attention(
            q, k, v, mask, self.dropout, self.is_causal, enable_gqa=self.heads[0] != self.heads[1]
        )
        h = self.out(h.transpose(1, 2).flatten(2))
        start = n_text if self.text == "first" else 0
        return h[:, start : start + n_visual]


def joint_inputs(n_text: int = 7, lengths: tuple[int, ...] = (7, 3)) -> dict[str, Tensor]:
    """Return video of 3 x 4 x 6 patches, text, and which text is valid, for two samples."""
    valid = torch.arange(n_text)[None] < torch.tensor(lengths)[:, None]
    n = len(lengths)
    return {
        "video": torch.randn(n, 4, 3, 8, 12), "text": torch.randn(n, n_text, 24), "valid": valid,
    }  # fmt: skip

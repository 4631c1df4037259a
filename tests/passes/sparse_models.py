"""Small joint-attention models, and what the tests of ReplaceAttention do with them."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from families import capture_once
from torch import Tensor, nn
from torch.fx import GraphModule, Node

import fxq
from fxq.graph import is_op
from fxq.operators import SPARSE_ATTENTION
from fxq.passes.rectified_spaattn import ReplaceAttention
from fxq.pipeline import Recipe
from fxq.program import Program

Mask = Callable[[Tensor, int], Tensor]  # valid text [B, text], visual tokens -> attention mask
SMALL = ReplaceAttention(density=0.3, block_size=4, min_tokens=8)
DENSE = replace(SMALL, density=1.0)


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


def inverted_bits(valid: Tensor, n_visual: int) -> Tensor:
    """Of integers: what is hidden, -2, is not false."""
    n = n_visual + valid.sum(1)
    hidden = torch.arange(n_visual + valid.shape[1])[None] >= n[:, None]
    return (~hidden.to(torch.int32)).to(torch.bool)[:, None, None]


def beside_ones(valid: Tensor, n_visual: int) -> Tensor:
    """Not provably a prefix: the text's own mask decides."""
    return torch.cat([valid.new_ones(len(valid), n_visual), valid], 1)[:, None, None]


def additive(valid: Tensor, n_visual: int) -> Tensor:
    """Not boolean."""
    keep = beside_ones(valid, n_visual)
    return torch.zeros(keep.shape).masked_fill(~keep, -1e4)


def constant_bias(valid: Tensor, n_visual: int) -> Tensor:
    """A bias that hides nothing, and counts."""
    return torch.linspace(1, 5, n_visual + valid.shape[1])[None, None, None]


def bias_of_ones(valid: Tensor, n_visual: int) -> Tensor:
    """A bias, though it looks like a mask that keeps everything."""
    return torch.ones(len(valid), 1, 1, n_visual + valid.shape[1])


def bias_of_zeros(valid: Tensor, n_visual: int) -> Tensor:
    """A bias without effect."""
    return bias_of_ones(valid, n_visual) * 0


def all_kept(valid: Tensor, n_visual: int) -> Tensor:
    """A mask without effect."""
    return torch.ones(1, 1, 1, n_visual + valid.shape[1], dtype=torch.bool)


def in_any_order(valid: Tensor, n_visual: int) -> Tensor:
    """Of valid text that may lie anywhere."""
    return beside_ones(valid.roll(2, 1), n_visual)


def padded_on(valid: Tensor, n_visual: int) -> Tensor:
    """The same, as padding, from another dtype."""
    return F.pad(valid.roll(2, 1).long(), (n_visual, 0), value=1).bool()[:, None, None]


def for_pairs(valid: Tensor, n_visual: int) -> Tensor:
    """Padding neither seen nor seeing, as a product."""
    keep = in_any_order(valid, n_visual)
    return keep * keep.transpose(2, 3)


def for_repeated_pairs(valid: Tensor, n_visual: int) -> Tensor:
    """The same, by a repeated mask and its transpose."""
    keep = padded_on(valid, n_visual)
    rows = keep.repeat(1, 1, keep.shape[-1], 1)
    return (rows & rows.transpose(2, 3)).bool()


def rounded(valid: Tensor, n_visual: int) -> Tensor:
    """Not provable: 0.5 shows a key, and rounded to an integer does not."""
    keep = beside_ones(valid, n_visual).float() * 0 + 0.5
    return keep.long().bool()


def for_other_pairs(valid: Tensor, n_visual: int) -> Tensor:
    """Padding that sees padding: no product of two parts."""
    keep = beside_ones(valid, n_visual)
    return keep == keep.transpose(2, 3)


def of_one_sample(valid: Tensor, n_visual: int) -> Tensor:
    """Of two parts that know no batch."""
    keep = beside_ones(valid, n_visual)[0, 0, 0]
    return keep & keep[:, None]


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


def compress(model: nn.Module, example: Any, attention: ReplaceAttention, **kwargs: Any) -> Program:
    return fxq.compress(model.eval(), example, Recipe("test", (attention,)), **kwargs)


def compress_each(
    model: nn.Module, example: Any, *attentions: ReplaceAttention, strict: bool = True
) -> Iterator[Program]:
    """Yield a program for each, of one capture."""
    found = capture_once(model.eval(), example)
    for attention in attentions:
        yield found.compress(Recipe("test", (attention,)), strict)


def sparse_nodes(gm: GraphModule) -> list[Node]:
    return [n for n in gm.graph.nodes if is_op(n, SPARSE_ATTENTION)]


def reasons(program: Program) -> dict[str, str]:
    """Module name -> why its attention is dense."""
    rows = fxq.report(program).rows
    return {r.row.module: r.reason for r in rows if r.row.kind == "attention" and r.row.skip}

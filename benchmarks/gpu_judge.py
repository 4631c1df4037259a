"""What judges attention on a GPU: some query blocks computed again in float64.

    O = R softmax(s Q K^T + bias) V + U       written out, pseudo-keys of "online" mode included

Near-ties make selections differ between correct implementations, so a result is judged at the lists
of blocks that it was computed with; how many blocks are listed is counted apart.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from gpu_rows import too_far
from torch import Tensor

from fxq.lowering.kernels.rectified_attention import Prepared
from fxq.lowering.lower_attention import min_attention_sqnr_db
from fxq.rectified_attention.layout import BlockLayout

JUDGED_BLOCKS = 12  # of queries, spread over heads and sequence, the last ones among them


class Shape(NamedTuple):
    """A self-attention.

    Args:
        grid: frames, height and width of the visual tokens.
        heads: of queries and keys.
        dim: D.
        text: tokens after the visual ones.
        density: share of visual blocks that is visited.
        curve: visual tokens are gathered by a curve, and neighbouring blocks are kept.
        block_size: visual tokens per block.
        dtype: of the tensors.
        mode: of the attention.
    """

    grid: tuple[int, int, int]
    heads: int
    dim: int
    text: int = 0
    density: float = 0.2
    curve: bool = False
    block_size: int = 128
    dtype: torch.dtype = torch.bfloat16
    mode: str = "paper"

    @property
    def n_tokens(self) -> int:
        """S."""
        return math.prod(self.grid) + self.text

    @property
    def layout(self) -> BlockLayout:
        """Of the sequence."""
        return BlockLayout(self.n_tokens, math.prod(self.grid), self.text, self.block_size)


@dataclass(frozen=True)
class Inputs:
    """Query, key and value of a shape, and the arguments of the kernels."""

    shape: Shape
    qkv: tuple[Tensor, Tensor, Tensor]
    args: tuple[Any, ...]

    @property
    def scale(self) -> float:
        """Of the logits."""
        return self.shape.dim**-0.5


def lists_of(prepared: Prepared, layout: BlockLayout, heads: int) -> Tensor:
    """Return which blocks are listed `[H, N, N]`, bool."""
    counts = prepared.selection.n_visited[:-1].view(heads, layout.n_blocks, 1)
    visited = prepared.selection.visited[:-1].view(heads, layout.n_blocks, layout.n_blocks)
    places = torch.arange(layout.n_blocks, device=counts.device)
    blocks = visited.long().where(places < counts, layout.n_blocks)
    listed = torch.zeros(*blocks.shape[:2], layout.n_blocks + 1, dtype=torch.bool).to(blocks.device)
    return listed.scatter_(2, blocks, True)[..., :-1]


def judged_again(given: Inputs, prepared: Prepared | None, h: int, n: int) -> tuple[Tensor, Tensor]:
    """Return where the rows of a query block lie in the sequence, and what they are in float64.

    Args:
        given: the inputs.
        prepared: lists of blocks, R and U; dense attention where left out.
        h: head.
        n: query block; the one after the last is the text.
    """
    layout, size = given.shape.layout, given.shape.block_size
    canonical = torch.arange(layout.n_tokens, device=given.qkv[0].device)
    if prepared is not None and prepared.positions is not None:
        canonical = prepared.positions
    visual = canonical[: layout.n_visual]
    text = canonical[layout.n_visual :]
    rows = visual[n * size : (n + 1) * size] if n < layout.n_blocks else text[-size:]
    seen, ratio, correction = canonical, 1.0, 0.0
    if prepared is not None and n < layout.n_blocks:
        of = h * layout.n_blocks + n
        count = int(prepared.selection.n_visited[of])
        blocks = prepared.selection.visited[of, :count].tolist()
        parts = [visual[m * size : (m + 1) * size] for m in blocks]
        seen = torch.cat([*parts, text])
        ratio = float(prepared.selection.ratio[of])
        correction = 0.0 if prepared.correction is None else prepared.correction[of].double()
    q, k, v = (x[0, h].double() for x in given.qkv)
    logits, values = q[rows] @ k[seen].T * given.scale, v[seen]
    if prepared is not None and prepared.pooled is not None and n < layout.n_blocks:
        pooled_k, pooled_v, bias = (part[0, h].double() for part in prepared.pooled)
        pseudo = q[rows] @ pooled_k.T * given.scale + bias[n]
        logits, values = torch.cat([logits, pseudo], 1), torch.cat([values, pooled_v])
    return rows, logits.softmax(-1) @ values * ratio + correction


def wrong_attention(given: Inputs, prepared: Prepared | None, found: Tensor) -> str | None:
    """Return why an output is wrong where it is judged, None where it is right.

    Args:
        given: the inputs.
        prepared: lists of blocks, R and U; dense attention where left out.
        found: the output `[1, H, S, D]`.
    """
    layout, heads = given.shape.layout, given.shape.heads
    n_rows = layout.n_blocks + (layout.text_size > 0)
    places = sorted({i * (n_rows - 1) // (JUDGED_BLOCKS - 1) for i in range(JUDGED_BLOCKS)})
    expected, reached = [], []
    for i, n in enumerate(places):
        h = (7 * i) % heads
        rows, again = judged_again(given, prepared, h, n)
        expected.append(again)
        reached.append(found[0, h, rows])
    bound = min_attention_sqnr_db(given.shape.dtype)
    return too_far(torch.cat(expected), torch.cat(reached), bound)


def wrong_count(given: Inputs, prepared: Prepared) -> str | None:
    """Return why lists do not hold as many blocks as asked, None where they do."""
    shape, n_blocks = given.shape, given.shape.layout.n_blocks
    wanted = min(n_blocks, max(1, math.floor(shape.density * n_blocks + 0.5)))
    counts = prepared.selection.n_visited[:-1]
    right = counts >= wanted if shape.curve else counts == wanted
    if bool(right.all()):
        return None
    return f"expected {wanted} of {n_blocks} blocks, found {int(counts.min())} to {counts.max()}"

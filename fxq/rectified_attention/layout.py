"""Which tokens are visual and which are text, and what the op accepts.

Inside the op tokens are in canonical order: visual tokens first, in curve order where one is given,
then text. `BlockLayout` says how to get there and back.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Mode = Literal["paper", "online", "sparse"]
Mass = Literal["complement", "critical"]


@dataclass(frozen=True)
class BlockLayout:
    """Where the text segment lies in a sequence, and how visual tokens are cut into blocks.

    Args:
        n_tokens: S, tokens of the sequence.
        text_start: first token of the text segment; 0, or `n_tokens - text_size`.
        text_size: tokens of the text segment, padding included; 0 where there is no text.
        block_size: visual tokens per block; the last block may be shorter.
    """

    n_tokens: int
    text_start: int
    text_size: int
    block_size: int

    @property
    def n_visual(self) -> int:
        """T, the number of visual tokens."""
        return self.n_tokens - self.text_size

    @property
    def n_blocks(self) -> int:
        """N, the number of visual blocks."""
        return -(-self.n_visual // self.block_size)

    @property
    def visual_start(self) -> int:
        """First visual token of the sequence."""
        return self.text_size if self.text_start == 0 else 0

    def row_groups(self) -> Iterator[tuple[int | None, slice]]:
        """Yield the canonical rows of every visual block with its index, then those of the text, a
        block's worth at a time, with None."""
        for n in range(self.n_blocks):
            start = n * self.block_size
            yield n, slice(start, min(start + self.block_size, self.n_visual))
        for start in range(self.n_visual, self.n_tokens, self.block_size):
            yield None, slice(start, min(start + self.block_size, self.n_tokens))

    def to_canonical(self, order: Tensor | None, device: torch.device) -> Tensor:
        """Return the position in the sequence of each canonical token, int64 `[S]`."""
        if order is None:
            order = torch.arange(self.n_visual, device=device)
        text = torch.arange(self.text_start, self.text_start + self.text_size, device=device)
        return torch.cat([order.to(device, torch.int64) + self.visual_start, text])

    def counts(self, device: torch.device) -> Tensor:
        """Return the tokens of each visual block, fp32 `[N]`."""
        starts = torch.arange(self.n_blocks, device=device) * self.block_size
        return (self.n_visual - starts).clamp(max=self.block_size).float()

    def text_mask(self, text_len: Tensor | None, n_batch: int, device: torch.device) -> Tensor:
        """Return which text tokens are valid, bool `[B, text_size]`."""
        if text_len is None:
            return torch.ones(n_batch, self.text_size, dtype=torch.bool, device=device)
        return torch.arange(self.text_size, device=device) < text_len[:, None]


def empty_output(query: Tensor, dim_v: int) -> Tensor:
    """Return an uninitialised output `[B, H, S, Dv]` in the dtype of `query`.

    Where heads lie within tokens, as a linear leaves them, the output's do too: the reshape to
    `[B, S, H * Dv]` after attention then copies nothing.
    """
    n_batch, n_heads, n_tokens, _ = query.shape
    if query.stride(1) < query.stride(2):
        return query.new_empty(n_batch, n_tokens, n_heads, dim_v).transpose(1, 2)
    return query.new_empty(n_batch, n_heads, n_tokens, dim_v)


def repeat_heads(x: Tensor, n_heads: int) -> Tensor:
    """Return key-value heads `[B, Hkv, ...]` repeated to `[B, H, ...]`, each for its group."""
    group = n_heads // x.shape[1]
    return x if group == 1 else x.repeat_interleave(group, dim=1)


def check_choices(mode: str, mass: str) -> None:
    """Raise `ValueError` where a named choice does not exist."""
    for name, value, choices in (("mode", mode, get_args(Mode)), ("mass", mass, get_args(Mass))):
        if value not in choices:
            raise ValueError(f"{name}: expected one of {choices}, found {value!r}")


def check_tensors(query: Tensor, key: Tensor, value: Tensor, density: Tensor) -> None:
    """Raise `ValueError` where the tensors do not make a self-attention.

    Args:
        query: `[B, H, S, D]`, any float dtype.
        key: `[B, Hkv, S, D]`, Hkv a divisor of H.
        value: `[B, Hkv, S, Dv]`.
        density: one element.
    """
    shapes = [tuple(t.shape) for t in (query, key, value)]
    if any(len(shape) != 4 for shape in shapes):
        raise ValueError(f"expected query, key and value of four dimensions, found {shapes}")
    (b, h, s, d), (b_key, h_key, s_key, d_key), of_value = shapes
    if (b, s, d) != (b_key, s_key, d_key) or of_value[:3] != (b_key, h_key, s_key):
        raise ValueError(
            f"expected self-attention, query [B, H, S, D], key [B, Hkv, S, D] and value "
            f"[B, Hkv, S, Dv], found {shapes}; leave cross-attention dense"
        )
    if h_key == 0 or h % h_key:
        raise ValueError(f"expected query heads a multiple of key heads, found {h} and {h_key}")
    if density.numel() != 1:
        raise ValueError(f"density: expected one number, found shape {tuple(density.shape)}")


def check_layout(
    layout: BlockLayout,
    text_len: Tensor | None,
    order: Tensor | None,
    adjacency: Tensor | None,
    n_batch: int,
    is_causal: bool,
) -> None:
    """Raise `ValueError` where segments, order or adjacency do not fit the sequence."""
    if layout.block_size < 1:
        raise ValueError(f"block_size: expected at least 1, found {layout.block_size}")
    last = layout.n_tokens - layout.text_size
    if last < 0 or (layout.text_size and layout.text_start not in (0, last)):
        raise ValueError(
            f"expected text at either end of {layout.n_tokens} tokens, found {layout.text_size} "
            f"tokens from {layout.text_start}; leave this attention dense"
        )
    n_blocks = layout.n_blocks
    for name, tensor, shape in (
        ("text_len", text_len, (n_batch,)),
        ("order", order, (layout.n_visual,)),
        ("adjacency", adjacency, (n_blocks, n_blocks)),
    ):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, found {tuple(tensor.shape)}")
    if is_causal and order is not None:
        raise ValueError("order: expected none with is_causal, where positions say what is past")

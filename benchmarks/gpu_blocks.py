"""Rows of the GPU benchmark for whole transformer blocks, compiled: fxq against Inductor.

The blocks are written out in torch, as ViT-L, DiT-XL/2 and Wan-14B have them, with random weights,
so that no model library is needed. Each result is judged by the same block in fp32, uncompiled; a
sparse one by a block that attends by the definition. All tokens share a component, so that a wrong
attention is seen: the mean of many random values alone would be next to nothing.
"""

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from gpu_rows import Job, Row, too_far
from torch import Tensor, nn

import fxq
from fxq.backend import fxq as backend
from fxq.passes import w8a8
from fxq.passes.rectified_spaattn import ReplaceAttention, TokenLayout, block_adjacency, curve_order
from fxq.pipeline import Recipe

MIN_DB = {"bfloat16": 32.0, "W8A8": 22.0}  # of a block with 8-bit codes and random weights
DENSITY = 0.2


def heads_of(x: Tensor, n_heads: int) -> Tensor:
    """Return `[B, S, H * D]` as `[B, H, S, D]`."""
    return x.unflatten(-1, (n_heads, -1)).transpose(1, 2)


class VitBlock(nn.Module):
    """A block of a vision transformer: attention and MLP, normed before."""

    def __init__(self, dim: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads_of(part, self.n_heads) for part in self.qkv(self.norm1(x)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.proj(attended)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class DitBlock(nn.Module):
    """A block of a diffusion transformer: a condition shifts, scales and gates its two halves."""

    def __init__(self, dim: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.modulation = nn.Linear(dim, 6 * dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        parts = self.modulation(F.silu(condition))[:, None].chunk(6, -1)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        h = self.norm(x) * (1 + scale1) + shift1
        q, k, v = (heads_of(part, self.n_heads) for part in self.qkv(h).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate1 * self.proj(attended)
        h = self.norm(x) * (1 + scale2) + shift2
        return x + gate2 * self.down(F.gelu(self.up(h), approximate="tanh"))


class WanBlock(nn.Module):
    """A block of a video transformer: self-attention with rotated queries and keys,
    cross-attention to text, MLP."""

    def __init__(self, dim: int, n_heads: int, hidden: int, n_tokens: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.cross_norm = nn.LayerNorm(dim)
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.cross_q, self.cross_k, self.cross_v, self.cross_o = (
            nn.Linear(dim, dim) for _ in range(4)
        )
        self.q_norm, self.k_norm = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.cross_q_norm, self.cross_k_norm = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)
        half = dim // n_heads // 2
        angles = torch.arange(n_tokens)[:, None] / 1e4 ** (torch.arange(half) / half)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.attend: Callable[..., Tensor] = F.scaled_dot_product_attention

    def rotate(self, x: Tensor) -> Tensor:
        """Rotate pairs of channels of `[B, H, S, D]` by the position's angles."""
        a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([a * self.cos - b * self.sin, a * self.sin + b * self.cos], -1)
        return turned.flatten(-2).to(x.dtype)

    def forward(self, x: Tensor, text: Tensor, time: Tensor) -> Tensor:
        parts = (self.modulation + time).chunk(6, 1)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        h = self.norm(x) * (1 + scale1) + shift1
        q, k = heads_of(self.q_norm(self.q(h)), self.n_heads), self.k_norm(self.k(h))
        q, k = self.rotate(q), self.rotate(heads_of(k, self.n_heads))
        attended = self.attend(q, k, heads_of(self.v(h), self.n_heads))
        x = x + gate1 * self.o(attended.transpose(1, 2).flatten(2))
        q = heads_of(self.cross_q_norm(self.cross_q(self.cross_norm(x))), self.n_heads)
        k = heads_of(self.cross_k_norm(self.cross_k(text)), self.n_heads)
        attended = F.scaled_dot_product_attention(q, k, heads_of(self.cross_v(text), self.n_heads))
        x = x + self.cross_o(attended.transpose(1, 2).flatten(2))
        h = self.norm(x) * (1 + scale2) + shift2
        return x + gate2 * self.down(F.gelu(self.up(h), approximate="tanh"))


@dataclass(frozen=True)
class Size:
    """A block and what it is called with.

    Args:
        kind: "vit", "dit" or "wan".
        batch: B.
        grid: tokens: one axis, or frames, height and width.
        dim: channels.
        n_heads: H.
        hidden: of the MLP of "wan".
        n_text: tokens of text of "wan".
    """

    kind: str
    batch: int
    grid: tuple[int, ...]
    dim: int
    n_heads: int
    hidden: int = 0
    n_text: int = 512


BLOCKS = {
    "ViT-L block, batch 8": Size("vit", 8, (197,), 1024, 16),
    "Wan-14B block, 32,760 tokens": Size("wan", 1, (21, 30, 52), 5120, 40, 13824),
    "DiT-XL/2 block, batch 16": Size("dit", 16, (256,), 1152, 16),
}
TINY = {
    "tiny ViT block": Size("vit", 2, (9,), 32, 2),
    "tiny Wan block": Size("wan", 1, (2, 4, 32), 32, 2, 64, 7),
    "tiny DiT block": Size("dit", 2, (8,), 32, 2),
}


def block_of(size: Size) -> nn.Module:
    """Return the block with random weights."""
    if size.kind == "wan":
        return WanBlock(size.dim, size.n_heads, size.hidden, math.prod(size.grid))
    return {"vit": VitBlock, "dit": DitBlock}[size.kind](size.dim, size.n_heads)


@functools.lru_cache(maxsize=1)
def made(size: Size, device: str) -> tuple[nn.Module, tuple[Tensor, ...], Tensor]:
    """Return a block in bfloat16, its inputs, and its output in fp32; rows of a block share it."""
    torch.manual_seed(0)
    with torch.device(device):
        block = block_of(size).eval().to(torch.bfloat16)
        shape = (size.batch, math.prod(size.grid), size.dim)
        inputs = [torch.randn(shape) + 2 * torch.randn(size.dim)]
        if size.kind == "wan":
            inputs += [torch.randn(size.batch, size.n_text, size.dim)]
            inputs += [torch.randn(size.batch, 6, size.dim)]
        elif size.kind == "dit":
            inputs += [torch.randn(size.batch, size.dim)]
    given = tuple(x.to(torch.bfloat16) for x in inputs)
    return block, given, in_fp32(block, given)


def in_fp32(block: nn.Module, given: tuple[Tensor, ...]) -> Tensor:
    """Return what a block gives in fp32."""
    return copy.deepcopy(block).float()(*(x.float() for x in given))


def sparse(size: Size) -> ReplaceAttention:
    """Return the pass that makes the block's self-attention sparse."""
    layout = TokenLayout(text_size=0, grid=size.grid)  # type: ignore[arg-type]
    return ReplaceAttention(DENSITY, top_p=0.0, min_tokens=256, layout=layout)


def sparse_definition(size: Size, block: nn.Module) -> nn.Module:
    """Return a block that attends as `sparse` should, by the definition."""
    rule = sparse(size)
    order = curve_order(size.grid)
    near = block_adjacency(size.grid, order, rule.block_size)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        density = torch.tensor(DENSITY, device=q.device)
        return torch.ops.fxq.rectified_attention(
            q, k, v, density, None, order.to(q.device), near.to(q.device), q.shape[2], 0,
            rule.block_size, rule.top_p, rule.mode, rule.mass, True, rule.center_keys, False, None,
        )[0]  # fmt: skip

    found = copy.deepcopy(block)
    found.attend = attend
    return found


def compiled(module: nn.Module, **options: Any) -> Callable[..., Tensor]:
    """Return a compiled module."""
    torch._dynamo.reset()
    return torch.compile(module, dynamic=False, **options)


def make_block(size: Size, device: str, variant: str) -> Job:
    """Return a row of a compiled block."""
    block, given, expected = made(size, device)
    bound = MIN_DB["bfloat16" if variant == "bfloat16 Inductor" else "W8A8"]
    if variant == "bfloat16 Inductor":
        run = compiled(block)
    elif variant == "fxq W8A8 static":
        run = compiled(fxq.compress(block, given, w8a8.STATIC, [given]), backend=backend)
    else:
        passes = w8a8.DYNAMIC.passes
        if "sparse" in variant:
            passes = (*passes, sparse(size))
            expected = in_fp32(sparse_definition(size, block), given)
        recipe = Recipe("benchmark", passes)
        run = compiled(block, backend=backend, options={"recipe": recipe})

    inputs = {f"input {i}": x for i, x in enumerate(given)}
    return Job((lambda: run(*given),), inputs, lambda: too_far(expected, run(*given), bound))


def rows(blocks: dict[str, Size]) -> list[Row]:
    """Return the rows of blocks."""
    variants = ("fxq W8A8 dynamic", "bfloat16 Inductor", "fxq W8A8 static")
    own = {"wan": ("fxq W8A8 dynamic, sparse attention", *variants[:2])}
    return [
        Row(case, variant, "", 45, functools.partial(make_block, size, variant=variant))
        for case, size in blocks.items()
        for variant in own.get(size.kind, variants)
    ]

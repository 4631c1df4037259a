"""Calls of rectified attention with defaults, and data on which its claims hold or fail."""

from typing import Any

import torch
from torch import Tensor

from fxq.rectified_attention.reference import rectified_attention

DEFAULTS: dict[str, Any] = {
    "text_len": None, "order": None, "adjacency": None, "text_start": 0, "text_size": 0,
    "block_size": 8, "top_p": 0.0, "mode": "paper", "mass": "complement", "gate": True,
    "center_keys": False, "is_causal": False, "scale": None,
}  # fmt: skip
MODES = ("paper", "online", "sparse")


def attention(q: Tensor, k: Tensor, v: Tensor, density: float, **options: Any) -> Tensor:
    """Return the output of rectified attention."""
    return with_lse(q, k, v, density, **options)[0]


def with_lse(
    q: Tensor, k: Tensor, v: Tensor, density: float, **options: Any
) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp; top-k only unless `top_p` is given."""
    return rectified_attention(q, k, v, torch.tensor(density), **DEFAULTS | options)


def random_qkv(n_tokens: int, heads: int = 2, batch: int = 1, dim: int = 16) -> list[Tensor]:
    """Return independent normal query, key and value."""
    return [torch.randn(batch, heads, n_tokens, dim) for _ in range(3)]


def block_structured(
    n_blocks: int, block_size: int, dim: int = 64, amp: float = 0.8, sigma: float = 0.1
) -> list[Tensor]:
    """Return query and key that are a prototype per block and noise, and a normal value."""
    shape = (1, 2, n_blocks * block_size, dim)
    prototypes = [
        (torch.randn(1, 2, n_blocks, dim) * amp).repeat_interleave(block_size, 2) for _ in range(2)
    ]
    return [p + sigma * torch.randn(shape) for p in prototypes] + [torch.randn(shape)]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the relative Frobenius error."""
    return float((found - expected).norm() / expected.norm())

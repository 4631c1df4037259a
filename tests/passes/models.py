"""Hand-written models that the pass and backend tests share."""

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """A transformer block whose q, k and v read one input."""

    def __init__(self, width: int = 64, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (
            layer(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        a = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.proj(a)
        return x + self.down(nn.functional.gelu(self.up(x)))


class Computed(nn.Module):
    """Weights that are computed at each call: a norm with 1 + weight as Gemma's, a bias put
    together as BEiT's, weights of an einsum `[H, C, D]`, a weight norm."""

    def __init__(self, width: int = 64, heads: int = 2) -> None:
        super().__init__()
        self.norm_weight = nn.Parameter(torch.rand(width) - 0.5)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias, self.v_bias = (nn.Parameter(torch.randn(width)) for _ in range(2))
        self.register_buffer("k_bias", torch.zeros(width))
        self.rows = nn.Parameter(torch.randn(heads, 3 * width, width // heads) / width**0.5)
        self.out = nn.utils.parametrizations.weight_norm(nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        h = (wide * (1.0 + self.norm_weight.float())).type_as(x)
        bias = torch.cat([self.q_bias, self.k_bias, self.v_bias])
        h = nn.functional.linear(h, self.qkv.weight, bias)
        return x + self.out(torch.einsum("btc,hcd->bthd", h, self.rows).flatten(2))


class Tied(nn.Module):
    """An embedding whose weight is the head's too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 64)
        self.block = nn.Linear(64, 64)
        self.head = nn.Linear(64, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.block(self.embed(ids)))


class Twice(nn.Module):
    """One module called at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.relu(self.inner(x)) * 3.0)


class OutOfOrder(nn.Module):
    """Registered in another order than called."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.a, self.b = nn.Linear(64, 8), nn.Linear(16, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))

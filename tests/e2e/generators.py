"""Small models that draw images as published generators do: with a loop of their own, which calls
parts of the model, caches in plain attributes, and lengths that change. And a judge that knows
nothing of graphs: it watches `F.linear`, or quantizes what goes into it, by the definition.

- `NextScale` draws 1, then 4 tokens at once, its blocks called one by one (as VAR does).
- `OneByOne` has a method for a step that grows a cache by one token (RAR).
- `Masked` drops by a boolean mask the tokens that are not known yet (MAR).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

WIDTH, HEADS, CODES = 32, 2, 24


class Attention(nn.Module):
    """The weight is read as a tensor, the bias is put together at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.q_bias, self.v_bias = (nn.Parameter(torch.randn(WIDTH) / 9) for _ in range(2))
        self.register_buffer("no_bias", torch.zeros(WIDTH))
        self.caching, self.keys, self.values = False, None, None

    def keep(self, caching: bool) -> None:
        self.caching, self.keys, self.values = caching, None, None

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat((self.q_bias, self.no_bias, self.v_bias))
        qkv = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, HEADS, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = 4 * F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        if self.caching:
            if self.keys is not None:
                k, v = torch.cat((self.keys, k), 2), torch.cat((self.values, v), 2)
            self.keys, self.values = k, v
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.norm = Attention(), nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.modulation = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.modulation(condition).unsqueeze(1).chunk(2, -1)
        x = x + self.attn(self.norm(x).mul(scale.add(1)).add_(shift))
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Generator(nn.Module):
    """Parts that the three kinds share."""

    n_blocks = 1

    def __init__(self) -> None:
        super().__init__()
        self.labels, self.tokens = nn.Embedding(4, WIDTH), nn.Embedding(CODES, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(self.n_blocks))
        self.head = nn.Linear(WIDTH, CODES)
        self.places = nn.Parameter(torch.randn(1, 16, WIDTH))

    def keep(self, caching: bool) -> None:
        for block in self.blocks:
            block.attn.keep(caching)

    def forward(self, *_: Any) -> None:
        raise NotImplementedError("it is drawn with")

    def draw(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens `[B, N]` and all logits."""
        raise NotImplementedError


class NextScale(Generator):
    scales = (1, 2)

    def draw(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        condition = self.labels(labels)
        x, drawn, logits = condition.unsqueeze(1), list[Tensor](), list[Tensor]()
        self.keep(True)
        for side in self.scales:
            x = x.mean(1, keepdim=True) + self.places[:, : side * side]
            for block in self.blocks:
                x = block(x, condition)
            logits.append(self.head(x))
            drawn.append(logits[-1].argmax(-1))
            x = self.tokens(drawn[-1])
        self.keep(False)
        return torch.cat(drawn, 1), torch.cat(logits, 1)


class OneByOne(Generator):
    def step(self, ids: Tensor, condition: Tensor) -> Tensor:
        x = (
            torch.cat((condition.unsqueeze(1), self.tokens(ids)), 1)
            + self.places[:, : len(ids[0]) + 1]
        )
        if self.blocks[0].attn.keys is not None:  # type: ignore[union-attr]
            x = x[:, -1:]
        for block in self.blocks:
            x = block(x, condition)
        return self.head(x)[:, -1]

    def draw(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        condition, ids = self.labels(labels), labels.new_empty(len(labels), 0)
        logits = []
        self.keep(True)
        for _ in range(5):
            logits.append(self.step(ids, condition))
            ids = torch.cat((ids, logits[-1].argmax(-1, keepdim=True)), 1)
        self.keep(False)
        return ids, torch.stack(logits, 1)


class Masked(Generator):
    n_blocks = 2

    def step(self, ids: Tensor, known: Tensor, condition: Tensor) -> Tensor:
        x = (self.tokens(ids) + self.places[:, : ids.shape[1]])[known.nonzero(as_tuple=True)]
        x = self.blocks[0](x.reshape(len(ids), -1, WIDTH), condition)
        whole = self.places[:, : ids.shape[1]].repeat(len(ids), 1, 1)
        whole[known.nonzero(as_tuple=True)] = x.flatten(0, 1)
        return self.head(self.blocks[1](whole, condition))

    def draw(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        condition, known = self.labels(labels), torch.zeros(len(labels), 9, dtype=torch.bool)
        ids, logits = torch.zeros(len(labels), 9, dtype=torch.int64), []
        known[:, 0] = True
        for n in (3, 6, 9):
            logits.append(self.step(ids, known, condition))
            known = torch.arange(9).expand(len(labels), -1) * 4 % 9 < n
            ids = torch.where(known, logits[-1].argmax(-1), ids)
        return ids, torch.stack(logits, 1)


Key = tuple[int, int]


def key_of(x: Tensor, weight: Tensor, by_length: bool) -> Key:
    return id(weight), x.shape[-2] if by_length and x.ndim > 2 else 0


class Watching(TorchFunctionMode):
    """Notes the smallest and largest input of `F.linear`, by weight, and by number of tokens where
    that is asked for."""

    def __init__(self, by_length: bool = False) -> None:
        super().__init__()
        self.by_length, self.ranges = by_length, dict[Key, tuple[float, float]]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, key = args[0], key_of(args[0], args[1], self.by_length)
            low, high = self.ranges.get(key, (torch.inf, -torch.inf))
            self.ranges[key] = min(low, float(x.min())), max(high, float(x.max()))
        return func(*args, **(kwargs or {}))


class Quantizing(TorchFunctionMode):
    """8-bit rounding of what goes into `F.linear`: weights per row, inputs in ranges seen."""

    def __init__(self, watched: Watching) -> None:
        super().__init__()
        self.watched = watched

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, weight, *rest = args
            low, high = self.watched.ranges[key_of(x, weight, self.watched.by_length)]
            scale = (max(high, 0.0) - min(low, 0.0)) / 255
            zero = round(-128 - min(low, 0.0) / scale)
            x = ((x / scale).round() + zero).clamp(-128, 127).sub(zero) * scale
            step = weight.abs().amax(1, keepdim=True) / 127
            args = (x, (weight / step).round() * step, *rest)
        return func(*args, **(kwargs or {}))

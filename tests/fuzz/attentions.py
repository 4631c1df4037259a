"""Attention in the spellings people use, right and nearly right: a rewrite must know them apart."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from family import Family, Shape, Shapes, Spelling
from torch import Tensor, nn


def _projections(shape: Shape, size: int) -> Shapes:
    if len(shape) != 3:
        return None
    c = shape[-1]
    return {
        "qkv": (3 * c, c),
        "bias": (shape[1], shape[1]),
        "temperature": (1,),
        "table": (2, 1, 1),
    }


def _one_head(m: Any, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = F.linear(h, m.qkv).chunk(3, -1)
    return q, k, v


def _heads(m: Any, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v `[B, 2, T, D]`."""
    q, k, v = F.linear(h, m.qkv).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    return q, k, v


def _joined(y: Tensor) -> Tensor:
    return y.transpose(1, 2).flatten(2)


def _scale(q: Tensor) -> float:
    return q.shape[-1] ** -0.5


def _causal(h: Tensor) -> Tensor:
    return torch.ones(h.shape[1], h.shape[1], dtype=torch.bool).tril()


def _by_hand(m: Any, h: Tensor, scores: Any, values: Any = None) -> Tensor:
    q, k, v = _heads(m, h)
    weights = scores(q, k)
    return _joined((weights if values is None else values(weights)) @ v)


SCORES: dict[str, Spelling] = {
    "softmax(q @ k.mT * s)": lambda m, h, o, n: _by_hand(
        m, h, lambda q, k: (q @ k.mT * _scale(q)).softmax(-1)
    ),
    "softmax(q @ k.transpose / sqrt(d))": lambda m, h, o, n: _by_hand(
        m, h, lambda q, k: (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)
    ),
    "softmax((q * s) @ k.mT)": lambda m, h, o, n: _by_hand(
        m, h, lambda q, k: ((q * _scale(q)) @ k.mT).softmax(-1)
    ),
    "softmax((q * s) @ (k * s).mT)": lambda m, h, o, n: _by_hand(
        m, h, lambda q, k: ((q * 0.7) @ (k * 0.6).mT).softmax(-1)
    ),
    "softmax(q @ k.mT)": lambda m, h, o, n: _by_hand(m, h, lambda q, k: (q @ k.mT).softmax(-1)),
    "softmax(-q @ k.mT)": lambda m, h, o, n: _by_hand(m, h, lambda q, k: (-(q @ k.mT)).softmax(-1)),
    "softmax(2 / (q @ k.mT))": lambda m, h, o, n: _by_hand(
        m, h, lambda q, k: (2.0 / ((q @ k.mT).abs() + 1)).softmax(-1)
    ),
    "softmax(q @ k.mT, -2)": lambda m, h, o, n: _by_hand(
        m, h, lambda q, k: (q @ k.mT * _scale(q)).softmax(-2)
    ),
    "softmax in float": lambda m, h, o, n: _by_hand(
        m, h, lambda q, k: (q @ k.mT * _scale(q)).softmax(-1, dtype=torch.float32).to(q.dtype)
    ),
    "scores in float": lambda m, h, o, n: _by_hand(
        m, h, lambda q, k: (q @ k.mT * _scale(q)).float().softmax(-1).to(q.dtype)
    ),
    "softmax(q @ k)": lambda m, h, o, n: _by_hand(
        m, h, lambda q, k: (q.mT @ k).softmax(-1) @ k.mT @ k.mT.mT.mT.mT[..., :1, :1].mT
    ),
    "softmax(q @ q.mT)": lambda m, h, o, n: _by_hand(m, h, lambda q, k: (q @ q.mT).softmax(-1)),
    "softmax(s * q @ k.mT + bias)": lambda m, h, o, n: _by_hand(
        m, h, lambda q, k: (q @ k.mT * _scale(q) + m.bias).softmax(-1)
    ),
    "softmax(bias + s * q @ k.mT)": lambda m, h, o, n: _by_hand(
        m, h, lambda q, k: (m.bias + q @ k.mT * _scale(q)).softmax(-1)
    ),
    "softmax((q @ k.mT + bias) * s)": lambda m, h, o, n: _by_hand(
        m, h, lambda q, k: ((q @ k.mT + m.bias) * _scale(q)).softmax(-1)
    ),
    "softmax(q @ k.mT - bias)": lambda m, h, o, n: _by_hand(
        m, h, lambda q, k: (q @ k.mT - m.bias).softmax(-1)
    ),
    "softmax(q @ k.mT + table)": lambda m, h, o, n: _by_hand(
        m, h, lambda q, k: (q @ k.mT + m.table).softmax(-1)
    ),
    "softmax(add(bias, alpha=2))": lambda m, h, o, n: _by_hand(
        m, h, lambda q, k: (q @ k.mT).add(m.bias, alpha=2).softmax(-1)
    ),
    "softmax(q @ k.mT * temperature)": lambda m, h, o, n: _by_hand(
        m, h, lambda q, k: (q @ k.mT * m.temperature).softmax(-1)
    ),
    "softmax(q @ k.mT + bias + bias)": lambda m, h, o, n: _by_hand(
        m, h, lambda q, k: (q @ k.mT + m.bias + m.bias.T).softmax(-1)
    ),
    "masked_fill(causal, -inf)": lambda m, h, o, n: _by_hand(
        m, h, lambda q, k: (q @ k.mT).masked_fill(~_causal(h), -math.inf).softmax(-1)
    ),
    "masked_fill(causal, -1e9)": lambda m, h, o, n: _by_hand(
        m,
        h,
        lambda q, k: (
            (q.float() @ k.float().mT).masked_fill(~_causal(h), -1e9).softmax(-1).to(q.dtype)
        ),
    ),
    "where(causal, scores, finfo.min)": lambda m, h, o, n: _by_hand(
        m,
        h,
        lambda q, k: torch.where(_causal(h), q @ k.mT, torch.finfo(q.dtype).min).softmax(-1),
    ),
    "where(causal, scores, -5)": lambda m, h, o, n: _by_hand(
        m, h, lambda q, k: torch.where(_causal(h), q @ k.mT, -5.0).softmax(-1)
    ),
    "a row without keys": lambda m, h, o, n: _by_hand(
        m, h, lambda q, k: torch.where(_causal(h).tril(-1), q @ k.mT, -1e30).softmax(-1)
    ),
    "masked then scaled": lambda m, h, o, n: _by_hand(
        m,
        h,
        lambda q, k: (torch.where(_causal(h), q @ k.mT, -3e4) * 1e-4).softmax(-1),
    ),
    "masked with bias": lambda m, h, o, n: _by_hand(
        m,
        h,
        lambda q, k: (torch.where(_causal(h), q @ k.mT * _scale(q), -math.inf) + m.bias).softmax(
            -1
        ),
    ),
    "mask from values": lambda m, h, o, n: _by_hand(
        m,
        h,
        lambda q, k: (q @ k.mT).masked_fill((h[:, None, None, :, 0] > 3), -1e4).softmax(-1),
    ),
    "scores + mask from values": lambda m, h, o, n: _by_hand(
        m, h, lambda q, k: (q @ k.mT + h[:, None, None, :, 0]).softmax(-1)
    ),
    "scores read twice": lambda m, h, o, n: _by_hand(
        m, h, lambda q, k: (q @ k.mT).softmax(-1) + (q @ k.mT) * 0.1
    ),
    "weights dropped out": lambda m, h, o, n: _by_hand(
        m, h, lambda q, k: F.dropout((q @ k.mT).softmax(-1), 0.5, training=False)
    ),
    "weights times a mask": lambda m, h, o, n: _by_hand(
        m, h, lambda q, k: (q @ k.mT).softmax(-1) * _causal(h)
    ),
    "weights renormalised": lambda m, h, o, n: _by_hand(
        m, h, lambda q, k: (q @ k.mT).softmax(-1), lambda w: w / w.sum(-2, keepdim=True)
    ),
    "weights.mT": lambda m, h, o, n: _by_hand(m, h, lambda q, k: (q @ k.mT).softmax(-1).mT),
    "linear attention": lambda m, h, o, n: _by_hand(m, h, lambda q, k: q.relu() @ k.relu().mT),
    "other k": lambda m, h, o, n: _by_hand(
        m, h, lambda q, k: (q @ F.normalize(k, dim=-1).mT * 10).softmax(-1)
    ),
    "einsum": lambda m, h, o, n: _by_hand(
        m, h, lambda q, k: torch.einsum("bhtd,bhsd->bhts", q, k).mul(0.3).softmax(-1)
    ),
}


def _flat_heads(m: Any, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (x.flatten(0, 1) for x in _heads(m, h))
    return q, k, v


def _bmm(m: Any, h: Tensor, beta: float, alpha: float) -> Tensor:
    q, k, v = _flat_heads(m, h)
    weights = torch.baddbmm(m.bias, q, k.mT, beta=beta, alpha=alpha).softmax(-1)
    return _joined(torch.bmm(weights, v).unflatten(0, (-1, 2)))


def _windows(m: Any, h: Tensor, mask: Tensor) -> Tensor:
    """Attention within two windows of half the tokens, with a mask per window."""
    x = h.unflatten(1, (2, -1)).flatten(0, 1)
    q, k, v = F.linear(x, m.qkv).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    scores = q @ k.mT * _scale(q)
    scores = scores.unflatten(0, (-1, 2)) + mask
    y = scores.flatten(0, 1).softmax(-1) @ v
    return _joined(y).unflatten(0, (-1, 2)).flatten(1, 2)


def _sdpa(m: Any, h: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    return _joined(F.scaled_dot_product_attention(*_heads(m, h), attn_mask=mask, **options))


def _shorter(m: Any, h: Tensor) -> Tensor:
    q, k, v = _heads(m, h)
    return _joined((q[:, :, :1] @ k.mT).softmax(-1) @ v[..., :1])


def _grouped(m: Any, h: Tensor) -> Tensor:
    q, k, v = _heads(m, h)
    return _joined(F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True))


WHOLE: dict[str, Spelling] = {
    "one head": lambda m, h, o, n: _one(*_one_head(m, h)),
    "bmm": lambda m, h, o, n: _bmm(m, h, 0, 1),
    "baddbmm": lambda m, h, o, n: _bmm(m, h, 1, 1),
    "baddbmm(alpha)": lambda m, h, o, n: _bmm(m, h, 1, 0.5),
    "baddbmm(beta=0, alpha)": lambda m, h, o, n: _bmm(m, h, 0, 0.5),
    "baddbmm(beta=0.5)": lambda m, h, o, n: _bmm(m, h, 0.5, 1),
    "windows": lambda m, h, o, n: _windows(m, h, m.table[:, None, None]),
    "windows by head": lambda m, h, o, n: _windows(m, h, m.table),
    "sdpa": lambda m, h, o, n: _sdpa(m, h),
    "sdpa causal": lambda m, h, o, n: _sdpa(m, h, is_causal=True),
    "sdpa bool mask": lambda m, h, o, n: _sdpa(m, h, _causal(h)),
    "sdpa float mask": lambda m, h, o, n: _sdpa(m, h, m.bias),
    "sdpa scale": lambda m, h, o, n: _sdpa(m, h, scale=0.3),
    "sdpa grouped": lambda m, h, o, n: _grouped(m, h),
    "sdpa row without keys": lambda m, h, o, n: _sdpa(m, h, _causal(h).tril(-1)),
    "shorter query": lambda m, h, o, n: _shorter(m, h),
    "MultiheadAttention": lambda m, h, o, n: m.attention(h, h, h, need_weights=False)[0],
    "MultiheadAttention and weights": lambda m, h, o, n: m.attention(h, o, h)[0],
    "encoder layer": lambda m, h, o, n: m.encoder(h),
}


def _one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * _scale(q)).softmax(-1) @ v


def _attention(shape: Shape, size: int) -> nn.Module:
    return nn.MultiheadAttention(shape[-1], 1, batch_first=True).eval()


def _encoder(shape: Shape, size: int) -> nn.Module:
    return nn.TransformerEncoderLayer(shape[-1], 1, 2 * shape[-1], batch_first=True).eval()


ATTENTIONS = {
    "attention": Family(
        SCORES | WHOLE, _projections, {"attention": _attention, "encoder": _encoder}
    ),
}

"""Views, copies, merges with earlier values, constants made in the forward, and branches."""

import torch
import torch.nn.functional as F
from family import Family, Spelling
from torch import Tensor

VIEW: dict[str, Spelling] = {
    "flatten(1)": lambda m, h, o, n: h.flatten(1),
    "reshape(len(h), -1)": lambda m, h, o, n: h.reshape(len(h), -1),
    "view(-1, c)": lambda m, h, o, n: h.view(-1, h.shape[-1]),
    "reshape(-1, c)": lambda m, h, o, n: h.reshape(-1, h.shape[-1]),
    "unflatten(-1, (-1, 2))": lambda m, h, o, n: h.unflatten(-1, (-1, 2)),
    "unflatten(1, (1, -1))": lambda m, h, o, n: h.unflatten(1, (1, -1)),
    "transpose(1, 2)": lambda m, h, o, n: h.transpose(1, 2),
    "transpose(-1, -2)": lambda m, h, o, n: h.transpose(-1, -2),
    "transpose(0, 1)": lambda m, h, o, n: h.transpose(0, 1),
    "mT": lambda m, h, o, n: h.mT,
    "T": lambda m, h, o, n: h.T,
    "permute(0, 2, 1)": lambda m, h, o, n: h.permute(0, 2, 1),
    "permute(0, 2, 3, 1)": lambda m, h, o, n: h.permute(0, 2, 3, 1),
    "permute(2, 0, 1)": lambda m, h, o, n: h.permute(2, 0, 1),
    "movedim(1, -1)": lambda m, h, o, n: h.movedim(1, -1),
    "transpose and contiguous": lambda m, h, o, n: h.transpose(1, 2).contiguous(),
    "transpose and reshape": lambda m, h, o, n: h.transpose(1, 2).reshape(
        h.shape[0], -1, h.shape[1]
    ),
    "heads": lambda m, h, o, n: h.unflatten(-1, (2, -1)).transpose(1, 2),
    "heads joined": lambda m, h, o, n: h.transpose(1, 2).flatten(2),
    "unsqueeze(1)": lambda m, h, o, n: h.unsqueeze(1),
    "unsqueeze(-1)": lambda m, h, o, n: h.unsqueeze(-1),
    "squeeze": lambda m, h, o, n: h.squeeze(-2),
    "chunk(2, -1)[0]": lambda m, h, o, n: h.chunk(2, -1)[0],
    "chunk(2, -1)[-1]": lambda m, h, o, n: h.chunk(2, -1)[-1],
    "chunk(2, 1)[0]": lambda m, h, o, n: h.chunk(2, 1)[0],
    "split and cat": lambda m, h, o, n: torch.cat(h.split(2, -1)[::-1], -1),
    "unbind": lambda m, h, o, n: h.unbind(1)[-1],
    "tensor_split": lambda m, h, o, n: h.tensor_split(2, -1)[0],
    "[..., :2]": lambda m, h, o, n: h[..., :2],
    "[..., -1:]": lambda m, h, o, n: h[..., -1:],
    "[:, ::2]": lambda m, h, o, n: h[:, ::2],
    "[:, 0]": lambda m, h, o, n: h[:, 0],
    "[:, -1]": lambda m, h, o, n: h[:, -1],
    "[:]": lambda m, h, o, n: h[:],
    "[:1]": lambda m, h, o, n: h[:1],
    "[..., None]": lambda m, h, o, n: h[..., None],
    "[:, index]": lambda m, h, o, n: h[:, torch.tensor([0, 0, -1])],
    "narrow": lambda m, h, o, n: h.narrow(-1, 0, 1),
    "expand": lambda m, h, o, n: h[:, :1].expand(-1, 3, *h.shape[2:]),
    "expand_as": lambda m, h, o, n: h[:, :1].expand_as(h),
    "repeat": lambda m, h, o, n: h.repeat(1, 2, *[1] * (h.ndim - 2)),
    "repeat_interleave": lambda m, h, o, n: h.repeat_interleave(2, 1),
    "tile": lambda m, h, o, n: h.tile(2),
    "flip": lambda m, h, o, n: h.flip(-1),
    "flip(0)": lambda m, h, o, n: h.flip(0),
    "roll": lambda m, h, o, n: h.roll(1, 1),
    "pad": lambda m, h, o, n: F.pad(h, (1, 2)),
    "clone": lambda m, h, o, n: h.clone(),
    "contiguous": lambda m, h, o, n: h.contiguous(),
    "sum(1)": lambda m, h, o, n: h.sum(1),
    "mean(-1, keepdim)": lambda m, h, o, n: h.mean(-1, keepdim=True),
    "amax": lambda m, h, o, n: h.amax(1, keepdim=True),
    "sort": lambda m, h, o, n: h.sort(-1).values,
    "topk": lambda m, h, o, n: h.topk(1, -1).values,
    "argmax": lambda m, h, o, n: h.argmax(-1, keepdim=True).to(h.dtype),
    "gather": lambda m, h, o, n: h.gather(-1, o.argsort(-1)),
    "unfold": lambda m, h, o, n: h.unfold(1, 2, 1),
    "triu": lambda m, h, o, n: h.triu(),
    "as_strided": lambda m, h, o, n: h.contiguous().as_strided((h.shape[0], 1), (1, 1)),
}

MERGE: dict[str, Spelling] = {
    "h + o": lambda m, h, o, n: h + o,
    "o + h": lambda m, h, o, n: o + h,
    "h - o": lambda m, h, o, n: h - o,
    "h.add(o, alpha=2)": lambda m, h, o, n: h.add(o, alpha=2),
    "h * o": lambda m, h, o, n: h * o,
    "h * o.mean": lambda m, h, o, n: h * o.mean(-1, keepdim=True),
    "cat(h, o)": lambda m, h, o, n: torch.cat([h, o], -1),
    "cat(h, o) of axis 1": lambda m, h, o, n: torch.cat([h, o], 1),
    "stack(h, o)": lambda m, h, o, n: torch.stack([h, o], 1),
    "h @ o.mT": lambda m, h, o, n: h @ o.mT,
    "h.mT @ o": lambda m, h, o, n: h.mT @ o,
    "lerp": lambda m, h, o, n: torch.lerp(h, o, 0.25),
    "where(mask)": lambda m, h, o, n: torch.where(o > 0, h, 2 * o),
    "maximum": lambda m, h, o, n: torch.maximum(h, o),
    "addcmul": lambda m, h, o, n: torch.addcmul(h, o, o, value=0.5),
    "cdist": lambda m, h, o, n: torch.cdist(h, o + 1),
    "masked_scatter": lambda m, h, o, n: h.masked_fill(o > 1, -1.0),
}


def _cond(h: Tensor) -> Tensor:
    return torch.cond(h.sum() > 0, lambda x: x * 2, lambda x: x - 1, (h,))  # type: ignore


def _branch_on_size(h: Tensor) -> Tensor:
    return h * 2 if h.shape[0] > 2 else h - 1


def _branch_on_value(h: Tensor) -> Tensor:
    return h * 2 if h.sum() > 0 else h - 1


def _loop(h: Tensor, n: int) -> Tensor:
    for _ in range(n):
        h = h * 0.5 + 1
    return h


CONTROL: dict[str, Spelling] = {
    "if n > 1": lambda m, h, o, n: h * 2 if n > 1 else h - 1,
    "for _ in range(n)": lambda m, h, o, n: _loop(h, n),
    "if h.shape[0] > 2": lambda m, h, o, n: _branch_on_size(h),
    "if h.sum() > 0": lambda m, h, o, n: _branch_on_value(h),
    "cond": lambda m, h, o, n: _cond(h),
    "h / len(h)": lambda m, h, o, n: h / len(h),
    "h / h.size(0)": lambda m, h, o, n: h / h.size(0),
    "h + arange(h.shape[0])": lambda m, h, o, n: (
        h + torch.arange(h.shape[0], dtype=h.dtype)[(..., *[None] * (h.ndim - 1))]
    ),
    "h + n": lambda m, h, o, n: h + n,
    "h * h.shape[1]": lambda m, h, o, n: h * h.shape[1],
    "if h.is_contiguous()": lambda m, h, o, n: h * 2 if h.is_contiguous() else h - 1,
    "if dtype": lambda m, h, o, n: h * 2 if h.dtype == torch.float32 else h - 1,
    "map over samples": lambda m, h, o, n: torch.vmap(torch.sin)(h),
}

CONSTANT: dict[str, Spelling] = {
    "h + ones": lambda m, h, o, n: h + torch.ones(h.shape[-1], dtype=h.dtype),
    "h + arange": lambda m, h, o, n: h + torch.arange(h.shape[-1], dtype=h.dtype),
    "h * tensor(2.)": lambda m, h, o, n: h * torch.tensor(2.0, dtype=h.dtype),
    "h + tensor([..])": lambda m, h, o, n: h + torch.tensor([1.5], dtype=h.dtype),
    "h @ eye": lambda m, h, o, n: h @ torch.eye(h.shape[-1], dtype=h.dtype),
    "h * zeros_like": lambda m, h, o, n: h + torch.zeros_like(h),
    "h * new_full": lambda m, h, o, n: h * h.new_full((h.shape[-1],), 0.5),
    "h * linspace": lambda m, h, o, n: h * torch.linspace(0, 1, h.shape[-1]).to(h.dtype),
    "h * tril": lambda m, h, o, n: h * torch.ones(h.shape[-2:], dtype=h.dtype).tril(),
    "rotary": lambda m, h, o, n: _rotary(h),
}


def _rotary(h: Tensor) -> Tensor:
    t, c = h.shape[-2], h.shape[-1] // 2
    angle = torch.outer(torch.arange(t).float(), 100.0 ** (-torch.arange(c).float() / c))
    cos, sin = angle.cos().to(h.dtype), angle.sin().to(h.dtype)
    a, b = h[..., :c], h[..., c : 2 * c]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


MOVEMENT: dict[str, Family] = {
    "view": Family(VIEW),
    "merge": Family(MERGE),
    "control": Family(CONTROL),
    "constant": Family(CONSTANT),
}

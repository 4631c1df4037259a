"""Recurrence, buffers that a call changes, and writes in place."""

from typing import Any

import torch
from family import Family, Shape, Shapes, Spelling
from torch import Tensor, nn


def _buffers(shape: Shape, size: int) -> Shapes:
    return {"count": (1,), "running": (shape[-1],), "cache": (4, shape[-1])}


def _counted(m: Any, h: Tensor) -> Tensor:
    m.count.add_(1)
    return h + m.count


def _running(m: Any, h: Tensor) -> Tensor:
    m.running.mul_(0.5).add_(h.reshape(-1, h.shape[-1]).mean(0))
    return h - m.running


def _cached(m: Any, h: Tensor) -> Tensor:
    m.cache.index_copy_(0, torch.tensor([1]), h.reshape(-1, h.shape[-1])[:1])
    return h + m.cache.sum(0)


def _sliced(m: Any, h: Tensor) -> Tensor:
    m.cache[:1] = h.reshape(-1, h.shape[-1])[:1]
    return h + m.cache.sum(0)


def _assigned(m: Any, h: Tensor) -> Tensor:
    m.count = m.count + 1
    return h + m.count


def _read_before(m: Any, h: Tensor) -> Tensor:
    before = m.count.clone()
    m.count += 1
    return h + before


STATE: dict[str, Spelling] = {
    "count.add_(1)": lambda m, h, o, n: _counted(m, h),
    "running mean": lambda m, h, o, n: _running(m, h),
    "cache.index_copy_": lambda m, h, o, n: _cached(m, h),
    "cache[:1] = h": lambda m, h, o, n: _sliced(m, h),
    "count = count + 1": lambda m, h, o, n: _assigned(m, h),
    "read before count += 1": lambda m, h, o, n: _read_before(m, h),
    "h + running": lambda m, h, o, n: h + m.running,
    "cache.t()": lambda m, h, o, n: h @ m.cache.t(),
}


def _first(h: Tensor, value: float) -> Tensor:
    h[:, :1] = value
    return h


def _last(h: Tensor) -> Tensor:
    h[..., -1] = h[..., 0]
    return h


def _plus(h: Tensor) -> Tensor:
    h += 1
    return h


def _half(h: Tensor) -> Tensor:
    h.chunk(2, -1)[0].mul_(2)
    return h


def _transposed(h: Tensor) -> Tensor:
    h.transpose(-1, -2)[..., 0, :] = 3.0
    return h


def _masked(h: Tensor) -> Tensor:
    h[h < -1] = 0.5
    return h


def _copied(h: Tensor, o: Tensor) -> Tensor:
    h[:, 0].copy_(o[:, -1])
    return h


def _index_copied(h: Tensor) -> Tensor:
    return h.index_copy_(0, torch.tensor([0]), h[:1] * 2)


def _read_and_write(h: Tensor) -> Tensor:
    before = h * 2
    h.add_(1)
    return before + h


def _view_before_write(h: Tensor) -> Tensor:
    first = h[:, :1]
    h.mul_(3)
    return first + h


def _empty(h: Tensor) -> Tensor:
    out = torch.empty_like(h)
    out.copy_(h)
    out[:1] = 0
    return out


WRITES: dict[str, Spelling] = {
    "h[:, :1] = 5": lambda m, h, o, n: _first(h, 5.0),
    "h[..., -1] = h[..., 0]": lambda m, h, o, n: _last(h),
    "h += 1": lambda m, h, o, n: _plus(h),
    "h.relu_()": lambda m, h, o, n: h.relu_(),
    "h.mul_(o)": lambda m, h, o, n: h.mul_(o),
    "h.chunk[0].mul_(2)": lambda m, h, o, n: _half(h),
    "h.mT[..., 0, :] = 3": lambda m, h, o, n: _transposed(h),
    "h[h < -1] = 0.5": lambda m, h, o, n: _masked(h),
    "h[:, 0].copy_(o[:, -1])": lambda m, h, o, n: _copied(h, o),
    "h.index_copy_": lambda m, h, o, n: _index_copied(h),
    "read, then h.add_(1)": lambda m, h, o, n: _read_and_write(h),
    "view, then h.mul_(3)": lambda m, h, o, n: _view_before_write(h),
    "h.zero_()": lambda m, h, o, n: h.zero_(),
    "h.masked_fill_": lambda m, h, o, n: h.masked_fill_(h > 1, 0.0),
    "clone()[:, :1] = 5": lambda m, h, o, n: _first(h.clone(), 5.0),
    "(h + 0)[..., -1] = ": lambda m, h, o, n: _last(h + 0),
    "(h * 1) += 1": lambda m, h, o, n: _plus(h * 1),
    "(h * 1).chunk[0].mul_(2)": lambda m, h, o, n: _half(h * 1),
    "(h * 1).mT[..., 0, :] = 3": lambda m, h, o, n: _transposed(h * 1),
    "(h * 1)[h < -1] = 0.5": lambda m, h, o, n: _masked(h * 1),
    "(h * 1)[:, 0].copy_": lambda m, h, o, n: _copied(h * 1, o),
    "(h * 1).index_copy_": lambda m, h, o, n: _index_copied(h * 1),
    "(h * 1), view, mul_(3)": lambda m, h, o, n: _view_before_write(h * 1),
    "(h * 1), read, add_(1)": lambda m, h, o, n: _read_and_write(h * 1),
    "empty_like": lambda m, h, o, n: _empty(h),
}


def _recurrent(kind: type[nn.RNNBase], **options: Any) -> Any:
    def make(shape: Shape, size: int) -> nn.Module:
        return kind(shape[-1], size, batch_first=True, **options)

    return make


RECURRENT: dict[str, Spelling] = {
    "lstm": lambda m, h, o, n: m.lstm(h)[0],
    "gru": lambda m, h, o, n: m.gru(h)[0],
    "gru both ways": lambda m, h, o, n: m.both_ways(h)[0],
}

STATES = {
    "state": Family(STATE, _buffers, buffers=("count", "running", "cache")),
    "write": Family(WRITES),
    "recurrent": Family(
        RECURRENT,
        lambda shape, size: {} if len(shape) == 3 else None,
        {
            "lstm": _recurrent(nn.LSTM),
            "gru": _recurrent(nn.GRU),
            "both_ways": _recurrent(nn.GRU, bidirectional=True),
        },
    ),
}

"""Products with weights in the spellings people use."""

import torch
import torch.nn.functional as F
from family import Family, Shape, Shapes, Spelling
from torch import Tensor, nn


def _matrices(shape: Shape, n: int) -> Shapes:
    c = shape[-1]
    return {
        "w": (n, c), "wt": (c, n), "b": (n,), "packed": (3 * n, c), "g": (c,), "row": (1, c),
        "square": (c, c), "heads": (c, 2, n), "halves": (2, n, c), "flat": (n * c,),
        "left": (n, shape[-2] if len(shape) > 1 else 1), "column": (c, 1), "vector": (c,),
    }  # fmt: skip


def _rows(h: Tensor) -> Tensor:
    return h.reshape(-1, h.shape[-1])


def _back(y: Tensor, h: Tensor) -> Tensor:
    return y.view(*h.shape[:-1], y.shape[-1])


LINEAR: dict[str, Spelling] = {
    "F.linear(h, w)": lambda m, h, o, n: F.linear(h, m.w),
    "F.linear(h, w, b)": lambda m, h, o, n: F.linear(h, m.w, m.b),
    "F.linear(h, w) + b": lambda m, h, o, n: F.linear(h, m.w) + m.b,
    "b + F.linear(h, w)": lambda m, h, o, n: m.b + F.linear(h, m.w),
    "F.linear(h, w) + b[None]": lambda m, h, o, n: F.linear(h, m.w) + m.b[None],
    "F.linear(h, w) - b": lambda m, h, o, n: F.linear(h, m.w) - m.b,
    "F.linear(h, w).add(b, alpha=2)": lambda m, h, o, n: F.linear(h, m.w).add(m.b, alpha=2),
    "b.add(F.linear(h, w), alpha=0.5)": lambda m, h, o, n: m.b.add(F.linear(h, m.w), alpha=0.5),
    "F.linear(h, w).add_(b)": lambda m, h, o, n: F.linear(h, m.w).add_(m.b),
    "F.linear(h, w, b) + b": lambda m, h, o, n: F.linear(h, m.w, m.b) + m.b,
    "y = F.linear(h, w); y * (y + b)": lambda m, h, o, n: _twice(F.linear(h, m.w), m.b),
    "h @ w.T": lambda m, h, o, n: h @ m.w.T,
    "h @ w.t()": lambda m, h, o, n: h @ m.w.t(),
    "h @ w.mT": lambda m, h, o, n: h @ m.w.mT,
    "h @ w.transpose(0, 1)": lambda m, h, o, n: h @ m.w.transpose(0, 1),
    "h @ w.permute(1, 0)": lambda m, h, o, n: h @ m.w.permute(1, 0),
    "h @ w.T.contiguous()": lambda m, h, o, n: h @ m.w.T.contiguous(),
    "h @ w.reshape(c, -1)": lambda m, h, o, n: h @ m.w.reshape(h.shape[-1], -1),
    "h @ wt": lambda m, h, o, n: h @ m.wt,
    "h @ wt + b": lambda m, h, o, n: h @ m.wt + m.b,
    "h @ wt[None]": lambda m, h, o, n: h @ m.wt[None],
    "h @ column": lambda m, h, o, n: h @ m.column,
    "h @ vector": lambda m, h, o, n: (h @ m.vector).unsqueeze(-1),
    "h @ square @ square": lambda m, h, o, n: h @ m.square @ m.square,
    "h @ (square @ square)": lambda m, h, o, n: h @ (m.square @ m.square),
    "matmul(h, wt)": lambda m, h, o, n: torch.matmul(h, m.wt),
    "mm(rows, wt)": lambda m, h, o, n: _back(torch.mm(_rows(h), m.wt), h),
    "mm(rows, w.t())": lambda m, h, o, n: _back(torch.mm(_rows(h), m.w.t()), h),
    "addmm(b, rows, wt)": lambda m, h, o, n: _back(torch.addmm(m.b, _rows(h), m.wt), h),
    "addmm(b[None], rows, wt)": lambda m, h, o, n: _back(
        torch.addmm(m.b[None], _rows(h), m.wt), h
    ),
    "addmm(b, rows, wt, beta=0.5, alpha=2)": lambda m, h, o, n: _back(
        torch.addmm(m.b, _rows(h), m.wt, beta=0.5, alpha=2), h
    ),
    "addmm(b, rows, wt, beta=0)": lambda m, h, o, n: _back(
        torch.addmm(m.b, _rows(h), m.wt, beta=0), h
    ),
    "addmm(b[:1], rows, wt)": lambda m, h, o, n: _back(
        torch.addmm(m.b[:1], _rows(h), m.wt), h
    ),
    "bmm(h, wt.expand)": lambda m, h, o, n: torch.bmm(h, m.wt.expand(h.shape[0], -1, -1)),
    "bmm(h, w.T.repeat)": lambda m, h, o, n: torch.bmm(h, m.w.T[None].repeat(h.shape[0], 1, 1)),
    "baddbmm(b, h, wt.expand)": lambda m, h, o, n: torch.baddbmm(
        m.b, h, m.wt.expand(h.shape[0], -1, -1)
    ),
    "baddbmm(b, h, wt.expand, beta=0, alpha=3)": lambda m, h, o, n: torch.baddbmm(
        m.b, h, m.wt.expand(h.shape[0], -1, -1), beta=0, alpha=3
    ),
    "baddbmm(b, h, wt.expand, beta=0.5)": lambda m, h, o, n: torch.baddbmm(
        m.b, h, m.wt.expand(h.shape[0], -1, -1), beta=0.5
    ),
    "(w @ h.mT).mT": lambda m, h, o, n: (m.w @ h.mT).mT,
    "w @ h[..., None]": lambda m, h, o, n: (m.w @ h.unsqueeze(-1)).squeeze(-1),
    "left @ h": lambda m, h, o, n: m.left @ h,
    "left @ h (h of 2 axes)": lambda m, h, o, n: torch.mm(m.left, h),
    "tensordot(h, wt)": lambda m, h, o, n: torch.tensordot(h, m.wt, 1),
    "tensordot(h, w, ([-1], [1]))": lambda m, h, o, n: torch.tensordot(h, m.w, ([-1], [1])),
    "inner(h, w)": lambda m, h, o, n: torch.inner(h, m.w),
    "(h[..., None, :] * w).sum(-1)": lambda m, h, o, n: (h[..., None, :] * m.w).sum(-1),
    "F.linear(h, 1 + w)": lambda m, h, o, n: F.linear(h, 1 + m.w),
    "F.linear(h, w * g)": lambda m, h, o, n: F.linear(h, m.w * m.g),
    "F.linear(h, w * row, b * 2)": lambda m, h, o, n: F.linear(h, m.w * m.row, m.b * 2),
    "F.linear(h, normalize(w))": lambda m, h, o, n: F.linear(h, F.normalize(m.w)),
    "F.linear(h, w.softmax(-1))": lambda m, h, o, n: F.linear(h, m.w.softmax(-1)),
    "F.linear(h, cat(w, w))": lambda m, h, o, n: F.linear(h, torch.cat([m.w, m.w])),
    "F.linear(h, w, cat(b, 0, b)[:n])": lambda m, h, o, n: F.linear(
        h, m.w, torch.cat([m.b, torch.zeros_like(m.b), m.b])[len(m.b) // 2 :][: len(m.b)]
    ),
    "F.linear(h, packed, cat(b, zeros, b))": lambda m, h, o, n: F.linear(
        h, m.packed, torch.cat([m.b, torch.zeros_like(m.b, requires_grad=False), m.b])
    ),
    "F.linear(h, w.float()).to": lambda m, h, o, n: F.linear(h.float(), m.w.float()).to(h.dtype),
    "F.linear(h, w.clone())": lambda m, h, o, n: F.linear(h, m.w.clone()),
    "F.linear(h, w.flip(0))": lambda m, h, o, n: F.linear(h, m.w.flip(0)),
    "F.linear(h, w.roll(1, 1))": lambda m, h, o, n: F.linear(h, m.w.roll(1, 1)),
    "F.linear(h, wt.t())": lambda m, h, o, n: F.linear(h, m.wt.t()),
    "F.linear(h, flat.view(n, c))": lambda m, h, o, n: F.linear(
        h, m.flat.view(-1, h.shape[-1])
    ),
    "F.linear(h, wt.reshape(n, c))": lambda m, h, o, n: F.linear(
        h, m.wt.reshape(-1, h.shape[-1])
    ),
    "F.linear(h, w.masked_fill)": lambda m, h, o, n: F.linear(h, m.w.masked_fill(m.w > 0.3, 0.0)),
    "F.linear(h, w.tril())": lambda m, h, o, n: F.linear(h, m.w.tril()),
    "F.linear(h, packed.chunk)": lambda m, h, o, n: _product(h, *m.packed.chunk(3)),
    "F.linear(h, packed.split)": lambda m, h, o, n: _product(
        h, *m.packed.split(len(m.packed) // 3)
    ),
    "F.linear(h, halves[0]) + F.linear(h, halves[1])": lambda m, h, o, n: (
        F.linear(h, m.halves[0]) + 2 * F.linear(h, m.halves[1])
    ),
    "F.linear(h, halves.unbind)": lambda m, h, o, n: (
        F.linear(h, m.halves.unbind(0)[0]) + 2 * F.linear(h, m.halves.unbind(0)[1])
    ),
    "F.linear(h, packed).chunk": lambda m, h, o, n: _mixed(*F.linear(h, m.packed).chunk(3, -1)),
    "F.linear(h, packed)[..., ::3]": lambda m, h, o, n: F.linear(h, m.packed)[..., ::3],
    "F.linear(h, packed[1:])": lambda m, h, o, n: F.linear(h, m.packed[1:]),
    "F.linear(h, packed[::2])": lambda m, h, o, n: F.linear(h, m.packed[::2]),
    "F.linear(h[..., 1:], w[:, 1:])": lambda m, h, o, n: F.linear(h[..., 1:], m.w[:, 1:]),
    "F.linear(h, tied w)": lambda m, h, o, n: F.linear(h, m.w),
    "h @ tied wt": lambda m, h, o, n: h @ m.wt,
    "h @ tied square.T + h @ square": lambda m, h, o, n: h @ m.square.T + h @ m.square,
    "F.linear(F.linear(h, w), w.t())": lambda m, h, o, n: F.linear(F.linear(h, m.w), m.w.t()),
    "F.linear(h, w) + F.linear(o, w)": lambda m, h, o, n: F.linear(h, m.w) + F.linear(o, m.w),
    "F.linear(h, w).relu_()": lambda m, h, o, n: F.linear(h, m.w).relu_(),
    "nn.Linear": lambda m, h, o, n: m.dense(h),
    "nn.Linear twice": lambda m, h, o, n: m.dense(m.dense(h)),
    "F.linear(h[:0]) grown": lambda m, h, o, n: F.linear(h[:0], m.w).sum() + F.linear(h, m.w),
}  # fmt: skip


def _twice(y: Tensor, b: Tensor) -> Tensor:
    return y * (y + b)


def _product(h: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.linear(h, q) * F.linear(h, k) + F.linear(h, v)


def _mixed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q + 2 * k - v


EINSUM: dict[str, Spelling] = {
    "...c,nc->...n": lambda m, h, o, n: torch.einsum("...c,nc->...n", h, m.w),
    "...c,cn->...n": lambda m, h, o, n: torch.einsum("...c,cn->...n", h, m.wt),
    "nc,...c->...n": lambda m, h, o, n: torch.einsum("nc,...c->...n", m.w, h),
    "nc,...c->n...": lambda m, h, o, n: torch.einsum("nc,...c->n...", m.w, h),
    "bc,nc": lambda m, h, o, n: torch.einsum("bc,nc", h, m.w),
    "bc,nc->nb": lambda m, h, o, n: torch.einsum("bc,nc->nb", h, m.w),
    "btc,nc->btn": lambda m, h, o, n: torch.einsum("btc,nc->btn", h, m.w),
    "btc,nc->bnt": lambda m, h, o, n: torch.einsum("btc,nc->bnt", h, m.w),
    "btc,nc->ntb": lambda m, h, o, n: torch.einsum("btc,nc->ntb", h, m.w),
    "btc,cn->tbn": lambda m, h, o, n: torch.einsum("btc,cn->tbn", h, m.wt),
    "btc,chd->bhtd": lambda m, h, o, n: torch.einsum("btc,chd->bhtd", h, m.heads),
    "btc,hdc->bthd": lambda m, h, o, n: torch.einsum("btc,hdc->bthd", h, m.halves),
    "btc,hdc->dhbt": lambda m, h, o, n: torch.einsum("btc,hdc->dhbt", h, m.halves),
    "btc,c->btc": lambda m, h, o, n: torch.einsum("btc,c->btc", h, m.g),
    "btc,c->bt": lambda m, h, o, n: torch.einsum("btc,c->bt", h, m.g),
    "bhtd,cd->bthc": lambda m, h, o, n: torch.einsum("bhtd,cd->bthc", h, m.w),
    "bhtd,thd... joined": lambda m, h, o, n: torch.einsum(
        "bthd,hdn->btn", h, m.w.view(1, 1, *m.w.shape).expand(1, h.shape[2], -1, -1)[0].mT
    ),
    "btc,btd->bcd": lambda m, h, o, n: torch.einsum("btc,btd->bcd", h, o),
    "btc,bsc->bts": lambda m, h, o, n: torch.einsum("btc,bsc->bts", h, o),
    "btc,bsc->bst": lambda m, h, o, n: torch.einsum("btc,bsc->bst", h, o),
    "btc,bsc,bsd->btd": lambda m, h, o, n: torch.einsum("btc,bsc,bsd->btd", h, o, h),
    "bhtd,bhsd->bhts": lambda m, h, o, n: torch.einsum("bhtd,bhsd->bhts", h, o),
    "bthd,bshd->bhts": lambda m, h, o, n: torch.einsum("bthd,bshd->bhts", h, o),
    "bij->bji": lambda m, h, o, n: torch.einsum("bij->bji", h),
    "bij->bi": lambda m, h, o, n: torch.einsum("bij->bi", h),
    "ij,ij->ij": lambda m, h, o, n: torch.einsum("...,...->...", h, o),
    "bi,bj->bij": lambda m, h, o, n: torch.einsum("bi,bj->bij", h, o),
    "btc,nc->btn of 2 * w": lambda m, h, o, n: torch.einsum("btc,nc->btn", h, 2 * m.w),
    "btc,nc->btn of one row": lambda m, h, o, n: torch.einsum("btc,nc->btn", h[:, :1], m.w),
    "...c,...c->...": lambda m, h, o, n: torch.einsum("...c,...c->...", h, o).unsqueeze(-1),
    "c,c... of a view": lambda m, h, o, n: torch.einsum("btc,cn->btn", h, m.w.t()),
    "twice with the same weight": lambda m, h, o, n: (
        torch.einsum("btc,cd->btd", h, m.square) + torch.einsum("btc,dc->btd", h, m.square)
    ),
}  # fmt: skip


def _dense(shape: Shape, size: int) -> nn.Module:
    return nn.Linear(shape[-1], shape[-1] if size == 2 else size)


PRODUCTS = {
    "linear": Family(LINEAR, _matrices, {"dense": _dense}),
    "einsum": Family(EINSUM, _matrices),
}

"""Activation functions and norms, whole and written out."""

import math

import torch
import torch.nn.functional as F
from family import Family, Shape, Shapes, Spelling
from torch import Tensor, nn


def _cube(x: Tensor) -> Tensor:
    return x * x * x


ACTIVATION: dict[str, Spelling] = {
    "relu": lambda m, h, o, n: h.relu(),
    "gelu": lambda m, h, o, n: F.gelu(h),
    "gelu tanh": lambda m, h, o, n: F.gelu(h, approximate="tanh"),
    "silu": lambda m, h, o, n: F.silu(h),
    "h * sigmoid(h)": lambda m, h, o, n: h * h.sigmoid(),
    "h * sigmoid(1.702 * h)": lambda m, h, o, n: h * torch.sigmoid(1.702 * h),
    "h * sigmoid(o)": lambda m, h, o, n: h * o.sigmoid(),
    "0.5 * h * (1 + erf(h / sqrt(2)))": lambda m, h, o, n: (
        0.5 * h * (1 + torch.erf(h / math.sqrt(2)))
    ),
    "h * 0.5 * (1 + erf(h * sqrt(0.5)))": lambda m, h, o, n: (
        h * (0.5 * (1 + torch.erf(h * math.sqrt(0.5))))
    ),
    "0.5 * h * (1 + erf(h / 1.41))": lambda m, h, o, n: 0.5 * h * (1 + torch.erf(h / 1.41)),
    "0.5 * h * (1 + erf(o / sqrt(2)))": lambda m, h, o, n: (
        0.5 * h * (1 + torch.erf(o / math.sqrt(2)))
    ),
    "0.5 * h * (1 + tanh(h + 0.044715 h ** 3))": lambda m, h, o, n: (
        0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    ),
    "0.5 * h * (1 + tanh(h + 0.044 h ** 3))": lambda m, h, o, n: (
        0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044 * h**3)))
    ),
    "0.5 * h * (1 + tanh(h * h * h))": lambda m, h, o, n: (
        0.5 * h * (1 + torch.tanh(0.79788456 * (h + 0.044715 * _cube(h))))
    ),
    "0.5 * h.mul(1 + erf) in place": lambda m, h, o, n: (
        torch.erf(h / math.sqrt(2)).add_(1).mul_(h).mul_(0.5)
    ),
    "add(1, alpha) before erf": lambda m, h, o, n: (
        0.5 * h * torch.erf(h / math.sqrt(2)).add(1.0, alpha=2)
    ),
    "glu": lambda m, h, o, n: F.glu(torch.cat([h, o], -1)),
    "h * silu(o)": lambda m, h, o, n: h * F.silu(o),
    "tanh": lambda m, h, o, n: h.tanh(),
    "hardswish": lambda m, h, o, n: F.hardswish(h),
    "leaky_relu": lambda m, h, o, n: F.leaky_relu(h, 0.1),
    "elu": lambda m, h, o, n: F.elu(h),
    "softplus": lambda m, h, o, n: F.softplus(h),
    "clamp": lambda m, h, o, n: h.clamp(-1, 1.5),
    "h ** 2": lambda m, h, o, n: h**2,
    "abs().sqrt()": lambda m, h, o, n: h.abs().sqrt(),
    "exp(-h ** 2)": lambda m, h, o, n: torch.exp(-(h**2)),
    "where(h > 0, h, o)": lambda m, h, o, n: torch.where(h > 0, h, o * 0.1),
    "masked_fill": lambda m, h, o, n: h.masked_fill(h < -1, 0.0),
    "dropout in eval": lambda m, h, o, n: F.dropout(h, 0.5, training=False),
    "dropout of 0": lambda m, h, o, n: F.dropout(h, 0.0, training=False),
    "alpha_dropout in eval": lambda m, h, o, n: F.alpha_dropout(h, 0.5, training=False),
    "float().to": lambda m, h, o, n: h.float().sin().to(h.dtype),
    "double()": lambda m, h, o, n: (h.double() * 2).to(h.dtype),
    "half precision rounding": lambda m, h, o, n: h.to(torch.bfloat16).to(h.dtype),
    "detach": lambda m, h, o, n: h.detach(),
    "h": lambda m, h, o, n: h,
    "h * 1": lambda m, h, o, n: h * 1,
    "h / 3": lambda m, h, o, n: h / 3,
    "h // 1": lambda m, h, o, n: (h * 3.25) // 1,
    "div trunc": lambda m, h, o, n: torch.div(h * 3.25, 1.0, rounding_mode="trunc"),
}

NORM: dict[str, Spelling] = {
    "layer_norm": lambda m, h, o, n: F.layer_norm(h, h.shape[-1:], m.g, m.beta),
    "layer_norm plain": lambda m, h, o, n: F.layer_norm(h, h.shape[-1:]),
    "layer_norm of two axes": lambda m, h, o, n: F.layer_norm(h, h.shape[-2:]),
    "rms_norm": lambda m, h, o, n: F.rms_norm(h, h.shape[-1:], m.g, 1e-6),
    "rms_norm plain": lambda m, h, o, n: F.rms_norm(h, h.shape[-1:]),
    "g * h * rsqrt(mean(h ** 2) + eps)": lambda m, h, o, n: (
        m.g * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6))
    ),
    "g * (h / sqrt(mean(h ** 2) + eps))": lambda m, h, o, n: (
        m.g * (h / torch.sqrt(h.square().mean(-1, keepdim=True) + 1e-2))
    ),
    "(1 + g) * h * rsqrt": lambda m, h, o, n: (
        (1 + m.g) * (h * torch.rsqrt(h.pow(2).mean(-1, True) + 1e-5))
    ),
    "g * h * rsqrt(mean(o ** 2) + eps)": lambda m, h, o, n: (
        m.g * (h * torch.rsqrt(o.pow(2).mean(-1, keepdim=True) + 1e-6))
    ),
    "g * h * rsqrt over another axis": lambda m, h, o, n: (
        m.g * (h * torch.rsqrt(h.pow(2).mean(-2, keepdim=True) + 1e-3))
    ),
    "g * h * rsqrt(mean(h ** 3) + 3)": lambda m, h, o, n: (
        m.g * (h * torch.rsqrt(h.pow(3).mean(-1, keepdim=True).abs() + 3))
    ),
    "g * h * rsqrt(eps a tensor)": lambda m, h, o, n: (
        m.g * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + m.g.abs()))
    ),
    "rms_norm in float": lambda m, h, o, n: (
        m.g * (h.float() * torch.rsqrt(h.float().pow(2).mean(-1, True) + 1e-6)).to(h.dtype)
    ),
    "layer_norm by hand": lambda m, h, o, n: (
        (h - h.mean(-1, True)) / (h.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt() * m.g
    ),
    "normalize": lambda m, h, o, n: F.normalize(h, dim=-1),
    "softmax": lambda m, h, o, n: h.softmax(-1),
    "softmax(1)": lambda m, h, o, n: h.softmax(1),
    "log_softmax": lambda m, h, o, n: h.log_softmax(-1),
    "batch_norm": lambda m, h, o, n: m.batch_norm(h),
    "instance_norm": lambda m, h, o, n: F.instance_norm(h),
    "group_norm": lambda m, h, o, n: m.group_norm(h),
    "cumsum": lambda m, h, o, n: h.cumsum(-1) / h.shape[-1],
    "batch mean": lambda m, h, o, n: h - h.mean(0, keepdim=True),
}

_BATCH_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}


def _batch_norm(shape: Shape, size: int) -> nn.Module:
    norm = _BATCH_NORMS.get(len(shape), nn.BatchNorm1d)(shape[1] if len(shape) > 1 else 1)
    norm.running_mean += 0.3
    norm.running_var *= 2
    return norm.eval()


def _group_norm(shape: Shape, size: int) -> nn.Module:
    channels = shape[1] if len(shape) > 1 else 1
    return nn.GroupNorm(math.gcd(channels, size), channels)


def _norms(shape: Shape, size: int) -> Shapes:
    return {"g": shape[-1:], "beta": shape[-1:]}


POINTWISE = {
    "activation": Family(ACTIVATION),
    "norm": Family(NORM, _norms, {"batch_norm": _batch_norm, "group_norm": _group_norm}),
}

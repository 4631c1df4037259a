"""Convolutions and what goes with them."""

from typing import Any

import torch
import torch.nn.functional as F
from family import Family, Shape, Shapes, Spelling
from torch import Tensor


def _conv_weights(shape: Shape, size: int) -> Shapes:
    if len(shape) not in (3, 4):
        return None
    channels = shape[1]
    n, spatial = max(size, 1), len(shape) - 2
    return {
        "w": (n, channels, *[2] * spatial), "b": (n,), "point": (n, channels, *[1] * spatial),
        "depth": (2 * channels, 1, *[3] * spatial), "across": (channels, n, *[2] * spatial),
        "grouped": (2 * n, max(channels // 2, 1), *[1] * spatial),
    }  # fmt: skip


def _conv(h: Tensor, w: Tensor, b: Tensor | None = None, **options: Any) -> Tensor:
    return (F.conv1d if h.ndim == 3 else F.conv2d)(h, w, b, **options)


def _transposed(h: Tensor, w: Tensor, **options: Any) -> Tensor:
    return (F.conv_transpose1d if h.ndim == 3 else F.conv_transpose2d)(h, w, **options)


CONV: dict[str, Spelling] = {
    "conv(h, w, b)": lambda m, h, o, n: _conv(h, m.w, m.b),
    "conv(h, w, padding=1)": lambda m, h, o, n: _conv(h, m.w, padding=1),
    'conv(h, w, padding="same")': lambda m, h, o, n: _conv(h, m.w, padding="same"),
    'conv(h, w, b, padding="valid")': lambda m, h, o, n: _conv(h, m.w, m.b, padding="valid"),
    "conv(h, w, stride=2)": lambda m, h, o, n: _conv(h, m.w, stride=2),
    "conv(h, w, dilation=2, padding=2)": lambda m, h, o, n: _conv(h, m.w, dilation=2, padding=2),
    "conv(h, point, b)": lambda m, h, o, n: _conv(h, m.point, m.b),
    "conv(h, depth, groups)": lambda m, h, o, n: _conv(h, m.depth, padding=1, groups=h.shape[1]),
    "conv(h, grouped, groups=2)": lambda m, h, o, n: _conv(h, m.grouped, groups=2),
    "conv(h, 1 + w)": lambda m, h, o, n: _conv(h, 1 + m.w),
    "conv(h, w.flip)": lambda m, h, o, n: _conv(h, m.w.flip(-1)),
    "conv_transpose(h, across)": lambda m, h, o, n: _transposed(h, m.across, stride=2),
    "conv_transpose(h, across, output_padding)": lambda m, h, o, n: _transposed(
        h, m.across, stride=2, output_padding=1, dilation=2
    ),
    "conv(pad(h, circular))": lambda m, h, o, n: _conv(
        F.pad(h, [1, 1] * (h.ndim - 2), mode="circular"), m.w
    ),
    "conv(pad(h, reflect))": lambda m, h, o, n: _conv(
        F.pad(h, [1, 0] * (h.ndim - 2), mode="reflect"), m.w
    ),
    "conv of one weight on values of other values": lambda m, h, o, n: torch.einsum(
        "oi,bi...->bo...", m.point.flatten(1), h
    ),
    "avg_pool": lambda m, h, o, n: (F.avg_pool1d if h.ndim == 3 else F.avg_pool2d)(h, 2),
    "max_pool": lambda m, h, o, n: (F.max_pool1d if h.ndim == 3 else F.max_pool2d)(h, 2),
    "interpolate": lambda m, h, o, n: F.interpolate(h, scale_factor=2),
    "adaptive pool": lambda m, h, o, n: (
        F.adaptive_avg_pool1d if h.ndim == 3 else F.adaptive_avg_pool2d
    )(h, 1),
}

CONVOLUTIONS = {"conv": Family(CONV, _conv_weights)}

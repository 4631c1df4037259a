"""What tests of rows share: a recipe, and quantization written from the definition."""

from typing import Any

import torch
from torch import Tensor, nn

from fxq.passes.common import Calibrate, Convert, InsertObservers
from fxq.pipeline import Recipe
from fxq.rows import Rows
from fxq.spec import LayerSpec, PerChannel, QuantSpec

WEIGHT = QuantSpec(granularity=PerChannel(0))


def recipe(rows: Rows | None, **kwargs: Any) -> Recipe:
    layer = LayerSpec(QuantSpec(rows=rows, symmetric=False, **kwargs), WEIGHT)
    return Recipe("rows", (InsertObservers(layer), Calibrate(), Convert()))


def quantized(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """8-bit affine rounding of `x` in ranges that broadcast to it, written from the definition."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low) / 255
    zero = torch.round(-128 - low / scale)
    return (torch.clamp(torch.round(x / scale) + zero, -128, 127) - zero) * scale


def weight_of(layer: nn.Linear) -> Tensor:
    scale = layer.weight.abs().amax(1, keepdim=True) / 127
    return torch.round(layer.weight / scale) * scale

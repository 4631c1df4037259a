"""What 8-bit linears compute, from their definition alone."""

import torch
from torch import Tensor, nn

from fxq.lowering.rule import Decision
from fxq.passes import w8a8
from fxq.spec import LayerSpec, PerChannel, QuantSpec

Decisions = list[dict[str, Decision]]  # of each compilation
W4A8 = LayerSpec(w8a8.DYNAMIC_LAYER.activation, QuantSpec(bits=4, granularity=PerChannel(0)))


def by_hand(x: Tensor, layer: nn.Linear, bits: int = 8) -> Tensor:
    """A linear with 8-bit activations per token and weights per channel, written again."""
    amax, largest = 2 ** (bits - 1) - 1, layer.weight.abs().amax(1, keepdim=True)
    if bits == 8:  # neighbours are scaled to fit together
        pairs = layer.weight.unflatten(1, (-1, 2)).sum(-1).abs().amax(1, keepdim=True)
        largest = torch.maximum(largest, pairs)
    weight = (layer.weight / largest * amax).round() / amax * largest
    scale = x.abs().amax(-1, keepdim=True) / 127
    return nn.functional.linear((x / scale).round() * scale, weight, layer.bias)

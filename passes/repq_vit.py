"""RepQ-ViT: give every channel of an activation the same range (arXiv:2212.08254).

The paper quantizes the activations after a LayerNorm with a scale and a zero-point per channel,
then moves what distinguishes the channels into the LayerNorm and the layers after it, so that one
scale and one zero-point are left. In units of the channels' ranges the number of bits cancels.

Departures: every kind of site is equalised, not only norms in front of linears; where a site cannot
be shifted only magnitudes are equalised; a site stays as it is where its quantization error on the
data would not fall. The paper's log-sqrt2 quantizer for attention is not part of this pass.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fxq.passes import w6a6, w8a8
from fxq.passes.common.scaling import Candidate, EquivalentScaling, ScaleSite, Statistics
from fxq.pipeline import Recipe
from fxq.spec import LayerSpec


def equalizing_scale_and_shift(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scale and shift after which all channels have one range.

    With per-channel step `d = (high - low) / (2^b - 1)` and zero-point `z = -low / d`, the result
    has step mean(d) and zero-point mean(z) in every channel. A constant channel is shifted to zero
    and has scale 0.

    Args:
        low: smallest activation per channel `[C]`, fp32.
        high: largest activation per channel `[C]`, fp32.
    Returns:
        scale `[C]`, shift `[C]`; the activation becomes `(x - shift) / scale`.
    Source: eqs. (7), (8): scale r1 = d / mean(d), shift -d (z - mean(z)).
    """
    width = high - low
    live = width > 0
    if not bool(live.any()):
        return torch.zeros_like(width), low
    zero = torch.where(live, -low / torch.where(live, width, 1.0), 0.0)
    return width / width[live].mean(), low + width * zero[live].mean()


@dataclass(frozen=True)
class RepQ(EquivalentScaling):
    """Equalise the channels of every site."""

    layer: LayerSpec = w8a8.STATIC_LAYER

    def candidates(self, site: ScaleSite, statistics: Statistics) -> Iterable[Candidate]:
        """Propose equal ranges, and equal magnitudes where there is no shift."""
        if site.why_no_shift:
            yield Candidate(statistics.amax / statistics.amax.mean())
        else:
            scale, shift = equalizing_scale_and_shift(statistics.low, statistics.high)
            yield Candidate(scale, shift)


W8A8 = Recipe("repq_w8a8", (RepQ(), *w8a8.STATIC.passes))
W6A6 = Recipe("repq_w6a6", (RepQ(w6a6.STATIC_LAYER), *w6a6.STATIC.passes))

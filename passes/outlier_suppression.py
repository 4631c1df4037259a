"""Outlier Suppression+: shift channels to the middle, then scale down the largest
(arXiv:2304.09145).

Asymmetric outliers are first made symmetric by a shift per channel, then channels beyond a
threshold t are scaled down to it. The threshold is searched for.

Departures: every kind of site is treated, not only LayerNorms in front of linears; thresholds are
spread geometrically between the largest and the smallest channel, so that no unit matters; the
error is that of the layers after the site with both quantizers on, not of a whole attention; a
site stays as it is where this error would not fall.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fxq.passes import w6a6, w8a8
from fxq.passes.common.scaling import Candidate, EquivalentScaling, ScaleSite, Statistics
from fxq.pipeline import Recipe
from fxq.spec import LayerSpec


def centring_shift(low: Tensor, high: Tensor) -> Tensor:
    """Return the middle of each channel's range `[C]`.

    Args:
        low: smallest activation per channel `[C]`.
        high: largest activation per channel `[C]`.
    Source: eq. (4).
    """
    return (low + high) / 2


def suppressing_scale(amax: Tensor, threshold: float) -> Tensor:
    """Return the factor that brings every channel down to the threshold `[C]`, at least 1.

    Args:
        amax: largest |shifted activation| per channel `[C]`.
        threshold: > 0.
    Source: eq. (6).
    """
    return (amax / threshold).clamp(min=1.0)


@dataclass(frozen=True)
class OutlierSuppression(EquivalentScaling):
    """Shift and scale every site by the best of some thresholds.

    Args:
        steps: how many thresholds to try.
    """

    layer: LayerSpec = w8a8.STATIC_LAYER
    steps: int = 20

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"OutlierSuppression.steps: expected at least 1, found {self.steps}")

    def candidates(self, site: ScaleSite, statistics: Statistics) -> Iterable[Candidate]:
        """Propose the shift with each threshold, largest (no scaling) first."""
        if site.why_no_shift:
            shift, amax = None, statistics.amax
        else:
            shift = centring_shift(statistics.low, statistics.high)
            amax = (statistics.high - statistics.low) / 2
        live = amax[amax > 0]
        if not len(live):
            return
        largest, smallest = float(live.max()), float(live.min())
        for threshold in torch.logspace(0, 1, self.steps, base=smallest / largest).tolist():
            yield Candidate(suppressing_scale(amax, largest * threshold), shift)


W8A8 = Recipe("outlier_suppression_w8a8", (OutlierSuppression(), *w8a8.STATIC.passes))
W6A6 = Recipe(
    "outlier_suppression_w6a6", (OutlierSuppression(w6a6.STATIC_LAYER), *w6a6.STATIC.passes)
)

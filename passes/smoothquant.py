"""SmoothQuant: move the difficulty of outlier channels into the weights (arXiv:2211.10438).

Each input channel of a linear is divided by a factor and the weight multiplied by it, so the
product is unchanged and both become easier to quantize.

Departures: every kind of site is scaled, not only norms in front of linears; a site stays as it is
where its quantization error on the data would not fall.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from fxq.passes import w6a6, w8a8
from fxq.passes.common.scaling import Candidate, EquivalentScaling, ScaleSite, Statistics
from fxq.pipeline import Recipe
from fxq.spec import LayerSpec


def smoothing_scale(x_amax: Tensor, w_amax: Tensor, alpha: float) -> Tensor:
    """Return the smoothing factor of each channel.

    Args:
        x_amax: largest |activation| per input channel over the data `[C]`, >= 0.
        w_amax: largest |weight| per input channel over all consumers `[C]`, >= 0.
        alpha: how much of the difficulty moves to the weights, in [0, 1].
    Returns:
        factor `[C]`; 0, infinity or NaN where a channel is dead.
    Source: eq. (4).
    """
    return x_amax**alpha / w_amax ** (1 - alpha)  # eq. (4)


@dataclass(frozen=True)
class SmoothQuant(EquivalentScaling):
    """Smooth every site.

    Args:
        alpha: migration strength, in [0, 1].
    """

    layer: LayerSpec = w8a8.STATIC_LAYER
    alpha: float = 0.5  # the paper's choice for OPT and BLOOM

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"SmoothQuant.alpha: expected 0 to 1, found {self.alpha}")

    def candidates(self, site: ScaleSite, statistics: Statistics) -> Iterable[Candidate]:
        """Propose eq. (4)."""
        yield Candidate(smoothing_scale(statistics.amax, statistics.weight_amax, self.alpha))


W8A8 = Recipe("smoothquant_w8a8", (SmoothQuant(), *w8a8.STATIC.passes))
W6A6 = Recipe("smoothquant_w6a6", (SmoothQuant(w6a6.STATIC_LAYER), *w6a6.STATIC.passes))

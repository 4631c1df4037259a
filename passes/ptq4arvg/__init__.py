"""PTQ4ARVG: quantization of autoregressive image generators (arXiv:2601.21238).

Departures from the paper and its published code:

- The factor is the optimum of eq. (15), as in the published code. Eq. (16) as printed, sums of
  magnitudes under a square root, is that for one output only; `GainProjected(equation="printed")`
  has it.
- The abstract reads as if gain-projected scaling took the place of smoothing; in the published code
  it comes after smoothing and centring, and so it does here.
- Factors that the derivation does not cover are kept within its bounds, or the bounds are left
  out, whichever quantizes better on rows that the factors were not fitted to; so is doing nothing.
- Layers that read one edge are stacked, where the published code looks at the first one.
- A channel without an error of one kind is at its bound, where the published code has 1, or a
  division by zero.
- dx is the error of the quantizer that the recipe will have, where the published code takes that
  of the largest channel alone.
- Positions are grouped by the data (`fxq.passes.common.GroupPositions`), where the published code
  lists groups for each model; further departures of the quantizers are in `recipes`.
- Samples are ranked by the distance of their pooled features in one set with a shrunk covariance.
  The published code takes the first token's, whitens conditional and unconditional samples apart,
  and uses their distances for the ratio of the two alone.
"""

from fxq.passes.ptq4arvg.calibration import choose, mahalanobis, pooled_features
from fxq.passes.ptq4arvg.gain_projected import GainProjected
from fxq.passes.ptq4arvg.recipes import W4A8, W6A6, W8A8, token_wise

__all__ = [
    "W4A8",
    "W6A6",
    "W8A8",
    "GainProjected",
    "choose",
    "mahalanobis",
    "pooled_features",
    "token_wise",
]

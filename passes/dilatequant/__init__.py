"""DilateQuant: quantization of diffusion models by weight dilation, ranges for every time-step, and
block-wise distillation (arXiv:2409.14307).

What is where:

    dilation                      factors that weights take without a change of their ranges
    passes.common.TimestepRows    a row of parameters for each time-step (the temporal parallel
                                  quantizer, eq. 13 and 14)
    passes.common.reconstruction  blocks distilled one after another (eq. 15)
    recipes                       all of it: `W6A6`, `W4A8`, `W4A4`

Departures from the paper, whose code is not published:

- Eq. (10) and (11) divide by zero where a row has weights of one sign only; here a row bounds
  those factors that could move its ends, and what nothing bounds is at most 2^8.
- Dilation is judged: `GuardedDilation` takes the best power of the paper's factor at each site, or
  leaves it. The paper's own is `WeightDilation`.
- Factors that no norm or linear in front takes become a product in front of the quantizer of the
  input, and part of that where it has one range. The paper folds them into the layer in front,
  which is not exact through SiLU.
- A row holds for its time-step's value, not for a count of calls; neighbouring time-steps may share
  one, and others than the calibrated have the nearest.
- Logarithms of scales are learned, each row by an Adam of its own, so that a step moves no row but
  those of its batch.
"""

from fxq.passes.dilatequant.dilation import (
    GuardedDilation,
    OptimalDilation,
    WeightDilation,
    dilation,
    saturated_channels,
)
from fxq.passes.dilatequant.recipes import BLOCKWISE, ROWS, W4A4, W4A8, W6A6, dilated

__all__ = [
    "BLOCKWISE",
    "ROWS",
    "W4A4",
    "W4A8",
    "W6A6",
    "GuardedDilation",
    "OptimalDilation",
    "WeightDilation",
    "dilated",
    "dilation",
    "saturated_channels",
]

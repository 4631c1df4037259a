"""EDA-DM: post-training quantization of diffusion models (arXiv:2401.04585).

`select` chooses calibration samples by density and variety of a feature map, out of whatever
`fxq.record` kept of a pipeline's runs. `NEAREST_W8A8`, `NEAREST_W4A8` and `NEAREST_W4A4` have the
published quantizers, rounded to nearest; block-wise reconstruction is not part of them.

Departures from the paper and its published code:

- The radius of density goes with the features: a quarter of the median squared distance between
  steps. The published constants, 3.0 and 0.3 (`RADIUS_CIFAR`, `RADIUS_LSUN`), are of particular
  models' features, and leave all densities equal on others.
- Numbers of samples are rounded by largest remainders, so that they add up to the total and do not
  depend on the order of steps; the published code adds to the largest and takes from the last,
  down to -1.
- Equal densities or varieties count as zero, where the published code divides by zero.
- Steps go by the time-step's value and not by counting calls, so that samplers that call a step
  twice, and guidance as two calls, are told apart; of a step's calls the first one counts.
- Distances come from one matrix product instead of T^2 comparisons.
- The feature map is found, and may be named; published are names of particular models.
- There may be a least number of samples per step.
"""

from fxq.passes.eda_dm.recipes import (
    NEAREST_W4A4,
    NEAREST_W4A8,
    NEAREST_W8A8,
    rounded_to_nearest,
)
from fxq.passes.eda_dm.select import VARIETY_WEIGHT, Selection, select, select_evenly
from fxq.passes.eda_dm.selection import RADIUS_CIFAR, RADIUS_LSUN, MedianRadius

__all__ = [
    "NEAREST_W4A4",
    "NEAREST_W4A8",
    "NEAREST_W8A8",
    "RADIUS_CIFAR",
    "RADIUS_LSUN",
    "VARIETY_WEIGHT",
    "MedianRadius",
    "Selection",
    "rounded_to_nearest",
    "select",
    "select_evenly",
]

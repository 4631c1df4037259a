"""EDA-DM: post-training quantization of diffusion models (arXiv:2401.04585).

`select` chooses calibration samples by density and variety of a feature map, out of whatever
`fxq.record` kept of a pipeline's runs. `W8A8`, `W4A8` and `W4A4` have the published quantizers and
fine-grained block reconstruction; `NEAREST_W8A8` and so on round to nearest instead.

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
- Block and layer errors are in units of the signal's power, mean over all elements: the published
  code sums over dimension 1, channels of images but tokens of sequences. One forward pass, and so
  one choice of the activations that stay float, gives both.
- Roundings are driven to 0 or 1 by AdaRound's penalty before they are taken for that; the published
  code has it switched off. The best of five judgements on samples held out is kept.
- A block's inputs are kept from block to block, where the published code runs all blocks before it
  again for every block.
"""

from fxq.passes.eda_dm.recipes import (
    FINE_GRAINED,
    NEAREST_W4A4,
    NEAREST_W4A8,
    NEAREST_W8A8,
    W4A4,
    W4A8,
    W8A8,
    reconstructed,
)
from fxq.passes.eda_dm.select import VARIETY_WEIGHT, Selection, select, select_evenly
from fxq.passes.eda_dm.selection import RADIUS_CIFAR, RADIUS_LSUN, MedianRadius

__all__ = [
    "FINE_GRAINED",
    "NEAREST_W4A4",
    "NEAREST_W4A8",
    "NEAREST_W8A8",
    "RADIUS_CIFAR",
    "RADIUS_LSUN",
    "VARIETY_WEIGHT",
    "W4A4",
    "W4A8",
    "W8A8",
    "MedianRadius",
    "Selection",
    "reconstructed",
    "select",
    "select_evenly",
]

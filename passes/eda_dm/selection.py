"""How many calibration samples each time-step gives: by density and variety of a feature map.

Features of all steps are compared with each other, on the same trajectories. A step near many
others speaks for them (density), one that points elsewhere than the rest covers what they do not
(variety). Equations of arXiv:2401.04585; `Similarities` takes features in pieces, so that nothing
of them has to be kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

EPSILON = 1e-6  # least length of a feature vector in a cosine, as published
FLAT = 1e-9  # relative differences below this are rounding: all steps are alike
BLOCK = 1 << 16  # columns of features that are float64 at a time

# Published radii, mean squared differences: of a feature map on CIFAR-10 and ImageNet, and of one
# on LSUN and with Stable Diffusion. They fit these models' features and no others'.
RADIUS_CIFAR, RADIUS_LSUN = 3.0, 0.3


@dataclass(frozen=True)
class MedianRadius:
    """A radius that goes with the features' scale.

    Args:
        fraction: of the median squared distance between two steps.
    """

    fraction: float = 0.25

    def __post_init__(self) -> None:
        if not self.fraction > 0:
            raise ValueError(f"MedianRadius.fraction: expected more than 0, found {self.fraction}")


Radius = float | MedianRadius


class Similarities:
    """What density and variety need to know of features, added up over pieces of them.

    Args:
        n_steps: T.
    """

    def __init__(self, n_steps: int) -> None:
        self.n_steps, self.n_values, self.largest = n_steps, 0, 0.0
        self.gram: Tensor = torch.zeros(n_steps, n_steps, dtype=torch.float64)
        self.variety: Tensor = torch.zeros(n_steps, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """Take in more places.

        Args:
            features: `[T, P, C]`, float, finite: vectors of channels at P places (rows of the
                batch and positions), the same ones at each step.
        """
        n_steps = len(features)
        self.largest = max(self.largest, float(features.abs().max()))
        wide = features.flatten(1)
        self.n_values += wide.shape[1]
        for block in wide.split(BLOCK, 1):
            # Differences to one step: distances stay, and equal features are exactly 0 apart.
            relative = block.double() - block[:1].double()
            self.gram += (relative @ relative.T).cpu()
        for part in features.split(max(1, BLOCK // features.shape[2]), 1):
            unit = part.double()
            unit = unit / unit.norm(dim=2, keepdim=True).clamp(min=EPSILON)
            others = unit.sum(0) - unit  # [T, P, C]: for each step the sum of all the others
            cosines = (unit * others).sum((1, 2))
            self.variety += ((n_steps - 1) * part.shape[1] - cosines).cpu()

    def distances(self) -> Tensor:
        """Return mean squared differences between features of two steps `[T, T]`, float64:
        |F_i|^2 + |F_j|^2 - 2 <F_i, F_j>."""
        squares = self.gram.diagonal()
        found = squares[:, None] + squares - 2 * self.gram
        return found.clamp(min=0) / max(1, self.n_values)


def resolve_radius(radius: Radius, distances: Tensor) -> float:
    """Return a radius as a number, in the unit of `distances` `[T, T]`."""
    if not isinstance(radius, MedianRadius):
        return radius
    n_steps = len(distances)
    row, column = torch.triu_indices(n_steps, n_steps, offset=1)
    return radius.fraction * float(distances[row, column].median())


def density(distances: Tensor, radius: float) -> Tensor:
    """Return how many other steps are within a radius of each, `[T]`, float64.

    Args:
        distances: `[T, T]`, mean squared differences.
        radius: a mean squared difference, not a length.
    """
    return (distances <= radius).double().sum(1) - 1  # itself


def normalised(values: Tensor) -> Tensor:
    """Return `[T]` moved and scaled to 0..1; zeros where all are the same but for rounding."""
    low, high = values.aminmax()
    if high - low <= FLAT * values.abs().max():
        return torch.zeros_like(values)
    return (values - low) / (high - low)


def score(dense: Tensor, varied: Tensor, variety_weight: float) -> Tensor:
    """Return the score of each step `[T]`: normalised density plus weighted variety; ones where
    neither tells the steps apart."""
    found = normalised(dense) + variety_weight * normalised(varied)
    return found if bool(found.any()) else torch.ones_like(found)


def assign(numbers: Sequence[int], n_trajectories: int, seed: int) -> list[tuple[int, int]]:
    """Return `(trajectory, step)` of every sample: a random trajectory for each, none twice at one
    step, and all equally often as far as that goes.

    Args:
        numbers: samples of each step; each at most `n_trajectories`.
        n_trajectories: how many there are.
        seed: of the assignment.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(n_trajectories, generator=generator).tolist()
    steps = [step for step, number in enumerate(numbers) for _ in range(number)]
    # Samples of one step are neighbours, so that going round they meet no trajectory twice.
    return [(order[i % n_trajectories], step) for i, step in enumerate(steps)]

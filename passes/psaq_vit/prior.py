"""What a picture is expected to look like, whatever the task: total variation, and the augmentation
and learning rate that the published optimization uses (arXiv:2203.02250, its code).

Pixels are in [0, 1] here, and every quantity is per image and per pixel, so that neither the
batch, the resolution nor the model's normalization changes what a number means.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Estimator = Literal["converged", "reference"]
Heads = Literal["mean", "concat"]


@dataclass(frozen=True)
class Prior:
    """What makes pixels a picture, whatever the task:

        a0 * -sum_l H_l  +  a2 * log(TV / target)^2

    The published a2 * |TV - target| has the same slope however close the target is: with a weight
    that holds it, Adam swings around it and drowns the rest.

    Args:
        entropy_weight: of the entropy, summed over attentions (a0).
        tv_weight: of the distance to the target (a2).
        tv_target: the target of each image is drawn from this interval: root mean square neighbour
            difference of a picture of 224 pixels, fraction of the pixel range, converted to the
            size at hand (`natural_scale`). The default holds 90 % of 200 ImageNet photographs;
            the published interval, 0.065 to 0.077, is drawn from once for all images.
        bandwidth: of the kernel density estimate, in cosine similarity. The published 0.01 leaves
            few pairs with a gradient where patches are few.
        estimator: "converged", or "reference": ten points, whole batch.
        heads: "mean" over heads, or "concat".
        jitter: largest cyclic shift in each stage, fraction of the side; the last entry also counts
            for later stages.
        flip: mirror half of the views.
    Raises:
        ValueError: no jitter, or an interval of no width or below zero.
    """

    entropy_weight: float = 1.0
    tv_weight: float = 20.0
    tv_target: tuple[float, float] = (0.04, 0.11)
    bandwidth: float = 0.05
    estimator: Estimator = "converged"
    heads: Heads = "mean"
    jitter: tuple[float, ...] = (15 / 224, 30 / 224)
    flip: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.tv_target[0] <= self.tv_target[1]:
            raise ValueError(f"Prior.tv_target: expected 0 < low <= high, found {self.tv_target}")
        if not self.jitter or min(self.jitter) < 0:
            raise ValueError(
                f"Prior.jitter: expected at least one number, none below 0, found {self.jitter}"
            )
        for name, choices in (("estimator", get_args(Estimator)), ("heads", get_args(Heads))):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"Prior.{name}: expected one of {choices}, found {getattr(self, name)!r}"
                )

    def draw(
        self, generators: Sequence[torch.Generator], side: int, stages: Sequence[int]
    ) -> tuple[Tensor, "Views"]:
        """Draw each image's target `[B]` and views.

        Args:
            generators: one per image.
            side: the shorter, in pixels.
            stages: steps of each stage.
        """
        low, high = (bound * natural_scale(side) for bound in self.tv_target)
        last = len(self.jitter) - 1
        reach = [round(self.jitter[min(i, last)] * side) for i in range(len(stages))]
        bound = torch.tensor([r for r, n in zip(reach, stages, strict=True) for _ in range(n)])
        targets, shifts, flips = [], [], []
        for g in generators:
            targets.append(low + (high - low) * torch.rand((), generator=g))
            unit = torch.rand(len(bound), 2, generator=g)
            shifts.append(((2 * bound[:, None] + 1) * unit).long() - bound[:, None])
            flips.append((torch.rand(len(bound), generator=g) < 0.5) & self.flip)
        return torch.stack(targets), Views(torch.stack(shifts, 1), torch.stack(flips, 1))

    def loss(self, entropy: Tensor, tv: Tensor, targets: Tensor) -> Tensor:
        """Return what to minimize `[B]`.

        Args:
            entropy: of each image at each tap `[L, B]`, nat.
            tv: total variation `[B]`.
            targets: likewise.
        """
        return self.tv_weight * (tv / targets).log().square() - self.entropy_weight * entropy.sum(0)


def neighbour_differences(images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the differences of neighbouring pixels of `[B, C, H, W]`: horizontal, vertical, and
    along both diagonals."""
    return (
        images[..., :, 1:] - images[..., :, :-1],
        images[..., 1:, :] - images[..., :-1, :],
        images[..., 1:, 1:] - images[..., :-1, :-1],
        images[..., 1:, :-1] - images[..., :-1, 1:],
    )


def total_variation(images: Tensor) -> Tensor:
    """Return the root mean square of neighbour differences, mean of four directions `[B]`.

    The published sum of norms over 32 images of 3 x 224 x 224 is 4 * 2187 times this.

    Args:
        images: `[B, C, H, W]`, at least 2 x 2 pixels.
    """
    parts = [d.flatten(1).square().mean(1) for d in neighbour_differences(images)]
    # The square root has no slope at a flat image.
    return torch.stack([(part + 1e-12).sqrt() for part in parts]).mean(0)


def natural_scale(side: int) -> float:
    """Return how much more neighbouring pixels of a photograph differ at `side` pixels than at 224.

    A pixel is a larger part of the scene. Median total variation of 200 ImageNet photographs scaled
    to 224, 128, 64, 32, 16 and 8 pixels: 0.068, 0.078, 0.095, 0.115, 0.132, 0.150; this gives
    0.068, 0.078, 0.093, 0.110, 0.131, 0.156.
    """
    return (224 / side) ** 0.25


def learning_rate_factor(step: int, n_steps: int, n_warmup: int) -> float:
    """Return the factor of a stage's learning rate at `step`: linear warm-up, then half a cosine.

    Args:
        step: from 0 to `n_steps - 1`.
        n_steps: of the stage.
        n_warmup: the first of them, with factors 1/n_warmup to 1.
    """
    if step < n_warmup:
        return (step + 1) / n_warmup
    return 0.5 * (1 + math.cos(math.pi * (step - n_warmup) / (n_steps - n_warmup)))


@dataclass(frozen=True)
class Views:
    """How each image is shifted and flipped at each step.

    Args:
        shifts: cyclic shifts down and right in pixels `[T, B, 2]`.
        flips: whether mirrored `[T, B]`, bool.
    """

    shifts: Tensor
    flips: Tensor

    def of(self, chosen: slice | Tensor) -> "Views":
        """Return those of some images."""
        return Views(self.shifts[:, chosen], self.flips[:, chosen])

    def at(self, step: int, images: Tensor) -> Tensor:
        """Return `images` `[B, C, H, W]` as they are seen at `step`."""
        seen = []
        for image, shift, flip in zip(
            images, self.shifts[step].tolist(), self.flips[step].tolist(), strict=True
        ):
            image = image.roll(shift, (-2, -1)) if any(shift) else image
            seen.append(image.flip(-1) if flip else image)
        return torch.stack(seen)


def generator_of(seed: int, index: int) -> torch.Generator:
    """Return the random numbers of one image: the same whatever other images are made with it."""
    # Hashed: torch's CPU generator uses 32 bits of its seed only.
    digest = hashlib.sha256(f"{seed}/{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4]))

"""What a picture is expected to look like, whatever the task: total variation, and the augmentation
and learning rate that the published optimization uses (arXiv:2203.02250, its code).

Pixels are in [0, 1] here, and every quantity is per image and per pixel, so that neither the
batch, the resolution nor the model's normalization changes what a number means.
"""

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor


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

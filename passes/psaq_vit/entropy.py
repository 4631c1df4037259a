"""Patch-similarity entropy: how diverse an attention layer finds the patches of an image
(arXiv:2203.02250).

    G_ij = cos(u_i, u_j)    H = -int f(x) ln f(x) dx    f = density of the G_ij, i < j

with u_i the output of self-attention at patch i and f a Gaussian kernel density estimate of
bandwidth h. Noise looks the same everywhere (low H), a picture does not.

The published estimator integrates over ten points between the smallest and largest similarity of
the batch: with a step of many bandwidths its value is close for smooth densities and its gradient
is aliasing, collapsed patches score highest, and batch mates change the score. Here pairs are
binned onto a fixed grid of four points per bandwidth with a quadratic B-spline, whose variance is
taken off the kernel's. The gradient is that of exactly this sum: one convolution on the grid and
an interpolation per pair. Tiles of similarities are computed twice and never kept. Counts are
integers, so the bytes of the result do not depend on the order of summation.
`reference_patch_similarity_entropy` reproduces the published numbers.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

POINTS_PER_BANDWIDTH = 4  # an eighth of the step already moves the entropy by less than 1e-4
REACH = 6  # bandwidths at which the kernel is cut: 2e-9 of its mass lies beyond
TILE = 1 << 19  # similarities that are in memory at a time
UNIT = 1 << 30  # one pair, in the integers that the histogram counts in
MIN_NORM = 1e-8  # of a patch vector, as in torch.cosine_similarity


@dataclass(frozen=True)
class Grid:
    """Equispaced points that cover all similarities and the kernel around them.

    Args:
        bandwidth: standard deviation of the Gaussian kernel, in cosine similarity.
        points_per_bandwidth: resolution.
    Raises:
        ValueError: bandwidth not in (0, 1].
    """

    bandwidth: float = 0.05
    points_per_bandwidth: int = POINTS_PER_BANDWIDTH

    def __post_init__(self) -> None:
        if not 0 < self.bandwidth <= 1:
            raise ValueError(f"bandwidth: expected a number in (0, 1], found {self.bandwidth}")

    @property
    def step(self) -> float:
        """Distance of neighbouring points."""
        return self.bandwidth / self.points_per_bandwidth

    @property
    def low(self) -> float:
        """The first point."""
        return -1 - (REACH + 1) * self.bandwidth

    @property
    def n_points(self) -> int:
        """How many there are."""
        return math.ceil(-2 * self.low / self.step) + 1

    def kernel(self, device: torch.device) -> Tensor:
        """Return the kernel at multiples of the step `[1, 1, 2r + 1]`, summing to 1.

        The B-spline that bins has a variance of a quarter step squared; the rest is the kernel's.
        """
        reach = REACH * self.points_per_bandwidth
        offset = torch.arange(-reach, reach + 1, device=device, dtype=torch.float32)
        variance = self.points_per_bandwidth**2 - 0.25  # in steps
        weights = torch.exp(-offset.square() / (2 * variance))
        return (weights / weights.sum()).view(1, 1, -1)

    def smooth(self, values: Tensor) -> Tensor:
        """Return `values` `[B, G]` convolved with the kernel."""
        kernel = self.kernel(values.device)
        return F.conv1d(values.unsqueeze(1), kernel, padding=kernel.shape[-1] // 2).squeeze(1)


def patch_similarity_entropy(
    patches: Tensor, grid: Grid | None = None, valid: Tensor | None = None
) -> Tensor:
    """Return the entropy of each image's patch similarities `[B]`, fp32, in nat. Differentiable.

    Args:
        patches: vectors `[B, W, N, D]`, any float dtype; pairs are formed within each of the W
            windows (1 for global attention) and pooled per image.
        grid: the kernel's bandwidth, and the resolution.
        valid: which tokens are patches `[W, N]`, bool; all unless given.
    Raises:
        ValueError: not four dimensions, or no pair of patches.
    Source: arXiv:2203.02250, section 3.2, with the departures above.
    """
    if patches.ndim != 4:
        raise ValueError(f"patches: expected [B, W, N, D], found {list(patches.shape)}")
    if valid is None:
        valid = torch.ones(patches.shape[1:3], dtype=torch.bool, device=patches.device)
    counts = valid.sum(1)
    n_pairs = int((counts * (counts - 1)).sum()) // 2
    if not n_pairs:
        raise ValueError(f"patches: expected two or more per window, found {counts.tolist()}")
    unit = unit_vectors(patches)
    entropy: Tensor = _PatchSimilarityEntropy.apply(unit, valid, grid or Grid(), n_pairs)
    return entropy


def unit_vectors(patches: Tensor) -> Tensor:
    """Return `patches` `[..., D]` in fp32, divided by their norms."""
    patches = patches.float()
    # Any scale is divided out first: squares of large or small values leave fp32.
    largest = patches.detach().abs().amax(-1, keepdim=True)
    patches = patches / largest.clamp(min=torch.finfo(torch.float32).tiny)
    return patches / patches.norm(dim=-1, keepdim=True).clamp(min=MIN_NORM)


def reference_patch_similarity_entropy(
    patches: Tensor, bandwidth: float = 0.01, n_points: int = 10
) -> Tensor:
    """Return the published estimate `[B]`, fp32: diagonal included, batch-wide range, few points.

    Args:
        patches: vectors `[B, W, N, D]`, any float dtype.
        bandwidth: of the kernel.
        n_points: between the smallest and largest similarity of the batch.
    Source: github.com/zkkli/PSAQ-ViT. Its `f + 1e-4` keeps the logarithm finite.
    """
    unit = unit_vectors(patches)
    similarity = (unit @ unit.mT).flatten(1)  # [B, W * N * N]
    low, high = (float(v) for v in similarity.detach().aminmax())
    points = torch.linspace(low, high, n_points, device=patches.device)
    density = torch.stack([_kernel(similarity, x, bandwidth).mean(1) for x in points], 1) + 1e-4
    return -torch.trapezoid(density * density.log(), points, dim=1)


def _kernel(samples: Tensor, x: Tensor, bandwidth: float) -> Tensor:
    z = (x - samples) / bandwidth
    return torch.exp(-0.5 * z * z) / (bandwidth * math.sqrt(2 * math.pi))


def density(histogram: Tensor, grid: Grid, n_pairs: int) -> Tensor:
    """Return the kernel density estimate on the grid `[B, G]` of binned samples."""
    return grid.smooth(histogram.float() / (UNIT * n_pairs * grid.step))


def differential_entropy(density: Tensor, step: float) -> Tensor:
    """Return `-int f ln f` `[B]` of densities on a grid `[B, G]`."""
    return -torch.xlogy(density, density).sum(1) * step


def bin_samples(samples: Tensor, grid: Grid, out: Tensor) -> None:
    """Add samples `[B, M]` in [-1, 1] to the histograms `out` `[B, G]`, int64 in units of
    1/`UNIT`."""
    index, offset = _position(samples, grid)
    index += torch.arange(0, out.numel(), out.shape[1], device=out.device).unsqueeze(1)
    flat, offset = index.flatten(), offset.flatten()
    left = (0.5 * (0.5 - offset).square() * UNIT).long()
    right = (0.5 * (0.5 + offset).square() * UNIT).long()
    counts = out.view(-1)
    counts.index_add_(0, flat - 1, left)
    counts.index_add_(0, flat, UNIT - left - right)
    counts.index_add_(0, flat + 1, right)


def _position(samples: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return the nearest point's index and the distance to it in steps, in [-0.5, 0.5]."""
    position = (samples - grid.low) * (1 / grid.step)
    nearest = position.round()
    return nearest.long(), position - nearest


def sensitivity(density: Tensor, grid: Grid, n_pairs: int) -> Tensor:
    """Return the slope `[B, G - 1]` between grid points of what one sample adds to the entropy."""
    log = density.clamp(min=torch.finfo(torch.float32).tiny).log()
    return grid.smooth(-(log + 1) / n_pairs).diff(dim=1) / grid.step


def interpolate_slope(slope: Tensor, samples: Tensor, grid: Grid) -> Tensor:
    """Return d entropy / d sample `[B, M]`: the B-spline's derivative, linear between slopes."""
    index, offset = _position(samples, grid)
    left = slope.gather(1, index - 1)
    right = slope.gather(1, index)
    return left + (0.5 + offset) * (right - left)


class _PatchSimilarityEntropy(torch.autograd.Function):
    """Entropy of unit vectors `[B, W, N, D]`; see the module."""

    @staticmethod
    def forward(ctx: Any, unit: Tensor, valid: Tensor, grid: Grid, n_pairs: int) -> Tensor:
        # What is not finite has no bin; the result has it, without waiting for the device.
        finite = unit.flatten(1).sum(1) * 0
        unit = unit.nan_to_num(0.0, 0.0, 0.0)
        counts = torch.zeros(len(unit), grid.n_points, dtype=torch.int64, device=unit.device)
        for images, rows, chosen in _tiles(unit.shape, valid):
            tile = unit[images, :, rows] @ unit[images, :, rows.start :].mT
            bin_samples(tile[:, chosen], grid, counts[images])
        f = density(counts, grid, n_pairs)
        ctx.save_for_backward(unit, valid, sensitivity(f, grid, n_pairs))
        ctx.grid = grid
        return differential_entropy(f, grid.step) + finite

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        unit, valid, slope = ctx.saved_tensors
        slope = slope * grads[0].unsqueeze(1)
        gradient = torch.zeros_like(unit)
        for images, rows, chosen in _tiles(unit.shape, valid):
            a, b = unit[images, :, rows], unit[images, :, rows.start :]
            tile = a @ b.mT
            weight = torch.zeros_like(tile)
            weight[:, chosen] = interpolate_slope(slope[images], tile[:, chosen], ctx.grid)
            gradient[images, :, rows] += weight @ b
            gradient[images, :, rows.start :] += weight.mT @ a
        return gradient, None, None, None


def _tiles(shape: torch.Size, valid: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield images, rows, and which pairs `[W, rows, N - first row]` of the tile count: those of
    two patches above the diagonal."""
    n_images, n_windows, n_tokens, _ = shape
    n_rows = min(n_tokens, max(1, TILE // (n_windows * n_tokens)))
    n_together = max(1, TILE // (n_windows * n_rows * n_tokens))
    for start in range(0, n_tokens, n_rows):
        rows = slice(start, min(start + n_rows, n_tokens))
        chosen = valid[:, rows, None] & valid[:, None, start:]
        chosen = chosen.triu(1)
        for first in range(0, n_images, n_together):
            yield slice(first, min(first + n_together, n_images)), rows, chosen

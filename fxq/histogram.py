"""Histograms on a grid that is fixed before any data is seen, and the ranges found on them.

A bin is a sign, one of 64 exponents (magnitudes 2^-32 to 2^32) and the leading m mantissa bits of
the fp32 pattern. Finding a bin is a shift, adding two histograms is exact, and no range needs to be
known beforehand. A bin is at most 2^-m of its value wide and takes 8 bytes:

    scale entries   m        relative bin width   memory per entry
    up to 64        7        0.8 %                128 KiB
    up to 256       6 to 5   1.6 % to 3.1 %       64 to 32 KiB
    more            4        6.3 %                16 KiB

Ranges are computed as if the values of a bin were spread evenly over it, cut to the exact smallest
and largest value. Magnitudes beyond the grid share its first and last bin, so they too are spread
over what is left of the exact range: coarse, never wrong.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from fxq import numerics
from fxq.spec import Entropy, MeanSquaredError, Percentile, QuantSpec

MIN_EXPONENT = -32  # smaller magnitudes share the zero bin
OCTAVES = 64
TOGETHER = 1 << 16  # elements of an array in a search of ranges: 512 KB, which caches hold
SUB_BINS = 16  # per code in the entropy search: TensorRT has 2048 bins for 128 codes


def mantissa_bits(entries: int) -> int:
    """Return how many mantissa bits a histogram with `entries` scale entries resolves."""
    budget = 20 - 7 - (entries - 1).bit_length()  # 2^20 counters, 2 * 64 octaves
    return min(7, max(4, budget))


def n_bins(bits: int) -> int:
    """Return the number of bins of a grid with `bits` mantissa bits."""
    return 2 * (OCTAVES << bits) + 1


def bin_index(x: Tensor, bits: int) -> Tensor:
    """Return each value's bin, int32, rising with the value; the middle bin holds zero.

    Args:
        x: finite values, any float dtype.
        bits: mantissa bits of the grid.
    """
    middle = OCTAVES << bits
    first = ((127 + MIN_EXPONENT) << bits) - 1
    sign = x.float().view(torch.int32) >> 31  # -1 for negative values
    index = x.float().abs().view(torch.int32).bitwise_right_shift_(23 - bits)
    index.clamp_(first, first + middle).sub_(first)  # bin of the magnitude
    return index.bitwise_xor_(sign).sub_(sign).add_(middle)  # (i ^ -1) + 1 is -i


def bin_edges(bits: int) -> Tensor:
    """Return the bounds of all bins in rising order `[bins + 1]`, fp64; the outer ones are
    infinite."""
    pattern = ((127 + MIN_EXPONENT) << bits) + torch.arange((OCTAVES << bits) + 1)
    edges = (pattern.int() << (23 - bits)).view(torch.float32).double()
    edges[-1] = torch.inf
    return torch.cat([-edges.flip(0), edges])


def fold(histogram: Tensor) -> Tensor:
    """Return the histogram `[E, bins]` of the magnitudes of the values in `histogram`."""
    middle = histogram.shape[1] // 2
    folded = torch.zeros_like(histogram)
    folded[:, middle:] = histogram[:, middle:]
    folded[:, middle + 1 :] += histogram[:, :middle].flip(1)
    return folded


@dataclass(frozen=True)
class Density:
    """How the values of each scale entry are distributed: evenly within each bin.

    Args:
        counts: values per bin `[E, bins]`, fp64 (exact up to 2^53).
        lower: smallest value of each bin `[E, bins]`, fp64, cut to the entry's exact range.
        upper: largest value of each bin.
    """

    counts: Tensor
    lower: Tensor
    upper: Tensor

    @staticmethod
    def of(histogram: Tensor, low: Tensor, high: Tensor, bits: int) -> "Density":
        """Return the density of a histogram `[E, bins]` of values in `[low, high]`."""
        used = histogram.any(0)
        used[used.numel() // 2] = True  # never none at all
        edges = bin_edges(bits).to(histogram.device)
        low, high = low.double().reshape(-1, 1), high.double().reshape(-1, 1)
        return Density(
            counts=histogram[:, used].double(),
            lower=edges[:-1][used].clamp(low, high),
            upper=edges[1:][used].clamp(low, high),
        )

    @cached_property
    def wide(self) -> Tensor:
        """Which bins hold more than a single value `[E, bins]`."""
        return self.upper > self.lower

    def up_to(self, points: Tensor) -> Tensor:
        """Return how many values are at most each of an entry's `points` `[E, P]`."""
        before = self.counts.cumsum(1) - self.counts
        bin = (torch.searchsorted(self.lower, points, right=True) - 1).clamp(min=0)
        lower, width = self.lower.gather(1, bin), (self.upper - self.lower).gather(1, bin)
        inside = torch.where(width > 0, ((points - lower) / width).clamp(0, 1), points >= lower)
        return before.gather(1, bin) + self.counts.gather(1, bin) * inside

    @property
    def at_once(self) -> int:
        """How many candidates for ranges to try together."""
        return max(1, TOGETHER // self.counts.numel())

    def quantile(self, rank: Tensor) -> Tensor:
        """Return the value below which `rank` `[E, 1]` of an entry's values lie `[E]`."""
        upto = self.counts.cumsum(1)
        bin = torch.searchsorted(upto, rank).clamp(max=upto.shape[1] - 1)
        count = self.counts.gather(1, bin)
        inside = (rank - upto.gather(1, bin) + count) / count.clamp(min=1)
        return self.lower.gather(1, bin).lerp(self.upper.gather(1, bin), inside).squeeze(1)


def searched_range(
    histogram: Tensor, low: Tensor, high: Tensor, bits: int, spec: QuantSpec
) -> tuple[Tensor, Tensor]:
    """Return the range that a spec's rule finds, fp32 in the shape of `low`.

    Args:
        histogram: counts `[E, bins]`.
        low: exact smallest value of each entry, E entries in any shape.
        high: exact largest value.
        bits: mantissa bits of the grid.
        spec: with the rule, and the codes there are.
    Raises:
        TypeError: a rule that weighs no values, and so has no histogram.
    """
    match spec.observer:
        case Percentile(percent):
            return percentile_range(histogram, low, high, bits, percent, symmetric=spec.symmetric)
        case MeanSquaredError(p, steps):
            density = Density.of(histogram, low, high, bits)
            cost = partial(quantization_error, density, spec=spec, p=p)
            return cut_range(low, high, steps, cost, density.at_once)
        case Entropy(steps):
            density = _nonzero_density(histogram, low, high, bits, symmetric=spec.symmetric)
            return cut_range(low, high, steps, partial(divergence, density, spec=spec))
    raise TypeError(f"expected a rule that weighs values, found {spec.observer}")


def _nonzero_density(
    histogram: Tensor, low: Tensor, high: Tensor, bits: int, *, symmetric: bool
) -> Density:
    histogram = histogram.clone()
    histogram[:, histogram.shape[1] // 2] = 0
    if symmetric:
        histogram, low, high = fold(histogram), torch.zeros_like(low), torch.maximum(-low, high)
    return Density.of(histogram, low, high, bits)


def percentile_range(
    histogram: Tensor, low: Tensor, high: Tensor, bits: int, percent: float, *, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Return the range of the central `percent` of the values, fp32 in the shape of `low`.

    Args:
        histogram: counts `[E, bins]`.
        low: exact smallest value of each entry, E entries in any shape.
        high: exact largest value.
        bits: mantissa bits of the grid.
        percent: share to keep; both tails lose the same number of values.
        symmetric: take the percentile of the magnitudes.
    """
    total = histogram.sum(1, keepdim=True).double()
    kept = total * percent / 100
    if symmetric:
        amax = torch.maximum(-low, high)
        limit = Density.of(fold(histogram), torch.zeros_like(amax), amax, bits).quantile(kept)
        limit = limit.float().reshape(low.shape)
        return -limit, limit
    density = Density.of(histogram, low, high, bits)
    first, last = density.quantile((total - kept) / 2), density.quantile((total + kept) / 2)
    return first.float().reshape(low.shape), last.float().reshape(low.shape)


def cut_range(
    low: Tensor,
    high: Tensor,
    steps: int,
    cost: Callable[[Tensor, Tensor], Tensor],
    at_once: int = 1,
) -> tuple[Tensor, Tensor]:
    """Return the cheapest of the ranges `[low, high]` cut to `[-t, t]`; of equals, the widest.

    The candidates for t fall geometrically from the largest magnitude to 1/steps of it, so that the
    search is as fine around the bulk of the values as around an outlier.

    Args:
        low: exact smallest value of each entry, E entries in any shape.
        high: exact largest value.
        steps: number of candidates.
        cost: maps a candidate's bounds to the cost of each entry `[E]`; those of several, `[S]` and
            then the shape of `low`, to `[S, E]`.
        at_once: how many candidates `cost` is given together.
    """
    amax = torch.maximum(-low, high)
    best_low, best_high, best = low, high, cost(low, high).reshape(low.shape)
    shares = [steps ** (-step / (steps - 1)) for step in range(1, steps)]
    for start in range(0, len(shares), at_once):
        some = torch.tensor(shares[start : start + at_once], device=low.device)
        t = amax * (some.reshape(-1, *[1] * amax.ndim) if at_once > 1 else some)
        cut_low, cut_high = torch.maximum(low, -t), torch.minimum(high, t)
        candidates = cost(cut_low, cut_high).reshape(-1, *low.shape).nan_to_num(nan=torch.inf)
        cheapest, first = candidates.min(0, keepdim=True)  # of equals, the first
        better = cheapest[0] < best
        best = torch.where(better, cheapest[0], best)
        lows, highs = cut_low.reshape(-1, *low.shape), cut_high.reshape(-1, *low.shape)
        best_low = torch.where(better, lows.gather(0, first)[0], best_low)
        best_high = torch.where(better, highs.gather(0, first)[0], best_high)
    return best_low, best_high


def quantization_error(
    density: Density, low: Tensor, high: Tensor, spec: QuantSpec, p: float
) -> Tensor:
    """Return the mean of |x - dequantize(quantize(x))|^p over each entry's values, fp64: `[E]`, or
    `[S, E]` for S bounds of each entry.

    With u = x / scale + zero_point and r = u - code, the error integrates over a bin in closed
    form: the integral of |r|^p up to u is code * c + r |r|^p / (p + 1), where c is that of a whole
    code. Evaluated at a bin's bounds, it does not alias with the codes as bin centres would.
    """
    scale, zero_point = numerics.choose_qparams(
        low, high, spec.quant_min, spec.quant_max, symmetric=spec.symmetric
    )
    entries = len(density.counts)
    several = [-1] if scale.numel() > entries else []
    scale = scale.double().reshape(*several, entries, 1)
    zero_point = zero_point.reshape(scale.shape)
    whole_code = 0.5**p / (p + 1)

    def residual(x: Tensor) -> tuple[Tensor, Tensor]:
        u = (x / scale).add_(zero_point)
        code = u.round().clamp_(spec.quant_min, spec.quant_max)
        return code, u.sub_(code)

    def integral(code: Tensor, r: Tensor) -> Tensor:
        return (r.abs() ** p).mul_(r).div_(p + 1).add_(code, alpha=whole_code)

    first, last = residual(density.lower), residual(density.upper)
    width = (density.upper - density.lower) / scale
    mean = integral(*last).sub_(integral(*first)).div_(width)
    if not bool(density.wide.all()):  # bins cut to a single value
        mean = torch.where(density.wide, mean, first[1].abs() ** p)
    total = mean.mul_(density.counts).sum(-1).div(density.counts.sum(1))
    return total * torch.pow(scale[..., 0], p)


def divergence(density: Density, low: Tensor, high: Tensor, spec: QuantSpec) -> Tensor:
    """Return KL(P || Q) of each entry `[E]`, fp64: what clipping to `[low, high]` and rounding
    lose.

    The candidate range is cut into 16 bins per code step, of which bin i holds s_i of the N values.
    p_i is s_i plus, in the outermost bins that hold any, the values clipped on that side. q_i is
    the sum of s over all bins that round to i's code, spread over those of them that hold any. With
    P = p / N and Q = q / N the divergence is sum_i P_i log(P_i / Q_i); infinite if nothing is
    inside.

    For a symmetric spec `density` is that of the magnitudes. Exact zeros should be left out: every
    range represents them exactly.

    Source: Migacz, 8-bit Inference with TensorRT, GTC 2017, S7310. Departures: bins follow the
    candidate instead of 2048 fixed ones (the same at its widest); they are grouped by the code they
    round to instead of into equal slices; clipped values never meet an empty bin; Q is not
    renormalized, or a range around a single value would lose nothing; affine ranges clip both ends.
    """
    low, high = low.double().reshape(-1, 1).clamp(max=0), high.double().reshape(-1, 1).clamp(min=0)
    codes = spec.quant_max - spec.quant_min
    if spec.symmetric:
        low, high, codes = torch.zeros_like(low), torch.maximum(-low, high), spec.quant_max
    bins = torch.arange(codes * SUB_BINS + 1, device=low.device)
    points = low + (high - low) * (bins / bins[-1].double())
    points[:, :1] = torch.nextafter(low, torch.full_like(low, -torch.inf))  # low itself is inside
    up_to = density.up_to(points)
    s, bins = up_to.diff(dim=1), bins[:-1]
    total, occupied = density.counts.sum(1, keepdim=True), (s > 0).int()
    first = occupied.argmax(1, keepdim=True)
    last = bins[-1] - occupied.flip(1).argmax(1, keepdim=True)
    p = s + (bins == first) * up_to[:, :1] + (bins == last) * (total - up_to[:, -1:])
    q = _average_per_code(s)
    terms = p / total * torch.log(p / q)
    return terms.nan_to_num(nan=0.0, posinf=torch.inf).sum(1)  # 0 log 0 = 0


def _average_per_code(s: Tensor) -> Tensor:
    """Spread the mass of the bins that round to one code over those that are not empty; `[E,
    codes * SUB_BINS]`."""
    half = SUB_BINS // 2  # the outer codes have half a cell
    cells = torch.nn.functional.pad(s, (half, half)).reshape(len(s), -1, SUB_BINS)
    occupied = cells > 0
    mean = cells.sum(2, keepdim=True) / occupied.sum(2, keepdim=True).clamp(min=1)
    return (occupied * mean).flatten(1)[:, half:-half]

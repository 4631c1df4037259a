"""GainProjected: the factor per channel at which quantization gains most (arXiv:2601.21238).

With one step for the whole activation, dividing channel i by s_i and its largest channel by s_1
changes the errors of the product x W as

    E = 1/2 (rho A + B / rho),   rho = (s_i / s_1)^2
    A = sum_k W_ik^2 dx_i^2      what rounding the activation costs, d* being rounding errors
    B = sum_k dW_ik^2 x_i^2      what rounding the weight costs

so that E falls by `gain`, which is concave and largest at rho = sqrt(B / A). The error model holds
near equal ranges only: sites are smoothed and centred first, and the step is repeated.

Where A and B are sums over rows and outputs they factorise: sum dx^2 * sum W^2, sum x^2 * sum dW^2.
All come from the rows of one sweep over the data. Layers that read one edge are stacked along their
outputs.

s_1 multiplies all channels alike. Of an activation with one scale and weights with one per output
channel it changes no code: only ratios count.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fxq.passes import w8a8
from fxq.passes.common.scaling import (
    Candidate,
    EquivalentScaling,
    Operands,
    ScaleSite,
    Statistics,
    admissible,
    operands,
)
from fxq.passes.outlier_suppression import centring_shift
from fxq.passes.smoothquant import smoothing_scale
from fxq.spec import LayerSpec

# The power of the errors that are summed. Squares are the optimum of eq. (15), and what the
# published code does; magnitudes are eq. (16) as printed, the optimum for one output only.
POWERS = {"optimum": 2, "printed": 1}


def gain(rho: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return how much smaller the error is than at `rho` 1.

    Args:
        rho: squared factor relative to the pivot's `[C]`, > 0.
        a: cost of rounding the activation per channel `[C]`.
        b: cost of rounding the weight per channel `[C]`.
    Source: eq. (15).
    """
    return (a + b - rho * a - b / rho) / 2  # eq. (15)


def error_sums(under: Operands, power: int = 2) -> tuple[Tensor, Tensor]:
    """Return what rounding the activation and rounding the weight cost, per input channel.

    Args:
        under: a layer's operands, float and quantized.
        power: of the errors: 2 for A and B, 1 for the sums of eq. (16).
    Returns:
        `sum |dx|^p * sum |W^|^p` and `sum |x|^p * sum |dW|^p`, each `[K]`, fp64. W^ is the
        quantized weight, as in the published code.
    """

    def sums(value: Tensor, channel: int) -> Tensor:
        powers = value.double().abs().pow(power)
        return powers.transpose(0, channel).flatten(1).sum(1)

    dx, dw = under.quantized_rows - under.rows, under.quantized_weight - under.weight
    a = sums(dx, 1) * sums(under.quantized_weight, 1)
    return a, sums(under.rows, 1) * sums(dw, 1)


def gain_projected_factor(a: Tensor, b: Tensor, power: int = 2) -> Tensor:
    """Return each channel's factor relative to the pivot's.

    Args:
        a: cost of rounding the activation per channel `[C]`, as `error_sums` gives it.
        b: cost of rounding the weight `[C]`.
        power: that they were summed with: `(B / A)^(1/4)` of squares, the optimum of eq. (15), or
            `(B / A)^(1/2)` of magnitudes, eq. (16) as printed.
    Returns:
        `[C]`; infinite where only A is 0, 0 where only B is, 1 where both are.
    """
    ratio = torch.where((a == 0) & (b == 0), 1.0, b / a)
    return ratio ** (1 / (2 * power))


def pivot_scale(x_range: Tensor, w_range: Tensor) -> Tensor:
    """Return the pivot's own factor, which makes its two ranges equal; 1 where one of them is 0.

    Args:
        x_range: of the pivot's activations, a scalar.
        w_range: of its weights.
    """
    both = (x_range > 0) & (w_range > 0)
    return torch.where(both, (x_range / w_range).sqrt(), 1.0)


def bounded(factor: Tensor, widths: Tensor) -> Tensor:
    """Return factors kept where the derivation holds.

    At least `R_i / R_1`: below that the channel, and not the pivot, would have the largest range.
    At most 1: beyond, it would be scaled down more than the pivot.

    Args:
        factor: relative to the pivot's `[C]`, may be 0 or infinite.
        widths: R, the range of each channel `[C]`.
    """
    largest = widths.amax()
    lowest = widths / largest if largest > 0 else torch.ones_like(widths)
    return torch.minimum(torch.maximum(factor, lowest), torch.ones_like(factor))


@dataclass(frozen=True)
class GainProjected(EquivalentScaling):
    """Scale every site by what gains most, after smoothing and centring it.

    Tried are: smoothing alone; smoothing and centring; and after these each of some steps of the
    closed form, kept within the bounds of the derivation and not. What quantizes best on rows that
    it was not fitted to is kept.

    Args:
        pre_smooth: migration strength of the smoothing in front, in [0, 1]; None leaves it out.
        center: shift channels by the middle of their range, by their mean, or not at all.
        equation: "optimum" is that of eq. (15); "printed" is eq. (16), which differs from it for
            more than one output.
        iterations: steps of the closed form, each from the last one's quantization errors.
    """

    layer: LayerSpec = w8a8.STATIC_LAYER
    whole: bool = False  # a whole graph is judged with one range for all groups of positions
    pre_smooth: float | None = 0.5  # of the published code
    center: Literal["middle", "mean"] | None = "middle"
    equation: Literal["optimum", "printed"] = "optimum"
    iterations: int = 3

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.layer.activation is None:
            raise ValueError(
                f"{name}.layer: expected quantized activations, found weights alone; without their "
                "errors there is nothing to balance"
            )
        if self.pre_smooth is not None and not 0 <= self.pre_smooth <= 1:
            raise ValueError(f"{name}.pre_smooth: expected 0 to 1, found {self.pre_smooth}")
        if self.center not in ("middle", "mean", None):
            raise ValueError(
                f"{name}.center: expected 'middle', 'mean' or None, found {self.center!r}"
            )
        if self.equation not in POWERS:
            raise ValueError(
                f"{name}.equation: expected 'optimum' or 'printed', found {self.equation!r}"
            )
        if self.iterations < 1:
            raise ValueError(f"{name}.iterations: expected at least 1, found {self.iterations}")

    def candidates(self, site: ScaleSite, statistics: Statistics) -> Iterable[Candidate]:
        """Propose the smoothed site, the centred one, and steps of the closed form from there."""
        scale = torch.ones(site.n_channels)
        if self.pre_smooth is not None:
            weights = statistics.weight_amax
            scale = smoothing_scale(statistics.amax, weights, self.pre_smooth)
            yield Candidate(scale)
        shift = None if site.why_no_shift else self._shift(statistics)
        if shift is not None:
            yield Candidate(scale, shift)
        for within_bounds in (True, False):
            yield from self._steps(statistics, Candidate(scale, shift), within_bounds)

    def _shift(self, statistics: Statistics) -> Tensor | None:
        if self.center == "mean":
            means = [c.rows.mean(0) for c in statistics.consumers]
            readers = [torch.ones_like(mean) for mean in means]
            return statistics.reduce(means, "sum") / statistics.reduce(readers, "sum")
        middle = centring_shift(statistics.low, statistics.high)
        return middle if self.center == "middle" else None

    def _steps(
        self, statistics: Statistics, start: Candidate, within_bounds: bool
    ) -> Iterator[Candidate]:
        scale, shift = start
        power = POWERS[self.equation]
        for _ in range(self.iterations):
            scale = admissible(scale, shift, statistics)
            found = Candidate(scale, shift)
            sums = [
                error_sums(operands(c, c, found, self.layer), power) for c in statistics.consumers
            ]
            a, b = (statistics.reduce(each, "sum") for each in zip(*sums, strict=True))
            widths = (statistics.high - statistics.low) / scale
            factor = gain_projected_factor(a, b, power).to(scale.dtype)
            limited = bounded(factor, widths)
            if not within_bounds:  # but where a sum is 0: there the bounds decide
                limited = torch.where((a == 0) | (b == 0), limited, factor)
            pivot = int(widths.argmax())
            limited[pivot] = 1.0
            weights = 2 * statistics.weight_amax * scale
            scale = scale * limited * pivot_scale(widths[pivot], weights[pivot])
            yield Candidate(scale, shift)

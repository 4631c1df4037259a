"""Quantizers that learn: modules that stand in a graph in the place of observers and weights.

    StaticActivation      the range that calibration found, times a gain
    DynamicActivation     the activation's own range; learns nothing itself
    StraightThroughWeight the weight's own range; the weight learns through it
    ScaledWeight          the range that the weight has at first, times a gain; both learn
    RoundedWeight         a fixed range; which of its two neighbours each weight goes to is learned
                          (AdaRound, arXiv:2004.10568)
    FixedWeight           codes that a method has chosen

Each gives, in eval mode, what `Convert` will make of it, to the last integer.
"""

import torch
from torch import Tensor, nn

from fxq import numerics
from fxq.layer import WeightCodes
from fxq.observers import RangeObserver
from fxq.passes.common.convert import quantize_weight
from fxq.passes.common.fake_quantize import fake_quantize
from fxq.row_choice import pick
from fxq.spec import QuantSpec, block_of

STRETCH = (-0.1, 1.1)  # ends of the sigmoid before it is cut to [0, 1]: AdaRound, Eq. 23


def rounding(position: Tensor) -> Tensor:
    """Return the share `[0, 1]` of a step that a weight is rounded up by: a sigmoid, stretched and
    cut, so that it reaches both ends.

    Args:
        position: what is learned, any shape.
    Source: arXiv:2004.10568 eq. 23.
    """
    low, high = STRETCH
    return (torch.sigmoid(position) * (high - low) + low).clamp(0, 1)


def position_of(share: Tensor) -> Tensor:
    """Return the position whose `rounding` is `share`, in [0, 1]."""
    low, high = STRETCH
    return torch.logit((share - low) / (high - low))


def kept(weight: Tensor, mask: Tensor | None) -> Tensor:
    """Return a weight with zeros where a mask is False."""
    return weight if mask is None else weight * mask


class StaticActivation(nn.Module):
    """An activation in the range its observer found, scaled and moved by what training makes of it.

    In train mode each element stays float with probability `float_share` (QDrop,
    arXiv:2203.05740): what learns then sees both.
    """

    found: Tensor
    found_zero: Tensor | None

    def __init__(self, observer: RangeObserver) -> None:
        super().__init__()
        self.spec, self.float_share = observer.spec, 0.0
        scale, zero_point = observer.qparams()
        self.register_buffer("found", scale)
        self.register_buffer("found_zero", None if self.spec.symmetric else zero_point)
        # A logarithm: a scale stays above zero. One that was trained before stays as it is.
        trains = observer.trained_scale is None
        self.log_gain = nn.Parameter(torch.zeros_like(scale), requires_grad=trains)
        # In codes. It is rounded, so it does nothing before it has come half of the way.
        self.zero_shift: nn.Parameter | None = None
        if not self.spec.symmetric:
            self.zero_shift = nn.Parameter(torch.zeros_like(scale), requires_grad=False)

    @property
    def scale(self) -> Tensor:
        """The scale as trained so far, fp32 in the shape of the one found."""
        return self.found * self.log_gain.exp()

    @property
    def zero_point(self) -> Tensor | None:
        """The zero-point as trained so far, int32 in the scale's shape; None where symmetric."""
        if self.found_zero is None or self.zero_shift is None:
            return None
        moved = self.found_zero + self.zero_shift.detach().round().to(torch.int32)
        return moved.clamp(self.spec.quant_min, self.spec.quant_max)

    def forward(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        """Return `x` quantized and dequantized, in its dtype."""
        scale, zero_point, rows = self.scale, self.zero_point, self.spec.rows
        shift: Tensor | None = self.zero_shift
        if rows is not None:
            assert index is not None
            scale = pick(scale, index, rows)
            zero_point = None if zero_point is None else pick(zero_point, index, rows)
            shift = None if shift is None else pick(shift, index, rows)
        value = fake_quantize(x, scale, zero_point, *self.spec.grid)
        if self.training and shift is not None and shift.requires_grad:
            value = value + _moved_by(shift, x, value, scale)
        if self.training and self.float_share:
            value = torch.where(torch.rand_like(x) < self.float_share, x, value)
        return value


def _moved_by(shift: Tensor, x: Tensor, value: Tensor, scale: Tensor) -> Tensor:
    """Return zeros with the gradient that a zero-point has: minus a step where a value is clipped,
    none where it is in range and moves with its code (LSQ+, arXiv:2004.09576, Eq. 5)."""
    wide = numerics.expand_blocks(scale.detach(), x.shape)
    clipped = (value.detach() - x.detach()).abs() > wide * (0.5 + 2**-10)
    return numerics.expand_blocks(shift.detach() - shift, x.shape) * wide * clipped


class DynamicActivation(nn.Module):
    """An activation in its own range."""

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` quantized and dequantized, in its dtype."""
        spec = self.spec
        block = block_of(spec.granularity, x.ndim, dynamic=True)
        low, high = numerics.block_amin_amax(x.detach(), block)
        scale, zero_point = numerics.choose_qparams(
            low, high, spec.quant_min, spec.quant_max, symmetric=spec.symmetric
        )
        zero = None if spec.symmetric else zero_point
        return fake_quantize(x, scale, zero, *spec.grid)


class StraightThroughWeight(nn.Module):
    """A weight in the range it has now.

    Args:
        spec: how it is quantized.
        mask: False where it is pruned and stays zero; None for nowhere.
    """

    mask: Tensor | None

    def __init__(self, spec: QuantSpec, mask: Tensor | None) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight quantized and dequantized."""
        weight = kept(weight, self.mask)
        with torch.no_grad():
            _, scale, zero_point = quantize_weight(weight, self.spec)
        return fake_quantize(weight, scale, zero_point, *self.spec.grid)


class ScaledWeight(nn.Module):
    """A weight in the range it has at first, times a gain.

    Args:
        weight: `[N, ...]`, any float dtype.
        spec: how it is quantized.
        mask: False where it is pruned and stays zero; None for nowhere.
    """

    found: Tensor
    zero_point: Tensor | None
    mask: Tensor | None

    def __init__(self, weight: Tensor, spec: QuantSpec, mask: Tensor | None) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("mask", mask)
        _, scale, zero_point = quantize_weight(weight.detach(), spec)
        self.register_buffer("found", scale)
        self.register_buffer("zero_point", zero_point)
        self.log_gain = nn.Parameter(torch.zeros_like(scale))

    @property
    def scale(self) -> Tensor:
        """The scale as trained so far, fp32."""
        return self.found * self.log_gain.exp()

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight quantized and dequantized."""
        weight = kept(weight, self.mask)
        return fake_quantize(weight, self.scale, self.zero_point, *self.spec.grid)

    def codes(self, weight: Tensor) -> WeightCodes:
        """Return what a weight is quantized to."""
        scale, weight = self.scale.detach(), kept(weight.detach(), self.mask)
        codes = numerics.quantize(weight, scale, self.zero_point, *self.spec.grid)
        return WeightCodes(codes, scale, self.zero_point)


class RoundedWeight(nn.Module):
    """A weight in a fixed range, of which each element learns whether it is rounded up or down.

    In train mode it is rounded by a share of a step, which begins where the weight is; in eval mode
    and where its position does not train, up where that share is at least a half. Before it has
    learned anything that is rounding to nearest.

    Args:
        weight: `[N, ...]`, any float dtype.
        spec: how it is quantized, to integers.
    """

    below: Tensor  # the code below each weight, fp32
    scale: Tensor
    zero_point: Tensor | None

    def __init__(self, weight: Tensor, spec: QuantSpec) -> None:
        super().__init__()
        self.spec = spec
        codes, scale, zero_point = quantize_weight(weight.detach(), spec)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)
        place = weight.detach().float() * numerics.expand_blocks(1.0 / scale, weight.shape)
        self.register_buffer("below", place.floor())
        share = place - self.below
        # Halves go to even: begin on the side that rounding to nearest takes.
        nearest = codes.float() - self._zero(codes)
        share = torch.where(share == 0.5, 0.5 + (nearest - place).sign() * 1e-5, share)
        self.position = nn.Parameter(position_of(share))
        self.register_buffer("between", share > 0)  # those on a code have one neighbour

    def _zero(self, like: Tensor) -> Tensor:
        zero = torch.zeros_like(self.scale) if self.zero_point is None else self.zero_point.float()
        return numerics.expand_blocks(zero, like.shape)

    def _steps(self) -> Tensor:
        """Return what is added to `below`: shares in train mode, 0 or 1 in eval mode."""
        if self.training and self.position.requires_grad:
            steps = rounding(self.position)
        else:
            steps = (self.position >= 0).float()
        between: Tensor = self.between  # type: ignore[assignment]
        return steps * between

    def _codes(self) -> Tensor:
        """Return codes, or what is between two of them, without the zero-point; fp32."""
        zero = self._zero(self.below)
        return (self.below + self._steps()).clamp(
            self.spec.quant_min - zero, self.spec.quant_max - zero
        )

    def forward(self, weight: Tensor) -> Tensor:
        """Return the rounded weight, in the dtype of `weight`."""
        value = self._codes() * numerics.expand_blocks(self.scale, self.below.shape)
        return value.to(weight.dtype)

    def indecision(self, sharpness: float) -> Tensor:
        """Return how far the shares are from 0 and 1, mean over the weight: 0 where all are there.

        Args:
            sharpness: beta of `1 - |2 share - 1|^beta`; the larger, the fewer shares feel it.
        Source: arXiv:2004.10568 eq. 24.
        """
        distance = (2 * rounding(self.position) - 1).abs()
        return (1 - distance.pow(sharpness)).mean()

    def codes(self) -> WeightCodes:
        """Return what the weight is rounded to."""
        was, self.training = self.training, False
        codes = (self._codes() + self._zero(self.below)).to(
            numerics.codes_dtype(self.spec.quant_max)
        )
        self.training = was
        return WeightCodes(codes, self.scale, self.zero_point)


class FixedWeight(nn.Module):
    """A weight as a method has fixed it."""

    def __init__(self, fixed: WeightCodes) -> None:
        super().__init__()
        self.fixed = fixed

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight that the codes stand for, in the dtype of `weight`."""
        fixed = self.fixed
        return numerics.dequantize(fixed.codes, fixed.scale, fixed.zero_point, weight.dtype)

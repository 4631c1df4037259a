"""What quantization does to the layers of a site: the error by which candidates are judged.

A layer is judged by rows of its input and by its weight, without a graph: ranges come from some
rows, the error from others.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fxq import numerics
from fxq.observers import RangeObserver
from fxq.passes.common.convert import quantize_weight
from fxq.passes.common.scaling.statistics import Consumer, Statistics
from fxq.spec import LayerSpec, MeanSquaredError, MinMax, PerTensor, PerToken, QuantSpec, block_of

STEPS = 20  # of a search for a range, at most


class Candidate(NamedTuple):
    """What a method proposes for a site: a scale and perhaps a shift, `[n_channels]` each."""

    scale: Tensor
    shift: Tensor | None = None


class Judge:
    """The error that quantization makes at a site's consumers, relative to their outputs.

        sum over consumers of |Q(x') Q(W').T - x' W'.T|^2 / |x W.T|^2,   x' = (x - shift) / scale

    Q has the range of the rows that a candidate was fitted to, x are other rows: a scale that only
    suits the rows it was made from is not taken for a good one. A convolution is judged by its
    taps, each as a linear of its own.

    Args:
        judged: statistics of the site, with the rows x.
        layer: how activations and weights are quantized.
    """

    def __init__(self, judged: Statistics, layer: LayerSpec) -> None:
        self.layer = layer
        self.consumers = [(c, product(c.rows, c.weight)) for c in judged.consumers]

    def loss(self, fitted: Statistics, candidate: Candidate) -> float:
        """Return the error under a candidate.

        Args:
            fitted: statistics of the same site that the candidate was made from.
            candidate: scale and shift.
        """
        total = 0.0
        for seen, (judged, outputs) in zip(fitted.consumers, self.consumers, strict=True):
            size, exact = outputs.square().sum(), outputs
            if candidate.shift is not None:  # whatever the scale, x' W'.T is (x - shift) W.T
                shift = seen.part.spread(candidate.shift, 0.0).float().to(outputs.device)
                exact = outputs - product(shift[None], judged.weight)
            total += relative_loss(operands(seen, judged, candidate, self.layer), exact, size)
        return total


class Operands(NamedTuple):
    """What a consumer multiplies under a candidate, and what quantization makes of it: rows
    `[R, K]` and the weight `[N, K, ...]`, fp32."""

    rows: Tensor
    quantized_rows: Tensor
    weight: Tensor
    quantized_weight: Tensor


def operands(
    fitted: Consumer, judged: Consumer, candidate: Candidate, layer: LayerSpec
) -> Operands:
    """Return a consumer's input and weight under a candidate.

    Args:
        fitted: statistics that quantizers have their range from.
        judged: of the same consumer, with the rows.
        candidate: scale and shift.
        layer: how activations and weights are quantized.
    """
    device, original = judged.rows.device, judged.weight
    scale = fitted.part.spread(candidate.scale, 1.0).float().to(device)
    shift: Tensor | float = 0.0
    if candidate.shift is not None:
        shift = fitted.part.spread(candidate.shift, 0.0).float().to(device)
    weight = original * scale.reshape(-1, *[1] * (original.ndim - 2))
    return quantized_operands(
        (judged.rows - shift) / scale, (fitted.seen - shift) / scale, weight, layer
    )


def quantized_operands(rows: Tensor, seen: Tensor, weight: Tensor, layer: LayerSpec) -> Operands:
    """Return an input and a weight, and what quantization makes of them.

    Args:
        rows: of the input `[R, K]`, fp32.
        seen: what the range of the input comes from `[S, K]` (`Consumer.seen`).
        weight: `[N, K, ...]`, fp32.
        layer: how activations and weights are quantized.
    """
    quantized = rows
    if layer.activation is not None:
        quantized = _fake_quantize_rows(rows, seen, _coarse(layer.activation))
    codes, step, zero = quantize_weight(weight, _coarse(layer.weight))
    approximate = numerics.dequantize(codes, step, zero, torch.float32)
    return Operands(rows, quantized, weight, approximate)


def _coarse(spec: QuantSpec) -> QuantSpec:
    """Return a spec whose search of a range takes fewer steps: near the best range the error is
    flat, and candidates are compared under the same steps."""
    if not isinstance(spec.observer, MeanSquaredError):
        return spec
    steps = min(spec.observer.steps, STEPS)
    return replace(spec, observer=replace(spec.observer, steps=steps))


def relative_loss(under: Operands, exact: Tensor, size: Tensor) -> float:
    """Return the error that quantization makes of a product, relative to a size > 0.

    Args:
        under: what is multiplied.
        exact: the product without quantization.
        size: a sum of squares.
    """
    error = product(under.quantized_rows, under.quantized_weight) - exact
    return float(error.square().sum() / size.clamp(min=torch.finfo(torch.float32).tiny))


def product(rows: Tensor, weight: Tensor) -> Tensor:
    """Return what a layer makes of rows `[R, K]`, a convolution's taps one by one."""
    return rows @ weight.transpose(0, 1).flatten(1)


def _fake_quantize_rows(rows: Tensor, seen: Tensor, spec: QuantSpec) -> Tensor:
    """Quantize rows as the recipe will, with the range of the rows seen in calibration.

    The last two rows seen are the smallest and largest values of all data. A static scale per token
    becomes one for all of them: rows have lost their position.
    """
    spec = replace(spec, rows=None)
    if spec.dynamic:
        low, high = numerics.block_amin_amax(rows, block_of(spec.granularity, 2, dynamic=True))
    else:
        if spec.granularity == PerToken():
            spec = replace(spec, granularity=PerTensor())
        observer = RangeObserver(spec, rows.shape, "rows")
        observer(seen if isinstance(spec.observer, MinMax) else seen[:-2])
        low, high = observer.range()
    step, zero_point = numerics.choose_qparams(
        low, high, spec.quant_min, spec.quant_max, symmetric=spec.symmetric
    )
    zero = None if spec.symmetric else zero_point
    codes = numerics.quantize(rows, step, zero, *spec.grid)
    return numerics.dequantize(codes, step, zero, torch.float32)

"""EquivalentScaling: what every method shares that divides activations and multiplies weights.

A method answers one question: which scale, and which shift, should be tried at this site? The pass
finds the sites, collects their statistics in one run over the data, keeps whatever quantizes best
(which may be nothing), folds it into the weights, and proves that the float function is unchanged.
"""

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import islice
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from fxq import numerics
from fxq.account import add_note, kind_of
from fxq.dialect import ATEN, Dialect
from fxq.graph import copy_graph, dtype_of
from fxq.observers import RangeObserver
from fxq.passes.common.convert import quantize_weight
from fxq.passes.common.scaling.fold import Scaling, fold_scaling
from fxq.passes.common.scaling.proof import check_float_function
from fxq.passes.common.scaling.sites import Kind, ScaleSite, scale_sites
from fxq.passes.common.scaling.statistics import Consumer, Statistics, collect
from fxq.pipeline import Batches, DataPass
from fxq.spec import LayerSpec, MinMax, PerTensor, PerToken, QuantSpec, block_of

EXACT_KINDS: tuple[Kind, ...] = ("norm", "modulate", "value", "gated", "relu", "linear")
CAP = 2.0**12  # largest factor, and one over the smallest


class Candidate(NamedTuple):
    """What a method proposes for a site: a scale and perhaps a shift, `[n_channels]` each."""

    scale: Tensor
    shift: Tensor | None = None


@dataclass(frozen=True)
class EquivalentScaling(DataPass):
    """Scale every site by the best of a method's candidates, or leave it alone.

    Args:
        layer: how the layers will be quantized, which decides what is best.
        kinds: which sites to scale (`sites.KINDS`). A "quantizer" site has an explicit product in
            front of its layers, which the quantizer takes in.
        targets: kinds of layers that will be quantized; a site without any is left alone.
        n_rows: rows of each activation that candidates are judged on.
    """

    layer: LayerSpec
    kinds: tuple[Kind, ...] = (*EXACT_KINDS, "quantizer")
    targets: tuple[Literal["linear", "conv"], ...] = ("linear",)
    n_rows: int = 256

    reads: ClassVar[Dialect] = ATEN
    writes: ClassVar[Dialect] = ATEN

    @abstractmethod
    def candidates(self, site: ScaleSite, statistics: Statistics) -> Iterable[Candidate]:
        """Return what to try at a site. Dead channels and extreme factors are dealt with here."""

    def run(self, gm: GraphModule, data: Batches) -> PassResult:
        """Scale the sites and note on every layer what was done, or why nothing was."""
        found = scale_sites(gm)
        name = type(self).__name__
        sites = [site for site in found.sites if self._wants(site)]
        statistics = collect(gm, data, sites, self.n_rows) if sites else {}
        scalings = []
        for site in sites:
            scaling = self._best(site, statistics.pop(site))
            note = f"{name} found no gain" if scaling is None else f"{name} ({site.kind})"
            for part in site.consumers:
                add_note(part.node, note)
            if scaling is not None:
                scalings.append(scaling)
        for node, why in found.refusals.items():
            if kind_of(node) in self.targets:
                add_note(node, f"not scaled: {why}")
        if scalings:
            before = copy_graph(gm)
            fold_scaling(gm, scalings)
            check_float_function(before, gm, islice(data, 1), name=name)
        return PassResult(gm, modified=bool(scalings))

    def _wants(self, site: ScaleSite) -> bool:
        kinds = {kind_of(part.node) for part in site.consumers}
        return site.kind in self.kinds and bool(kinds & set(self.targets))

    def _best(self, site: ScaleSite, statistics: Statistics) -> Scaling | None:
        if not bool(statistics.amax.isfinite().all()):
            return None
        ones = torch.ones(site.n_channels)
        best, least = None, quantization_loss(statistics, Candidate(ones), self.layer)
        for candidate in self.candidates(site, statistics):
            shift = None if site.why_no_shift else candidate.shift
            usable = Candidate(admissible(candidate.scale, shift, statistics), shift)
            loss = quantization_loss(statistics, usable, self.layer)
            if loss < least:
                best, least = usable, loss
        return None if best is None else Scaling(site, best.scale, best.shift)


def admissible(scale: Tensor, shift: Tensor | None, statistics: Statistics) -> Tensor:
    """Return a scale made safe: finite, positive, bounded, and exact in half precision.

    A channel whose factor is not a positive number keeps its own. Factors are limited so that
    neither the weights nor the activation come near the largest number of their dtype. Where one of
    them is fp16 or bf16, factors are rounded to powers of two, so that folding rounds nothing.

    Args:
        scale: `[n_channels]`.
        shift: what is subtracted first `[n_channels]`, or None.
        statistics: of the site.
    """
    site = statistics.site
    scale = torch.where(scale.isfinite() & (scale > 0), scale, 1.0).clamp(1 / CAP, CAP)
    parts = [*site.producers, *site.consumers]
    dtypes = {dtype_of(part.node) for part in parts}
    largest = min(torch.finfo(dtype).max for dtype in dtypes) / 16
    reach = statistics.amax + (0.0 if shift is None else shift.abs())
    scale = torch.minimum(scale, largest / statistics.weight_amax.clamp(min=1e-30))
    scale = torch.maximum(scale, reach / largest)
    if dtypes & {torch.float16, torch.bfloat16}:
        scale = torch.exp2(scale.log2().round())
    return scale


def quantization_loss(statistics: Statistics, candidate: Candidate, layer: LayerSpec) -> float:
    """Return the error that quantization makes at a site's consumers, relative to their outputs.

        sum over consumers of |Q(x') Q(W').T - x' W'.T|^2 / |x W.T|^2,   x' = (x - shift) / scale

    A convolution is judged by its taps, each as a linear of its own.

    Args:
        statistics: of the site.
        candidate: scale and shift.
        layer: how activations and weights are quantized.
    """
    return sum(_consumer_loss(consumer, candidate, layer) for consumer in statistics.consumers)


def _consumer_loss(consumer: Consumer, candidate: Candidate, layer: LayerSpec) -> float:
    scale = consumer.part.spread(candidate.scale, 1.0).float()
    rows, bounds = consumer.rows, torch.stack([consumer.low, consumer.high])
    output = _product(rows, consumer.weight).square().sum()
    if candidate.shift is not None:
        shift = consumer.part.spread(candidate.shift, 0.0).float()
        rows, bounds = rows - shift, bounds - shift
    rows, bounds = rows / scale, bounds / scale
    weight = consumer.weight * scale.reshape(-1, *[1] * (consumer.weight.ndim - 2))
    exact = _product(rows, weight)
    if layer.activation is not None:
        rows = _fake_quantize_rows(rows, bounds, layer.activation)
    codes, step, zero = quantize_weight(weight, layer.weight)
    error = _product(rows, numerics.dequantize(codes, step, zero, torch.float32)) - exact
    return float(error.square().sum() / output.clamp(min=torch.finfo(torch.float32).tiny))


def _product(rows: Tensor, weight: Tensor) -> Tensor:
    return rows @ weight.transpose(0, 1).flatten(1)


def _fake_quantize_rows(rows: Tensor, bounds: Tensor, spec: QuantSpec) -> Tensor:
    """Quantize rows as the recipe will. A static scale per token becomes one for all of them: rows
    have lost their position."""
    if spec.dynamic:
        low, high = numerics.block_amin_amax(rows, block_of(spec.granularity, 2, dynamic=True))
    else:
        if spec.granularity == PerToken():
            spec = replace(spec, granularity=PerTensor())
        observer = RangeObserver(spec, rows.shape, "rows")
        observer(rows)
        if isinstance(spec.observer, MinMax):
            observer(bounds)  # the range of all data, not only of the sample
        low, high = observer.range()
    grid = (spec.quant_min, spec.quant_max)
    step, zero = numerics.choose_qparams(low, high, *grid, symmetric=spec.symmetric)
    codes = numerics.quantize(rows, step, None if spec.symmetric else zero, *grid)
    return numerics.dequantize(codes, step, None if spec.symmetric else zero, torch.float32)

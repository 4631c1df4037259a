"""EquivalentScaling: what every method shares that divides activations and multiplies weights.

A method answers one question: which scale, and which shift, should be tried at this site? The pass
finds the sites, collects their statistics in one run over the data, keeps whatever quantizes best
(which may be nothing), folds it into the weights, and proves that the float function is unchanged.
"""

from abc import abstractmethod
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from fxq import numerics
from fxq.account import kind_of
from fxq.dialect import ATEN, Dialect
from fxq.graph import dtype_of
from fxq.layer import Skip, treat
from fxq.observers import RangeObserver
from fxq.passes.common.convert import quantize_weight
from fxq.passes.common.float_function import LOOSE, check_float_function
from fxq.passes.common.scaling.fold import Scaling, fold_scaling
from fxq.passes.common.scaling.sites import Kind, ScaleSite, ScaleSites, scale_sites
from fxq.passes.common.scaling.statistics import (
    Consumer,
    Statistics,
    collect,
)
from fxq.passes.common.scaling.undo import costs_of_scaling
from fxq.passes.common.whole import halves_of
from fxq.pipeline import Batches, DataPass
from fxq.rewriting import copy_graph
from fxq.spec import LayerSpec, MinMax, PerTensor, PerToken, QuantSpec, block_of

EXACT_KINDS: tuple[Kind, ...] = ("norm", "modulate", "value", "gated", "relu", "linear")
Target = Literal["linear", "conv"]
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
        least_gain: how much the error of doing nothing must be above that of a candidate, relative
            to the latter: what gains less may gain by chance.
        whole: judge the scaled graph as a whole too, and undo the kinds of sites that cost
            (`undo`). Otherwise what is best for each site's layers stays.
    """

    layer: LayerSpec
    kinds: tuple[Kind, ...] = (*EXACT_KINDS, "quantizer")
    targets: tuple[Target, ...] = ("linear",)
    n_rows: int = 512
    least_gain: float = 0.0
    whole: bool = True

    reads: ClassVar[Dialect] = ATEN
    writes: ClassVar[Dialect] = ATEN

    @abstractmethod
    def candidates(self, site: ScaleSite, statistics: Statistics) -> Iterable[Candidate]:
        """Return what to try at a site. Dead channels and extreme factors are dealt with here."""

    def run(self, gm: GraphModule, data: Batches) -> PassResult:
        """Scale the sites and note on every layer what was done, or why nothing was."""
        found = scale_sites(gm)
        name = type(self).__name__
        sites = [site for site in found.sites if wanted(site, self.kinds, self.targets)]
        statistics = collect(gm, data, sites, self.n_rows) if sites else {}
        best: dict[ScaleSite, int] = {}
        decided: dict[ScaleSite, Scaling | str] = {}
        for site in sites:
            choice = self._best(site, statistics.pop(site))
            if isinstance(choice, str):
                decided[site] = f"{name} {choice}"
            else:
                best[site], candidate = choice
                decided[site] = Scaling(site, *candidate)
        if best and self.whole:
            decided |= self._undone(gm, data, best)
        before = copy_graph(gm)
        scaled = apply_scalings(gm, found, decided, name, self.targets)
        if scaled:
            check_float_function(before, gm, islice(data, 1), name=name, tolerance=LOOSE)
        return PassResult(gm, modified=scaled)

    def _undone(
        self, gm: GraphModule, data: Batches, best: Mapping[ScaleSite, int]
    ) -> dict[ScaleSite, str]:
        """Return the sites whose scaling costs in the whole graph, with the reason."""
        halves, folds = halves_of(gm, data), []
        for fold in halves.folds:
            statistics = collect(gm, fold.fit, best, self.n_rows)
            fitted = [
                Scaling(site, *self._proposed(site, statistics.pop(site))[index])
                for site, index in best.items()
            ]
            folds.append((fitted, fold))
        costs = costs_of_scaling(gm, folds, self.layer, self.targets)
        on = "on batches held out" if halves.held_out else "on the only batch"
        return {
            site: f"{type(self).__name__}: undone: with its {site.kind} sites "
            f"{costs[site.kind]} {on}"
            for site in best
            if site.kind in costs
        }

    def _best(self, site: ScaleSite, statistics: Statistics) -> tuple[int, Candidate] | str:
        """Return the best proposal for a site with its number, or why the site stays as it is."""
        if not bool(statistics.amax.isfinite().all()):
            return "saw an activation that is not finite"
        if not statistics.folds:
            # One row can be shifted to zero: exact for that row, and wrong for every other.
            return "saw too few rows to judge a factor; give it more data"
        proposed = self._proposed(site, statistics)
        losses = torch.zeros(len(proposed), dtype=torch.float64)
        folds = statistics.folds
        for fitted, judged in zip(folds, reversed(folds), strict=True):
            for index, candidate in enumerate(self._proposed(site, fitted)):
                losses[index] += quantization_loss(fitted, judged, candidate, self.layer)
        losses[1:] *= 1 + self.least_gain
        best = int(losses.argmin())
        return (best, proposed[best]) if best else "found no gain"

    def _proposed(self, site: ScaleSite, statistics: Statistics) -> list[Candidate]:
        """Return the candidates made safe, after doing nothing, which is always one."""
        proposed = [Candidate(torch.ones(site.n_channels))]
        for candidate in self.candidates(site, statistics):
            shift = None if site.why_no_shift else candidate.shift
            proposed.append(Candidate(admissible(candidate.scale, shift, statistics), shift))
        return proposed


def wanted(site: ScaleSite, kinds: Collection[Kind], targets: Collection[Target]) -> bool:
    """Tell whether a site is of one of the kinds and has a layer that will be quantized."""
    found = {kind_of(part.node) for part in site.consumers}
    return site.kind in kinds and bool(found & set(targets))


def apply_scalings(
    gm: GraphModule,
    found: ScaleSites,
    decided: Mapping[ScaleSite, Scaling | str],
    name: str,
    targets: Collection[Target],
) -> bool:
    """Fold the scalings into a graph, and note on every layer what was done, or why nothing was.

    Args:
        gm: the graph.
        found: its sites.
        decided: a scaling for each site, or why there is none; others are left out.
        name: of the pass.
        targets: kinds of layers that will be quantized.
    Returns:
        whether anything was scaled.
    """
    for site in found.sites:
        did, remark = "", decided.get(site, f"{name}: {site.kind} sites are left out")
        if isinstance(remark, Scaling):
            did, remark = f"scaled its input ({site.kind})", f"{name} ({site.kind})"
        for part in site.consumers:
            if kind_of(part.node) in targets:
                treat(part.node, name, did or Skip(remark, intended=True), remark)
    for node, why in found.refusals.items():
        if kind_of(node) in targets:
            remark = f"not scaled: {why}"
            treat(node, name, Skip(remark, intended=True), remark)
    scalings = [each for each in decided.values() if isinstance(each, Scaling)]
    if scalings:
        fold_scaling(gm, scalings)
    return bool(scalings)


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


def quantization_loss(
    fitted: Statistics, judged: Statistics, candidate: Candidate, layer: LayerSpec
) -> float:
    """Return the error that quantization makes at a site's consumers, relative to their outputs.

        sum over consumers of |Q(x') Q(W').T - x' W'.T|^2 / |x W.T|^2,   x' = (x - shift) / scale

    Q has the range of the rows that the candidate was fitted to, x are other rows: a scale that
    only suits the rows it was made from is not taken for a good one. A convolution is judged by its
    taps, each as a linear of its own.

    Args:
        fitted: statistics that the candidate was made from.
        judged: of the same site, with the rows x.
        candidate: scale and shift.
        layer: how activations and weights are quantized.
    """
    pairs = zip(fitted.consumers, judged.consumers, strict=True)
    return sum(_consumer_loss(*pair, candidate, layer) for pair in pairs)


def _consumer_loss(
    fitted: Consumer, judged: Consumer, candidate: Candidate, layer: LayerSpec
) -> float:
    size = product(judged.rows, judged.weight).square().sum()
    return relative_loss(operands(fitted, judged, candidate, layer), size)


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
        quantized = _fake_quantize_rows(rows, seen, layer.activation)
    codes, step, zero = quantize_weight(weight, layer.weight)
    approximate = numerics.dequantize(codes, step, zero, torch.float32)
    return Operands(rows, quantized, weight, approximate)


def relative_loss(under: Operands, size: Tensor) -> float:
    """Return the error that quantization makes of a product, relative to a size > 0."""
    exact = product(under.rows, under.weight)
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

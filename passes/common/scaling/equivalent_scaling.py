"""EquivalentScaling: what every method shares that divides activations and multiplies weights.

A method answers one question: which scale, and which shift, should be tried at this site? The pass
finds the sites, collects their statistics in one run over the data, keeps whatever quantizes best
(which may be nothing), folds it into the weights, and proves that the float function is unchanged.
"""

import math
from abc import abstractmethod
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from fxq.account import kind_of
from fxq.calibrate import all_alike
from fxq.dialect import ATEN, Dialect
from fxq.graph import dtype_of
from fxq.layer import Skip, treat
from fxq.passes.common.float_function import LOOSE, check_float_function
from fxq.passes.common.insert_observers import Target
from fxq.passes.common.scaling.fold import Scaling, fold_scaling
from fxq.passes.common.scaling.loss import Candidate, Judge
from fxq.passes.common.scaling.sites import Kind, ScaleSite, ScaleSites, scale_sites
from fxq.passes.common.scaling.statistics import Statistics, collect
from fxq.passes.common.scaling.undo import costs_of_scaling
from fxq.passes.common.whole import halves_of
from fxq.pipeline import Batches, DataPass
from fxq.rewriting import copy_graph
from fxq.spec import LayerSpec

EXACT_KINDS: tuple[Kind, ...] = ("norm", "modulate", "value", "gated", "relu", "linear")
CAP = 2.0**12  # largest factor, and one over the smallest


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
        best: dict[ScaleSite, int] = {}
        decided: dict[ScaleSite, Scaling | str] = {}
        if sites and all_alike(data):
            why = (
                f"{name} saw one sample only, so none to judge a factor on; give it different ones"
            )
            decided, sites = dict.fromkeys(sites, why), []
        statistics = collect(gm, data, sites, self.n_rows) if sites else {}
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
        proposed, folds = self._proposed(site, statistics), statistics.folds
        fitted = [self._proposed(site, fold) for fold in folds]
        judges = [Judge(fold, self.layer) for fold in reversed(folds)]
        best, least = 0, math.inf
        for index in range(len(proposed)):
            loss, handicap = 0.0, 1 + self.least_gain if index else 1.0
            for candidates, fold, judge in zip(fitted, folds, judges, strict=True):
                loss += handicap * judge.loss(fold, candidates[index])
                if not loss < least:
                    break  # the other fold can only add to it
            else:
                best, least = index, loss
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

"""Undo what costs: scalings that were decided site by site, judged together in the whole graph.

A site is judged by the layers that read it and by some rows. What its scaling does to the rest of
the graph, and to values beyond those that calibration showed, is seen at the outputs only.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

import torch
from torch.fx import GraphModule, Node

from fxq.passes.common.insert_observers import Target
from fxq.passes.common.scaling.fold import Scaling, fold_scaling
from fxq.passes.common.scaling.sites import KINDS, Part, ScaleSite
from fxq.passes.common.whole import Halves, WholeError, whole_error
from fxq.rewriting import copy_graph
from fxq.spec import LayerSpec

# What is less is chance: the worst is a single sample.
POOLED_TOLERANCE_DB, WORST_TOLERANCE_DB = 0.1, 0.5
STANDARD_ERRORS = 1.28  # that the pooled error may be off by: it is not, nine times out of ten


def costs_of_scaling(
    gm: GraphModule,
    folds: Sequence[tuple[Sequence[Scaling], Halves]],
    layer: LayerSpec,
    targets: tuple[Target, ...],
) -> dict[str, str]:
    """Return the kinds of sites whose scaling costs, each with what it costs.

    Where all scalings together are sure to quantize no worse than none (`likely_cost`), nothing
    costs. Otherwise one kind of site after the other is added, and stays if that holds of it, too:
    the graph is judged, in each fold, at most two times more often than there are kinds.

    Args:
        gm: the graph, which stays as it is.
        folds: scalings, each fitted to the first half of the batches beside it.
        layer: how layers will be quantized.
        targets: kinds of layers that will be.
    """

    def judged(chosen: Collection[str]) -> WholeError:
        errors = []
        for scalings, halves in folds:
            scaled = scaled_copy(gm, [s for s in scalings if s.site.kind in chosen])
            errors.append(whole_error(scaled, gm, halves, layer, targets))
        return WholeError(*map(torch.cat, zip(*errors, strict=True)))

    kinds = [kind for kind in KINDS if any(s.site.kind == kind for s in folds[0][0])]
    plain, everything = judged([]), judged(kinds)
    if not likely_cost(everything, plain):
        return {}
    kept: list[str] = []
    current = plain
    found: dict[str, str] = {}
    for kind in kinds:
        error = everything if len(kinds) == 1 else judged([*kept, kind])
        why = likely_cost(error, plain) or likely_cost(error, current)
        if why:
            found[kind] = why
        else:
            kept, current = [*kept, kind], error
    return found


def scaled_copy(gm: GraphModule, scalings: Iterable[Scaling]) -> GraphModule:
    """Return a copy of a graph with scalings folded in, which are of sites of `gm`."""
    copied = copy_graph(gm)
    of = dict(zip(gm.graph.nodes, copied.graph.nodes, strict=True))
    moved = [replace(s, site=_moved(s.site, of)) for s in scalings]
    if moved:
        fold_scaling(copied, moved)
    return copied


def _moved(site: ScaleSite, of: dict[Node, Node]) -> ScaleSite:
    """Return a site at the nodes of a copy of its graph."""

    def parts(group: Iterable[Part]) -> tuple[Part, ...]:
        return tuple(replace(part, node=of[part.node]) for part in group)

    return replace(
        site,
        producers=parts(site.producers),
        consumers=parts(site.consumers),
        edge=None if site.edge is None else of[site.edge],
        shifted=parts(site.shifted),
    )


def likely_cost(found: WholeError, other: WholeError) -> str:
    """Return what an error costs in the place of another, of the same samples; "" where it is sure
    that it costs nothing.

    A gain that one sample alone makes is chance: where the samples are few and their errors differ
    much, those of use are other ones. So the pooled error counts as large as it may be,

        min(sum(e) + 1.28 sqrt(n) std(e - o), max(e / o) sum(o))

    of errors e and o of n samples: by the standard error of the difference, but not relatively
    larger than that of any sample. A difference that one sample makes is one standard error.

    Args:
        found: of the graph as it would be.
        other: of the graph as it is.
    """
    e, o = found.shares, other.shares
    by_chance = float(e.sum())
    if len(e) > 1 and math.isfinite(by_chance):
        by_chance += STANDARD_ERRORS * math.sqrt(len(e)) * float((e - o).std())
    each = max(map(decibels, e.tolist(), o.tolist()))
    pooled = min(decibels(by_chance, float(o.sum())), each)
    if pooled > POOLED_TOLERANCE_DB:
        return f"the pooled error may be {pooled:.1f} dB larger"
    worst = decibels(float(found.relative.max()), float(other.relative.max()))
    if worst > WORST_TOLERANCE_DB:
        return f"the worst sample's error was {worst:.1f} dB larger"
    return ""


def decibels(error: float, other: float) -> float:
    """Return how far an error is above another."""
    if error <= other:
        return 0.0
    return 10 * math.log10(error / other) if other > 0 else math.inf

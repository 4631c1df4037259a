"""Undo what costs: scalings that were decided site by site, judged together in the whole graph.

A site is judged by the layers that read it and by some rows. What its scaling does to the rest of
the graph, and to values beyond those that calibration showed, is seen at the outputs only.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from math import log10

from torch.fx import GraphModule, Node

from fxq.passes.common.insert_observers import Target
from fxq.passes.common.scaling.fold import Scaling, fold_scaling
from fxq.passes.common.scaling.sites import KINDS, Part, ScaleSite
from fxq.passes.common.whole import Halves, WholeError, whole_error
from fxq.rewriting import copy_graph
from fxq.spec import LayerSpec

# What is less is chance: the worst is a single sample.
POOLED_TOLERANCE_DB, WORST_TOLERANCE_DB = 0.1, 0.5


def costs_of_scaling(
    gm: GraphModule,
    folds: Sequence[tuple[Sequence[Scaling], Halves]],
    layer: LayerSpec,
    targets: tuple[Target, ...],
) -> dict[str, str]:
    """Return the kinds of sites whose scaling costs, each with what it costs.

    Where all scalings together quantize no worse than none, pooled and by the worst sample, nothing
    costs. Otherwise one kind of site after the other is added, and stays if neither error grows:
    the graph is judged, in each fold, at most two times more often than there are kinds.

    Args:
        gm: the graph, which stays as it is.
        folds: scalings, each fitted to the first half of the batches beside it.
        layer: how layers will be quantized.
        targets: kinds of layers that will be.
    """

    def judged(chosen: Collection[str]) -> list[WholeError]:
        errors = []
        for scalings, halves in folds:
            scaled = scaled_copy(gm, [s for s in scalings if s.site.kind in chosen])
            errors.append(whole_error(scaled, gm, halves, layer, targets))
        return errors

    kinds = [kind for kind in KINDS if any(s.site.kind == kind for s in folds[0][0])]
    plain, everything = judged([]), judged(kinds)
    if not _cost(everything, plain):
        return {}
    kept: list[str] = []
    current = plain
    found: dict[str, str] = {}
    for kind in kinds:
        error = everything if len(kinds) == 1 else judged([*kept, kind])
        why = _cost(error, plain) or _cost(error, current)
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


def _cost(errors: Sequence[WholeError], others: Sequence[WholeError]) -> str:
    """Return by how much errors are above others in dB, in the fold where most; "" where they are
    not in any."""
    pairs = list(zip(errors, others, strict=True))
    pooled = max(decibels(error.pooled, other.pooled) for error, other in pairs)
    if pooled > POOLED_TOLERANCE_DB:
        return f"the pooled error was {pooled:.1f} dB larger"
    worst = max(decibels(error.worst, other.worst) for error, other in pairs)
    if worst > WORST_TOLERANCE_DB:
        return f"the worst sample's error was {worst:.1f} dB larger"
    return ""


def decibels(error: float, other: float) -> float:
    """Return how far an error is above another."""
    if error <= other:
        return 0.0
    return 10 * log10(error / other) if other > 0 else float("inf")

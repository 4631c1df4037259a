"""InduceSparsity: a pruner whose importances are learned, and whose error is made up for in the
bias (arXiv:2602.21652)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from fxq.dialect import ATEN, Dialect
from fxq.graph import is_constant, weight_of
from fxq.identity import TensorKey
from fxq.layer import Induction
from fxq.operators import operand
from fxq.passes.common.float_function import LOOSE, check_float_function
from fxq.passes.common.reconstruction.blocks import cut
from fxq.passes.common.scaling import ScaleSite, ScaleSites, Scaling, fold_scaling, scale_sites
from fxq.passes.common.scaling.equivalent_scaling import EXACT_KINDS
from fxq.passes.common.scaling.sites import Kind
from fxq.passes.common.second_moments import gram
from fxq.passes.common.weight_method import Job, Treated, WeightMethod
from fxq.passes.pruning import Wanda
from fxq.passes.pruning.patterns import Pattern
from fxq.passes.pruning.prune import Pruner, prunable, pruned
from fxq.passes.sparsity_induction.equations import (
    absorbed_shift,
    centred,
    concentration,
)
from fxq.passes.sparsity_induction.learning import Choice, Layer, Learning, learn
from fxq.pipeline import Batches
from fxq.rewriting import copy_graph

Link = tuple[ScaleSite, tuple[int, ...]]  # a site, and its channel of each input channel or -1
Where = Literal["nowhere", "forward"]


@dataclass(frozen=True)
class Plan:
    """What is to be done to a weight.

    Args:
        pattern: which of it may go.
        links: the sites whose factors its importance is multiplied by.
        why_no_shift: why its bias stays, "" where it is shifted.
        why_no_factor: why it has no site, "" where it has.
    """

    pattern: Pattern
    links: tuple[Link, ...]
    why_no_shift: str = ""
    why_no_factor: str = ""


@dataclass(frozen=True, eq=False)
class Induced(Treated):
    """What came to a weight, and the logs of its sites' factors `[n_channels]`."""

    factors: Mapping[ScaleSite, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class InduceSparsity(WeightMethod[Plan]):
    """Prune linears block by block, by importances that are learned for each site.

    A site is an edge of the graph that a scale can be moved across; all layers that read it share
    its factors. Which weights go is all that is left of the factors, so with `fold="nowhere"` the
    weights stay in their scale. Each layer's mean error on the data goes into its bias, which is
    what the paper's shift comes to; a layer without a bias gets one.

    Args:
        pruner: whose importance it is, with its pattern and overrides.
        learning: how factors are learned.
        shift: whether errors of the mean go into biases.
        fold: "forward" also moves the factors into the weights as a scale: into those that stay,
            and out of the norm or layer in front. The function is the same.
        kinds: of sites to learn at.
    """

    pruner: Pruner = Wanda()  # noqa: RUF009
    learning: Learning = Learning()  # noqa: RUF009
    shift: bool = True
    fold: Where = "nowhere"
    kinds: tuple[Kind, ...] = EXACT_KINDS

    reads: ClassVar[Dialect] = ATEN
    writes: ClassVar[Dialect] = ATEN

    def plans(self, gm: GraphModule) -> Mapping[Node, Plan]:
        """Return the pattern and sites of each linear to prune."""
        name, pruner = type(self).__name__, self.pruner
        patterns = prunable(gm, name, pruner.pattern, pruner.overrides)
        if not patterns:
            return {}
        found = scale_sites(gm)
        homes = {n: k for k, b in enumerate(cut(gm, self.blocks, patterns)) for n in b.layers}
        links, reasons = _links(found, self.kinds, patterns, homes)
        by_weight: dict[TensorKey, list[Node]] = {}
        for node in patterns:
            by_weight.setdefault(TensorKey.of(weight_of(node)), []).append(node)
        plans: dict[Node, Plan] = {}
        for nodes in by_weight.values():
            plan = Plan(patterns[nodes[0]], *_of_weight(nodes, links, reasons))
            plans |= dict.fromkeys(nodes, plan)
        return {node: plans[node] for node in patterns}

    def moments(self, x: Tensor) -> Tensor:
        """Return the sum of `z z^T` for `z = (x, 1)`, and the medians times the rows in one row
        more `[K + 2, K + 1]`. Of several batches the medians' mean is taken: no exact median can
        be found without keeping all rows."""
        rows = x.detach().flatten(0, -2).double()
        last = rows.new_zeros(1, rows.shape[1] + 1)
        if any(start.startswith("spread") for start in self.learning.starts):
            last[0, :-1] = rows.median(0).values * len(rows)
        return torch.cat([gram(F.pad(rows, (0, 1), value=1.0)), last])

    def treat(self, weight: Tensor, moments: Tensor, plan: Plan, mask: Tensor | None) -> Treated:
        """Prune a weight by itself."""
        return self.treat_block([Job("", weight, moments, plan, mask)])[0]

    def treat_block(self, jobs: Sequence[Job[Plan]]) -> list[Treated]:
        """Prune the weights of a block, those that share sites together."""
        results: dict[int, Treated] = {}
        for group in _together(jobs):
            some = [jobs[k] for k in group]
            try:
                results |= dict(zip(group, self._treat_together(some), strict=True))
            except ValueError as error:
                names = ", ".join(job.name for job in some)
                raise ValueError(f"weight of {names}: {error}") from error
        return [results[k] for k in range(len(jobs))]

    def _treat_together(self, jobs: Sequence[Job[Plan]]) -> list[Induced]:
        sites = list(dict.fromkeys(site for job in jobs for site, _ in job.plan.links))
        sizes = [site.n_channels for site in sites]
        starts = {site: sum(sizes[:k]) for k, site in enumerate(sites)}
        layers = [self._layer(job, starts) for job in jobs]
        learned = learn(self.pruner, layers, sizes, self.learning)
        factors = dict(zip(sites, learned.log_factors.cpu().split(sizes), strict=True))
        results = []
        for job, layer, best, base in zip(jobs, layers, learned.best, learned.base, strict=True):
            own = torch.cat([learned.log_factors, layer.moments.new_zeros(1)])[layer.index]
            results.append(self._result(job, layer, best, base, own, factors))
        return results

    def _layer(self, job: Job[Plan], starts: Mapping[ScaleSite, int]) -> Layer:
        raw, device = job.moments[:-2, :-1], job.moments.device
        shifted, mean = centred(job.moments[:-1])
        index = torch.full((raw.shape[0],), -1, device=device)
        for site, channels in job.plan.links:
            mine = torch.tensor(channels, device=device)
            index = torch.where(mine >= 0, mine + starts[site], index)
        median = job.moments[-1, :-1] / job.moments[-2, -1]
        moments = shifted if self._shifts(job) else raw
        return Layer(job.weight, job.plan.pattern, raw, moments, median, mean, index)

    def _shifts(self, job: Job[Plan]) -> bool:
        return self.shift and not job.plan.why_no_shift

    def _result(
        self,
        job: Job[Plan],
        layer: Layer,
        best: Choice,
        base: Choice,
        own: Tensor,
        factors: Mapping[ScaleSite, Tensor],
    ) -> Induced:
        plain = pruned(best.weight, best.mask, layer.pattern)
        did = (
            f"{plain.did}; output error {best.error:.3g}, {base.error:.3g} with "
            f"{type(self.pruner).__name__}'s own choice"
        )
        induction = Induction(
            tuple(site.name for site, _ in job.plan.links),
            best.error,
            base.error,
            concentration(layer.weight),
            concentration(layer.weight * own.exp()),
        )
        whys = (("no factor", job.plan.why_no_factor), ("no shift", job.plan.why_no_shift))
        remark = "; ".join([plain.remark, *(f"{what}: {why}" for what, why in whys if why)])
        shift = None
        if self._shifts(job):
            shift = absorbed_shift(layer.weight.double(), best.weight.double(), layer.mean)
        mine = {site: factors[site] for site, _ in job.plan.links}
        facts = {**plain.facts, "induction": induction}
        return Induced(did, remark, plain.weight, facts, shift, mine)

    def finish(self, gm: GraphModule, data: Batches, results: Sequence[Treated]) -> None:
        """Move the factors into the weights, where that is asked for."""
        if self.fold == "nowhere":
            return
        factors: dict[ScaleSite, Tensor] = {}
        for result in results:
            assert isinstance(result, Induced)
            factors |= result.factors
        before = copy_graph(gm)
        fold_scaling(gm, [Scaling(site, u.exp()) for site, u in factors.items() if bool(u.any())])
        name = type(self).__name__
        check_float_function(before, gm, islice(data, 1), name=name, tolerance=LOOSE)


def _links(
    found: ScaleSites,
    kinds: Sequence[Kind],
    patterns: Mapping[Node, Pattern],
    homes: Mapping[str, int],
) -> tuple[dict[Node, tuple[Link, ...]], dict[Node, str]]:
    """Return the sites of each layer to prune, and why layers have none."""
    links: dict[Node, tuple[Link, ...]] = {}
    reasons = dict(found.refusals)
    for site in found.sites:
        mine = [part for part in site.consumers if part.node in patterns]
        if site.kind not in kinds:
            why = f"{site.kind} sites are left out"
        elif len({homes[part.node.name] for part in mine}) > 1:
            why = "the layers that read its input are in several blocks"
        else:
            for part in mine:
                link = (site, tuple(part.channels.tolist()))
                links[part.node] = (*links.get(part.node, ()), link)
            continue
        reasons |= {part.node: why for part in mine}
    return links, reasons


def _of_weight(
    nodes: Sequence[Node], links: Mapping[Node, tuple[Link, ...]], reasons: Mapping[Node, str]
) -> tuple[tuple[Link, ...], str, str]:
    """Return a weight's sites, why its biases stay, and why it has no sites."""
    biases = [operand(node, "bias", None) for node in nodes]
    fixed = any(bias is not None and not is_constant(bias) for bias in biases)
    why_no_shift = "its bias is computed at run time" if fixed else ""
    mine = links.get(nodes[0], ())
    if any(links.get(node, ()) != mine for node in nodes):
        return (), why_no_shift, "its weight is that of layers with other inputs"
    return mine, why_no_shift, "" if mine else reasons.get(nodes[0], "no scale reaches it")


def _together(jobs: Sequence[Job[Plan]]) -> list[list[int]]:
    """Return the jobs by which share sites, directly or through others."""
    groups: list[tuple[set[ScaleSite], list[int]]] = []
    for k, job in enumerate(jobs):
        sites, members = {site for site, _ in job.plan.links}, [k]
        for group in [group for group in groups if group[0] & sites]:
            sites, members = sites | group[0], [*group[1], *members]
            groups.remove(group)
        groups.append((sites, members))
    return [sorted(members) for _, members in groups]

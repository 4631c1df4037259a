"""Magnitude pruning: the smallest weights go (arXiv:1506.02626). Needs no data."""

from dataclasses import dataclass

from torch import Tensor
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from fxq.graph import weight_of
from fxq.passes.common.weight_method import install, sharing
from fxq.passes.pruning.prune import Pruner, prunable, pruned
from fxq.pipeline import Pass
from fxq.rewriting import erase_dead


@dataclass(frozen=True)
class Magnitude(Pruner, Pass):
    """Prune by `|W|`; fields as for `Pruner`."""

    def scores(self, weight: Tensor, moments: Tensor) -> Tensor:
        """Return `|W|`, whatever the input."""
        return weight.abs()

    def run(self, gm: GraphModule) -> PassResult:
        """Prune every layer."""
        name = type(self).__name__
        plans = prunable(gm, name, self.pattern, self.overrides)
        for (_, pattern), nodes in sharing(plans).items():
            weight = weight_of(nodes[0])
            mask = pattern.keep(weight.float().abs())
            install(gm, name, nodes, pruned(weight, mask, pattern))
        erase_dead(gm)
        return PassResult(gm, modified=bool(plans))

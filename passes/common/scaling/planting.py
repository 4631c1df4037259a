"""Planted imbalance: ground truth for scaling methods.

Some channels of every site are multiplied by large factors and the weights that read them divided
by these: the float function stays the same, quantization does not. What a method recovers of the
loss can then be measured on any model.
"""

from collections.abc import Collection

import torch
from torch.fx import GraphModule

from fxq.passes.common.scaling.equivalent_scaling import EXACT_KINDS
from fxq.passes.common.scaling.fold import Scaling, fold_scaling
from fxq.passes.common.scaling.sites import Kind, scale_sites


def plant_imbalance(
    gm: GraphModule,
    *,
    seed: int,
    kinds: Collection[Kind] = EXACT_KINDS,
    share: float = 0.05,
    smallest: float = 5.0,
    largest: float = 50.0,
) -> int:
    """Unbalance the channels of a graph; return how many sites were.

    Args:
        gm: a canonical graph (dialect ATEN), rewritten in place; the model's tensors are not.
        seed: which channels, and their factors.
        kinds: of sites to unbalance.
        share: of a site's channels, at least one.
        smallest: factor; logarithms of factors are uniform.
        largest: factor.
    """
    generator = torch.Generator().manual_seed(seed)
    scalings = []
    for site in scale_sites(gm).sites:
        if site.kind in kinds:
            n = max(1, int(share * site.n_channels))
            chosen = torch.randperm(site.n_channels, generator=generator)[:n]
            factor = torch.ones(site.n_channels)
            factor[chosen] = smallest * (largest / smallest) ** torch.rand(n, generator=generator)
            scalings.append(Scaling(site, 1 / factor))
    fold_scaling(gm, scalings)
    return len(scalings)

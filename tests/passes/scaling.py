"""What the tests of scaling passes share: graphs in fp64 and random factors."""

from typing import Any

import families
import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils._pytree import tree_map

from fxq.passes.common.scaling import ScaleSite, Scaling
from fxq.rewriting import propagate
from fxq.signature import split_inputs


def family(name: str, dtype: torch.dtype = torch.float32) -> tuple[GraphModule, list[Any]]:
    """Return a family's graph and its inputs. In fp64 nothing inside computes in fp32 either."""

    def cast(value: Any) -> Any:
        is_float = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(dtype) if is_float else value

    found = families.family(name)
    gm = found.graph
    if dtype is torch.float64:
        for node in gm.graph.nodes:
            if node.op == "placeholder":
                node.meta["val"] = cast(node.meta["val"])
            same = (node.args, node.kwargs)
            node.args, node.kwargs = tree_map(lambda a: dtype if a is torch.float32 else a, same)
        gm.load_state_dict(tree_map(cast, dict(gm.state_dict())), assign=True)
        propagate(gm)
        gm.recompile()
    args, kwargs = split_inputs(found.example)
    return gm, tree_map(cast, found.captured.signature.flatten(args, kwargs, "test", None))


def random_scaling(site: ScaleSite, seed: int) -> Scaling:
    """Return factors in [0.2, 5] and, where allowed, normal shifts."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.empty(site.n_channels, dtype=torch.float64).uniform_(0.2, 5, generator=generator)
    shift = torch.randn(site.n_channels, dtype=torch.float64, generator=generator)
    return Scaling(site, scale, None if site.why_no_shift else shift)


def with_slow(*names: str) -> list[Any]:
    """Families as test parameters, the largest of them slow: others have what they have."""
    large = ("unet_condition", "hunyuan_video", "flux")
    return [pytest.param(n, marks=[pytest.mark.slow] * (n in large)) for n in names]

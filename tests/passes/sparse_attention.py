"""A program with one sparse attention, put there by the smallest of passes."""

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

import fxq
from fxq.dialect import QUANTIZED
from fxq.graph import is_op
from fxq.pipeline import Pass, Recipe
from fxq.rewriting import add_buffer, insert_call

OP = torch.ops.fxq.rectified_attention


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x) * 2


@dataclass(frozen=True)
class MakeSparse(Pass):
    """Put the op in the place of every attention, its density a buffer or computed."""

    by_policy: bool = False
    block_size: int = 4
    mode: str = "paper"
    is_causal: bool = False
    scale: float | None = None
    reads = writes = QUANTIZED

    def run(self, gm: GraphModule) -> PassResult:
        for node in list(gm.graph.nodes):
            if not is_op(node, torch.ops.aten.scaled_dot_product_attention.default):
                continue
            density = add_buffer(gm, "density", torch.tensor(0.25), like=node)
            if self.by_policy:
                density = insert_call(torch.ops.aten.mul.Tensor, (density, density), before=node)
            text = (None, None, None, 0, 0, self.block_size)
            how = (0.3, self.mode, "complement", True, False, self.is_causal, self.scale)
            call = insert_call(OP.default, (*node.args[:3], density, *text, *how), before=node)
            node.replace_all_uses_with(insert_call(operator.getitem, (call, 0), before=node))
            gm.graph.erase_node(node)
        return PassResult(gm, True)


def compressed(
    shape: tuple[int, ...] = (2, 2, 16, 8), dtype: torch.dtype = torch.float32, **options: Any
) -> fxq.Program:
    """Return a program of one attention whose query, key and value are its input."""
    recipe = Recipe("sparse", (MakeSparse(**options),))
    return fxq.compress(Attention().eval(), torch.randn(shape, dtype=dtype), recipe)

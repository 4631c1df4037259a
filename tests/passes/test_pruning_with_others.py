"""Pruning with other passes: what keeps a mask, and what is told that it would break one."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from optimal_brain import correlated
from pruned import Residual, linears
from torch import nn
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

import fxq
from fxq.dialect import ATEN, Dialect
from fxq.errors import PassError
from fxq.graph import weight_of
from fxq.layer import layer_of
from fxq.passes import pruning, smoothquant, w8a8
from fxq.passes.pruning import Group, Magnitude, Wanda
from fxq.pipeline import Pass, Recipe
from fxq.rewriting import add_buffer


@pytest.mark.parametrize("recipe", [pruning.SPARSEGPT_2_4_W8A8, pruning.SPARSEGPT_50_W4])
def test_what_is_pruned_stays_zero_when_it_is_quantized(recipe: Recipe) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 8)).eval()
    x = correlated(64, 64)

    program = fxq.compress(model, x, recipe, [x])

    for node in linears(program.graph_module)[:2]:
        codes, _, zero = node.args[1].args[:3]
        state = dict(program.graph_module.named_buffers())
        values = state[codes.target].int()
        if zero is not None:
            values = values - state[zero.target].repeat_interleave(32, 1)
        assert not values[~layer_of(node).mask].any()  # type: ignore[index]
        assert layer_of(node).sparsity == 0.5
    rows = fxq.report(program).rows
    assert rows[0].sparsity == 0.5
    assert "50.00% pruned" in rows[0].reason


def test_scaling_after_pruning_keeps_the_mask() -> None:
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    x = correlated(64, 16)
    recipe = Recipe("both", (Wanda(), *smoothquant.W8A8.passes))

    program = fxq.compress(model, x, recipe, [x])

    assert layer_of(linears(program.graph_module)[0]).sparsity == 0.5


@dataclass(frozen=True)
class Shift(Pass):
    """Breaks masks."""

    reads: ClassVar[Dialect] = ATEN
    writes: ClassVar[Dialect] = ATEN

    def run(self, gm: GraphModule) -> PassResult:
        for node in linears(gm)[:1]:
            value = weight_of(node) + 0.1
            node.update_arg(1, add_buffer(gm, "a.moved", value, like=node))
        return PassResult(gm, modified=True)


@dataclass(frozen=True)
class Compute(Shift):
    """Makes a pruned weight one that is computed."""

    def run(self, gm: GraphModule) -> PassResult:
        node = linears(gm)[0]
        with gm.graph.inserting_before(node):
            moved = gm.graph.call_function(torch.ops.aten.neg.default, (node.args[1],))
        moved.meta = {"val": node.args[1].meta["val"]}  # type: ignore[union-attr]
        node.update_arg(1, moved)
        return PassResult(gm, modified=True)


def test_a_pass_that_breaks_a_mask_is_told() -> None:
    model, x = Residual().eval(), torch.randn(4, 16)

    with pytest.raises(PassError, match=r"^a after Shift: mask: expected zeros .* found other"):
        fxq.compress(model, x, Recipe("r", (Magnitude(), Shift())))
    with pytest.raises(PassError, match="a after Compute: expected a constant weight, because"):
        fxq.compress(model, x, Recipe("r", (Magnitude(), Compute())))


def test_a_layer_is_pruned_once() -> None:
    model, x = Residual().eval(), torch.randn(4, 16)

    with pytest.raises(ValueError, match="Wanda: expected dense layers, found a pruned before"):
        fxq.compress(model, x, Recipe("r", (Magnitude(), Wanda(Group(2, 4)))), [x])
    others = Wanda(overrides=(("a", None), ("b", None)))
    program = fxq.compress(model, x, Recipe("r", (Magnitude(), others)), [x])
    assert [layer_of(n).sparsity for n in linears(program.graph_module)] == [0.5] * 3


def test_codes_cannot_be_pruned() -> None:
    with pytest.raises(ValueError, match="Wanda reads ATEN, but Convert before it writes QUANT"):
        Recipe("r", (*w8a8.DYNAMIC.passes, Wanda()))

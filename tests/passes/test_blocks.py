"""Blocks: where graphs are cut, what a block reads, and that all of them in order are the whole."""

from typing import Any

import pytest
import torch
from models import Block
from torch import Tensor, nn
from torch.fx import GraphModule

import fxq
from fxq.graph import is_state, tensor_of
from fxq.layer import layer_of
from fxq.passes.common import Calibrate, InsertObservers
from fxq.passes.common.reconstruction import cut
from fxq.pipeline import Recipe
from fxq.spec import LayerSpec, PerChannel, QuantSpec

SPEC = LayerSpec(QuantSpec(8, symmetric=False), QuantSpec(4, granularity=PerChannel(0)))
W4A8 = (InsertObservers(SPEC, targets=("linear", "conv")), Calibrate())


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(16, 32)
        self.blocks = nn.ModuleList(Block(32) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)).softmax(-1)


class Residual(nn.Module):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.one, self.two = (
            nn.Conv2d(channels, out, 3, padding=1),
            nn.Conv2d(out, out, 3, padding=1),
        )
        self.emb = nn.Linear(8, out)
        self.skip = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.one(x) + self.emb(t)[:, :, None, None]
        return self.skip(x) + self.two(nn.functional.silu(h))


class SmallUNet(nn.Module):
    """Skips over blocks, a time embedding that every block reads, concatenations."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.time = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 8))
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.down, self.middle = Residual(8, 8), Residual(8, 8)
        self.up = Residual(16, 8)
        self.head = nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = nn.functional.silu(self.time(t))
        x = self.stem(x)
        skip = self.down(x, t)
        x = self.middle(nn.functional.avg_pool2d(skip, 2), t)
        x = nn.functional.interpolate(x, scale_factor=2.0)
        return self.head(self.up(torch.cat([x, skip], 1), t))


class WithoutModules(nn.Module):
    """Residual sums in the model's own code, a rotation whose sum is none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.ParameterList(torch.randn(8, 8) / 3 for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        a = nn.functional.linear(x, self.w[0])
        a = a * 0.6 + a.flip(-1) * 0.8
        x = x + nn.functional.linear(a.relu(), self.w[1])
        x = x + nn.functional.linear(nn.functional.linear(x, self.w[2]), self.w[3])
        return nn.functional.linear(x, self.w[4])


INPUTS: dict[type[nn.Module], tuple[Any, ...]] = {
    Transformer: (torch.randn(3, 6, 16),),
    SmallUNet: (torch.randn(3, 1, 8, 8), torch.randn(3, 4)),
    WithoutModules: (torch.randn(3, 8),),
}
BLOCKS = {
    Transformer: ["stem", "blocks.0", "blocks.1", "head", "results"],
    SmallUNet: ["time.0", "time.2", "stem", "down", "middle", "up", "head"],
    WithoutModules: [2, 2, 1],
}


def observed(kind: type[nn.Module]) -> tuple[GraphModule, tuple[Any, ...], nn.Module]:
    model, x = kind().eval(), INPUTS[kind]
    gm = fxq.capture(model, x).graph_module
    return Recipe("w4a8", W4A8).apply(gm, [x]), x, model


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_in_order_are_the_whole_graph(kind: type[nn.Module]) -> None:
    gm, x, model = observed(kind)
    names = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
    known = dict(zip(names, x, strict=True))
    known |= {n.name: tensor_of(gm, n) for n in gm.graph.nodes if is_state(n)}

    for block in cut(gm):
        results = block.graph_module(*(known[name] for name in block.inputs))
        known |= dict(zip(block.outputs, results, strict=True))

    (result,) = gm.graph.output_node().args[0]
    torch.testing.assert_close(known[result.name], model(*x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", BLOCKS)
def test_cuts_are_where_residual_modules_end(kind: type[nn.Module]) -> None:
    gm, _, _ = observed(kind)
    blocks = cut(gm)
    found = [len(b.layers) for b in blocks] if kind is WithoutModules else [b.name for b in blocks]
    assert found == BLOCKS[kind]
    pending = [n.name for n in gm.graph.nodes if layer_of(n).is_pending]
    assert [name for block in blocks for name in block.layers] == pending


def test_a_concatenation_is_in_the_block_that_reads_it_with_its_skip_as_an_input() -> None:
    gm, _, _ = observed(SmallUNet)
    up = next(block for block in cut(gm) if block.name == "up")

    targets = [node.target for node in up.graph_module.graph.nodes]

    assert torch.ops.aten.cat.default in targets
    assert len(up.inputs) == 3  # what comes from below, the skip, the embedding


def test_an_observer_that_several_blocks_read_is_in_each_of_them() -> None:
    gm, _, _ = observed(SmallUNet)
    shared = [
        [str(n.target) for n in block.graph_module.graph.nodes if n.op == "call_module"]
        for block in cut(gm)
        if block.name in ("down", "middle", "up")
    ]
    assert len(set(shared[0]) & set(shared[1]) & set(shared[2])) == 1


def test_patterns_choose_modules_and_one_that_matches_nothing_is_told() -> None:
    gm, _, _ = observed(SmallUNet)
    assert len(cut(gm, ("time", "up"))[0].layers) == 2
    with pytest.raises(ValueError, match=r"'ups' matches no module.*up"):
        cut(gm, ("ups",))

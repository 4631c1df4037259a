"""SplitConcatenations: the same float function, a range for each part, and a reason otherwise."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxq
from fxq.account import account
from fxq.capturing import capture
from fxq.dialect import ATEN
from fxq.graph import owner_name
from fxq.layer import WeightCodes, layer_of, set_facts
from fxq.operators import LAYERS
from fxq.passes.common import (
    Calibrate,
    Convert,
    InsertObservers,
    SplitConcatenations,
    check_float_function,
)
from fxq.pipeline import Recipe
from fxq.rewriting import copy_graph
from fxq.spec import LayerSpec, PerChannel, PerTensor, QuantSpec


class Skip(nn.Module):
    """Concatenations as a layer reads them, and in ways in which none is split."""

    def __init__(self) -> None:
        super().__init__()
        self.shortcut = nn.Conv2d(8, 5, 3, stride=2, padding=1)
        self.twice = nn.Conv2d(8, 5, 1, bias=False)
        self.norm, self.after = nn.GroupNorm(2, 8), nn.Conv2d(8, 5, 1)
        self.grouped = nn.Conv2d(8, 4, 1, groups=2)
        self.high = nn.Conv2d(5, 5, 1)
        self.mix, self.tokens = nn.Linear(8, 6), nn.Linear(4, 3)
        self.three, self.waves = nn.Conv1d(9, 2, 2), nn.Conv2d(6, 1, 1)

    def forward(self, h: Tensor, skip: Tensor) -> list[Tensor]:
        both = torch.cat([h, skip], 1)  # 3 + 5 channels
        last = torch.cat([h.flatten(2).mT, skip.flatten(2).mT], -1)
        line, other = h[..., 0], skip[:, :3, :, 0]
        return [
            self.shortcut(both), self.twice(both) + self.twice(2 * h.mean() + both.clone()),
            self.twice(torch.cat([skip, h], 1)), self.after(F.silu(self.norm(both))),
            self.grouped(both), self.high(torch.cat([skip, skip], 2)), self.mix(last),
            self.tokens(torch.cat([h[:, 0], h[:, 1]], 1)),
            self.three(torch.cat([line, line + 1, other], 1)), torch.cat([skip, h], 1),
            self.waves(torch.cat([h.sin(), h.cos()], 1)),
        ]  # fmt: skip


INPUTS = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4)


def test_the_float_function_stays_and_what_is_left_whole_says_why() -> None:
    gm = capture(Skip().eval(), INPUTS).graph_module
    before = copy_graph(gm)

    result = SplitConcatenations().run(gm)

    gm.graph.lint()
    gm.recompile()
    ATEN.check(gm)
    assert result.modified
    check_float_function(before, gm, [INPUTS], name="SplitConcatenations")
    made = [n for n in gm.graph.nodes if n.target in LAYERS]
    names = sorted({owner_name(n) for n in made if ".part_" in owner_name(n)})
    layers = {"shortcut": 2, "twice": 2, "mix": 2, "three": 3}
    assert names == sorted(f"{name}.part_{i}" for name, n in layers.items() for i in range(n))
    weights = dict(gm.named_parameters())
    assert weights["shortcut.part_0.weight"].shape == (5, 3, 3, 3)
    assert weights["shortcut.part_1.weight"].shape == (5, 5, 3, 3)
    assert "shortcut.weight" not in weights
    remarks = {row.module: row.layer.remarks for row in account(gm)}
    assert remarks["after"] == "not split: it reads a concatenation through group_norm, silu"
    assert "its channels are in groups" in remarks["grouped"]
    assert "put together along axis 2" in remarks["high"]
    assert "put together along axis 1" in remarks["tokens"]
    assert remarks["waves"] == "not split: the parts of its input are made of the same values"
    assert remarks["mix.part_1"] == "part 1 of a concatenated input"
    assert not SplitConcatenations().run(gm).modified


def test_parts_have_their_part_of_a_mask_and_fixed_codes_stay_whole() -> None:
    gm = capture(Join().eval(), (torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4))).graph_module
    (layer,) = [n for n in gm.graph.nodes if n.target in LAYERS]
    mask = torch.rand(8, 16, 1, 1) < 0.5
    set_facts(layer, mask=mask)

    SplitConcatenations().run(gm)

    masks = [layer_of(n).mask for n in gm.graph.nodes if n.target in LAYERS]
    parts = [part for part in masks if part is not None]
    assert torch.equal(torch.cat(parts, 1), mask)

    gm = capture(Join().eval(), (torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4))).graph_module
    (layer,) = [n for n in gm.graph.nodes if n.target in LAYERS]
    codes = torch.zeros(8, 16, 1, 1, dtype=torch.int8)
    set_facts(layer, weight=WeightCodes(codes, torch.ones(8, 1, 1, 1), None))
    assert not SplitConcatenations().run(gm).modified
    assert "its codes are fixed" in layer_of(layer).remarks


def recipe(bits: int, *first: Any) -> Recipe:
    spec = LayerSpec(
        QuantSpec(bits, symmetric=False, granularity=PerTensor()),
        QuantSpec(bits, granularity=PerChannel(0)),
    )
    observe = InsertObservers(spec, targets=("linear", "conv"))
    return Recipe("test", (*first, observe, Calibrate(), Convert()))


class Join(nn.Module):
    """One layer over a concatenation; what the small part becomes is all that comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(16, 8, 1, bias=False)
        nn.init.zeros_(self.layer.weight)
        self.layer.weight.data[:, :8, 0, 0] = torch.eye(8)

    def forward(self, h: Tensor, skip: Tensor) -> Tensor:
        return self.layer(torch.cat([h, skip], 1))


@pytest.mark.parametrize(("bits", "better", "split_error"), [(4, 20, 0.03), (8, 1e3, 1e-3)])
def test_the_small_part_keeps_its_codes(bits: int, better: float, split_error: float) -> None:
    torch.manual_seed(0)
    model = Join().eval()
    data = torch.randn(4, 8, 8, 8), 100 * torch.randn(4, 8, 8, 8)

    found = [
        fxq.compress(model, data, recipe(bits, *first), data=[data])(*data)
        for first in ((), (SplitConcatenations(),))
    ]

    joint, split = (float((x - data[0]).square().mean()) for x in found)
    assert joint > better * split
    assert split < split_error


def test_a_unet_is_split_at_every_skip_connection() -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=2, out_channels=2, layers_per_block=1, norm_num_groups=4,
        block_out_channels=(8, 16), attention_head_dim=4, cross_attention_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip
    call = {
        "sample": torch.randn(2, 2, 8, 8), "timestep": torch.tensor([3, 500]),
        "encoder_hidden_states": torch.randn(2, 4, 8),
    }  # fmt: skip
    captured = capture(model, call)
    gm = captured.graph_module
    before = copy.deepcopy(gm)

    SplitConcatenations().run(gm)
    gm.recompile()

    inputs = captured.inputs(call)
    check_float_function(before, gm, [inputs], name="SplitConcatenations")
    parts = {owner_name(n) for n in gm.graph.nodes if ".part_" in owner_name(n)}
    shortcuts = {f"up_blocks.{i}.resnets.{j}.conv_shortcut" for i in (0, 1) for j in (0, 1)}
    assert parts == {f"{name}.part_{i}" for name in shortcuts for i in (0, 1)}
    remarks = [layer_of(n).remarks for n in gm.graph.nodes if n.target in LAYERS]
    assert remarks.count("not split: it reads a concatenation through group_norm, silu") == 4

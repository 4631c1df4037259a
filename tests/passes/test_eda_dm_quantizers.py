"""EDA-DM's quantizers: which layers are first and last, and what attention multiplies."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from models import Block
from torch import Tensor, nn
from torch.fx import GraphModule, Node

import fxq
from fxq.capturing import capture
from fxq.dialect import OBSERVED
from fxq.errors import MissingInputError
from fxq.graph import args_of, is_op, owner_name
from fxq.layer import layer_of
from fxq.observers import RangeObserver
from fxq.operators import MATMUL
from fxq.passes import eda_dm
from fxq.passes.common import (
    FIRST,
    LAST,
    Calibrate,
    DecomposeAttention,
    InsertObservers,
    ObserveActivations,
    first_of,
)
from fxq.spec import LayerSpec, PerChannel, QuantSpec


def spec(bits: int) -> LayerSpec:
    return LayerSpec(QuantSpec(bits), QuantSpec(bits, granularity=PerChannel(0)))


def time_first_unet() -> Any:
    """A UNet whose time-step layers are registered first, and the first convolution last."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=4,
        block_out_channels=(8,), attention_head_dim=8, down_block_types=("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",),
    ).eval()  # fmt: skip
    model.register_module("conv_in", model._modules.pop("conv_in"))
    assert next(iter(model._modules)) == "time_proj"
    return model


def test_the_ends_of_a_unet_have_eight_bits_whatever_is_registered_first() -> None:
    model = time_first_unet()
    x = {"sample": torch.randn(2, 1, 8, 8), "timestep": torch.tensor([10, 900])}

    program = fxq.compress(model, x, eda_dm.NEAREST_W4A4, data=[x])

    gm = program.graph_module
    names = {n.name: owner_name_of(gm, n) for n in gm.graph.nodes if layer_of(n).spec}
    specs = {names[n.name]: layer_of(n).spec for n in gm.graph.nodes if n.name in names}
    eight = {name for name, s in specs.items() if s is not None and s.weight.bits == 8}
    assert eight == {"conv_in", "conv_out"}
    assert {s.activation.bits for n, s in specs.items() if s and s.activation and n in eight} == {8}
    rest = [s for n, s in specs.items() if s is not None and n not in eight]
    assert {(s.activation and s.activation.bits, s.weight.bits) for s in rest} == {(4, 4)}
    assert {"time_embedding.linear_1", "up_blocks.0.resnets.0.conv_shortcut.part_1"} <= {*specs}
    for node in gm.graph.nodes:
        if (
            is_op(node, torch.ops.fxq.quantize.default)
            and node.all_input_nodes[0].op == "placeholder"
        ):
            assert args_of(node)[3:5] == (-128, 127)  # the sample itself


def owner_name_of(gm: GraphModule, layer: Node) -> str:
    """The name of a converted layer: of its codes."""
    codes = args_of(args_of(layer)[1])[0]
    return str(codes.target).removesuffix(".weight_codes")


class TwoInputs(nn.Module):
    """A time-step's layer in front, and two inputs that meet."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.sample, self.other = (nn.Linear(4, 4) for _ in range(3))
        self.middle, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, t: Tensor, x: Tensor, y: Tensor) -> Tensor:
        time = self.time(t.float().unsqueeze(-1).expand(-1, 4))
        return self.last(self.middle((self.sample(x) + self.other(x * y)) * time))


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        (FIRST, {"time", "sample", "other"}),
        (first_of("t"), {"time"}),
        (first_of("y"), {"other"}),
        (first_of("x"), {"sample", "other"}),
        (first_of(), {"sample", "other"}),  # t is an integer
        (LAST, {"last"}),
    ],
)
def test_first_layers_of_an_input_go_by_data_flow(pattern: str, names: set[str]) -> None:
    inputs = torch.tensor([1, 2]), torch.randn(2, 4), torch.randn(2, 4)
    gm = capture(TwoInputs().eval(), inputs).graph_module

    InsertObservers(spec(4), overrides=((pattern, spec(8)),)).run(gm)

    layers = [n for n in gm.graph.nodes if layer_of(n).is_pending]
    assert {owner_name(n) for n in layers if layer_of(n).spec == spec(8)} == names
    assert len(layers) == 5


def test_first_of_what_is_no_input_is_an_error_but_in_a_part() -> None:
    inputs = torch.tensor([1, 2]), torch.randn(2, 4), torch.randn(2, 4)
    gm = capture(TwoInputs().eval(), inputs).graph_module
    overrides = ((first_of("z"), spec(8)),)

    with pytest.raises(MissingInputError, match=r"<first of z>.*no input 'z'.*'x'"):
        InsertObservers(spec(4), overrides=overrides).run(gm)
    assert InsertObservers(spec(4), overrides=overrides, partial=True).run(gm).modified


class Products(nn.Module):
    """Products of activations, written by hand; one operand has another reader."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.table = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        q = self.q(x)
        p = torch.softmax(q @ y.transpose(1, 2), -1).to(torch.float32)
        return p @ (y * 2), x @ self.table + q


def observed(gm: GraphModule) -> dict[str, list[int]]:
    """Bits of the observers each product of the graph reads, 0 for none."""
    found = {}
    for node in gm.graph.nodes:
        if is_op(node, *MATMUL):
            pairs = [(n, n.op == "call_module") for n in node.all_input_nodes]
            modules = [gm.get_submodule(str(n.target)) if is_m else None for n, is_m in pairs]
            found[node.name] = [m.spec.bits if isinstance(m, RangeObserver) else 0 for m in modules]
    return found


def test_operands_of_products_are_observed_and_for_the_products_alone() -> None:
    inputs = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    gm = capture(Products().eval(), inputs).graph_module
    DecomposeAttention().run(gm)
    InsertObservers(spec(4)).run(gm)

    ObserveActivations(QuantSpec(6), ("operand",)).run(gm)
    ObserveActivations(QuantSpec(8), ("probabilities",)).run(gm)

    OBSERVED.check(gm)
    gm.recompile()
    assert [*observed(gm).values()] == [[6, 6], [8, 6]]  # x @ table is a linear
    q = next(n for n in gm.graph.nodes if owner_name(n) == "q" and layer_of(n).spec)
    (addition,) = [user for user in q.users if user.op != "call_module"]
    assert addition.target is torch.ops.aten.add.Tensor  # q itself goes on in float
    products = [n for n in gm.graph.nodes if is_op(n, *MATMUL)]
    assert all("operands are quantized" in str(layer_of(n).skip) for n in products)


def test_attention_written_out_is_observed_and_nothing_twice() -> None:
    gm = capture(Block().eval(), torch.randn(2, 5, 64)).graph_module
    DecomposeAttention().run(gm)
    InsertObservers(spec(4)).run(gm)

    kinds = ("layer", "operand", "probabilities")
    ObserveActivations(QuantSpec(6), kinds).run(gm)

    # q, k and v are outputs of layers, observed as such; views of them are not again.
    OBSERVED.check(gm)
    (first, second) = [n for n in gm.graph.nodes if is_op(n, *MATMUL)]
    bits = observed(gm)
    assert bits[first.name] == [0, 0]
    assert bits[second.name] == [6, 0]
    gm.recompile()
    result = Calibrate().run(gm, [[torch.randn(2, 5, 64)]])
    assert result.modified


def test_products_of_quantized_operands_are_those_of_their_codes() -> None:
    torch.manual_seed(0)
    model = Products().eval()
    x, y = torch.randn(2, 5, 8), torch.randn(2, 5, 8)

    program = fxq.compress(model, (x, y), eda_dm.NEAREST_W8A8, data=[(x, y)])
    coarse = fxq.compress(
        model, (x, y), eda_dm.reconstructed("a3", 8, 3, reconstruct=None), data=[(x, y)]
    )

    exact = model(x, y)[0]
    error, more = ((p(x, y)[0] - exact).norm() / exact.norm() for p in (program, coarse))
    assert 0 < error < 0.02
    assert more > 5 * error  # 3-bit operands


@pytest.mark.slow
def test_reconstruction_brings_a_unet_closer_to_the_model_at_steps_it_has_not_seen() -> None:
    model = time_first_unet()

    def batch(seed: int, time: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(4, 1, 8, 8, generator=generator)
        return {"sample": x, "timestep": torch.full((4,), time)}

    data = [batch(k, 100 * k) for k in range(9)]
    short = replace(eda_dm.FINE_GRAINED, steps=40)
    recipe = eda_dm.reconstructed("short", 4, 4, reconstruct=short)
    program = fxq.compress(model, data[0], recipe, data=data)
    nearest = fxq.compress(model, data[0], eda_dm.NEAREST_W4A4, data=data)

    errors = torch.zeros(2)
    with torch.no_grad():
        for k in range(8):
            x = batch(20 + k, 50 + 100 * k)
            exact = model(**x).sample
            for index, found in enumerate((program, nearest)):
                errors[index] += (found(**x).sample - exact).square().sum()
    assert errors[0] < 0.9 * errors[1]
    assert eda_dm.W4A4.passes[-2] == eda_dm.FINE_GRAINED
